"""Images from a pipeline that is in memory, each with a seed of its own: for previews, class images and samples."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..base.objective import FlowMatching, objective_of
from ..errors import DeloraError
from ..families import Conditioning, FamilyError, family_of, placed, stack_conditioning
from .config import SCHEDULERS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

#: The samplers of `config.SCHEDULERS` that there are for flow matching, and diffusers' classes.
_FLOW_SCHEDULERS = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts, and the negative one of all of them, as text or encoded.

    Attributes:
        texts: the prompts.
        negative: the negative prompt; None: what the pipeline guides against then.
        encoded: what each of the texts was encoded to; empty while their encoder is in the pipeline to do it.
        against: what the negative prompt was encoded to, beside `encoded`; None where the family has none.
    """

    texts: Sequence[str]
    negative: str | None = None
    encoded: Sequence[Conditioning] = ()
    against: Conditioning | None = None

    def at(self, places: Iterable[int]) -> Prompts:
        """Those at these places, which may repeat."""
        places = list(places)
        return replace(
            self, texts=[self.texts[k] for k in places], encoded=[self.encoded[k] for k in places if self.encoded]
        )

    def conditioning(self, pipe: DiffusionPipeline) -> tuple[Conditioning, Conditioning | None]:
        """One batch of the prompts, and the conditioning of the negative one.

        Raises:
            FamilyError: a negative prompt for a family that takes none.
        """
        if self.encoded:
            return stack_conditioning(self.encoded), self.against
        family = family_of(pipe)
        return family.encode_prompt(pipe, self.texts), family.encode_negative(pipe, self.negative)


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline,
    prompts: Prompts,
    seeds: Sequence[int],
    *,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """One image for each prompt and seed, in one batch. An image depends on its own seed, not on its neighbours.

    The VAE decodes in its own precision, which may be higher than the denoiser's.

    Args:
        prompts: the prompt of each image.
        seeds: one seed for each prompt.
        guidance_scale: the family's usual one if None.
        num_inference_steps: the same.
        settings: passed to the pipeline's call (height, width).

    Raises:
        FamilyError: a negative prompt for a family that takes none, or a size that the pipeline does not draw.
    """
    family = family_of(pipe)
    cond, against = prompts.conditioning(pipe)
    device = pipe._execution_device  # where components come to for their turn, or where they are
    inputs: dict[str, Any] = placed(cond, device)
    if against is not None:
        repeated = placed(stack_conditioning([against] * len(seeds)), device)
        inputs |= {f"negative_{name}": value for name, value in repeated.items()}
    if "negative_prompt" in inspect.signature(type(pipe).__call__).parameters:
        inputs["negative_prompt"] = None  # "" is some pipelines' default, which they refuse beside embeddings
    chosen = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    inputs |= family.sampling(pipe) | {name: value for name, value in chosen.items() if value is not None} | settings
    inputs[family.guidance] = inputs.pop("guidance_scale")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with _own_precision(pipe.vae, device):
        try:
            images: list[Image.Image] = pipe(**inputs, generator=generators).images
        except DeloraError:
            raise
        except ValueError as error:  # what a pipeline says of its inputs
            raise FamilyError(f"{type(pipe).__name__} cannot draw so: {error}") from error
    return images


def set_sampler(pipe: DiffusionPipeline, name: str) -> None:
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
    flow = {"shift": shift, "flow_shift": shift, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    known = inspect.signature(kind := getattr(diffusers, _FLOW_SCHEDULERS[name])).parameters
    pipe.scheduler = kind.from_config(config, **{key: value for key, value in flow.items() if key in known})


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
def quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
