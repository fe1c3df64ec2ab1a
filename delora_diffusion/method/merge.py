"""Merging adapters into the weights and out again, in fp32 and exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import DeloraError, WeightKindError
from .block_weights import listed, number
from .delora import DeloraLayer
from .inject import (
    Record,
    _swap_in,
    active_delora_adapters,
    adapted_layers,
    delora_layers,
    delora_names,
    known_adapter,
    layer_of,
    record_of,
    remove_delora,
    update_hooks,
)
from .kinds import Host, known_kind
from .lowrank import LowRank, added
from .offloaded import stored, written
from .weights import base_weight, dequantise, is_quantised

Plan = list[tuple[str, Host, DeloraLayer, dict[str, float]]]


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
    dequantize: bool = False,
) -> MergeReport:
    """Add the updates of adapters (the active ones if None) to the weights: in fp32, with one cast at the end.

    All layers are merged or, where one would not be finite, none. The base weights are kept for `unmerge_delora`,
    unless `permanently`: then layer by layer is replaced, nothing is kept, and all adapters are removed.

    Args:
        scale: multiplies the weight of every adapter that is merged.
        dtype: what merged weights are cast to, with `permanently`; the weight's own dtype if None.
        dequantize: let plain layers take the place of quantised ones, for good, so that they can be merged into.

    Raises:
        ValueError: an unknown or already merged adapter, or a layer that would not be finite (named).
        WeightKindError: a quantised layer, without `dequantize`.
    """
    if dtype is not None and not permanently:
        raise DeloraError("dtype is for merging permanently; without it the base could not be restored")
    record = record_of(module)
    names = active_delora_adapters(module) if adapter_names is None else listed(adapter_names)
    scale = number(scale, "scale")
    plan = _plan(module, record, names, scale=scale, permanently=permanently)
    if _made_plain(module, plan, dequantize):
        plan = _plan(module, record, names, scale=scale, permanently=permanently)
    updates = [_update(layer, merged) for _, _, layer, merged in plan]
    if permanently:
        _check_fits(plan, updates, names, dtype)
        _swap_in(module, record, list(dict.fromkeys(n for *_, merged in plan for n in merged)))
    before = [(layer, layer.base_weight, layer.merged) for _, _, layer, _ in plan]
    sizes, losses, ranges = [], [], []
    for (_, linear, layer, merged), update in zip(plan, updates, strict=True):
        weight, kept = written(linear).detach(), layer.base_weight
        keeping = None if permanently else weight.clone() if kept is None else kept
        lost, spread = _write_sum(linear, update, dtype or weight.dtype)
        layer.base_weight, layer.merged = keeping, {} if permanently else merged
        sizes.append(update.norm().double())
        losses.append(lost)
        ranges.append(spread)
    fits = torch.stack(ranges).isfinite().tolist() if ranges else []
    wrong = [path for (path, *_), fit in zip(plan, fits, strict=True) if not fit]
    if wrong and not permanently:
        _undo(plan, before)
        raise DeloraError(f"merging {names} gives values that are not finite in {wrong[0]}; no layer was changed")
    if permanently:
        _forget_base(module, record)
    else:
        update_hooks(module)
    size, loss = (float(torch.stack(parts).norm()) if parts else 0.0 for parts in (sizes, losses))
    return MergeReport(layers=len(plan), rounding_loss=loss / size if size else 0.0)


def _plan(module: nn.Module, record: Record, names: Sequence[str], *, scale: float, permanently: bool) -> Plan:
    """The layers to change, each with the weights of all the adapters that will be in it."""
    acting = active_delora_adapters(module)
    for name in names:
        known_adapter(record, name)
        if record.trained_in_full[name] and name not in acting and not permanently:
            raise DeloraError(f"adapter {name!r} trained parameters in full; make it active before merging it")
    plan: Plan = []
    for path, linear in delora_layers(module).items():
        layer = layer_of(linear)
        new = {n: scale * float(layer[n].delora_weight) for n in names if n in layer.adapters}
        if already := [n for n in new if n in layer.merged]:
            raise DeloraError(f"adapter {already[0]!r} is merged already; unmerge_delora first")
        if new:
            plan.append((path, linear, layer, {**layer.merged, **new}))
    _check_untied(module, plan)
    return plan


def _check_untied(module: nn.Module, plan: Plan) -> None:
    """Refuse a weight that another layer has as well, such as an embedding's in an output layer."""
    planned = {id(linear.weight): (path, linear) for path, linear, *_ in plan}
    for name, part in module.named_modules():
        for leaf, parameter in part._parameters.items():
            path, linear = planned.get(id(parameter), ("", part))
            if linear is not part:
                raise DeloraError(
                    f"{path} shares its weight with {name}.{leaf}, which merging would change as well; leave it out "
                    f"of the adapter (exclude_modules), or give it a weight of its own and set tie_word_embeddings "
                    f"to false"
                )


def _made_plain(module: nn.Module, plan: Plan, dequantize: bool) -> bool:
    """Whether there were quantised layers to merge into, which are plain then, or refused."""
    quantised = [path for path, linear, *_ in plan if is_quantised(linear)]
    if quantised and not dequantize:
        raise WeightKindError(
            f"{quantised[0]} is quantised, and an update would drown in its rounding; load the base unquantised to "
            f"merge into it, or pass dequantize=True to make its layers plain for good"
        )
    if quantised:
        dequantise(module)
        update_hooks(module)
    return bool(quantised)


def _update(layer: DeloraLayer, merged: dict[str, float]) -> LowRank:
    """The sum of the updates of the adapters in `merged`, each at its weight, in fp32."""
    parts = []
    for name, value in merged.items():
        current = float(layer[name].delora_weight)
        factors = layer[name].factors()
        parts.append(factors.scaled(value / current if current else 1.0) if current != value else factors)
    return added(parts)


def _write_sum(linear: Host, update: LowRank, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Put W + dW into a layer, cast to `dtype`: the norm of what the cast lost, and a number that is not finite
    where the sum is not. Both stay on the device, in fp64."""
    base, weight = base_weight(linear), written(linear)
    exact = _sum(base, update)
    cast = exact.to(dtype)
    if cast is exact:
        lost, spread = exact.new_zeros((), dtype=torch.float64), (exact.amax() - exact.amin()).double()
    else:
        lost = spread = torch.linalg.vector_norm(exact.sub_(base.copy_(cast))).double()
    if cast.dtype == weight.dtype:  # in place: new tensors beside old ones would fragment the memory
        weight.copy_(known_kind(linear).as_weight(cast, weight.shape))
    else:
        linear.weight.data = known_kind(linear).as_weight(cast, weight.shape).contiguous()
    return lost, spread


def _sum(weight: Tensor, update: LowRank) -> Tensor:
    """W + dW in fp32, where W is."""
    return torch.addmm(weight.float(), update.up.to(weight.device), update.down.to(weight.device))


def _check_fits(plan: Plan, updates: Sequence[LowRank], names: Sequence[str], dtype: torch.dtype | None) -> None:
    """Refuse a merge that could not be undone and would not be finite. Sizes tell: |W + dW| <= max |W| + |dW|_F."""
    for (path, linear, _, _), update in zip(plan, updates, strict=True):
        cast = dtype or linear.weight.dtype
        if linear.weight.is_meta and cast != linear.weight.dtype:
            raise DeloraError(f"{path} is offloaded and cannot become {cast} there; merge before offloading")
        low, high = torch.aminmax(stored(linear, "weight"))
        if bool(high.float() - low.float() + update.norm() < torch.finfo(cast).max):
            continue
        if not _sum(base_weight(linear), update).to(cast).isfinite().all():
            raise DeloraError(f"merging {names} gives values that are not finite in {path}; no layer was changed")


def _undo(plan: Plan, before: Sequence[tuple[DeloraLayer, Tensor | None, dict[str, float]]]) -> None:
    """Put back what was in the weights: the base's, or that and what had been merged before."""
    for (_, linear, _, _), (layer, kept, merged) in zip(plan, before, strict=True):
        layer.restore(linear)
        if kept is not None:
            layer.base_weight, layer.merged = kept, merged
            update = _update(layer, merged)
            kind, there = known_kind(linear), written(linear)
            there.copy_(kind.as_weight(_sum(kind.matrix(kept), update).to(there.dtype), there.shape))


@torch.no_grad()
def unmerge_delora(module: nn.Module) -> None:
    """Restore the weights of the base, bit for bit. Does nothing where nothing is merged."""
    for linear, layer in adapted_layers(module):
        layer.restore(linear)
    if delora_names(module):
        update_hooks(module)


def _forget_base(module: nn.Module, record: Record) -> None:
    """Let the merged weights be the base from now on, and take all adapters out."""
    for _, layer in adapted_layers(module):
        layer.base_weight, layer.merged = None, {}
    record.base_values, record.in_place = {}, {}
    for full in record.trained_in_full.values():
        full.clear()
    remove_delora(module)
