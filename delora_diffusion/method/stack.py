"""The factors of all adapters of a module, formed together once in a forward pass.

A GPU at batch 1 waits for operations, not for arithmetic. So layers of one shape are stacked, and `down` and `up` of
all of them come from a few dozen operations at the start of the adapted module's forward; a layer then does what a
LoRA does. They belong to that forward pass: nothing is kept for the next, so nothing is stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .delora import DeloraAdapter, DeloraLayer, form_factors
from .forward_pass import ForwardPass
from .kinds import Host
from .weights import weight_dtype

#: Arguments of diffusers' denoisers in which a pipeline's call hands along a scale for its adapters.
SCALE_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def start_forward(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The forward pre-hook of an adapted module: form the factors of every adapter that acts."""
    record: Any = module._delora
    scale = scale_of(kwargs)
    for _, layer in record.layers if scale != 1 else ():
        layer.scale = scale
    for place in record.fused:
        if place.moved():
            place.attach()
    if torch.compiler.is_compiling() or waits(module) or (torch.is_grad_enabled() and has_compiled_parts(module)):
        return  # a compiler fuses the operations itself; weights that come later are read where they have come
    stacks: dict[tuple[Any, ...], list[tuple[DeloraLayer, str, DeloraAdapter]]] = {}
    current = ForwardPass() if torch.is_grad_enabled() else None
    for linear, layer in record.layers:
        names = layer.acting()
        if current is not None:
            current.acting[layer] = names
        for name in names:
            adapter = layer[name]
            if name in record.configs and not waits(adapter) and not layer.kind.gathers:
                stacks.setdefault((name, *adapter.kind(), compute_dtype(linear, adapter)), []).append(
                    (layer, name, adapter)
                )
    for key, members in stacks.items():
        down, up = form_factors([adapter for *_, adapter in members], dtype=key[-1], scale=scale, owner=current)
        for place, (layer, name, _) in enumerate(members):
            layer.factors[name] = down[place], up[place]
            if current is not None:
                current.values[layer, name] = down[place].detach(), up[place].detach(), down[place].requires_grad


def end_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The forward hook of an adapted module, which is called whatever happens: layers forget their factors."""
    record: Any = module._delora
    for _, layer in record.layers:
        layer.factors.clear()
        if layer.scale != 1:
            layer.scale = 1.0


def scale_of(kwargs: Mapping[str, Any]) -> float:
    """The scale that the caller of a denoiser asks for in this forward pass; 1 if it does not."""
    asked = [kwargs[name] for name in SCALE_ARGUMENTS if isinstance(kwargs.get(name), Mapping)]
    return float(next((own["scale"] for own in asked if "scale" in own), 1.0))


def waits(module: nn.Module) -> bool:
    """Whether accelerate or diffusers may bring the weights of a module within its forward, after our pre-hook.

    A pipeline's `cache_context` leaves an empty registry of hooks on a denoiser, which brings nothing.
    """
    registry = module.__dict__.get("_diffusers_hook")
    return "_hf_hook" in module.__dict__ or bool(registry is not None and registry.hooks)


def has_compiled_parts(module: nn.Module) -> bool:
    """Whether blocks of a module are compiled: computed again in a backward pass, they cannot ask for its factors."""
    return any(part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in module.modules())


def compute_dtype(linear: Host, adapter: DeloraAdapter) -> torch.dtype:
    """The precision in which a layer will be asked for its update, where its adapter is: its weight may come later."""
    kind, dtype = adapter.delora_A.device.type, weight_dtype(linear)
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
