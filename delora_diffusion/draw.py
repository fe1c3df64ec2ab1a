"""Images from a pipeline that is in memory, each with a seed of its own: for previews, class images and samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from .encode import decode_latents
from .families import Conditioning, stack_conditioning


@torch.no_grad()
def draw(
    pipe: Any,
    prompts: Sequence[str] | Sequence[Conditioning],
    seeds: Sequence[int],
    *,
    negative: str | Conditioning | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """One image for each prompt and seed, in one batch. An image depends on its own seed, not on its neighbours.

    The VAE decodes in its own precision, which may be higher than the denoiser's.

    Args:
        prompts: texts, or what they were encoded to.
        seeds: one seed for each prompt.
        negative: the negative prompt of all of them, in the same form.
        settings: passed to the pipeline's call (num_inference_steps, guidance_scale, height, width).
    """
    inputs: dict[str, Any]
    if isinstance(prompts[0], str):
        inputs = {"prompt": list(prompts)}
        if negative is not None:
            inputs["negative_prompt"] = [negative] * len(prompts)
    else:
        inputs = _placed(pipe, stack_conditioning(prompts))  # type: ignore[arg-type]
        if isinstance(negative, dict):
            repeated = stack_conditioning([negative] * len(prompts))
            inputs |= {f"negative_{name}": tensor for name, tensor in _placed(pipe, repeated).items()}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = pipe(**inputs, generator=generators, output_type="latent", **settings).images
    return decode_latents(pipe, latents)


def _placed(pipe: Any, cond: Conditioning) -> Conditioning:
    return {name: tensor.to(pipe.device) for name, tensor in cond.items()}


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
