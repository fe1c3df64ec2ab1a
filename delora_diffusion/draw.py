"""Images from a pipeline that is in memory, each with a seed of its own: for previews, class images and samples."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from .families import Conditioning, family_of, placed, stack_conditioning


@torch.no_grad()
def draw(
    pipe: Any,
    prompts: Sequence[str] | Sequence[Conditioning],
    seeds: Sequence[int],
    *,
    negative: str | Conditioning | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """One image for each prompt and seed, in one batch. An image depends on its own seed, not on its neighbours.

    The VAE decodes in its own precision, which may be higher than the denoiser's.

    Args:
        prompts: texts, or what they were encoded to.
        seeds: one seed for each prompt.
        negative: the negative prompt of all of them, in the same form; None: what the pipeline guides against then.
        guidance_scale: the family's usual one if None.
        num_inference_steps: the same.
        settings: passed to the pipeline's call (height, width).

    Raises:
        FamilyError: a negative prompt for a family that takes none.
    """
    family = family_of(pipe)
    if isinstance(prompts[0], str):
        cond = family.encode_prompt(pipe, [text for text in prompts if isinstance(text, str)])
        against = family.encode_negative(pipe, negative if isinstance(negative, str) else None)
    else:
        cond = stack_conditioning([item for item in prompts if isinstance(item, dict)])
        against = negative if isinstance(negative, dict) else None
    inputs: dict[str, Any] = placed(cond, pipe.device)
    if against is not None:
        repeated = placed(stack_conditioning([against] * len(prompts)), pipe.device)
        inputs |= {f"negative_{name}": value for name, value in repeated.items()}
    if "negative_prompt" in inspect.signature(type(pipe).__call__).parameters:
        inputs["negative_prompt"] = None  # "" is some pipelines' default, which they refuse beside embeddings
    chosen = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    inputs |= family.sampling(pipe) | {name: value for name, value in chosen.items() if value is not None} | settings
    inputs[family.guidance] = inputs.pop("guidance_scale")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with _own_precision(pipe.vae):
        images: list[Image.Image] = pipe(**inputs, generator=generators).images
    return images


@contextlib.contextmanager
def _own_precision(vae: Any) -> Iterator[None]:
    """Let the VAE decode latents of any precision and device in its own, outside autocast."""
    decode = vae.decode

    def decode_as_it_is(z: torch.Tensor, *args: Any, **settings: Any) -> Any:
        with torch.autocast(vae.device.type, enabled=False):
            return decode(z.to(vae.device, vae.dtype), *args, **settings)

    vae.decode = decode_as_it_is
    try:
        yield
    finally:
        del vae.decode


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
