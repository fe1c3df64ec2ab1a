"""What adapters change: their updates, layer by layer and as thin factors, from any source, added up or compressed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..adapters.adapter import Adapter, adapted, check_layers, update_of
from ..adapters.safetensors_file import AdapterFileError
from ..adapters.sources import as_adapter
from ..errors import DeloraError
from ..families import Architecture
from ..method.block_weights import number, weights_of
from ..method.lowrank import LowRank, added
from ..method.weights import NORM_TOLERANCE
from .lora_names import ARCHITECTURES, DENOISERS, LoraError, architecture_of

#: component -> layer -> its update.
Updates = dict[str, dict[str, LowRank]]


def gathered(
    source: Any, *, component: str | None, adapter_name: str = "default", text_encoders: bool = True
) -> list[Adapter]:
    """Adapters in memory from whatever `export_lora` takes, each part under the name of its component.

    Args:
        text_encoders: False leaves their parts out.

    Raises:
        LoraError: no adapter, one that does not say what it is for, or nothing but text encoders to leave out.
    """
    sources = list(source) if isinstance(source, (list, tuple)) else [source]
    if not sources:
        raise LoraError("there is nothing to export; give at least one adapter")
    adapters = [_of_component(one, component, adapter_name) for one in sources]
    return adapters if text_encoders else [_denoiser_part(adapter) for adapter in adapters]


def _denoiser_part(adapter: Adapter) -> Adapter:
    kept = [component for component in adapter.tensors if component in DENOISERS]
    if not kept:
        raise LoraError(
            f"the adapter is for {', '.join(adapter.tensors)} alone; nothing is left without text encoders"
        )
    tensors = {component: adapter.tensors[component] for component in kept}
    return Adapter(tensors, {component: adapter.configs[component] for component in kept}, adapter.provenance)


def _of_component(source: Any, component: str | None, adapter_name: str) -> Adapter:
    """The adapter, under the name of its component: a PEFT folder, or a module alone, does not say which that is."""
    adapter = None if component is None and isinstance(source, nn.Module) else as_adapter(source, adapter_name)
    if adapter is not None and "" not in adapter.tensors:
        return adapter
    if adapter is None or component is None:
        raise LoraError(
            "a PEFT folder, or a module alone, does not say which component of a pipeline it is for; say it: "
            "component unet, transformer, text_encoder or text_encoder_2"
        )
    return Adapter({component: adapter.tensors[""]}, {component: adapter.configs[""]}, adapter.provenance)


def summed(
    adapters: Sequence[Adapter],
    weights: float | Sequence[float],
    *,
    allow_partial: bool,
    nameless: Callable[[str, str], bool] = lambda component, layer: False,
) -> tuple[Updates, tuple[str, ...]]:
    """The weighted sum of adapters, layer by layer and exact, and notes on what was left out or widened.

    Args:
        allow_partial: leave out what a LoRA cannot hold, instead of refusing.
        nameless: (component, layer) -> whether the file that is to be written has no name for a layer.

    Raises:
        AdapterFileError: an adapter that is incomplete or not finite.
        LoraError: a wrong number of weights, adapters of different bases, or something that thin factors cannot hold.
    """
    try:
        values = [number(weight, "adapter") for weight in weights_of(len(adapters), weights)]
    except DeloraError as error:
        raise LoraError(str(error)) from error
    if not all(math.isfinite(value) for value in values):
        raise LoraError(f"weights are {values}; they must be finite")
    parts: dict[str, dict[str, list[LowRank]]] = {}
    left_out: list[str] = []
    norms: dict[str, Tensor] = {}
    residual = False
    for adapter, value in zip(adapters, values, strict=True):
        for component, tensors in adapter.tensors.items():
            layers, full = _by_layer(component, tensors)
            unnamed = {layer for layer in layers if nameless(component, layer)}
            left_out += full + [f"{component}.{layer}" for layer in layers if layer in unnamed]
            for layer, named in layers.items():
                if layer not in unnamed:
                    _check_same_base(f"{component}.{layer}", named["delora_w_norm"], norms)
                    residual |= "delora_A_init" in named
                    members = parts.setdefault(component, {}).setdefault(layer, [])
                    members.append(update_of(f"{component}.{layer}", named, value))
    if left_out and not allow_partial:
        raise LoraError(
            f"a LoRA cannot hold {len(left_out)} parts of this adapter ({', '.join(left_out[:3])}): parameters "
            f"trained in full, or layers that its readers have no names for (T5 goes into format comfyui). "
            f"Merge the adapter into the base instead, or leave them out with allow_partial"
        )
    if not parts:
        raise LoraError("nothing is left that a LoRA can hold; no file was written")
    notes = [f"left out: {', '.join(left_out)}"] if left_out else []
    if residual:
        notes.append("init_weights residual: the frozen initial update is part of it, so the rank is 2r")
    return {c: {layer: added(members) for layer, members in layers.items()} for c, layers in parts.items()}, tuple(
        notes
    )


def kernels(adapters: Sequence[Adapter]) -> dict[tuple[str, str], tuple[int, ...]]:
    """(component, layer) -> channels, height and width of what an adapted convolution reads."""
    return {
        (component, layer): tuple(tensors[f"{layer}.delora_A"].shape[1:])
        for adapter in adapters
        for component, tensors in adapter.tensors.items()
        for layer in adapted(tensors)
        if tensors[f"{layer}.delora_A"].ndim == 4
    }


def _check_same_base(layer: str, w: Tensor, norms: dict[str, Tensor]) -> None:
    """Compare a layer's column norms with those that an earlier adapter brought, which `norms` collects."""
    known = norms.setdefault(layer, w)
    if known.shape != w.shape or float((w - known).norm()) > NORM_TOLERANCE * float(known.norm()):
        raise LoraError(
            f"these adapters were trained on different bases: the column norms of {layer} differ; add up adapters of "
            f"one base"
        )


def _by_layer(component: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors of each adapted layer (fp32, on the CPU), and the names of parameters trained in full."""
    check_layers(tensors, where=f"{component}.")
    layers: dict[str, dict[str, Tensor]] = {}
    full = []
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf.startswith("delora_"):
            layers.setdefault(layer, {})[leaf] = tensor.detach().float().cpu()
        else:
            full.append(f"{component}.{name}")
    for layer, named in layers.items():
        if wrong := [leaf for leaf, tensor in named.items() if not tensor.isfinite().all()]:
            raise AdapterFileError(f"{component}.{layer}.{wrong[0]} is not finite; the adapter is of no use")
    return layers, full


def compressed_updates(updates: Updates, rank: int) -> tuple[Updates, tuple[str, ...]]:
    """Every layer at `rank` at most, and a note on the error."""
    if rank < 1:
        raise LoraError(f"rank is {rank}; it must be at least 1")
    shorter: Updates = {}
    lost = size = 0.0
    worst, where = 0.0, ""
    for component, layers in updates.items():
        for layer, factors in layers.items():
            shorter.setdefault(component, {})[layer], error = factors.compressed(rank)
            whole = float(factors.norm())
            lost, size = lost + error**2, size + whole**2
            if whole and error / whole > worst:
                worst, where = error / whole, f"{component}.{layer}"
    share = math.sqrt(lost / size) if size else 0.0
    at = f", at most {worst:.2%}, in {where}" if where else ""
    return shorter, (f"compressed to rank {rank}: {share:.2%} of the update is lost{at}",)


def known_architecture(adapters: Sequence[Adapter], asked: str | None) -> Architecture | None:
    """The family that was asked for, else the one that the adapters' header and shapes tell."""
    if asked is not None:
        if asked not in ARCHITECTURES:
            raise LoraError(f"architecture is {asked!r}; choose one of {', '.join(ARCHITECTURES)}")
        return ARCHITECTURES[asked]
    provenance = adapters[0].provenance
    widths: dict[str, dict[str, int]] = {}
    for component, tensors in ((c, t) for adapter in adapters for c, t in adapter.tensors.items()):
        rows = {layer: tensors[f"{layer}.delora_A"].shape[1] for layer in adapted(tensors)}
        widths[component] = widths.get(component, {}) | rows
    return architecture_of(
        widths, pipeline=provenance.get("pipeline", ""), prediction_type=provenance.get("prediction_type", "")
    )
