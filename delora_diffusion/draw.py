"""Images from a pipeline that is in memory, each with a seed of its own: for previews, class images and samples."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

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
    device = pipe._execution_device  # where components come to for their turn, or where they are
    inputs: dict[str, Any] = placed(cond, device)
    if against is not None:
        repeated = placed(stack_conditioning([against] * len(prompts)), device)
        inputs |= {f"negative_{name}": value for name, value in repeated.items()}
    if "negative_prompt" in inspect.signature(type(pipe).__call__).parameters:
        inputs["negative_prompt"] = None  # "" is some pipelines' default, which they refuse beside embeddings
    chosen = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    inputs |= family.sampling(pipe) | {name: value for name, value in chosen.items() if value is not None} | settings
    inputs[family.guidance] = inputs.pop("guidance_scale")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with _own_precision(pipe.vae, device):
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
def _own_precision(vae: Any, device: torch.device) -> Iterator[None]:
    """Let the VAE decode latents of any precision and device in its own precision on `device`, outside autocast."""
    decode = vae.decode

    def decode_as_it_is(z: torch.Tensor, *args: Any, **settings: Any) -> Any:
        with torch.autocast(device.type, enabled=False):
            return decode(z.to(device, vae.dtype), *args, **settings)

    vae.decode = decode_as_it_is
    try:
        yield
    finally:
        del vae.decode


@contextlib.contextmanager
def components_on(pipe: Any, device: torch.device, *, offload: bool) -> Iterator[None]:
    """The whole pipeline on `device`, where it stays; with `offload`, `in_turn`."""
    if not offload:
        pipe.to(device)
    with in_turn(pipe, device) if offload else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def in_turn(pipe: Any, device: torch.device, *, staying: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Draw with less memory: components wait in the CPU's memory and come to `device` for their turn, one at a time.

    Like diffusers' `enable_model_cpu_offload`, but for a while, with components that stay, and with all others sent
    away, not only the one before in a chain: of two text encoders that are called in turns, both would stay there.
    Pictures are decoded one by one: decoding several at once takes more memory than many a denoiser.

    Args:
        staying: components that are on `device` and are not moved.
    """
    from accelerate import cpu_offload_with_hook

    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    waiting = [part for part in parts if all(part is not module for module in staying)]
    hooks = [cpu_offload_with_hook(module, device)[1] for module in waiting]
    for hook in hooks:
        hook.hook.pre_forward = _alone(hook.hook.pre_forward, [other for other in hooks if other is not hook])

    def send_back(*_: Any) -> None:
        for hook in hooks:
            hook.offload()

    handles = [module.register_forward_pre_hook(send_back) for module in staying]
    sliced = pipe.vae.use_slicing
    pipe.vae.enable_slicing()
    try:
        yield
    finally:
        pipe.vae.use_slicing = sliced
        send_back()
        for hook in hooks:
            hook.remove()
        for handle in handles:
            handle.remove()


def _alone(come: Callable[..., Any], others: Sequence[Any]) -> Callable[..., Any]:
    """What accelerate calls when a component is used: the others leave before it comes."""

    def others_leave_first(*args: Any, **kwargs: Any) -> Any:
        for other in others:
            other.offload()
        return come(*args, **kwargs)

    return others_leave_first


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
