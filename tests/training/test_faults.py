"""What befalls a run: full disks, folders that nobody may write to, signals, closed terminals, a second run, a break.

Oracles: the files as they were, and the run that nothing befell.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from delora_diffusion import atomic, read_adapter
from delora_diffusion.console import STOP_SIGNALS, lasting_output, optional
from delora_diffusion.data.encode import Cache
from delora_diffusion.options import OptionError
from delora_diffusion.reports import card
from delora_diffusion.run_folder import ADAPTER_NAME
from delora_diffusion.training import checkpoint as checkpoints
from delora_diffusion.training import loop, output
from delora_diffusion.training.checkpoint import CheckpointError, find_checkpoint, keep_newest, read_progress
from delora_diffusion.training.config import TrainingConfig
from delora_diffusion.training.log import TrainingLog, read_log

from .. import tiny
from ..runs import Run, arguments, load_script, same, tensors

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A run of 6 steps with an average and a checkpoint after every second one."""
    return trained(tmp_path_factory.mktemp("started"), base, "--use_ema", "--checkpointing_steps=2")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Tensor]:
    """The adapter of 6 steps that nothing befell."""
    return tensors(trained(tmp_path_factory.mktemp("straight"), base))


def trained(folder: Path, base: Path, *extra: str) -> Path:
    tiny.photos(folder / "photos")
    AcceleratorState._reset_state(True)
    assert load_script().main(arguments(base, folder / "photos", folder / "out", *extra)) == 0
    return folder / "out"


# ---- checkpoints ---------------------------------------------------------------------------------


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    held = load_file(file)
    change(held)
    save_file(held, file)


def spoil(name: str) -> Callable[[Path], None]:
    def with_nan(held: dict[str, Tensor]) -> None:
        next(tensor for tensor in held.values() if tensor.numel() > 1).view(-1)[0] = float("nan")

    return lambda folder: rewrite(folder / name, with_nan)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "ema.safetensors").unlink(), "ema.safetensors"),
        (spoil("ema.safetensors"), "ema.safetensors holds values that are not finite"),
        (spoil("optimizer.safetensors"), "optimizer.safetensors holds values that are not finite"),
        (lambda folder: (folder / "state.json").write_text("[1, 2]"), "is no checkpoint"),
        (lambda folder: (folder / "state.json").write_text('"text"'), "is no checkpoint"),
        (lambda folder: (folder / "state.json").write_text("[" * 100_000), "is no checkpoint"),
        (lambda folder: (folder / "state.json").unlink(), "is no checkpoint"),
        (lambda folder: (folder / ADAPTER_NAME).unlink(), "holds no adapter"),
    ],
    ids=["no average", "NaN average", "NaN moments", "list", "text", "deep", "no state", "no adapter"],
)
def test_a_checkpoint_that_lacks_something_is_refused_in_a_sentence(
    damage: Callable[[Path], Any], said: str, started: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-6"
    folder.mkdir()
    for file in (started / "checkpoint-6").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    held = load_file(started / "checkpoint-6" / "ema.safetensors")
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(t) for t in held.values()]}], fused=True)
    with pytest.raises(CheckpointError, match=said):
        read_progress(folder)
        checkpoints.read_checkpoint(folder, optimizer, ema=True)


def fake(out: Path, step: int, written: float) -> Path:
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "written": written}))
    return folder


def test_the_checkpoints_written_last_are_kept_and_the_latest_is_the_last_of_them(tmp_path: Path) -> None:
    """A run that goes on from step 20 of 60 and comes to 30 has not lost its own checkpoint to those it gave up."""
    for place, step in enumerate((20, 40, 60, 30)):
        fake(tmp_path, step, 1000.0 + place)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-30"
    keep_newest(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 4
    keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-30", "checkpoint-60"]
    keep_newest(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-30"]


def test_a_checkpoint_that_a_killed_run_had_no_time_to_delete_goes_when_it_is_resumed(
    run: Run, started: Path, tmp_path: Path
) -> None:
    shutil.copytree(started, tmp_path / "out")
    out = run(
        "out", "--use_ema", "--resume_from_checkpoint=latest", "--checkpoints_total_limit=1", "--max_train_steps=6"
    )
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-6"]
    assert same(tensors(started), tensors(out))


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        fake(tmp_path, step, step)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoints, "remove", refuse)
    keep_newest(tmp_path, 1)
    assert "checkpoint-1 cannot be deleted: Permission denied" in caplog.text


def test_a_resumed_log_has_the_averages_of_the_uninterrupted_one(run: Run) -> None:
    """A checkpoint between two lines carries the losses of the line to come."""
    longer = ("--max_train_steps=20", "--checkpointing_steps=7", "--lambda_warmup_steps=2", "--direction_turn=0")
    straight = run("straight", *longer)
    broken = run("broken", *longer)
    for step in (14,):
        atomic.remove(broken / f"checkpoint-{step}")
    run("broken", *longer, "--resume_from_checkpoint=latest")
    one, two = (
        [(x["step"], x["loss"], x["update_norm"]) for x in read_log(f / "log.jsonl")] for f in (straight, broken)
    )
    assert one == two and [step for step, _, _ in one] == [1, 10, 20]
    assert same(tensors(straight), tensors(broken))
    assert (straight / ADAPTER_NAME).read_bytes() == (broken / ADAPTER_NAME).read_bytes(), "not a byte differs"


# ---- what is not finite --------------------------------------------------------------------------


def test_an_adapter_that_became_infinite_is_neither_saved_nor_does_it_cost_a_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gradients and loss may be finite where the update is not."""
    original = loop.take_step

    def overflowing(current: Any, *args: Any, **kwargs: Any) -> Tensor:
        failed = original(current, *args, **kwargs)
        if current.step == 4:
            with torch.no_grad():
                next(iter(current.parameters.values())).mul_(float("inf"))
        return failed

    monkeypatch.setattr(loop, "take_step", overflowing)
    limits = ("--checkpointing_steps=2", "--checkpoints_total_limit=1")
    out = run("out", *limits, code=1)
    assert "the adapter is not finite after step 4; it is not saved" in capsys.readouterr().err
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    out = run("last", "--max_train_steps=4", "--checkpointing_steps=0", code=1)
    assert not (out / ADAPTER_NAME).exists()


def test_gradients_that_no_scale_can_mend_are_a_failed_step() -> None:
    """With fp16's scale at 1 an infinite gradient is none of the scale's making."""
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for scale, failed in ((1024.0, False), (1.0, True)):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, float("inf"))
        scaler = SimpleNamespace(_get_scale_async=lambda scale=scale: torch.tensor(scale))
        accelerator: Any = SimpleNamespace(
            scaler=scaler, clip_grad_norm_=lambda parameters, norm: torch.nn.utils.clip_grad_norm_(parameters, norm)
        )
        now: Any = SimpleNamespace(
            parameters=dict(module.named_parameters()), optimizer=optimizer, ema=None, step=0,
            schedule=SimpleNamespace(step=lambda: None),
        )  # fmt: skip
        wrapped = SimpleNamespace(step=lambda: None, zero_grad=optimizer.zero_grad)
        said = loop.take_step(now, {}, TrainingConfig(), accelerator, wrapped, torch.tensor(1.0))
        assert bool(said) is failed


# ---- disks and folders ---------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], bool]], None]:
    """Let writing into folders fail as on a full disk."""

    def fill(where: Callable[[Path], bool]) -> None:
        aside = atomic._aside

        def refusing(folder: Path) -> Any:
            if where(folder):
                raise OSError(errno.ENOSPC, "No space left on device", str(folder))
            return aside(folder)

        monkeypatch.setattr(atomic, "_aside", refusing)

    return fill


def test_a_checkpoint_without_room_is_told_and_training_goes_on(
    run: Run, full: Any, straight: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = [3]

    def sometimes(folder: Path) -> bool:
        here = folder.name == "out" and sys._getframe(2).f_code.co_name == "complete_folder"
        left[0] -= here
        return bool(here and left[0] == 1)

    full(sometimes)
    out = run("out", "--checkpointing_steps=2")
    assert f"no checkpoint at step 4: {tmp_path / 'out'}: No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    assert same(straight, tensors(out))


def test_a_disk_that_is_full_at_the_end_costs_no_adapter(
    run: Run, full: Any, straight: Any, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(output.tempfile, "tempdir", str(elsewhere))
    asked: list[Path] = []
    full(lambda folder: folder.name == "out" and (asked.append(folder) or (folder / "log.jsonl").exists()))
    run("out", "--checkpointing_steps=0", code=1)
    said = capsys.readouterr().err
    (saved,) = elsewhere.rglob(ADAPTER_NAME)
    assert f"; it is in {saved}; move it from there" in said and "No space left on device" in said
    assert same(straight, load_file(saved)) and read_adapter(saved).provenance["steps"] == "6"


def test_a_cache_without_room_is_done_without(tmp_path: Path, full: Any, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path / "cache")
    full(lambda folder: folder.name == "cache")
    for key in ("one", "two"):
        assert torch.equal(cache.get(key, lambda: {"x": torch.ones(2)})["x"], torch.ones(2))
    assert set(cache.memory) == {"one", "two"}
    assert caplog.text.count("is not kept in the cache") == 1


def test_lines_that_a_full_disk_refuses_come_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = TrainingLog(tmp_path / "log.jsonl")
    log._write({"step": 1}, {})
    monkeypatch.setattr("delora_diffusion.training.log._append", lambda path, text: exec("raise OSError(28, 'full')"))
    log._write({"step": 2}, {})
    monkeypatch.undo()
    log._write({"step": 3}, {})
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("option", ["output_dir", "cache_dir", "class_data_dir"])
def test_folders_that_are_files_or_cannot_be_written_to_are_refused_first(
    option: str, run: Run, tmp_path: Path, full: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("delora_diffusion.training.check.begin", lambda *args, **kwargs: pytest.fail("base was read"))
    (tmp_path / "taken").write_text("a file")
    prior = ("--with_prior_preservation", "--class_prompt=a dog") if option == "class_data_dir" else ()
    run("out", *prior, f"--{option}={tmp_path / 'taken'}", code=1)
    assert f"{option} {tmp_path / 'taken'} is a file; give a folder" in capsys.readouterr().err
    run("out", *prior, f"--{option}={tmp_path / 'taken' / 'below'}", code=1)
    assert f"error: {option} {tmp_path / 'taken' / 'below'} cannot be written to: Not a directory" in (
        capsys.readouterr().err
    )
    full(lambda folder: folder.name == "full")
    run("out", *prior, f"--{option}={tmp_path / 'full'}", code=1)
    assert f"{option} {tmp_path / 'full'} cannot be written to: No space left on device" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "a file" and not (tmp_path / "out").exists()


# ---- two at once ---------------------------------------------------------------------------------


def test_a_folder_is_one_runs_alone_and_again_free_when_that_ends(tmp_path: Path) -> None:
    options = TrainingConfig(output_dir=str(tmp_path / "runs" / "out"))
    scrap = tmp_path / "runs" / "out" / "previews" / atomic.ASIDE / "0123456789abcdef"
    with output.only_run(options, ALONE):  # type: ignore[arg-type]
        scrap.mkdir(parents=True)
        scrap.with_suffix(".lock").touch()
        said = rf"is in use by another run \(process {os.getpid()} on .*, since .*\); let it end"
        with pytest.raises(OptionError, match=said), output.only_run(options, ALONE):  # type: ignore[arg-type]
            pytest.fail("two runs in one folder")
    with pytest.raises(KeyError), output.only_run(options, ALONE):  # type: ignore[arg-type]
        assert not scrap.exists(), "what a killed run left is gone"
        raise KeyError
    assert not (tmp_path / "runs" / "out" / ".lock").exists()
    fresh = TrainingConfig(output_dir=str(tmp_path / "more" / "out"))
    with output.only_run(fresh, ALONE):  # type: ignore[arg-type]
        assert (tmp_path / "more" / "out" / ".lock").exists()
    assert not (tmp_path / "more").exists(), "a run that wrote nothing leaves no folder"


def test_the_second_of_two_trainings_is_refused_before_it_reads_anything(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("delora_diffusion.training.check.instance_examples", lambda *a, **k: pytest.fail("was read"))
    with output.only_run(TrainingConfig(output_dir=str(tmp_path / "out")), ALONE):  # type: ignore[arg-type]
        run("out", "--overwrite_output_dir", code=1)
        run("out", "--resume_from_checkpoint=latest", code=1)
    assert capsys.readouterr().err.count("is in use by another run") == 2


# ---- signals and terminals -----------------------------------------------------------------------


def test_signals_that_end_terminals_and_jobs_ask_for_a_checkpoint_and_only_ctrl_c_hurries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} == set(STOP_SIGNALS)
    for number in STOP_SIGNALS:
        with loop.stop_signals() as seen:
            assert not seen
            for _ in range(3):  # a shell and a launcher pass on what the terminal has sent already
                os.kill(os.getpid(), number)
            assert seen == [number] * 3
    monkeypatch.setattr(loop, "SAME_SIGNAL", 0.0)
    with pytest.raises(KeyboardInterrupt), loop.stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop.stop_signals() as seen:  # nohup
            os.kill(os.getpid(), signal.SIGHUP)
            assert not seen
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_ends_no_run_and_leaves_a_checkpoint(
    run: Run, straight: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGHUP comes, and from then on nobody reads what is printed."""
    original = loop.take_step

    class Gone:
        encoding, errors, buffer = "utf-8", "strict", None

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def flush(self) -> None:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            raise ValueError

    def hang_up(current: Any, *args: Any, **kwargs: Any) -> Tensor:
        if current.step == 2:
            sys.stdout._stream = sys.stderr._stream = Gone()  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGHUP)
        return original(current, *args, **kwargs)

    monkeypatch.setattr(loop, "take_step", hang_up)
    out = run("out", "--checkpointing_steps=0", code=130)
    monkeypatch.undo()
    assert [path.name for path in out.iterdir() if path.name.startswith("checkpoint")] == ["checkpoint-3"]
    assert same(straight, tensors(run("out", "--resume_from_checkpoint=latest")))


def test_ctrl_c_before_the_first_step_is_a_line_and_not_a_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("delora_diffusion.training.check.instance_examples", interrupted)
    run("out", code=130)
    said = capsys.readouterr().err
    assert "stopped" in said and "Traceback" not in said


def test_a_stop_without_room_for_its_checkpoint_puts_it_elsewhere(
    run: Run, full: Any, straight: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    elsewhere, original = tmp_path / "elsewhere", loop.take_step
    elsewhere.mkdir()
    monkeypatch.setattr(output.tempfile, "tempdir", str(elsewhere))

    def stop(current: Any, *args: Any, **kwargs: Any) -> Tensor:
        if current.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            full(lambda folder: folder.name == "out")
        return original(current, *args, **kwargs)

    monkeypatch.setattr(loop, "take_step", stop)
    run("out", code=130)
    monkeypatch.undo()
    (saved,) = elsewhere.rglob("checkpoint-3")
    assert f"go on with --resume_from_checkpoint {saved}" in capsys.readouterr().err
    run("out", f"--resume_from_checkpoint={saved}")
    assert same(straight, tensors(tmp_path / "out"))


class Broken:
    """A stream that nobody reads."""

    encoding = "ascii"

    def __init__(self) -> None:
        self.written: list[str] = []
        self.broken = False

    def write(self, text: str) -> int:
        if self.broken:
            raise BrokenPipeError
        text.encode("ascii")
        self.written.append(text)
        return len(text)

    def flush(self) -> None:
        if self.broken:
            raise BrokenPipeError

    def fileno(self) -> int:
        raise ValueError


def test_printing_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Broken()
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_output():
        print("a café")
        stream.broken = True
        print("unread", flush=True)
    assert "".join(stream.written) == "a caf\\xe9\n" and sys.stdout is stream


def test_what_is_optional_is_told_and_an_interrupt_is_not_swallowed(caplog: pytest.LogCaptureFixture) -> None:
    with optional("plot"):
        raise OSError(errno.ENOSPC, "No space left on device", "a.png")
    with optional("preview of step 3"):
        _ = [][1]
    assert "no plot: a.png: No space left on device; make room" in caplog.text
    assert "no preview of step 3: IndexError: list index out of range (test_faults.py, line" in caplog.text
    with pytest.raises(KeyboardInterrupt), optional("plot"):
        raise KeyboardInterrupt


def test_nothing_that_only_looks_at_a_run_ends_it(
    run: Run, straight: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Previews, plot, card, LoRA and settings fail, in every way; the adapter is the one of a run that has none."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")

    for name in ("write_card", "plot_run", "export_lora"):
        monkeypatch.setattr(f"delora_diffusion.training.results.{name}", broken)
    monkeypatch.setattr("delora_diffusion.training.preview.Previews.write", broken)
    out = run("out", "--validation_prompt=a cat", "--validation_steps=3", "--strength_sheet=0.5,1")
    said = capsys.readouterr().err
    parts = ("preview of step 0", "preview of step 3", "preview of step 6", "plot of the run", "model card")
    for what in (*parts, "LoRA is written beside the adapter", "strength sheet"):
        assert f"no {what}: " in said
    assert same(straight, tensors(out))


def test_a_tracker_that_fails_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def failing(line: Any, step: int) -> None:
        raise ConnectionError("no network")

    log = TrainingLog(tmp_path / "log.jsonl", track=failing)
    for step in (1, 2):
        log._write({"step": step}, {})
    assert len(read_log(tmp_path / "log.jsonl")) == 2
    assert caplog.text.count("nothing more is sent to the tracker: no network") == 1


# ---- refused at the start ------------------------------------------------------------------------


def test_an_upload_without_a_login_is_refused_at_the_start(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr("delora_diffusion.training.check.begin", lambda *args, **kwargs: pytest.fail("base was read"))
    run("out", "--push_to_hub", code=1)
    assert "HF_HUB_OFFLINE is set, so nothing can be uploaded" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    run("out", "--push_to_hub", code=1)
    assert "nobody is logged in; hf auth login" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "refused"), [(401, True), (503, False)])
def test_a_login_that_the_hub_does_not_know_is_refused_and_a_hub_that_is_away_is_not(
    code: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    def answer() -> None:
        raise HfHubHTTPError(f"{code}", response=SimpleNamespace(status_code=code, headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.whoami", answer)
    if refused:
        with pytest.raises(card.HubError, match="knows no such login"):
            card.check_login(None)
    else:
        card.check_login(None)
    with pytest.raises(card.HubError, match="another hub_model_id"):
        card.check_login("a//b")


def test_an_internal_error_is_no_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*args: Any, **kwargs: Any) -> None:
        raise TypeError("a fault of the program")

    monkeypatch.setattr("delora_diffusion.training.check.instance_examples", faulty)
    with pytest.raises(TypeError, match="a fault of the program"):
        run("out")
