"""Drawing with components that wait for their turn: the same pictures, and who is on the device when.

The "device" is the CPU, so nothing really moves: what is looked at are the moves that are asked for. A real device is
behind `-m gpu`.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from delora_diffusion.cli import main as delora
from delora_diffusion.families import family_of
from delora_diffusion.method.config import DeloraConfig
from delora_diffusion.method.inject import inject_delora
from delora_diffusion.run_folder import RunFolder
from delora_diffusion.sampling.generate import Prompts, generate
from delora_diffusion.sampling.offload import components_on, in_turn
from delora_diffusion.training.config import ValidationConfig
from delora_diffusion.training.preview import Previews

from .. import tiny
from ..runs import Run, same, tensors
from ..tiny_families import BUILDERS, build

CPU = torch.device("cpu")


def settings(kind: str) -> dict[str, Any]:
    side = {"lumina2": 64, "sana": 32}.get(kind, 16)
    return {"height": side, "width": side, "num_inference_steps": 2}


def named(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def movements(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A list that grows with (component, "away" | "use"): every time one is sent away, or comes to be used."""
    seen: list[tuple[str, str]] = []
    names = {id(part): name for name, part in named(pipe).items()}

    def leave(self: Any, module: nn.Module) -> nn.Module:
        seen.append((names[id(module)], "away"))
        return module

    def come(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append((names[id(module)], "use"))
        return args, kwargs

    monkeypatch.setattr("accelerate.hooks.CpuOffload.init_hook", leave)
    monkeypatch.setattr("accelerate.hooks.CpuOffload.pre_forward", come)
    return seen


@pytest.mark.parametrize("kind", BUILDERS)
def test_pictures_are_the_same(kind: str, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path)
    plain = generate(pipe, Prompts(texts=["a dog", "a cat on snow"]), [0, 1], **settings(kind))
    with in_turn(pipe, CPU):
        assert all(hasattr(part, "_hf_hook") for part in named(pipe).values()) and pipe.vae.use_slicing
        waiting = generate(pipe, Prompts(texts=["a dog", "a cat on snow"]), [0, 1], **settings(kind))
        again = generate(pipe, Prompts(texts=["a dog"]), [0], **settings(kind))
    assert not any(hasattr(part, "_hf_hook") for part in named(pipe).values()) and not pipe.vae.use_slicing
    for one, other in zip([*plain, plain[0]], [*waiting, again[0]], strict=True):
        assert abs(tiny.as_array(one) - tiny.as_array(other)).max() <= 1


@pytest.mark.parametrize("kind", ["sdxl", "sd3.5", "flux.1-dev", "lumina2"])
def test_no_two_components_are_on_the_device_at_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text encoders as well, although those of SDXL and SD3 are called in turns for prompt and negative prompt."""
    pipe = build(kind, tmp_path)
    seen = movements(pipe, monkeypatch)
    with in_turn(pipe, CPU):
        for _ in range(2):
            generate(pipe, Prompts(texts=["a dog"]), [0], **settings(kind))
    uses = [name for name, what in seen if what == "use"]
    assert set(uses) == set(named(pipe)) and uses[-1] == "vae"
    here: set[str] = set()
    for name, what in seen:
        here = here - {name} if what == "away" else here | {name}
        assert len(here) <= 1, seen
    assert not here


def test_a_denoiser_that_is_trained_stays_and_the_vae_leaves_before_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build("sd", tmp_path)
    inject_delora(pipe.unet, DeloraConfig(r=2))
    config = ValidationConfig(
        validation_prompt=["a", "b"], num_validation_images=2, validation_num_inference_steps=2,
        enable_model_cpu_offload=True,
    )  # fmt: skip
    with torch.no_grad():
        cond = [family_of(pipe).encode_prompt(pipe, [text]) for text in ("a", "b")]
        negative = family_of(pipe).encode_negative(pipe, None)
    pipe.text_encoder = None
    seen = movements(pipe, monkeypatch)
    pipe.unet.register_forward_hook(lambda *_: seen.append(("unet", "use")))
    shown = Prompts(texts=config.validation_prompt, negative=None, encoded=cond, against=negative)
    Previews(
        pipe=pipe, run=RunFolder(tmp_path), config=config, shown=shown, unrelated=Prompts(texts=[]), size=16, seed=0
    ).draw(2)
    assert {name for name, what in seen if what == "away"} == {"vae"} and seen[-1] == ("vae", "away")
    assert seen.count(("vae", "use")) == 2, "one for each prompt"
    for before, after in itertools.pairwise(seen):
        assert after != ("unet", "use") or before in (("unet", "use"), ("vae", "away")), seen


def test_training_and_its_pictures_are_the_same(run: Run, tmp_path: Path) -> None:
    options = ("--validation_prompt=a", "--validation_prompt=b", "--num_validation_images=2", "--class_prompt=a dog",
               "--with_prior_preservation", "--num_class_images=3", "--strength_sheet=0.5,1")  # fmt: skip
    plain = run("plain", *options, f"--class_data_dir={tmp_path / 'class'}")
    saving = run("saving", *options, f"--class_data_dir={tmp_path / 'other'}", "--enable_model_cpu_offload")
    assert same(tensors(plain), tensors(saving))
    pictures = [sorted(folder.rglob("*.png")) for folder in (tmp_path / "class", tmp_path / "other")]
    assert [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]]
    for name in ("previews/step_000006.png", "strength_sheet.png"):
        ours, theirs = (tiny.as_array(_opened(folder / name)) for folder in (plain, saving))
        assert abs(ours - theirs).max() <= 1


def test_a_run_may_be_resumed_with_less_memory(run: Run) -> None:
    run("out", "--checkpointing_steps=3", "--max_train_steps=3")
    run("out", "--resume_from_checkpoint=latest", "--enable_model_cpu_offload", "--validation_prompt=a")


def test_the_sampler_draws_the_same(run: Run, tmp_path: Path) -> None:
    adapter = run("out")
    common = ["sample", f"--adapter={adapter}", "--prompts", "a", "b", "--seeds", "0", "1", "--num_inference_steps=2",
              "--device=cpu"]  # fmt: skip
    assert delora([*common, f"--output_dir={tmp_path / 'plain'}"]) == 0
    assert delora([*common, f"--output_dir={tmp_path / 'saving'}", "--enable_model_cpu_offload"]) == 0
    names = [{p.name for p in (tmp_path / kind).glob("*.png")} for kind in ("plain", "saving")]
    assert names[0] == names[1] and len(names[0]) == 5
    for name in names[0]:
        ours, theirs = (tiny.as_array(_opened(tmp_path / kind / name)) for kind in ("plain", "saving"))
        assert abs(ours - theirs).max() <= 1


def test_the_whole_pipeline_stays_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("sd", tmp_path)
    with components_on(pipe, CPU, offload=False):
        assert not any(hasattr(part, "_hf_hook") for part in named(pipe).values())


def _opened(path: Path) -> Any:
    from PIL import Image

    return Image.open(path).convert("RGB")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BUILDERS)
def test_on_a_gpu_one_component_is_there_at_a_time(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build(kind, tmp_path)
    gpu = torch.device("cuda", 0)
    there: list[set[str]] = []

    def look(*_: Any) -> None:
        there.append({name for name, part in named(pipe).items() if next(part.parameters()).is_cuda})

    with in_turn(pipe, gpu):
        getattr(pipe, family_of(pipe).denoiser).register_forward_hook(look)
        waiting = generate(pipe, Prompts(texts=["a dog", "a cat"]), [0, 1], **settings(kind))
    assert there and all(found == {family_of(pipe).denoiser} for found in there)
    assert all(not next(part.parameters()).is_cuda for part in named(pipe).values())
    pipe.to(gpu)
    plain = generate(pipe, Prompts(texts=["a dog", "a cat"]), [0, 1], **settings(kind))
    for one, other in zip(plain, waiting, strict=True):
        assert abs(tiny.as_array(one) - tiny.as_array(other)).max() <= 2


@pytest.mark.gpu
def test_on_a_gpu_a_run_with_offload_trains_the_same(run: Run) -> None:
    options = ("--validation_prompt=a", "--mixed_precision=bf16", "--num_validation_images=2")
    plain, saving = run("plain", *options), run("saving", *options, "--enable_model_cpu_offload")
    ours, theirs = tensors(plain), tensors(saving)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)
