"""A pipeline, or its transformer alone, as one `.safetensors` file of the original layout, which other programs open.

Stable Diffusion 1, 2 and XL are whole: UNet, VAE and text encoders. Of the transformer families it is the transformer,
as ComfyUI keeps it in `models/diffusion_models`. Tensors are written one by one, so memory holds the model once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family, family_of
from ..families.original import (
    TRANSFORMERS,
    Place,
    open_clip_place,
    swapped_halves,
    transformer_place,
    unet_name,
    unet_places,
    vae_name,
)
from .lora_names import LoraError

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass
class Entry:
    """A tensor of the file: ours, one after the other in rows, and then changed."""

    parts: dict[int, Tensor] = field(default_factory=dict)
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def tensor(self, device: str | None = None) -> Tensor:
        """The tensor; on the meta device only its shape."""
        parts = [self.parts[number].detach() for number in sorted(self.parts)]
        parts = [part.to(device) if device else part for part in parts]
        return self.change(torch.cat(parts) if len(parts) > 1 else parts[0])


Entries = dict[str, Entry]


def single_file_entries(pipe: Any) -> Entries:
    """The tensors of the single file of a pipeline, by their names there.

    Raises:
        LoraError: a family without an original layout, a component that is missing or quantised, or tensors that have
            no counterpart there.
    """
    family = family_of(pipe)
    check_family(family)
    if family.denoiser == "transformer":
        return _transformer_entries(pipe.transformer, family.architectures[0].name)
    encoders = _prefixes(pipe)
    for name in ("unet", "vae", *encoders):
        _check_plain(name, getattr(pipe, name, None))
    entries: Entries = {}
    places = unet_places(pipe.unet.config)
    _add(entries, "model.diffusion_model.", pipe.unet, lambda key: _place(unet_name(key, places)))
    blocks = len(pipe.vae.config.block_out_channels)
    _add(entries, "first_stage_model.", pipe.vae, lambda key: Place(vae_name(key, blocks)))
    for name, entry in entries.items():
        if ".mid.attn_1." in name and entry.parts[0].dim() == 2:
            entry.change = _as_convolution
    for name, prefix in encoders.items():
        place = open_clip_place if prefix.endswith(".model.") else _clip_place
        _add(entries, prefix, getattr(pipe, name), place)
    if "conditioner.embedders.1.model.text_projection" in entries:
        entries["conditioner.embedders.1.model.text_projection"].change = torch.t
    if "text_encoder_2" in encoders and pipe.scheduler.config.get("prediction_type") == "v_prediction":
        marks = ("v_pred", *(["ztsnr"] if pipe.scheduler.config.get("rescale_betas_zero_snr") else []))
        entries |= {mark: Entry({0: torch.zeros(0)}) for mark in marks}  # how ComfyUI and others know
    return entries


def check_family(family: Family) -> None:
    """Refuse a family whose original layout no program opens as one file.

    Raises:
        LoraError: it says which have one.
    """
    architecture = family.architectures[0].name
    if family.denoiser == "transformer" and architecture not in TRANSFORMERS:
        raise LoraError(
            f"{architecture} has no single file that other programs load; those that have are Stable Diffusion 1, 2 "
            f"and XL, {', '.join(TRANSFORMERS)}. Merge into a folder instead"
        )


def _prefixes(pipe: Any) -> dict[str, str]:
    """Where the text encoders are: CLIP's own layout or OpenCLIP's, which SD 2's has a GELU by."""
    if hasattr(pipe, "text_encoder_2"):
        first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
        return {"text_encoder": first, "text_encoder_2": second}
    open_clip = pipe.text_encoder is not None and pipe.text_encoder.config.hidden_act == "gelu"
    return {"text_encoder": "cond_stage_model.model." if open_clip else "cond_stage_model.transformer."}


def _transformer_entries(transformer: nn.Module, architecture: str) -> Entries:
    _check_plain("transformer", transformer)
    entries: Entries = {}
    _add(entries, "", transformer, lambda key: transformer_place(architecture, key))
    return entries


def _check_plain(name: str, module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise LoraError(f"the base has no {name}, and a single file holds it; merge into a folder instead")
    if getattr(module, "hf_quantizer", None) is not None:
        raise LoraError(f"{name} is quantised, and the original layout is not; give the unquantised base")


def _add(entries: Entries, prefix: str, module: nn.Module, place: Callable[[str], Place | None]) -> None:
    """Add the tensors of a component.

    Raises:
        LoraError: some have no counterpart, or one that is several there lacks a part.
    """
    state: Mapping[str, Tensor] = module.state_dict()
    found = {key: place(key) for key in state}
    if lost := [key for key, where in found.items() if where is None]:
        raise LoraError(
            f"the original layout has no counterpart for {len(lost)} tensors of this {type(module).__name__} "
            f"({', '.join(lost[:3])}); merge into a folder instead"
        )
    wanted: dict[str, int] = {}
    for key, where in found.items():
        assert where is not None
        entry = entries.setdefault(prefix + where.name, Entry())
        entry.parts[where.part] = state[key]
        wanted[prefix + where.name] = where.parts
        weight = state[f"{key.rpartition('.')[0]}.weight"] if where.swapped else None
        if weight is not None and weight.shape[0] == 2 * weight.shape[1]:
            entry.change = swapped_halves
    if short := [name for name, number in wanted.items() if len(entries[name].parts) != number]:
        raise LoraError(f"{short[0]} lacks a part in this {type(module).__name__}; merge into a folder instead")


def _place(name: str | None) -> Place | None:
    return None if name is None else Place(name)


def _clip_place(key: str) -> Place:
    """With the `text_model.` level, which transformers 5.6 took out of CLIPTextModel."""
    return Place(f"text_model.{key.removeprefix('text_model.')}")


def _as_convolution(tensor: Tensor) -> Tensor:
    return tensor[:, :, None, None]


def write_single_file(path: Path, entries: Entries, metadata: Mapping[str, str]) -> None:
    """Write a `.safetensors` file tensor by tensor, the wide types first, as safetensors itself does."""
    outlines = {name: entry.tensor("meta") for name, entry in entries.items()}
    order = sorted(outlines, key=lambda name: (-outlines[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        tensor = outlines[name]
        end = offset + tensor.numel() * tensor.element_size()
        fields = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[name], offset = fields, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in _data(entries[name] for name in order):
            file.write(data)


def _data(entries: Iterator[Entry]) -> Iterator[bytes]:
    """Each tensor's bytes; no two at once."""
    for entry in entries:
        tensor = entry.tensor().cpu().contiguous()
        yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
