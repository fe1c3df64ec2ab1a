"""What differs between model families: one frozen `Family` each, and nothing about a family anywhere else.

To add one: a `Family` value in `FAMILIES`, a `predict` of a few lines, and a tiny pipeline of it in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: What conditions the denoiser, by the name of the pipeline's own keyword argument; first dimension B.
Conditioning = dict[str, Tensor]


class FamilyError(ValueError):
    """A pipeline of no supported family; the message lists them."""


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: how it is called in messages and files.
        pipelines: names of diffusers' pipeline classes that belong to it.
        denoiser: name of the denoiser among the pipeline's components.
        text_encoders: names of its text encoders there.
        encode_prompt: (pipeline, prompts) -> Conditioning; differentiable.
        predict: (denoiser, x_t, t, cond) -> what the pipeline hands to `scheduler.step` for the latents x_t
            (B, C, H, W) and the scheduler's timesteps t (B,).
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser: str
    text_encoders: tuple[str, ...]
    encode_prompt: Callable[[Any, Sequence[str]], Conditioning]
    predict: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]

    def components(self) -> tuple[str, ...]:
        """Names of the components that can carry an adapter."""
        return (self.denoiser, *self.text_encoders)


def _encode_stable_diffusion(pipe: Any, prompts: Sequence[str]) -> Conditioning:
    embeds, _ = pipe.encode_prompt(list(prompts), pipe.text_encoder.device, 1, False)
    return {"prompt_embeds": embeds}


def _predict_stable_diffusion(denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    prediction: Tensor = denoiser(x_t, t, encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0]
    return prediction


FAMILIES = (
    Family(
        name="stable-diffusion",
        pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
        denoiser="unet",
        text_encoders=("text_encoder",),
        encode_prompt=_encode_stable_diffusion,
        predict=_predict_stable_diffusion,
    ),
)


def family_of(pipe: Any) -> Family:
    """The family of a diffusers pipeline.

    Raises:
        FamilyError: a pipeline of none of the supported families (they are listed).
    """
    name = type(pipe).__name__
    for family in FAMILIES:
        if name in family.pipelines:
            return family
    known = ", ".join(p for family in FAMILIES for p in family.pipelines)
    raise FamilyError(f"{name} is of no supported family; supported pipelines are {known}")


def stack_conditioning(items: Sequence[Conditioning]) -> Conditioning:
    """One batch from the conditionings of single prompts (first dimension 1 each)."""
    return {key: torch.cat([item[key] for item in items]) for key in items[0]}
