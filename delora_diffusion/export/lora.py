"""Adapters as LoRA files: what diffusers, ComfyUI, A1111 and Forge open, with the same update to rounding.

A DeLoRA update is a product of two thin matrices already (`delora.factors_of`), so a LoRA of the same rank holds it
exactly, and nothing is fitted. Several adapters become one LoRA whose ranks add up.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, is_native
from ..adapters.safetensors_file import write_tensors
from ..atomic import complete_file
from ..families import Architecture
from ..method.lowrank import LowRank
from ..run_folder import ADAPTER_NAME, LORA_NAME
from .clients import CLIENTS, found_by
from .combine import Updates, compressed_updates, gathered, kernels, known_architecture, summed
from .lora_header import lora_header, recommended_strength, write_sidecar
from .lora_names import LoraError, lora_name, missing_attention, style_of, tensor_endings, unreadable
from .original_names import joined, original_path

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written: the file, whose names it has, its one rank, layers of each component, and what to know."""

    path: Path
    style: str
    rank: int
    layers: dict[str, int]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        counted = ", ".join(f"{number} layers of {component}" for component, number in self.layers.items())
        return "\n".join([f"{self.path}: rank {self.rank}, {counted}, {self.style} names", *self.notes])


def export_lora(
    source: Any,
    destination: str | Path,
    *,
    format: str = "diffusers",
    weights: float | Sequence[float] = 1.0,
    rank: int | None = None,
    dtype: str = "fp32",
    component: str | None = None,
    architecture: str | None = None,
    adapter_name: str = "default",
    text_encoders: bool = True,
    sidecar: bool = False,
    trigger: str | None = None,
    metadata: bool = True,
    allow_partial: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write one adapter, or the weighted sum of several, as one LoRA file: A' = A diag(w), B' = B diag(lambda / (r
    |a_i| |b_i|)), alpha = r. LoRA strength s is then lambda times s.

    Args:
        source: a native file or folder, a PEFT folder, a Hub id, an `Adapter`, a module or pipeline with adapters in
            it, {component: module}; or a list of these, whose sum is written.
        destination: the file, or a folder to put `pytorch_lora_weights.safetensors` into.
        format: "diffusers"; "kohya" (UNets only: ComfyUI, A1111, Forge, and diffusers as well); "original" (of
            transformers, as they were first published); or "comfyui", which is kohya's names for a UNet, and for a
            transformer those by which ComfyUI finds it: diffusers', for Lumina 2 the original ones.
        weights: strength of the source, or one for each.
        rank: compress to this rank by SVD; the error is in the report. None: exact.
        dtype: "fp32" or "fp16".
        component: what a PEFT folder or a bare module is for ("unet", "transformer", "text_encoder", ...).
        architecture: "sd1", "sdxl", "flux1", ... (`ARCHITECTURES`), where file and shapes do not tell.
        adapter_name: which adapter of a module or pipeline.
        text_encoders: False leaves their parts out.
        sidecar: also write `NAME.json`, from which A1111, Forge and InvokeAI take trigger words and strength.
        trigger: words for the header; the prompt it was trained with if None.
        metadata: write the header that user interfaces read.
        allow_partial: leave out what a LoRA cannot hold (parameters trained in full, text encoders that its readers
            have no names for) and report it, instead of refusing.
        overwrite: replace a LoRA that is there.

    Raises:
        AdapterFileError: no usable adapter there.
        LoraError: something that the format cannot hold, or a destination that must not be replaced. Nothing is
            written.
    """
    path = Path(destination)
    path = path if path.suffix == ".safetensors" else path / LORA_NAME
    _check_destination(path, overwrite)
    if dtype not in DTYPES:
        raise LoraError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)} (bf16 would lose 0.2 % of the update)")
    adapters = gathered(source, component=component, adapter_name=adapter_name, text_encoders=text_encoders)
    family = known_architecture(adapters, architecture)
    nameless = functools.partial(unreadable, format=format, architecture=family)
    updates, notes = summed(adapters, weights, allow_partial=allow_partial, nameless=nameless)
    if rank is not None:
        updates, lost = compressed_updates(updates, rank)
        notes += lost
    style = style_of(format, set(updates), family)
    counts = {component: len(layers) for component, layers in updates.items()}
    more = _lost_in_comfyui(updates, style, family) if format == "comfyui" else []
    shapes = kernels(adapters)
    if style == "original":
        if shapes:
            raise LoraError(
                f"original names are for Linear layers, and {next(iter(shapes))[1]} is none; use diffusers'"
            )
        updates = updates | {"transformer": joined(updates.get("transformer", {}), family)}
    tensors, width, remarks = _tensors(updates, style, family, DTYPES[dtype])
    more += remarks
    convolutions = _as_kernels(tensors, shapes, style, family)
    header = {"format": "pt"}
    words = trigger or _triggers(adapters)
    if metadata:
        name = path.stem if path.name != LORA_NAME else path.resolve().parent.name
        header |= lora_header(
            tensors,
            name=name,
            rank=width,
            style=style,
            architecture=family,
            provenance=adapters[0].provenance,
            trigger=words,
        )
        if convolutions:  # as kohya says it of a LoCon
            header["ss_network_args"] = json.dumps({"conv_dim": str(width), "conv_alpha": str(float(width))})
    with complete_file(path) as aside:
        write_tensors(aside, tensors, header)
    if sidecar:
        more += write_sidecar(path, words, recommended_strength(source), family)
    return ExportReport(path=path, style=style, rank=width, layers=counts, notes=(*notes, *more))


def _lost_in_comfyui(updates: Updates, style: str, architecture: Architecture | None) -> list[str]:
    """A note on layers that ComfyUI has no name for."""
    layers = [(component, layer) for component, members in updates.items() for layer in members]
    lost = []
    for component, layer in layers:
        there = original_path(layer, architecture) if style == "original" and component == "transformer" else None
        name = lora_name(style, component, there or layer, architecture)
        if not found_by("comfyui", [name], [(component, layer)], architecture)[0]:
            lost.append(f"{component}.{layer}")
    found = f"{CLIENTS['comfyui'].title} finds {len(layers) - len(lost)} of {len(layers)} layers"
    return [f"{found}, not {lost[0]}"] if lost else []


def _triggers(adapters: Sequence[Adapter]) -> str:
    return ", ".join(dict.fromkeys(filter(None, (a.provenance.get("instance_prompt") for a in adapters))))


def beside(source: str, format: str) -> Path:
    """Where the LoRA of an adapter goes if nothing else is said: into its folder, named after the folder and format.

    Raises:
        LoraError: the adapter is on the Hub, not on this machine.
    """
    folder = folder_of(source)
    return folder / (LORA_NAME if format == "diffusers" else f"{folder.resolve().name}_{format}.safetensors")


def folder_of(source: str) -> Path:
    """The folder an adapter lies in.

    Raises:
        LoraError: the adapter is on the Hub, not on this machine.
    """
    path = Path(source)
    if not path.exists():
        raise LoraError(f"there is no file or folder {source} to write beside; say where to: output")
    return path if path.is_dir() else path.parent


def _tensors(
    updates: Updates, style: str, architecture: Architecture | None, dtype: torch.dtype
) -> tuple[dict[str, Tensor], int, list[str]]:
    """The file's tensors by name, the one rank they all have, and notes.

    One rank, because diffusers scales kohya's files wrongly where ranks differ; by original names they may.
    """
    ranks = {factors.rank for layers in updates.values() for factors in layers.values()}
    rank = max(ranks)
    same = style != "original"
    filling = f"ranks {', '.join(map(str, sorted(ranks)))} are filled up to {rank} with zeros"
    notes = [filling] if same and len(ranks) > 1 else []
    tensors: dict[str, Tensor] = {}
    down_end, up_end = tensor_endings(style)
    for component, layers in updates.items():
        filled = {layer: _zeros(near, layers[near], rank) for layer, near in missing_attention(component, layers)}
        if filled:
            notes.append(f"{component}: {len(filled)} attention projections without an adapter are there as zeros")
        for layer, factors in {**layers, **filled}.items():
            name = lora_name(style, component, layer, architecture)
            down, up = (factors.halvable() if dtype is torch.float16 else factors).padded(
                rank if same else factors.rank
            )
            tensors[name + down_end], tensors[name + up_end] = down.to(dtype).contiguous(), up.to(dtype).contiguous()
            if style == "kohya":
                tensors[f"{name}.alpha"] = torch.tensor(float(rank), dtype=dtype)
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise LoraError(f"{wrong[0]} does not fit into fp16; export as fp32")
    return tensors, rank, notes


def _as_kernels(
    tensors: dict[str, Tensor],
    shapes: Mapping[tuple[str, str], tuple[int, ...]],
    style: str,
    architecture: Architecture | None,
) -> int:
    """Give the two halves of a convolution's update the shapes of a LoCon's: k x k, then 1 x 1. Returns how many."""
    down_end, up_end = tensor_endings(style)
    for (component, layer), shape in shapes.items():
        name = lora_name(style, component, layer, architecture)
        down, up = tensors[name + down_end], tensors[name + up_end]
        tensors[name + down_end], tensors[name + up_end] = down.view(-1, *shape), up[:, :, None, None]
    return len(shapes)


def _zeros(near: str, factors: LowRank, rank: int) -> LowRank:
    """An update of zeros for a square projection, as wide as the residual stream that `near` reads or writes."""
    width = factors.up.shape[0] if near.endswith("mlp.fc2") else factors.down.shape[1]
    return LowRank(torch.zeros(rank, width), torch.zeros(width, rank))


def _check_destination(path: Path, overwrite: bool) -> None:
    if path.name == ADAPTER_NAME:
        raise LoraError(f"{path} is the name of native adapters; give the LoRA another name")
    if path.exists() and not overwrite:
        raise LoraError(f"{path} exists; give another name, or replace it with overwrite")
    if path.exists() and is_native(path):
        raise LoraError(f"{path} is a native adapter, which a LoRA does not replace; give another name")
