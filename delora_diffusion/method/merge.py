"""Merging adapters into the weights and out again, in fp32 and exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .block_weights import listed
from .delora import DeloraLayer, base_weight
from .inject import (
    Record,
    _swap_in,
    active_delora_adapters,
    adapted_layers,
    delora_layers,
    known_adapter,
    layer_of,
    record_of,
    remove_delora,
)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: layers changed, and |cast(W + dW) - (W + dW)|_F / |dW|_F, the part of dW lost to rounding."""

    layers: int
    rounding_loss: float


@torch.no_grad()
def merge_delora(
    module: nn.Module,
    adapter_names: str | Sequence[str] | None = None,
    *,
    scale: float = 1.0,
    permanently: bool = False,
    dtype: torch.dtype | None = None,
) -> MergeReport:
    """Add the updates of adapters (the active ones if None) to the weights: in fp32, with one cast at the end.

    Every layer is checked before the first is touched. The base weights are kept for `unmerge_delora`, unless
    `permanently`: then layer by layer is replaced, nothing is kept, and all adapters are removed.

    Args:
        scale: multiplies the weight of every adapter that is merged.
        dtype: what merged weights are cast to, with `permanently`; the weight's own dtype if None.

    Raises:
        ValueError: an unknown or already merged adapter, or a layer that would not be finite (named).
        TypeError: a quantised layer.
    """
    if dtype is not None and not permanently:
        raise ValueError("dtype is for merging permanently; without it the base could not be restored")
    record = record_of(module)
    names = active_delora_adapters(module) if adapter_names is None else listed(adapter_names)
    plan = _plan(module, record, names, scale=scale, permanently=permanently)
    for path, linear, layer, merged in plan:
        if not _merged_weight(linear, layer, merged).to(dtype or linear.weight.dtype).isfinite().all():
            raise ValueError(f"merging {names} gives values that are not finite in {path}; no layer was changed")
    if permanently:
        _swap_in(module, record, list(dict.fromkeys(n for *_, merged in plan for n in merged)))
    lost = size = 0.0
    for _, linear, layer, merged in plan:
        exact = _merged_weight(linear, layer, merged)
        base = linear.weight.detach() if layer.base_weight is None else layer.base_weight
        size += float((exact - base.float()).square().sum())
        cast = exact.to(dtype or linear.weight.dtype)
        lost += float((cast.float() - exact).square().sum())
        if permanently:
            layer.base_weight, layer.merged = None, {}
        else:
            layer.base_weight, layer.merged = base.clone() if layer.base_weight is None else base, merged
        if cast.dtype == linear.weight.dtype:  # in place: new tensors beside old ones would fragment the memory
            linear.weight.copy_(cast)
        else:
            linear.weight.data = cast
    if permanently:
        _forget_base(module, record)
    return MergeReport(layers=len(plan), rounding_loss=math.sqrt(lost / size) if size else 0.0)


Plan = list[tuple[str, nn.Linear, DeloraLayer, dict[str, float]]]


def _plan(module: nn.Module, record: Record, names: Sequence[str], *, scale: float, permanently: bool) -> Plan:
    """The layers to change, each with the weights of all the adapters that will be in it."""
    acting = active_delora_adapters(module)
    for name in names:
        known_adapter(record, name)
        if record.trained_in_full[name] and name not in acting and not permanently:
            raise ValueError(f"adapter {name!r} trained parameters in full; make it active before merging it")
    plan: Plan = []
    for path, linear in delora_layers(module).items():
        layer = layer_of(linear)
        new = {n: scale * float(layer[n].delora_weight) for n in names if n in layer.adapters}
        if already := [n for n in new if n in layer.merged]:
            raise ValueError(f"adapter {already[0]!r} is merged already; unmerge_delora first")
        if not linear.weight.is_floating_point() or type(linear.weight.data) is not Tensor:
            raise TypeError(f"{path} is quantised ({linear.weight.dtype}); load the base unquantised to merge into it")
        if new:
            plan.append((path, linear, layer, {**layer.merged, **new}))
    return plan


def _merged_weight(linear: nn.Linear, layer: DeloraLayer, merged: dict[str, float]) -> Tensor:
    """W plus the updates of the adapters in `merged`, each at its weight, in fp32."""
    weight = base_weight(linear)
    for name, value in merged.items():
        adapter = layer[name]
        down, up = adapter.factors()
        current = float(adapter.delora_weight)
        if current != value:
            up = up * (value / current) if current else up
        weight = torch.addmm(weight, up, down)
    return weight


@torch.no_grad()
def unmerge_delora(module: nn.Module) -> None:
    """Restore the weights of the base, bit for bit. Does nothing where nothing is merged."""
    for linear, layer in adapted_layers(module):
        layer.restore(linear)


def _forget_base(module: nn.Module, record: Record) -> None:
    """Let the merged weights be the base from now on, and take all adapters out."""
    for _, layer in adapted_layers(module):
        layer.base_weight, layer.merged = None, {}
    record.base_values = {}
    for full in record.trained_in_full.values():
        full.clear()
    remove_delora(module)
