"""Training through the real script: same seed same result, resume, processes, accumulation, what is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from delora_diffusion import load_delora_weights, read_adapter, verify_lora
from delora_diffusion.base.denoiser import Denoiser
from delora_diffusion.method.inject import delora_adapters
from delora_diffusion.run_folder import ADAPTER_NAME, LORA_NAME
from delora_diffusion.training import loop
from delora_diffusion.training.loop import ramp_weight
from delora_diffusion.training.optimizer import ema_update

from ..runs import SCRIPT, Run, arguments, largest_difference, load_script, losses, same, tensors

EVERYTHING = (
    "--train_text_encoder", "--use_ema", "--random_flip", "--module_dropout=0.2", "--no-center_crop",
    "--with_prior_preservation", "--with_base_preservation", "--class_prompt=a dog", "--num_class_images=2",
    "--lr_scheduler=cosine", "--gradient_accumulation_steps=2", "--snr_gamma=5", "--train_batch_size=1",
)  # fmt: skip


def test_same_seed_gives_the_same_adapter_bit_for_bit(run: Run) -> None:
    first = tensors(run("first"))
    assert same(first, tensors(run("second")))
    assert not same(first, tensors(run("other", "--seed=1")))


@pytest.mark.parametrize("options", [(), EVERYTHING], ids=["plain", "everything"])
def test_resumed_equals_straight_bit_for_bit(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    if options:
        options = (*options, f"--class_data_dir={tmp_path / 'class'}")
    straight = run("straight", *options, "--checkpointing_steps=6")
    resumed = run("resumed", *options, "--checkpointing_steps=2")
    for folder in (resumed / "checkpoint-4", resumed / "checkpoint-6"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    run("resumed", *options, "--checkpointing_steps=6", "--resume_from_checkpoint=latest")
    assert same(tensors(straight), tensors(resumed))
    for name in ("optimizer.safetensors", *(["ema.safetensors"] if options else [])):
        assert same(load_file(straight / "checkpoint-6" / name), load_file(resumed / "checkpoint-6" / name))
    assert [json.loads(line)["step"] for line in (resumed / "log.jsonl").read_text().splitlines()] == [1, 6]


@pytest.mark.parametrize(("optimizer", "package"), [("prodigy", "prodigyopt"), ("adamw8bit", "bitsandbytes")])
def test_other_optimizers_train_and_resume(run: Run, optimizer: str, package: str) -> None:
    pytest.importorskip(package)
    chosen = (f"--optimizer={optimizer}", f"--learning_rate={1 if optimizer == 'prodigy' else 1e-3}")
    straight = run("straight", *chosen)
    resumed = run("resumed", *chosen, "--checkpointing_steps=4")
    run("resumed", *chosen, "--resume_from_checkpoint=checkpoint-4")
    assert same(tensors(straight), tensors(resumed))


def test_interrupted_run_leaves_a_checkpoint_and_continues(base: Path, photos: Path, tmp_path: Path, run: Run) -> None:
    extra = ("--max_train_steps=40", "--lambda_warmup_steps=3", "--direction_turn=0")
    straight = run("straight", *extra)
    out = tmp_path / "stopped"
    long = arguments(base, photos, out, "--max_train_steps=100000", *extra[1:])
    job = subprocess.Popen([sys.executable, str(SCRIPT), *long], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").is_file() or not (out / "log.jsonl").read_text():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 130, output
    (checkpoint,) = out.glob("checkpoint-*")
    assert "resume_from_checkpoint latest" in output
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    if step < 40:
        run("stopped", *extra, "--resume_from_checkpoint=latest")
        assert same(tensors(straight), tensors(out))


def test_accumulated_batches_equal_one_large_batch(run: Run) -> None:
    large = run("large", "--train_batch_size=4")
    small = run("small", "--train_batch_size=1", "--gradient_accumulation_steps=4")
    assert largest_difference(tensors(large), tensors(small)) < 5e-5  # Adam's step is 1e-3


def test_gradient_checkpointing_changes_nothing(run: Run) -> None:
    plain = run("plain", "--train_text_encoder")
    saving = run("saving", "--train_text_encoder", "--gradient_checkpointing")
    assert largest_difference(tensors(plain), tensors(saving)) < 1e-5


def test_disk_cache_changes_nothing(run: Run, tmp_path: Path) -> None:
    cached = f"--cache_dir={tmp_path / 'cache'}"
    memory, disk, again = run("memory"), run("disk", cached), run("again", cached)
    assert same(tensors(memory), tensors(disk)) and same(tensors(disk), tensors(again))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3 + 1  # views and the prompt


@pytest.mark.parametrize("precision", ["bf16"])
def test_half_precision_trains_fp32_adapters(run: Run, precision: str) -> None:
    out = run("half", f"--mixed_precision={precision}", "--validation_prompt", "a cat", "--num_validation_images=1")
    saved = tensors(out)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in saved.values())
    assert (out / "before_after.png").is_file()


def test_ramp_rises_linearly_and_the_file_holds_plain_lambda(run: Run) -> None:
    assert [ramp_weight(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert ramp_weight(0, 0) == 1.0
    out = run("out", "--lambda_learning_rate=0", "--delora_lambda=3")
    assert {float(t) for n, t in tensors(out).items() if n.endswith("delora_lambda")} == {3.0}
    unfinished = run("unfinished", "--lambda_learning_rate=0", "--delora_lambda=3", "--lambda_warmup_steps=12")
    assert {float(t) for n, t in tensors(unfinished).items() if n.endswith("delora_lambda")} == {1.5}


def test_the_learning_rate_cancels_bit_for_bit(run: Run) -> None:
    """Only directions count: with lengths in learning rates, a rate 64 times as large gives the same update."""
    extra = ("--train_text_encoder", "--lambda_learning_rate=0", "--max_grad_norm=0")
    slow = tensors(run("slow", "--learning_rate=0.0009765625", *extra))
    fast = tensors(run("fast", "--learning_rate=0.0625", *extra))
    assert slow.keys() == fast.keys() and any(t.any() for n, t in slow.items() if n.endswith("delora_B"))
    for name, tensor in slow.items():
        scale = 64 if name.endswith(("delora_A", "delora_B")) else 1
        torch.testing.assert_close(tensor * scale, fast[name], rtol=1e-4, atol=0.0625 * 1e-3)
    kaiming = tensors(run("kaiming", "--learning_rate=0.0625", "--direction_turn=0", *extra))
    assert largest_difference(fast, kaiming) > 0.1


@pytest.mark.parametrize("init_weights", ["zero", "residual", "paired"])
def test_an_adapter_starts_as_the_identity_with_lengths_in_learning_rates(
    base: Path, photos: Path, init_weights: str, run: Run
) -> None:
    out = run("out", f"--init_weights={init_weights}", "--learning_rate=0.5", "--max_train_steps=9",
              "--validation_prompt", "a cat", "--num_validation_images=1", "--direction_turn=0.75",
              "--lambda_warmup_steps=0", "--adam_beta1=0", "--max_grad_norm=1e-30", "--adam_epsilon=1")  # fmt: skip
    length = 0.5 * 10 * (9 / 100) ** 0.75 / 0.75
    for name, tensor in tensors(out).items():
        if name.endswith(("delora_A", "delora_A_init")) or (name.endswith("delora_B") and init_weights != "zero"):
            assert float(tensor.square().mean().sqrt()) == pytest.approx(length, rel=1e-4), name
    pictures = [(out / "previews" / f"step_{step:06d}" / "0_0.png").read_bytes() for step in (0, 9)]
    assert pictures[0] == pictures[1] or init_weights == "zero"


def test_first_step_is_a_twentieth_of_the_ramp_whatever_the_learning_rate(run: Run) -> None:
    """The ramp removes the jump of a zero start: FACTS-like sizes at learning rates two decades apart."""
    first = {}
    for rate in ("1e-4", "1e-2"):
        out = run(rate, f"--learning_rate={rate}", "--lambda_warmup_steps=20", "--max_train_steps=1")
        first[rate] = json.loads((out / "log.jsonl").read_text().splitlines()[0])["update_norm"]
    full = run("full", "--lambda_warmup_steps=0", "--max_train_steps=1")
    jump = json.loads((full / "log.jsonl").read_text().splitlines()[0])["update_norm"]
    assert first["1e-4"] == pytest.approx(jump / 20, rel=0.05)
    assert first["1e-2"] == pytest.approx(jump / 20, rel=0.05)


def test_optimizer_state_and_average_take_part(run: Run) -> None:
    plain, average = tensors(run("plain")), tensors(run("average", "--use_ema"))
    assert not same(plain, average)
    shadow, value = {"p": torch.zeros(2)}, {"p": torch.nn.Parameter(torch.ones(2))}
    ema_update(shadow, value, 0.5, step=0)  # d = min(0.5, 1 / 10)
    assert shadow["p"].tolist() == pytest.approx([0.9, 0.9])
    ema_update(shadow, {"p": torch.nn.Parameter(torch.zeros(2))}, 0.5, step=1000)
    assert shadow["p"].tolist() == pytest.approx([0.45, 0.45])


def test_output_folder_holds_everything(run: Run, base: Path, tmp_path: Path) -> None:
    out = run("out", "--validation_prompt", "a sks dog", "a cat", "--validation_steps=4", "--num_validation_images=2",
              "--checkpointing_steps=2", "--checkpoints_total_limit=2")  # fmt: skip
    files = {ADAPTER_NAME, LORA_NAME, "README.md", "before_after.png", "config.yaml", "log.jsonl", "training.png"}
    assert {p.name for p in out.iterdir()} == files | {"checkpoint-4", "checkpoint-6", "previews"}
    assert sorted(p.name for p in (out / "previews").glob("*.png")) == [f"step_00000{n}.png" for n in (0, 4, 6)]
    assert read_adapter(out).provenance["base_model"] == str(base)
    AcceleratorState._reset_state(True)
    assert load_script().main(["--config", str(out / "config.yaml"), f"--output_dir={tmp_path / 'again'}"]) == 0
    assert same(tensors(out), tensors(tmp_path / "again"))


@pytest.mark.parametrize("extra", [(), ("--train_text_encoder", "--init_weights=residual")], ids=["unet", "both"])
def test_the_output_folder_opens_in_plain_diffusers(extra: tuple[str, ...], run: Run, base: Path) -> None:
    out = run("out", "--delora_lambda=20", "--learning_rate=1e-2", *extra)
    images = []
    for kind in ("base", "native", "lora"):
        pipe = StableDiffusionPipeline.from_pretrained(base)
        if kind == "native":
            load_delora_weights(pipe, out)
        elif kind == "lora":
            pipe.load_lora_weights(str(out))
        noise = torch.Generator().manual_seed(1)
        images.append(pipe("a sks dog", num_inference_steps=2, generator=noise, output_type="np").images[0])
    untouched, native, lora = images
    assert np.abs(native - lora).max() < 1e-5 and np.abs(native - untouched).max() > 1e-4
    assert verify_lora(out, out).agrees(1e-6)
    with safe_open(out / LORA_NAME, framework="pt") as file:
        header = file.metadata()
    assert header["modelspec.trigger_phrase"] == "a sks dog" and header["delora.base_model"] == str(base)
    assert header["modelspec.resolution"] == "16x16" and header["delora.base_fingerprint"]


def test_no_lora_is_left_where_none_is_wanted_or_possible(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert (run("out") / LORA_NAME).is_file()
    assert not (run("out", "--no-portable_lora", "--overwrite_output_dir") / LORA_NAME).exists()
    out = run("other", "--bias=delora_only")
    assert (out / ADAPTER_NAME).is_file() and not (out / LORA_NAME).exists()
    assert "no LoRA is written beside the adapter: a LoRA cannot hold" in capsys.readouterr().err


def test_missing_class_images_are_drawn_once(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    prior = ("--with_prior_preservation", "--class_prompt=a dog", f"--class_data_dir={folder}", "--num_class_images=3")
    run("first", *prior)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert sorted(before) == ["class_00000.png", "class_00001.png", "class_00002.png"]
    (folder / "class_00001.png").unlink()
    run("second", *prior)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--instance_data_dir=nowhere",), "nowhere does not exist"),
        (("--target_modules=to_x",), "matched none of the layers"),
        (("--pretrained_model_name_or_path=no/such",), "no/such is neither a folder nor among the models downloaded"),
        (("--resume_from_checkpoint=checkpoint-7",), "no checkpoint checkpoint-7"),
        (("--init_weights=paired", "--rank=3"), "even rank"),
        (("--optimizer=prodigy",), "delora_diffusion[prodigy]"),
        (("--report_to=wandb",), "delora_diffusion[wandb]"),
        (("--report_to=wandbb",), "report_to wandbb"),
    ],
)
def test_refusals_say_what_to_do(
    run: Run, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("prodigyopt", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    run("out", *extra, code=1)
    assert message in capsys.readouterr().err


def test_another_run_in_the_folder_is_refused_and_kept(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run("out") / ADAPTER_NAME).read_bytes()
    out = run("out", "--seed=1", code=1)
    assert "holds another run" in (told := capsys.readouterr().err) and "--overwrite_output_dir" in told
    assert (out / ADAPTER_NAME).read_bytes() == before
    assert (run("out", "--seed=1", "--overwrite_output_dir") / ADAPTER_NAME).read_bytes() != before


def test_options_that_are_refused_cost_no_earlier_run(run: Run) -> None:
    out = run("out", "--checkpointing_steps=2")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run("out", "--overwrite_output_dir", "--target_modules=to_x", code=1)
    run("out", "--overwrite_output_dir", "--pretrained_model_name_or_path=no/such", code=1)
    run("out", "--resume_from_checkpoint=latest", "--rank=8", code=1)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_resuming_with_other_options_is_refused(run: Run, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("out", "--checkpointing_steps=2")
    run("out", "--rank=8", "--resume_from_checkpoint=latest", code=1)
    assert "rank was 4 and is 8" in capsys.readouterr().err
    (photos / "00.png").write_bytes((photos / "01.png").read_bytes())
    run("out", "--resume_from_checkpoint=latest", code=1)
    assert "photos and captions" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("out", "--checkpointing_steps=6")
    file = out / "checkpoint-6" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    run("out", "--resume_from_checkpoint=latest", code=1)
    assert "cannot resume from" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    run: Run, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from delora_diffusion.training import loop as train

    original, calls = train.batch_loss, []

    def broken(*args: object, **kwargs: object) -> Tensor:
        calls.append(1)
        loss = original(*args, **kwargs)  # type: ignore[arg-type]
        return loss * float("nan") if len(calls) == 4 else loss

    monkeypatch.setattr(train, "batch_loss", broken)
    out = run("out", "--checkpointing_steps=2", code=1)
    assert "loss is nan at step 4" in (told := capsys.readouterr().err) and ".png" in told
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(t.isfinite().all() for t in tensors(out / "checkpoint-2").values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named_later(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Nobody looks at a loss before the next line of the log: meanwhile no NaN reaches a parameter or a file."""
    original, calls = loop.batch_loss, []

    def broken(batch: list[object], examples: object, denoiser: Denoiser, *args: object, **kwargs: object) -> Tensor:
        calls.append(denoiser.module)
        loss = original(batch, examples, denoiser, *args, **kwargs)  # type: ignore[arg-type]
        if len(calls) == 4 and what == "gradient":
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss * float("nan") if len(calls) == 4 and what == "loss" else loss

    monkeypatch.setattr(loop, "batch_loss", broken)
    out = run("out", "--max_train_steps=9", "--checkpointing_steps=3", code=1)
    expected = "the loss is nan at step 4" if what == "loss" else "a gradient is not finite at step 4"
    assert expected in capsys.readouterr().err and len(calls) == 6
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-3"] and not (out / ADAPTER_NAME).exists()
    adapters = delora_adapters(calls[0]).values()
    assert all(bool(p.isfinite().all()) for adapter in adapters for p in adapter.parameters())


def test_no_step_waits_for_the_device_between_two_lines_of_the_log(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    waited, at_step = [], []

    class Waiting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "_local_scalar_dense":
                waited.append(func)
            return func(*args, **(kwargs or {}))

    original = loop.step_gradients

    def noting(*args: Any, **kwargs: Any) -> Any:
        at_step.append(len(waited))
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "step_gradients", noting)
    with Waiting():
        run("out", "--max_train_steps=31", "--with_base_preservation", "--class_prompt=a dog", "--use_ema",
            "--lambda_warmup_steps=25", "--gradient_accumulation_steps=2")  # fmt: skip
    assert at_step[1] == at_step[9] and at_step[10] == at_step[19] and at_step[20] == at_step[29]


def test_layers_without_gradient_are_named(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the output of cross-attention detached, its adapters train nothing."""
    from diffusers.models.attention_processor import Attention

    original = Attention.forward

    def detached(self: Attention, hidden: Tensor, **kwargs: object) -> Tensor:
        out = original(self, hidden, **kwargs)
        return out.detach() if self.is_cross_attention else out

    monkeypatch.setattr(Attention, "forward", detached)
    run("out", "--max_train_steps=1")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "no gradient reaches" in line]
    assert "no gradient reaches 16 adapted layers" in line and "attn2.to_q" in line and "attn1" not in line


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
def test_trains_on_a_gpu_in_every_precision(run: Run, precision: str) -> None:
    assert torch.cuda.is_available()
    out = run("out", f"--mixed_precision={precision}", "--validation_prompt=a cat", "--train_text_encoder")
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors(out).values())
    assert all(0 < loss < 10 for loss in losses(out))
