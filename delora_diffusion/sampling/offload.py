"""Where a pipeline's components are while it draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@contextlib.contextmanager
def components_on(
    pipe: DiffusionPipeline, device: torch.device, *, offload: bool, staying: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """The whole pipeline on `device`, where it stays; with `offload`, `in_turn`.

    Args:
        staying: components that are on `device` and are not moved.
    """
    if not offload:
        for part in _others(pipe, staying) if staying else [pipe]:
            part.to(device)
    with in_turn(pipe, device, staying=staying) if offload else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def in_turn(pipe: DiffusionPipeline, device: torch.device, *, staying: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Draw with less memory: components wait in the CPU's memory and come to `device` for their turn, one at a time.

    Like diffusers' `enable_model_cpu_offload`, but for a while, with components that stay, and with all others sent
    away, not only the one before in a chain: of two text encoders that are called in turns, both would stay there.
    Pictures are decoded one by one: decoding several at once takes more memory than many a denoiser.

    Args:
        staying: components that are on `device` and are not moved.
    """
    from accelerate import cpu_offload_with_hook

    hooks = [cpu_offload_with_hook(module, device)[1] for module in _others(pipe, staying)]
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


def _others(pipe: DiffusionPipeline, staying: Sequence[nn.Module]) -> list[Any]:
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return [part for part in parts if all(part is not module for module in staying)]


def _alone(come: Callable[..., Any], others: Sequence[Any]) -> Callable[..., Any]:
    """What accelerate calls when a component is used: the others leave before it comes."""

    def others_leave_first(*args: Any, **kwargs: Any) -> Any:
        for other in others:
            other.offload()
        return come(*args, **kwargs)

    return others_leave_first
