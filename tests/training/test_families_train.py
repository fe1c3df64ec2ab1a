"""Every family end to end: the real script, resume, the native file loaded back, the batch sampler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from PIL import Image

from delora_diffusion import load_delora_weights, load_pipeline, read_adapter
from delora_diffusion.cli import main as delora
from delora_diffusion.families import family_of
from delora_diffusion.run_folder import ADAPTER_NAME
from delora_diffusion.sampling.generate import Prompts, generate

from .. import tiny
from ..runs import load_script, same, tensors
from ..tiny_families import BUILDERS, build

USUAL = {"sdxl", "sd3.5", "flux.1-dev"}  # Stable Diffusion itself is in test_train.py and test_sample.py
RARER = [pytest.param(kind, marks=pytest.mark.slow) for kind in BUILDERS if kind not in USUAL]
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_scripts" / "train_dreambooth_delora.py"
SIDE = {"lumina2": 64, "sana": 32}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def train(base: Path, photos: Path, out: Path, side: int, *extra: str, code: int = 0, launched: bool = False) -> Path:
    """Run the script, in this process or as users do."""
    AcceleratorState._reset_state(True)
    options = {
        "pretrained_model_name_or_path": base, "instance_data_dir": photos, "instance_prompt": "a sks dog",
        "resolution": side, "rank": 2, "output_dir": out, "max_train_steps": 4, "validation_num_inference_steps": 2,
        "num_validation_images": 1, "checkpointing_steps": 2, "learning_rate": 0.01,
    }  # fmt: skip
    arguments = [*(f"--{key}={value}" for key, value in options.items()), *extra]
    if launched:
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
        job = subprocess.run([*launch, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)
        assert job.returncode == code, job.stderr
    else:
        assert load_script().main(arguments) == code
    return out


@pytest.mark.parametrize("kind", [*sorted(USUAL), *RARER])
def test_a_family_trains_resumes_loads_and_samples(kind: str, photos: Path, tmp_path: Path) -> None:
    side, base = SIDE.get(kind, 16), tmp_path / "base"
    build(kind, tmp_path / "parts").save_pretrained(base)
    text = ["--train_text_encoder"] if kind in USUAL else []
    options = [*text, "--gradient_checkpointing", "--validation_prompt=a sks dog on snow"]

    straight = train(base, photos, tmp_path / "straight", side, *options, launched=True)
    resumed = tmp_path / "resumed"
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    train(base, photos, resumed, side, *options, "--resume_from_checkpoint=latest")
    assert same(tensors(straight), tensors(resumed))
    assert Image.open(straight / "before_after.png").size[0] > 100

    # ---- the file: loaded into a plain pipeline it acts, fused or beside the weights
    pipe = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"height": side, "width": side, "num_inference_steps": 2}
    before = generate(pipe, Prompts(texts=["a sks dog"]), [0], **asked)[0]
    report = load_delora_weights(pipe, straight)
    adapter = read_adapter(straight)
    assert report.layers == {part: len(config_layers(found)) for part, found in adapter.tensors.items()}
    assert set(adapter.tensors) == set(family_of(pipe).components() if text else [family_of(pipe).denoiser])
    beside = generate(pipe, Prompts(texts=["a sks dog"]), [0], **asked)[0]
    fused_pipe = load_pipeline(base, straight / ADAPTER_NAME)
    fused_pipe.set_progress_bar_config(disable=True)
    fused = generate(fused_pipe, Prompts(texts=["a sks dog"]), [0], **asked)[0]
    assert abs(tiny.as_array(beside) - tiny.as_array(fused)).max() <= 1
    assert abs(tiny.as_array(beside) - tiny.as_array(before)).max() >= 1, "four steps with a large learning rate"

    # ---- the sampler
    out = tmp_path / "samples"
    command = ["sample", f"--adapter={straight}", "--prompts", "a sks dog", "x", f"--output_dir={out}",
               f"--height={side}", f"--width={side}", "--num_inference_steps=2", "--device=cpu"]  # fmt: skip
    assert delora(command) == 0
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    drawn = [Image.open(out / row["file"]) for row in rows if row["prompt"] == "a sks dog"]
    assert len(rows) == 2 and abs(tiny.as_array(drawn[0]) - tiny.as_array(beside)).max() <= 1


@pytest.mark.parametrize("kind", ["sd", *sorted(USUAL), *(k for k in RARER if k.values != ("sd",))])
def test_photos_of_two_shapes_train_in_one_batch_and_resume(kind: str, tmp_path: Path) -> None:
    side, base, photos = SIDE.get(kind, 16), tmp_path / "base", tmp_path / "photos"
    build(kind, tmp_path / "parts").save_pretrained(base)
    for number, size in enumerate([(20, 40), (40, 20), (21, 40)]):
        tiny.photos(photos, 1, size=size, seed=number)[0].rename(photos / f"shape_{number}.png")
    options = [f"--aspect_ratio_buckets={side},{2 * side};{2 * side},{side}", "--train_batch_size=3"]
    straight = train(base, photos, tmp_path / "straight", side, *options)
    shutil.copytree(straight / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train(base, photos, tmp_path / "resumed", side, *options, "--resume_from_checkpoint=latest")
    assert same(tensors(straight), tensors(tmp_path / "resumed"))
    squares = train(base, photos, tmp_path / "squares", side, "--train_batch_size=3")
    assert not same(tensors(straight), tensors(squares))


def config_layers(found: dict[str, torch.Tensor]) -> set[str]:
    return {name.rpartition(".")[0] for name in found}


@pytest.mark.parametrize("extra, calls", [((), 1), (("--train_text_encoder",), 3)])
def test_captions_are_encoded_again_only_while_their_encoders_train(
    extra: tuple[str, ...], calls: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the one caption, or at each of three steps: then all three encoders train, T5 as well."""
    build("sd3.5", tmp_path / "parts").save_pretrained(tmp_path / "base")
    seen: list[list[str]] = []
    encode = StableDiffusion3Pipeline.encode_prompt

    def counted(self: Any, prompt: list[str], *args: Any, **settings: Any) -> Any:
        seen.append(prompt)
        return encode(self, prompt, *args, **settings)

    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", counted)
    out = train(tmp_path / "base", photos, tmp_path / "out", 16, "--max_train_steps=3", *extra)
    assert seen == [["a sks dog"]] * calls
    encoders = {"text_encoder", "text_encoder_2", "text_encoder_3"} if extra else set()
    assert set(read_adapter(out).tensors) == {"transformer", *encoders}


def test_dead_layers_are_left_out_and_no_layer_stays_silent(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build("sd3.5", tmp_path / "parts").save_pretrained(tmp_path / "base")
    out = train(
        tmp_path / "base", photos, tmp_path / "out", 16, "--target_modules=attention+ff", "--max_train_steps=1"
    )
    names = config_layers(read_adapter(out).tensors["transformer"])
    assert "transformer_blocks.1.attn.add_q_proj" in names and "transformer_blocks.2.attn.add_q_proj" not in names
    assert "transformer_blocks.0.ff_context.net.2" in names and not any(
        "no gradient" in r.message for r in caplog.records
    )


@pytest.mark.parametrize(
    "kind, extra, said",
    [
        ("flux.1-schnell", ["--resolution=18"], "resolution is 18; it must be a multiple of 8"),
        ("flux.2-klein", ["--train_text_encoder"], "the text encoder of flux.2 is a large language model"),
        ("flux.1-schnell", ["--validation_prompt=a", "--validation_negative_prompt=b"], "takes no negative prompt"),
        ("sdxl", ["--timestep_shift=3"], "timestep_shift is for flow matching"),
        (
            "lumina2",
            ["--resolution=64", "--aspect_ratio_buckets=64,72;72,64"],
            "aspect_ratio_buckets is 72; Lumina2Pipeline needs a multiple of 16",
        ),
    ],
)
def test_what_a_family_cannot_do_is_told_before_anything_is_written(
    kind: str, extra: list[str], said: str, photos: Path, tmp_path: Path, caplog: Any, capsys: Any
) -> None:
    build(kind, tmp_path / "parts").save_pretrained(tmp_path / "base")
    try:
        train(tmp_path / "base", photos, tmp_path / "out", 16, *extra, code=1)
    except SystemExit as stop:
        assert stop.code == 2
    assert said in caplog.text + capsys.readouterr().err
    assert not (tmp_path / "out").exists()
