"""The record that describes a model family, and the conditioning that all of them share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import DeloraError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

#: What conditions the denoiser, by the name of the pipeline's own keyword argument: a tensor with first dimension B,
#: or a list of B tensors of different lengths.
Conditioning = dict[str, Tensor | list[Tensor]]
_LIST = "[]"  # marks the tensors of a list where only tensors can be kept


class FamilyError(DeloraError):
    """A pipeline that cannot be used; the message says which can."""


@dataclass(frozen=True)
class Setting:
    """What a denoiser may be told besides prompt and time.

    Attributes:
        height: of the picture, in pixels.
        width: the same.
        guidance: the guidance scale that a guidance-distilled model (FLUX dev) is to imitate.
    """

    height: int
    width: int
    guidance: float = 3.5


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A kind of model as LoRA files know it.

    Attributes:
        name: how it is asked for.
        denoiser: name of the denoiser among the pipeline's components.
        encoders: text encoders that LoRA files know, with their prefix in kohya's names; those of T5 are read by
            ComfyUI and Forge only.
        model_spec: `modelspec.architecture`, "" where no tool has agreed on one.
        base_version: kohya's `ss_base_model_version`, by which A1111 hides LoRAs that do not fit; "" as above.
        found: regex of the layers of the denoiser that ComfyUI, and other programs that draw with it, have names for;
            "" where they have none.
    """

    name: str
    denoiser: str
    encoders: Mapping[str, str] = field(default_factory=dict)
    model_spec: str = ""
    base_version: str = ""
    found: str = ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Attributes:
        name: how it is called in messages and files.
        pipelines: names of diffusers' text-to-image pipeline classes of it: what can be trained with.
        related: names of pipeline classes with the same denoiser: adapters can be loaded into them.
        denoiser: name of the denoiser among the pipeline's components.
        text_encoders: names of its text encoders there.
        encode_prompt: (pipeline, prompts) -> Conditioning; differentiable.
        encode_negative: (pipeline, negative prompt or None) -> Conditioning of one negative prompt as the pipeline
            makes it, or None where it uses none.
        blank: denoiser -> Conditioning of one prompt with the usual number of tokens, all zeros: for its shapes.
        predict: (denoiser, x_t, t, cond, setting) -> what the pipeline hands to `scheduler.step` for the latents x_t
            (B, C, H, W) and the scheduler's timesteps t (B,), as (B, C, H, W).
        sampling: pipeline -> the usual guidance_scale and num_inference_steps, and what else its call needs.
        guidance: name of the pipeline's argument for guidance_scale.
        patch: side of the square of latents that makes one token.
        half: the half precision in which its pictures are drawn on a GPU.
        trains_text: whether the text encoders can be adapted.
        flow_samplers: with flow matching, short names of the samplers that its pipelines can draw with.
        optional: those of the text encoders that the pipeline can do without.
        architectures: what LoRA files know it as; several where they tell its versions apart.
        blocks: regex of the parts of the denoiser that gradient checkpointing calls, and calls again.
        dead: for a component, regexes of Linear layers without influence on the prediction ({last}: the last block).
    """

    name: str
    pipelines: tuple[str, ...]
    related: tuple[str, ...]
    denoiser: str
    text_encoders: tuple[str, ...]
    encode_prompt: Callable[[Any, Sequence[str]], Conditioning]
    encode_negative: Callable[[Any, str | None], Conditioning | None]
    blank: Callable[[Any], Conditioning]
    predict: Callable[[nn.Module, Tensor, Tensor, Conditioning, Setting], Tensor]
    sampling: Callable[[Any], dict[str, Any]]
    architectures: tuple[Architecture, ...]
    guidance: str = "guidance_scale"
    patch: int = 1
    half: str = "bf16"
    trains_text: bool = True
    flow_samplers: tuple[str, ...] = ("euler",)
    optional: tuple[str, ...] = ()
    blocks: str = r"(single_)?transformer_blocks\.\d+"
    dead: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def components(self) -> tuple[str, ...]:
        """Names of the components that can carry an adapter."""
        return (self.denoiser, *self.text_encoders) if self.trains_text else (self.denoiser,)

    def multiple(self, pipe: DiffusionPipeline) -> int:
        """What height and width in pixels must be divisible by."""
        patchified = 2 if getattr(pipe.vae, "bn", None) is not None else 1
        return int(pipe.vae_scale_factor) * patchified * self.patch

    def dead_layers(self, component: str, module: nn.Module) -> list[str]:
        """Names of the Linear layers of a component that no gradient reaches."""
        names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
        found = []
        for pattern in self.dead.get(component, ()):
            container = pattern.partition("{last}")[0]
            blocks = [int(match[1]) for name in names if (match := re.match(rf"{container}(\d+)\.", name))]
            exact = pattern.replace("{last}", str(max(blocks, default=0)))
            found += [name for name in names if re.fullmatch(exact, name)]
        return found


def zeros(*sizes: int) -> Tensor:
    """Zeros for one prompt, (1, *sizes)."""
    return torch.zeros(1, *sizes)


def stack_conditioning(items: Sequence[Conditioning]) -> Conditioning:
    """One batch from several conditionings: concatenated, shorter token sequences (dimension 1) padded with zeros.

    A mask among them is padded as well and so tells the padding.
    """
    stacked: Conditioning = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if isinstance(values[0], list):
            stacked[key] = [tensor for value in values for tensor in value]
            continue
        tensors = [value for value in values if isinstance(value, Tensor)]
        if tensors[0].dim() > 1 and len({tensor.shape[1:] for tensor in tensors}) > 1:
            length = max(tensor.shape[1] for tensor in tensors)
            tensors = [pad(t, [0, 0] * (t.dim() - 2) + [0, length - t.shape[1]]) for t in tensors]
        stacked[key] = torch.cat(tensors)
    return stacked


def placed(cond: Conditioning, device: torch.device, dtype: torch.dtype | None = None) -> Conditioning:
    """A conditioning on a device, its floating-point tensors as `dtype`."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if dtype and tensor.is_floating_point() else tensor.dtype)

    return {k: [move(t) for t in value] if isinstance(value, list) else move(value) for k, value in cond.items()}


def to_tensors(cond: Conditioning) -> dict[str, Tensor]:
    """The conditioning of a single prompt as named tensors, for a file."""
    return {key + _LIST if isinstance(v, list) else key: v[0] if isinstance(v, list) else v for key, v in cond.items()}


def from_tensors(tensors: Mapping[str, Tensor]) -> Conditioning:
    """The inverse of `to_tensors`."""
    return {key.removesuffix(_LIST): [value] if key.endswith(_LIST) else value for key, value in tensors.items()}


def encoder_device(pipe: DiffusionPipeline, family_encoders: Sequence[str]) -> torch.device:
    """Where the text encoders work: where they are or, while they wait for their turn, where they will come."""
    for module in (getattr(pipe, name, None) for name in family_encoders):
        if module is not None:
            coming = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            return torch.device(coming or module.device)
    return torch.device("cpu")


def call_defaults(pipe: DiffusionPipeline, *names: str) -> dict[str, Any]:
    """Defaults of those arguments that the pipeline's call has; `encode_prompt` may have others for the same."""
    arguments = inspect.signature(type(pipe).__call__).parameters
    return {name: arguments[name].default for name in names if name in arguments}


def refuse_negative(pipe: DiffusionPipeline, prompt: str | None) -> None:
    """`encode_negative` of a family whose pipelines take no negative prompt."""
    if prompt is not None:
        raise FamilyError(f"{type(pipe).__name__} takes no negative prompt here; leave it out")
