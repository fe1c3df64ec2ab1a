"""LoRAs of transformers by original names, `diffusion_model.<path>`: what ComfyUI looks up for every model it has.

Layers that are one in the original are one in the file: their `down` stand one below the other, their `up` on the
diagonal, so the update is the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..families import Architecture
from ..families.original import TRANSFORMERS, Place, swapped_halves, transformer_place
from ..method.lowrank import LowRank
from .lora_names import LoraError

PREFIX = "diffusion_model."


def original_path(layer: str, architecture: Architecture | None) -> str | None:
    """The original path of a layer of a transformer; None where there is none."""
    place = _place(layer, architecture)
    return None if place is None else place.name.removesuffix(".weight")


def _place(layer: str, architecture: Architecture | None) -> Place | None:
    if architecture is None or architecture.name not in TRANSFORMERS:
        return None
    return transformer_place(architecture.name, f"{layer}.weight")


def joined(layers: Mapping[str, LowRank], architecture: Architecture | None) -> dict[str, LowRank]:
    """The updates of a transformer by original paths.

    Raises:
        LoraError: no original layout, a layer without a counterpart, or too few parts of one to know its size.
    """
    found: dict[str, dict[int, LowRank]] = {}
    sizes: dict[str, int] = {}
    for layer, factors in layers.items():
        place = _place(layer, architecture)
        if place is None:
            name = architecture.name if architecture else "an architecture that is not known (say which)"
            raise LoraError(f"there is no original name for transformer.{layer} of {name}; use format diffusers")
        if place.swapped and factors.up.shape[0] == 2 * factors.down.shape[1]:
            factors = LowRank(factors.down, swapped_halves(factors.up))
        path = place.name.removesuffix(".weight")
        found.setdefault(path, {})[place.part], sizes[path] = factors, place.parts
    return {path: _diagonal(path, parts, sizes[path]) for path, parts in found.items()}


def _diagonal(path: str, parts: Mapping[int, LowRank], count: int) -> LowRank:
    if count == 1:
        return parts[0]
    inputs = next(iter(parts.values())).down.shape[1]
    rows = {number: factors.up.shape[0] for number, factors in parts.items()}
    if count == 3:  # keys and values are of one size; queries are as wide as what they read
        rows |= {number: rows[3 - number] for number in (1, 2) if number not in rows and 3 - number in rows}
        rows.setdefault(0, inputs)
    if len(rows) != count:
        raise LoraError(
            f"{path} is {count} layers in one, and the adapter has {len(parts)} of them, which does not tell the size "
            f"of the others; use format diffusers"
        )
    down = torch.cat([parts[number].down for number in sorted(parts)])
    blocks = [parts[n].up if n in parts else torch.zeros(rows[n], 0) for n in range(count)]
    return LowRank(down, torch.block_diag(*blocks))  # type: ignore[no-untyped-call]
