"""Images from a pipeline that is in memory, each with a seed of its own: for previews, class images and samples."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from .config import SCHEDULERS
from .families import Conditioning, FamilyError, family_of, placed, stack_conditioning
from .objective import FlowMatching, objective_of

#: The samplers of `config.SCHEDULERS` that there are for flow matching, and diffusers' classes.
_FLOW_SCHEDULERS = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


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


def set_sampler(pipe: Any, name: str) -> None:
    """Let a pipeline draw with another sampler, one of `config.SCHEDULERS`, on the noise schedule it has.

    Raises:
        FamilyError: a sampler that there is not for the pipeline's kind of model, or that its call does not take.
    """
    import diffusers

    family, config = family_of(pipe), pipe.scheduler.config
    if not isinstance(objective_of(pipe.scheduler), FlowMatching):
        # what most bases do not say, and DDIM and DDPM else assume: latents are not pixels, and exceed 1
        pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(config, clip_sample=False)
        return
    if name not in family.flow_samplers:
        raise FamilyError(
            f"{type(pipe).__name__} does not draw with the sampler {name}; choose one of "
            f"{', '.join(family.flow_samplers)}, or leave it out"
        )
    shift = config.get("shift") or config.get("flow_shift") or 1.0
    told = {"shift": shift, "flow_shift": shift, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    known = inspect.signature(kind := getattr(diffusers, _FLOW_SCHEDULERS[name])).parameters
    pipe.scheduler = kind.from_config(config, **{key: value for key, value in told.items() if key in known})


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
