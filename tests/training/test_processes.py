"""Several processes: the same run as one, everything encoded once, and none that waits for one that is gone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from delora_diffusion import verify_lora
from delora_diffusion.options import OptionError, parse
from delora_diffusion.training import loop, processes
from delora_diffusion.training.check import _check_sharding
from delora_diffusion.training.config import GROUPS, Options
from delora_diffusion.training.processes import Watch

from .. import tiny
from ..runs import Run, arguments, largest_difference, load_script, losses, tensors
from .processes import UNLIKE

ROOT = Path(__file__).parents[2]
PRIOR = ("--with_prior_preservation", "--class_prompt=a dog", "--num_class_images=3")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with what all plans of `processes.py` left, and what was said."""
    folder = tmp_path_factory.mktemp("processes")
    tiny.stable_diffusion(folder / "parts").save_pretrained(folder / "base")
    tiny.photos(folder / "photos", 2)
    tiny.photos(folder / "more", 1, size=(20, 30), seed=5)[0].rename(folder / "photos" / "high.png")
    job = subprocess.run([sys.executable, "-m", "tests.training.processes", str(folder)], cwd=ROOT, text=True,
                         capture_output=True, timeout=560, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert job.returncode == 0, job.stderr
    return folder, job.stderr


def codes(folder: Path, plan: str) -> list[int]:
    found: list[int] = json.loads((folder / "codes.json").read_text())[plan]
    return found


def seen(folder: Path, plan: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{plan}_[0-9].json"))]


def test_two_equal_one_and_share_the_encoding(launched: tuple[Path, str], fresh_accelerator: None) -> None:
    folder, said = launched
    assert codes(folder, "shared_work") == [0, 0] and "2 processes" in said, said
    first, second = seen(folder, "shared_work")
    assert first["photos"] == 4 and second["photos"] == 2  # three photos and three class images
    assert first["prompts"] == 3 and second["prompts"] == 0  # the instance's, the class's, the negative one
    out = folder / "one"
    prior = (*PRIOR, f"--class_data_dir={folder / 'classes'}")
    options = ("--train_batch_size=4", "--learning_rate=1e-4", *prior)
    assert load_script().main(arguments(folder / "base", folder / "photos", out, *options)) == 0
    assert losses(out) == pytest.approx(losses(folder / "two"), abs=2e-6)
    assert largest_difference(tensors(out), tensors(folder / "two")) < 5e-6  # Adam's step is 1e-4


def test_a_signal_to_one_ends_both_with_a_checkpoint(launched: tuple[Path, str]) -> None:
    folder, said = launched
    assert codes(folder, "asked_to_stop") == [130, 130]
    (checkpoint,) = (folder / "stopped").glob("checkpoint-*")
    step = checkpoint.name.removeprefix("checkpoint-")
    assert f"stopped at step {step}; go on with --resume_from_checkpoint latest" in said and int(step) <= 20
    assert len(list((folder / "cache").glob("*.safetensors"))) == 3 + 1  # views and the prompt


def test_when_one_dies_the_other_ends_and_says_so(launched: tuple[Path, str]) -> None:
    folder, said = launched
    assert codes(folder, "killed") == [1, -9]
    assert "error: another process of the run is gone" in said or "error: process 1 is gone" in said
    assert sorted(p.name for p in (folder / "killed").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_an_error_of_one_is_told_to_the_other(launched: tuple[Path, str]) -> None:
    folder, said = launched
    assert codes(folder, "failed") == [1, 1]
    assert "process 0 ended: " in said and "this process ends as well" in said


# ---- a base that is shared out ---------------------------------------------------------------------


def test_gradients_of_a_step_are_the_same_on_one_two_and_four(
    launched: tuple[Path, str], fresh_accelerator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of two shapes and preserved prompts: processes that need fewer passes run along."""
    folder, said = launched
    assert codes(folder, "one_step_each") == [0, 0] and codes(folder, "one_step_each_of_four") == [0] * 4, said
    found: list[dict[str, torch.Tensor]] = []
    take_step = loop.take_step

    def looked_at(state: Any, modules: Any, *args: Any) -> Any:
        found.append({name: p.grad.clone() for name, p in state.parameters.items()})
        found.append({"held": torch.tensor(sum(p.numel() for p in modules["unet"].parameters()))})
        return take_step(state, modules, *args)

    monkeypatch.setattr(loop, "take_step", looked_at)
    options = ("--train_batch_size=4", *UNLIKE)
    assert load_script().main(arguments(folder / "base", folder / "photos", folder / "step_1", *options)) == 0
    one, whole = found
    trained = sum(gradient.numel() for gradient in one.values())
    for world, plan in ((2, "one_step_each"), (4, "one_step_each_of_four")):
        rows = seen(folder, plan)
        base = int(whole["held"]) - trained
        assert all(row["held"] - trained < 1.1 * base / world + 1000 for row in rows)
        for rank in range(world):
            other = load_file(folder / f"gradients_{world}_{rank}")
            off = sum(float((other[name] - gradient).square().sum()) for name, gradient in one.items()) ** 0.5
            assert off < 1e-6 * sum(float(gradient.square().sum()) for gradient in one.values()) ** 0.5
    counts = [row["passes"] for plan in ("one_step_each", "one_step_each_of_four") for row in seen(folder, plan)]
    assert len(set(counts[:2])) > 1 or len(set(counts[2:])) > 1


def test_a_run_draws_saves_and_goes_on_with_one_process(launched: tuple[Path, str], fresh_accelerator: None) -> None:
    folder, said = launched
    assert codes(folder, "sharded") == [0, 0], said
    out = folder / "sharded"
    drawn = {path.name: path.read_bytes() for path in (folder / "classes").iterdir()}
    for name in drawn:  # drawn in other batches
        one, other = (tiny.as_array(Image.open(folder / kind / name)) for kind in ("classes", "sharded_classes"))
        assert abs(one - other).max() <= 1
    assert largest_difference(tensors(out), tensors(folder / "two")) < 5e-6
    assert (out / "strength_sheet.png").is_file() and (out / "before_after.png").is_file()
    assert verify_lora(out, out).agrees(1e-6)
    resumed = folder / "resumed"
    shutil.copytree(out / "checkpoint-3", resumed / "checkpoint-3")
    options = (*PRIOR, f"--class_data_dir={folder / 'sharded_classes'}", "--train_batch_size=4",
               "--learning_rate=1e-4", "--resume_from_checkpoint=latest")  # fmt: skip
    assert load_script().main(arguments(folder / "base", folder / "photos", resumed, *options)) == 0
    assert largest_difference(tensors(out), tensors(resumed)) < 5e-6


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((), "this is one; start several"),
        (("--blocks_to_swap=4", "--gradient_checkpointing"), "does not go with blocks_to_swap or compile"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    run: Run, extra: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        run("out", "--shard_base", *extra, code=1)
    except SystemExit as stop:
        assert stop.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--train_text_encoder", "--bias=all", "--base_quantization=int8"])
def test_what_cannot_be_cut_is_refused(flag: str) -> None:
    given = ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=x", "--shard_base", flag]
    groups = dict(zip(("model", "adapter", "data", "training", "validation"),
                      parse(given, *GROUPS, prog="train", description=""), strict=True))  # fmt: skip
    with pytest.raises(OptionError, match=f"does not go with {flag[2:].partition('=')[0]}"):
        _check_sharding(Options(**groups), 2)


# ---- the watch alone -------------------------------------------------------------------------------


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a watch has ended its process; everything happens in little time."""
    event = threading.Event()
    monkeypatch.setattr(processes, "BEAT", 0.01)
    monkeypatch.setattr(processes, "GRACE", 0.05)
    monkeypatch.setattr(processes, "SILENCE", 0.2)
    monkeypatch.setattr(processes.os, "_exit", lambda code: event.set())
    return event


def test_one_that_is_silent_is_taken_for_dead(left: threading.Event) -> None:
    store = torch.distributed.HashStore()
    first = Watch(store, 0, 2)
    assert left.wait(20) and first.told == "process 1 is gone (killed, or out of memory?)"
    first.close()


def test_those_that_beat_or_are_done_are_left_alone(left: threading.Event) -> None:
    store = torch.distributed.HashStore()
    first, second = Watch(store, 0, 2), Watch(store, 1, 2)
    assert not left.wait(0.4)
    second.close()
    assert not left.wait(0.4) and not first.told
    first.close()


def test_why_one_ends_is_told_and_who_ends_by_itself_is_let(left: threading.Event, caplog: Any) -> None:
    store = torch.distributed.HashStore()
    first, second = Watch(store, 0, 2), Watch(store, 1, 2)
    second.close("process 1 ended: no such photo")
    first.thread.join(20)
    assert left.is_set() and "process 1 ended: no such photo: this process ends as well" in caplog.text
    first.close()


def test_a_launch_that_started_one_process_is_told_what_to_type(
    base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerator: None, capsys: Any
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # as `accelerate launch --cpu --num_processes 2` does
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    AcceleratorState._reset_state(True)
    assert load_script().main(arguments(base, photos, tmp_path / "out", "--max_train_steps=1")) == 0
    said = capsys.readouterr().err
    assert "started one" in said and "torchrun --nproc_per_node 2" in said and "(1 process" in said
