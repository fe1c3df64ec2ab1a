"""A native adapter of every family as a LoRA: the pipeline's own loader draws the same pictures at every strength."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from delora_diffusion import DeloraConfig, export_lora, inject_delora, load_delora_weights, save_delora_weights
from delora_diffusion.draw import draw
from delora_diffusion.families import family_of
from delora_diffusion.pipeline import set_adapters

from .tiny_families import BUILDERS, build

LOADED = [kind for kind in BUILDERS if not kind.startswith("pixart")]  # diffusers has no LoRA loader for PixArt


def pictures(pipe: Any) -> np.ndarray:
    images = draw(pipe, ["a sks dog", "a cat"], [0, 1], num_inference_steps=2, height=32, width=32)
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("kind", LOADED)
def test_diffusers_own_loader_draws_what_the_native_adapter_draws(kind: str, tmp_path: Path) -> None:
    native = build(kind, tmp_path / "native")
    plain = ours = pictures(native)
    denoiser = family_of(native).denoiser
    trained = build(kind, tmp_path / "trained")
    inject_delora(
        getattr(trained, denoiser), DeloraConfig(r=2, relative_lambda=1.0, init_weights="kaiming"),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    file = save_delora_weights(tmp_path / "adapter", trained)
    load_delora_weights(native, file, "dog")
    export_lora(file, tmp_path / "lora.safetensors", format="comfyui" if denoiser != "unet" else "diffusers")
    ported = build(kind, tmp_path / "ported")
    ported.load_lora_weights(str(tmp_path / "lora.safetensors"), adapter_name="dog")
    for strength in (0.0, 0.5, 1.0):
        set_adapters(native, "dog", strength)
        ported.set_adapters("dog", strength)
        ours, theirs = pictures(native), pictures(ported)
        assert abs(ours - theirs).max() <= 1, f"{kind} at {strength}"
    assert abs(ours - plain).max() > 2, "the adapter does something"


@pytest.mark.parametrize("kind", [kind for kind in BUILDERS if kind not in LOADED])
def test_families_without_a_loader_are_named_here(kind: str, tmp_path: Path) -> None:
    assert not hasattr(build(kind, tmp_path), "load_lora_weights")
