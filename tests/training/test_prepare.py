"""A base read in stages: the same pipeline as one read at once, and never more of it in memory than a stage needs."""

from __future__ import annotations

import contextlib
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from delora_diffusion.atomic import ASIDE
from delora_diffusion.base.checks import BaseModelError
from delora_diffusion.base.config import ModelConfig
from delora_diffusion.base.load import load_base, outline
from delora_diffusion.data.config import DataConfig
from delora_diffusion.data.encode import cache_latents
from delora_diffusion.data.photos import instance_examples
from delora_diffusion.families import Conditioning, family_of
from delora_diffusion.sampling.generate import Prompts
from delora_diffusion.training import prepare as stages
from delora_diffusion.training.check import check
from delora_diffusion.training.class_images import draw_class_images, missing_batches
from delora_diffusion.training.config import AdapterConfig, Options, TrainingConfig, ValidationConfig

from ..runs import Run
from ..tiny_families import BUILDERS, build

ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), mixed_precision="no", is_main_process=True, process_index=0, num_processes=1,
    wait_for_everyone=lambda: None,
)  # fmt: skip


def saved(kind: str, folder: Path, **without: None) -> ModelConfig:
    """A tiny base of this kind on disk."""
    pipe = build(kind, folder / "parts")
    type(pipe)(**{**pipe.components, **without}).save_pretrained(folder / "base")
    return ModelConfig(pretrained_model_name_or_path=str(folder / "base"))


def prepared(model: ModelConfig, photos: Path, side: int = 16, **settings: Any) -> tuple[stages.Prepared, Any]:
    """What the script prepares, and the base read at once."""
    validation = ValidationConfig(validation_prompt=["a cat"], validation_num_inference_steps=2)
    data = DataConfig(instance_data_dir=str(photos), instance_prompt="a sks dog", resolution=side, **settings)
    options = Options(
        model=model, adapter=AdapterConfig(rank=4), data=data, training=TrainingConfig(output_dir=str(photos / "out")),
        validation=validation,
    )  # fmt: skip
    return stages.prepare(check(options, ACCELERATOR), ACCELERATOR), load_base(model, precision="no")


def same(ours: Conditioning, theirs: Conditioning) -> bool:
    pairs = [(ours[key], theirs[key]) for key in theirs]
    flat = [(a, b) if isinstance(b, torch.Tensor) else (a[0], b[0]) for a, b in pairs]
    return ours.keys() == theirs.keys() and all(torch.equal(a, b) for a, b in flat)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", BUILDERS)
def test_in_stages_a_base_is_what_it_is_at_once(kind: str, photos: Path, tmp_path: Path) -> None:
    side = {"lumina2": 64, "sana": 32}.get(kind, 16)
    made, whole = prepared(saved(kind, tmp_path), photos, side)
    family, pipe = family_of(whole), made.pipe
    assert all(getattr(pipe, name, None) is None for name in family.text_encoders)
    for name in (family.denoiser, "vae"):
        ours, theirs = getattr(pipe, name).state_dict(), getattr(whole, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert not getattr(pipe, name).training and not any(p.requires_grad for p in getattr(pipe, name).parameters())
    settled = {
        key: value for key, value in vars(whole).items()
        if isinstance(value, (bool, int, float, str)) and key not in family.text_encoders
    }  # fmt: skip
    assert {key: getattr(pipe, key) for key in settled} == settled and settled
    with torch.no_grad():
        assert made.texts.conditioning is not None
        assert same(made.texts.conditioning["a cat"], family.encode_prompt(whole, ["a cat"]))
        examples = instance_examples(
            DataConfig(instance_data_dir=str(photos), instance_prompt="a sks dog", resolution=side), seed=0
        )
        latents = cache_latents(stages.Cache(), whole.vae, examples, identity="")
    assert made.latents.keys() == latents.keys()
    assert all(torch.equal(made.latents[key]["mean"], latents[key]["mean"]) for key in latents)


@pytest.mark.parametrize("kind", BUILDERS)
def test_an_outline_has_every_layer_and_no_weights(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    whole = load_base(model, precision="no")
    for name, part in whole.components.items():
        if isinstance(part, nn.Module):
            found = outline(model, name)
            ours, theirs = ({n: p.shape for n, p in m.named_parameters()} for m in (found, part))
            assert ours == theirs
            assert type(found) is type(part) and all(p.is_meta and not p.requires_grad for p in found.parameters())


def test_an_outline_of_a_part_that_is_not_there_is_refused(tmp_path: Path) -> None:
    model = saved("sd", tmp_path)
    with pytest.raises(BaseModelError, match="lists no transformer"):
        outline(model, "transformer")
    (tmp_path / "base" / "unet" / "config.json").unlink()
    with pytest.raises(BaseModelError, match="cannot load the base model"):
        outline(model, "unet")


def test_what_only_encodes_is_gone_before_the_denoiser_is_read(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every module that is read, and at each reading those of the earlier ones that are still in memory."""
    model = saved("sd3.5", tmp_path)
    read: list[tuple[str, weakref.ref[nn.Module]]] = []
    alive: dict[str, set[str]] = {}
    original = load_base

    def noted(*args: Any, **settings: Any) -> Any:
        before = {name for name, ref in read if ref() is not None}
        pipe = original(*args, **settings)
        given = settings.get("given") or {}
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and given.get(name) is None and not name.startswith("image"):
                alive[name] = before
                read.append((name, weakref.ref(part)))
        return pipe

    monkeypatch.setattr(stages, "load_base", noted)
    made, _ = prepared(model, photos)
    gc.collect()
    texts = {"text_encoder", "text_encoder_2", "text_encoder_3"}
    assert alive == {"vae": set(), **{name: {"vae"} for name in texts}, "transformer": {"vae"}}
    assert {name for name, ref in read if ref() is not None} == {"vae", "transformer"}
    assert made.pipe.vae is not None


def test_a_base_without_its_third_encoder_is_encoded_without_the_denoiser(photos: Path, tmp_path: Path) -> None:
    """SD3's pipeline asks the transformer's config for the width of the missing encoder's zeros."""
    made, whole = prepared(saved("sd3.5", tmp_path, text_encoder_3=None, tokenizer_3=None), photos)
    with torch.no_grad():
        expected = family_of(whole).encode_prompt(whole, ["a cat"])
    assert made.texts.conditioning is not None and same(made.texts.conditioning["a cat"], expected)


def test_class_images_are_those_that_the_whole_pipeline_draws(photos: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "stages", tmp_path / "whole"]
    model = saved("sdxl", tmp_path)
    prior = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 3}
    made, whole = prepared(model, photos, class_data_dir=str(folders[0]), **prior)
    settings = {"height": 16, "width": 16, "num_inference_steps": 2}
    batches = missing_batches(folders[1], 3, 4)
    draw_class_images(whole, folders[1], Prompts(texts=["a dog"]), batches, seed=0, settings=settings)
    pictures = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert pictures[0] == pictures[1] and len(pictures[0]) == len(made.classes) == 3
    assert all(example.key(view) in made.latents for example in made.classes for view in example.views)


def test_what_a_killed_run_left_among_class_images_is_none(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    scrap = folder / ASIDE / "0123456789abcdef"
    scrap.mkdir(parents=True)
    for path in (scrap / "class_00001.png", folder / ".class_00001.png"):
        path.write_bytes((photos / "00.png").read_bytes())
    scrap.with_suffix(".lock").touch()
    assert missing_batches(folder, 2, 4) == [[(0, "class_00000.png"), (1, "class_00001.png")]]
    prior = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2}
    made, _ = prepared(saved("sd", tmp_path), photos, class_data_dir=str(folder), **prior)
    assert [example.path.name for example in made.classes] == ["class_00000.png", "class_00001.png"]
    assert not scrap.exists()


def test_a_late_process_draws_its_share_of_class_images(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process has listed the folder before one draws: one that lists later would take others' for its own."""
    folder, drawn, others = tmp_path / "class", [], iter(range(9))

    def wait() -> None:
        if next(others) == 0:  # the other process, which was first, draws its half at once
            for number in (0, 2):
                (folder / f"class_{number:05d}.png").write_bytes((photos / "00.png").read_bytes())

    folder.mkdir()
    late = SimpleNamespace(**vars(ACCELERATOR) | {"process_index": 1, "num_processes": 2, "wait_for_everyone": wait})
    monkeypatch.setattr(stages, "draw_class_images", lambda pipe, where, prompt, batches, **kw: drawn.extend(batches))
    data = DataConfig(instance_data_dir=str(photos), resolution=16, with_prior_preservation=True, num_class_images=4,
                      sample_batch_size=1, class_data_dir=str(folder), class_prompt="a dog")  # fmt: skip
    options = SimpleNamespace(data=data, validation=ValidationConfig(), training=TrainingConfig())
    monkeypatch.setattr(stages, "components_on", lambda *args, **kwargs: contextlib.nullcontext())
    stages._draw_classes(None, SimpleNamespace(of_class=Prompts(texts=["a dog"])), options, late, staying=[])  # type: ignore[arg-type]
    assert drawn == [[(1, "class_00001.png")], [(3, "class_00003.png")]]


def test_a_picture_that_is_drawn_after_a_kill_is_the_one_drawn_before_it(photos: Path, tmp_path: Path) -> None:
    """In the same company: rounding depends on the size of a batch."""
    pipe, folder = load_base(saved("sd", tmp_path), precision="no"), tmp_path / "class"
    settings = {"height": 16, "width": 16, "num_inference_steps": 2}
    pictures = []
    for lost in ([0, 1, 2, 3, 4], [2], [1, 4]):
        for number in lost:
            (folder / f"class_{number:05d}.png").unlink(missing_ok=True)
        batches = missing_batches(folder, 5, 3)
        assert batches[0] == [(number, f"class_{number:05d}.png") for number in range(3)]
        draw_class_images(pipe, folder, Prompts(texts=["a dog"]), batches, seed=0, settings=settings)
        pictures.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(pictures[0]) == 5 and pictures[0] == pictures[1] == pictures[2]


def test_captions_of_class_images_that_are_there_are_encoded(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "mine.png").write_bytes((photos / "00.png").read_bytes())
    (tmp_path / "class" / "mine.txt").write_text("a dog of mine")
    prior = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2}
    made, _ = prepared(saved("sd", tmp_path), photos, class_data_dir=str(tmp_path / "class"), **prior)
    assert {example.caption for example in made.classes} == {"a dog", "a dog of mine"}
    assert made.texts.conditioning is not None and {"a dog", "a dog of mine"} <= made.texts.conditioning.keys()


@pytest.mark.parametrize(
    "kind, extra, said",
    [
        ("sd", ["--target_modules=to_x"], "matched none of the layers"),
        ("sd", ["--timestep_shift=3"], "timestep_shift is for flow matching"),
        ("flux.2-klein", ["--train_text_encoder"], "is a large language model"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_weights_are_read(
    kind: str, extra: list[str], said: str, run: Run, tmp_path: Path, capsys: Any
) -> None:
    model = saved(kind, tmp_path)
    for file in Path(model.pretrained_model_name_or_path).rglob("*.safetensors"):
        file.unlink()
    given = f"--pretrained_model_name_or_path={model.pretrained_model_name_or_path}"
    run("out", given, *extra, code=1)
    assert said in capsys.readouterr().err
    run("out", given, code=1)
    assert "cannot load the base model" in capsys.readouterr().err


def test_another_base_is_not_resumed_with(run: Run, tmp_path: Path, base: Path, capsys: Any) -> None:
    """A difference in any one part is another base."""
    run("out", "--checkpointing_steps=3", "--max_train_steps=3")
    for part in ("unet", "vae", "text_encoder"):
        pipe = DiffusionPipeline.from_pretrained(base)
        with torch.no_grad():
            next(getattr(pipe, part).parameters()).add_(0.1)
        pipe.save_pretrained(tmp_path / part)
        run("out", f"--pretrained_model_name_or_path={tmp_path / part}", "--resume_from_checkpoint=latest", code=1)
        assert "base model was" in capsys.readouterr().err
    DiffusionPipeline.from_pretrained(base).save_pretrained(tmp_path / "copy")
    run("out", f"--pretrained_model_name_or_path={tmp_path / 'copy'}", "--resume_from_checkpoint=latest")
