"""Is an exported file the adapter it came from? Layer by layer, and by the names each program looks up."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.peft import CONFIG_NAME
from ..adapters.safetensors_file import described, read_tensors
from ..families import Architecture
from ..method.lowrank import LowRank, distance
from ..method.targets import is_target
from ..run_folder import LORA_NAME
from .clients import CLIENTS, found_by
from .combine import Updates, gathered, known_architecture, summed
from .lora_names import LoraError, canonical, lora_name, tensor_endings, unreadable
from .original_names import PREFIX, joined


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """How an exported file compares with its adapter.

    Attributes:
        layers: adapted layers of the adapter.
        missing: those that the file lacks.
        unexpected: layers that change something in the file alone.
        largest_error: largest |dW_file - dW_adapter|_F / |dW_adapter|_F of a layer, and `worst`, that layer.
        loaders: for each program, how many of the layers its loader finds in the file.
        remarks: for some programs, what to know of that number.
    """

    layers: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    largest_error: float
    worst: str
    loaders: dict[str, int]
    remarks: dict[str, str] = field(default_factory=dict)

    def agrees(self, tolerance: float) -> bool:
        """Whether the file is the adapter, up to a relative error of `tolerance` in every layer."""
        return not self.missing and not self.unexpected and self.largest_error <= tolerance

    def __str__(self) -> str:
        lines = [f"{self.layers} layers; largest relative error of dW {self.largest_error:.2e}, in {self.worst}"]
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"{len(names)} {what}: {', '.join(names[:5])}")
        for name, count in self.loaders.items():
            remark = f": {said}" if (said := self.remarks.get(name)) else ""
            lines.append(f"{count}/{self.layers} layers found by {_title(name)}{remark}")
        return "\n".join(lines)


def _title(loader: str) -> str:
    """What a loader is called, with the version that is here or that its tables are of."""
    if loader in CLIENTS:
        return CLIENTS[loader].title
    if loader == "peft":
        return "PEFT 0.21's format"
    import diffusers

    return f"diffusers {diffusers.__version__}"


def verify_lora(
    file: str | Path,
    source: Any,
    *,
    weights: float | Sequence[float] = 1.0,
    component: str | None = None,
    architecture: str | None = None,
    adapter_name: str = "default",
    text_encoders: bool = True,
) -> VerifyReport:
    """Compare a LoRA file, or PEFT's folders, with the adapter (or the sum of adapters) it was exported from.

    The diffusers count is of layers that diffusers' own conversion brings to their place with the file's own values;
    PEFT's of those that its configuration targets; the others are counted by the names those programs look up, in
    the versions that `clients.CLIENTS` names.

    Args:
        file: the LoRA, a folder that holds `pytorch_lora_weights.safetensors`, or one that holds PEFT's.
        source, weights, component, architecture, adapter_name, text_encoders: what `export_lora` was given.

    Raises:
        AdapterFileError, LoraError: one of them cannot be read, or the file is no LoRA.
    """
    path = Path(file)
    adapters = gathered(source, component=component, adapter_name=adapter_name, text_encoders=text_encoders)
    if not (path / LORA_NAME).is_file() and [*path.glob(CONFIG_NAME), *path.glob(f"*/{CONFIG_NAME}")]:
        updates, _ = summed(adapters, weights, allow_partial=True)
        (exported,) = gathered(path, component=component)
        inside = _by_name(summed([exported], 1.0, allow_partial=True)[0], "diffusers", None)
        return _compared(inside, _by_name(updates, "diffusers", None), {"peft": _found_by_peft(exported, updates)})
    path = path / LORA_NAME if path.is_dir() else path
    tensors, header = read_tensors(path)
    if not any("lora_" in name.rpartition(".")[0] for name in tensors):
        raise LoraError(f"{path} is no LoRA: {described(tensors, header)}")
    family = known_architecture(adapters, architecture)
    style = "kohya" if any(name.endswith(".lora_down.weight") for name in tensors) else "diffusers"
    style = "original" if any(name.startswith(PREFIX) for name in tensors) else style
    inside = {name: (name, factors) for name, factors in _updates_in(tensors, style).items()}
    format = "comfyui" if any(re.match(r"lora_te\d_encoder_block_", name) for name in inside) else style
    nameless = functools.partial(unreadable, format=format, architecture=family)
    updates, _ = summed(adapters, weights, allow_partial=True, nameless=nameless)
    loaders, remarks = {"diffusers": _found_by_diffusers(tensors, updates) if style != "original" else 0}, {}
    if style == "original":
        remarks["diffusers"] = "original names are for ComfyUI; give diffusers the other format"
    layers = [(component, layer) for component, layers_of in updates.items() for layer in layers_of]
    for program in CLIENTS:
        loaders[program], remarks[program] = found_by(program, inside, layers, family)
    if style == "original":
        updates = updates | {"transformer": joined(updates.get("transformer", {}), family)}
    compared = _compared(inside, _by_name(updates, style, family), loaders)
    return dataclasses.replace(compared, layers=len(layers), remarks=remarks)


#: name in a file -> (what to call it, its update)
_Named = Mapping[str, tuple[str, LowRank]]


def _by_name(updates: Updates, style: str, architecture: Architecture | None) -> dict[str, tuple[str, LowRank]]:
    return {
        lora_name(style, component, layer, architecture): (f"{component}.{layer}", factors)
        for component, layers in updates.items()
        for layer, factors in layers.items()
    }


def _compared(inside: _Named, wanted: _Named, loaders: dict[str, int]) -> VerifyReport:
    """What a file holds beside what it should hold, both by the names in the file."""
    missing, largest, worst = [], -1.0, "none"
    for name, (layer, factors) in wanted.items():
        if name not in inside:
            missing.append(layer)
            continue
        there = inside[name][1]
        if there.down.shape[1] != factors.down.shape[1] or there.up.shape[0] != factors.up.shape[0]:
            raise LoraError(
                f"{layer} is {there.up.shape[0]} x {there.down.shape[1]} in the file, and {factors.up.shape[0]} x "
                f"{factors.down.shape[1]} in the adapter; the file is for another base"
            )
        whole, off = float(factors.norm()), distance(there, factors)
        error = off / whole if whole else (0.0 if off == 0 else float("inf"))
        if error > largest:
            largest, worst = error, layer
    unexpected = tuple(
        called for name, (called, layers_of) in inside.items() if name not in wanted and layers_of.norm() > 0
    )
    return VerifyReport(
        layers=len(wanted),
        missing=tuple(missing),
        unexpected=unexpected,
        largest_error=max(largest, 0.0),
        worst=worst,
        loaders=loaders,
    )


def _updates_in(tensors: Mapping[str, Tensor], style: str) -> dict[str, LowRank]:
    """Every layer's update in a LoRA file, by its name there; alpha / rank is multiplied in."""
    down_end, up_end = tensor_endings(style)
    found = {}
    for name, down in tensors.items():
        layer = name.removesuffix(down_end)
        if layer == name:
            continue
        if layer + up_end not in tensors:
            raise LoraError(f"{layer + up_end} is missing beside {name}; the file is incomplete, export it again")
        up, alpha = tensors[layer + up_end], tensors.get(f"{layer}.alpha")
        sizes = min(down.dim(), up.dim()) >= 2 and down.shape[0] == up.shape[1] and 0 not in (*down.shape, *up.shape)
        if not sizes or not (down.is_floating_point() and up.is_floating_point()):
            raise LoraError(
                f"{name} {tuple(down.shape)} and {layer + up_end} {tuple(up.shape)} are no halves of one update; the "
                f"file is damaged, export it again"
            )
        if alpha is not None and alpha.numel() != 1:
            raise LoraError(f"{layer}.alpha holds {alpha.numel()} numbers; the file is damaged, export it again")
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        found[layer] = LowRank(down.float().flatten(1), up.float().flatten(1) * scale)  # convolutions have four
    return found


def _found_by_peft(exported: Adapter, updates: Updates) -> int:
    """How many layers are in PEFT's folders and named by their configuration, without which PEFT adapts none."""
    layers = [(component, layer) for component, layers_of in updates.items() for layer in layers_of]
    return sum(
        f"{layer}.delora_A" in exported.tensors.get(component, ())
        and is_target(exported.configs[component], layer, nn.Linear(1, 1), nn.Module())
        for component, layer in layers
    )


def _found_by_diffusers(tensors: Mapping[str, Tensor], updates: Updates) -> int:
    """How many layers diffusers' reader puts where they belong, after its conversion of the file's names."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    count = 0
    try:
        state, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(tensors))
    except (ValueError, KeyError, IndexError, AttributeError, TypeError):  # names that its conversion does not know
        return 0
    for component, layers in updates.items():
        part = {k.removeprefix(f"{component}."): t for k, t in state.items() if k.startswith(f"{component}.")}
        try:
            if component.startswith("text_encoder"):
                part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
            elif not any("lora_A" in key for key in part):
                part = convert_unet_state_dict_to_peft(part)
        except ValueError:  # diffusers cannot tell what the file is, and would refuse it
            part = {}
        count += sum(f"{canonical(component, layer)}.lora_A.weight" in part for layer in layers)
    return count
