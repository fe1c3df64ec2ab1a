"""Pipelines with a family's denoiser that do other things than draw a text: adapters load into them, and act there.

Oracle for which there are: diffusers' own classes, by the denoiser and the LoRA loader that they declare.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image

from delora_diffusion.adapters.sources import collect
from delora_diffusion.families import FAMILIES, Family, family_named, family_of
from delora_diffusion.method.config import DeloraConfig
from delora_diffusion.method.inject import inject_delora
from delora_diffusion.pipeline import load_delora_weights, set_adapters, unload_delora_weights

from ..tiny_families import BUILDERS, build, wake

#: What carries no adapter of the family although it looks so, and why.
NOT_OURS = {"StableDiffusionUpscalePipeline": "a UNet of other widths, that enlarges"}


def declared(family: Family) -> set[str]:
    """Names of diffusers' pipelines with the denoiser and the LoRA loader of a family, a VAE, and a future."""
    own = getattr(diffusers, family.pipelines[0])
    denoiser = own.__init__.__annotations__[family.denoiser].__name__
    loader = next((b.__name__ for b in own.__mro__ if b.__name__.endswith("LoraLoaderMixin")), "DiffusionPipeline")
    found = set()
    for name in dir(diffusers):
        kind = getattr(diffusers, name)
        if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
            continue
        if ".deprecated." in kind.__module__ or "AnimateDiff" in name:  # videos: with attention of their own between
            continue
        types = {key: str(value) for key, value in getattr(kind.__init__, "__annotations__", {}).items()}
        has_loader = loader in [base.__name__ for base in kind.__mro__]
        if has_loader and "vae" in types and any(value.split(".")[-1].strip("'>") == denoiser or
                                                 f".{denoiser} |" in value for value in types.values()):  # fmt: skip
            found.add(name)
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_pipeline_of_the_denoiser_is_listed(family: Family) -> None:
    found = declared(family) - set(NOT_OURS)
    assert found >= set(family.pipelines)
    assert found <= {*family.pipelines, *family.related}


def arguments(kind: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(kind.__init__).parameters.values())[1:]


def variants(pipe: Any) -> list[Any]:
    """Pipelines of the related classes that can be made from the components of this one."""
    have = pipe.components | {
        "safety_checker": None,
        "image_encoder": None,
        "feature_extractor": None,
        "processor": None,
    }
    made = []
    for name in family_of(pipe).related:
        kind = getattr(diffusers, name)
        if {a.name for a in arguments(kind) if a.default is a.empty} <= set(have):
            made.append(kind(**{a.name: have[a.name] for a in arguments(kind) if a.name in have}))
    return made


# ---- drawing --------------------------------------------------------------------------------------

#: Input channels of denoisers that see more than the latents: a picture to edit, a mask, a control image.
WIDER = {
    "StableDiffusionInstructPix2PixPipeline": 8, "StableDiffusionXLInstructPix2PixPipeline": 8,
    "FluxFillPipeline": 16 + 16 + 16, "FluxControlPipeline": 32, "FluxControlInpaintPipeline": 16 + 16 + 4,
}  # fmt: skip
DRAWN = {
    "sd": ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionPAGImg2ImgPipeline",
           "StableDiffusionInstructPix2PixPipeline"],
    "sdxl": ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline",
             "StableDiffusionXLInstructPix2PixPipeline"],
    "sd3.5": ["StableDiffusion3Img2ImgPipeline"],
    "flux.1-dev": ["FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline", "FluxKontextPipeline",
                   "FluxKontextInpaintPipeline", "FluxControlPipeline"],
    "flux.2-dev": ["Flux2Pipeline"],
    "flux.2-klein": ["Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"],
    "sana": ["SanaSprintImg2ImgPipeline"],
    "qwen-image": ["QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "QwenImageEditPipeline",
                   "QwenImageEditPlusPipeline"],
    "z-image": ["ZImageImg2ImgPipeline", "ZImageInpaintPipeline"],
}  # fmt: skip


def widened(denoiser: Any, **config: Any) -> Any:
    """The same denoiser with other settings: what has the same shape has the same weights."""
    told = {key: value for key, value in denoiser.config.items() if not key.startswith("_")}
    told |= {"out_channels": denoiser.config.out_channels or denoiser.config.in_channels} | config
    other = type(denoiser)(**told)
    wake(other)
    own = other.state_dict()
    own |= {k: v for k, v in denoiser.state_dict().items() if k in own and own[k].shape == v.shape}
    other.load_state_dict(own)
    return other.requires_grad_(False).eval()


def variant_of(pipe: Any, name: str) -> Any:
    """A pipeline of the class `name` from the components of this one, and what it needs besides."""
    kind, parts = getattr(diffusers, name), dict(pipe.components)
    denoiser = family_of(pipe).denoiser
    if name in WIDER:
        parts[denoiser] = widened(parts[denoiser], in_channels=WIDER[name])
    if "Sprint" in name:
        parts |= {denoiser: widened(parts[denoiser], guidance_embeds=True), "scheduler": diffusers.SCMScheduler()}
    absent = dict.fromkeys(("safety_checker", "image_encoder", "feature_extractor", "processor"))
    made = kind(**{a.name: (absent | parts)[a.name] for a in arguments(kind) if a.name in absent | parts})
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipe: Any, cond: dict[str, Any]) -> np.ndarray:
    side = 16 if type(pipe).__name__.startswith("StableDiffusion3") else 64
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    half = (np.indices((side, side))[0] < side // 2) * 255
    image, mask = Image.fromarray(pixels), Image.fromarray(half.astype(np.uint8))
    told: dict[str, Any] = {
        "prompt": "a dog", "image": image, "mask_image": mask, "control_image": image, "height": side, "width": side,
        "num_inference_steps": 2 if "Sprint" in type(pipe).__name__ else 3,
        "strength": 0.9, "use_resolution_binning": False, "_auto_resize": False,
        "max_area": side**2, "generator": torch.Generator().manual_seed(0), "output_type": "np",
    }  # fmt: skip
    if "processor" in {a.name for a in arguments(type(pipe))}:  # of a language model that sees: given what it says
        told |= {"prompt": None} | cond
    takes = inspect.signature(type(pipe).__call__).parameters
    found: np.ndarray = pipe(**{key: value for key, value in told.items() if key in takes}).images
    return found


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in DRAWN.items() for name in names])
def test_an_adapter_of_the_family_acts_in_the_variant(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained with the text-to-image pipeline; at strength 0, and taken out, the variant is as it was."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):  # else pictures of a million pixels
        size = module.calculate_dimensions(64 * 64, 1.0)
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, size=size: size)
    pipe = build(kind, tmp_path)
    family = family_of(pipe)
    with torch.no_grad():
        cond: Any = family.encode_prompt(pipe, ["a dog"])
    denoiser = getattr(pipe, family.denoiser)
    names = inject_delora(denoiser, DeloraConfig(r=2, relative_lambda=1.0, init_weights="kaiming"))
    adapter = collect({family.denoiser: denoiser}, "default")
    unload_delora_weights(pipe)

    variant = variant_of(pipe, name)
    before = drawn(variant, cond)
    assert load_delora_weights(variant, adapter).layers == {family.denoiser: len(names)}
    assert np.abs(drawn(variant, cond) - before).max() > 1e-3
    set_adapters(variant, "default", 0.0)
    assert np.abs(drawn(variant, cond) - before).max() < 1e-5
    unload_delora_weights(variant)
    assert np.array_equal(drawn(variant, cond), before) and np.isfinite(before).all()


def test_every_family_that_has_such_a_pipeline_draws_with_one() -> None:
    """Others have none, or only one that draws texts with perturbed attention (PAG)."""
    with_one = {family_named(names[0]).name for names in DRAWN.values()}
    for family in FAMILIES:
        assert family.name in with_one or not [name for name in family.related if "PAG" not in name], family.name


@pytest.mark.parametrize("kind", BUILDERS)
def test_adapters_load_into_every_variant_of_the_same_components(kind: str, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path)
    denoiser = family_of(pipe).denoiser
    names = inject_delora(getattr(pipe, denoiser), DeloraConfig(r=2, init_weights="kaiming"))
    adapter = collect({denoiser: getattr(pipe, denoiser)}, "default")
    unload_delora_weights(pipe)
    for variant in variants(pipe):
        assert load_delora_weights(variant, adapter).layers == {denoiser: len(names)}
        unload_delora_weights(variant)
