"""A denoiser made faster without a change of its names or weights: compiled blocks, a layout for convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..options import OptionError

#: What the option `compile` is, wherever there is a denoiser.
COMPILE = "compile the denoiser's repeated blocks: the first steps take minutes, all later ones less time"
#: Variants of one block that torch keeps before it falls back to plain execution: shapes, training and drawing.
_VARIANTS = 64


def compile_blocks(denoiser: nn.Module, device: torch.device, **how: Any) -> None:
    """Compile the blocks of a denoiser that repeat, in place, or the whole of it where diffusers names none.

    Adapters, their strengths and the lambda ramp may change afterwards without anything being compiled again.

    Args:
        device: where it will work.
        how: options of `torch.compile`.

    Raises:
        OptionError: torch cannot compile on this machine.
    """
    _check_compiler(device, how)
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    module: Any = denoiser
    if getattr(module, "_repeated_blocks", None):
        module.compile_repeated_blocks(**how)
    else:
        module.compile(**how)


def _check_compiler(device: torch.device, how: Mapping[str, Any]) -> None:
    """Compile one addition, so that a machine without a compiler says so now and in a sentence."""
    try:
        torch.compile(_plus_one, **how)(torch.zeros(2, device=device))
    except Exception as error:  # whatever a missing C++ compiler or Triton raises
        raise OptionError(
            f"compile: torch cannot compile for {device.type} here ({str(error).strip().splitlines()[0]}); "
            f"install a C++ compiler (CPU) or triton (GPU), or leave compile out"
        ) from error


def _plus_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def to_channels_last(denoiser: nn.Module) -> None:
    """Lay out a UNet's convolutions as the fast kernels of GPUs in half precision read them.

    Raises:
        OptionError: a transformer, which has no convolutions to gain by it.
    """
    if not any(isinstance(module, nn.Conv2d) and module.kernel_size != module.stride for module in denoiser.modules()):
        raise OptionError(f"channels_last: {type(denoiser).__name__} has no convolutions to gain by it; leave it out")
    denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def attention_of(denoiser: nn.Module) -> str:
    """Which attention a denoiser computes, in words."""
    processors = getattr(denoiser, "attn_processors", None) or {}
    names = sorted({type(processor).__name__ for processor in processors.values()})
    backends = {getattr(processor, "_attention_backend", None) for processor in processors.values()} - {None}
    chosen = ", ".join(sorted(str(getattr(backend, "value", backend)) for backend in backends)) or "torch's own choice"
    return f"{', '.join(names) or 'its own'} on {chosen}"
