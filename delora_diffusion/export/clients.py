"""Programs that open LoRA files, and the names under which each looks for a layer: their own tables, by version.

What a program draws with, and what its tables hold, changes from version to version; what is said here is said of the
version named. `tests/clients` runs a program's own loader, where its source is at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..families import Architecture
from .lora_names import ARCHITECTURES, DENOISERS, ORIGINAL_PATHS, canonical, is_clip, is_t5
from .original_names import PREFIX, original_path


@dataclass(frozen=True, kw_only=True)
class Client:
    """A program and its tables.

    Attributes:
        title: name and version.
        engines: the architectures it draws with, by name; of others it opens no file.
        diffusers: whether it has diffusers' names of transformers and of CLIP beside kohya's.
        t5: the prefixes under which it knows T5, by architecture.
        original: whether it knows every layer of a transformer by its original name.
        projection: whether it knows the projection of SDXL's second text encoder.
        lost_at_most: a file with more tensors without a name is dropped whole.
    """

    title: str
    engines: tuple[str, ...]
    diffusers: bool
    t5: Mapping[str, tuple[str, ...]]
    projection: bool = False
    original: bool = False
    lost_at_most: int | None = None


_UNETS = ("sd1", "sd2", "sd2_v", "sdxl")
#: ComfyUI: comfy/lora.py, comfy/utils.py. Forge: backend/patcher/lora.py, packages_3rdparty/comfyui_lora_collection,
#: sd_forge_lora/networks.py, commit dfdcbab. A1111: extensions-builtin/Lora/networks.py.
CLIENTS = {
    "comfyui": Client(
        title="ComfyUI 0.19.3",
        engines=(*_UNETS, "sd3", "flux1", "flux2", "pixart", "qwen_image", "z_image", "lumina2"),
        original=True,
        diffusers=True,
        t5={"flux1": ("lora_te2", "lora_te3"), "sd3": ("lora_te3",), "pixart": ("lora_te1",)},
        projection=True,
    ),
    "forge": Client(
        title="Forge of June 2025",
        engines=(*_UNETS, "flux1"),
        diffusers=True,
        t5={"flux1": ("lora_te1", "lora_te2", "lora_te3")},
        projection=True,
        lost_at_most=12,
    ),
    "a1111": Client(title="A1111 1.10.1", engines=_UNETS, diffusers=False, t5={}),
}


def looked_up(client: str, component: str, layer: str, architecture: Architecture | None = None) -> set[str]:
    """The names under which a program of `CLIENTS` looks for a layer's LoRA; none where it has no table for it.

    Args:
        architecture: whose layer it is; None counts what the program finds in any.
    """
    program, path = CLIENTS[client], canonical(component, layer)
    asked = [architecture] if architecture is not None else list(ARCHITECTURES.values())
    drawn = [one for one in asked if one.name in program.engines]
    if component in DENOISERS:
        having = [one for one in drawn if one.denoiser == component and re.fullmatch(one.found, path)]
        names = _denoiser_names(program, component, path) if having else set()
        there = original_path(path, architecture) if program.original and component == "transformer" else None
        return names if there is None else names | {f"{PREFIX}{there}"}
    if is_t5(component, path):
        having = [one for one in drawn if architecture is not None and component in one.encoders]
        return {f"{prefix}_{path.replace('.', '_')}" for one in having for prefix in program.t5.get(one.name, ())}
    return _clip_names(program, component, path) if drawn and is_clip(component, path) else set()


def _denoiser_names(program: Client, component: str, path: str) -> set[str]:
    if component == "transformer":
        return {f"transformer.{path}"} if program.diffusers else set()
    flat = path.replace(".", "_")
    names = {f"lora_unet_{ORIGINAL_PATHS.get(path, flat)}"}
    if program.diffusers:  # diffusers' names as they were in 2023, with the attention's processor
        old = re.sub(r"to_out\.0$", "to_out", path.replace(".to_", ".processor.to_"))
        names |= {f"lora_unet_{flat}", f"unet.{old}"}
    return names


def _clip_names(program: Client, component: str, path: str) -> set[str]:
    if path == "text_projection":
        return {"lora_te2_text_projection"} if program.projection else set()
    prefixes = {"text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}[component]
    plain = {f"{component}.{path}"} if program.diffusers else set()
    return {f"{prefix}_{path.replace('.', '_')}" for prefix in prefixes} | plain


def found_by(
    client: str, names: Iterable[str], layers: Iterable[tuple[str, str]], architecture: Architecture | None
) -> tuple[int, str]:
    """How many layers a program finds in a file, and what to know of that.

    Args:
        names: of layers in the file, without the endings of their tensors.
        layers: component and path of each adapted layer.
        architecture: of the base; None if not known.
    """
    program, names = CLIENTS[client], set(names)
    if architecture is not None and architecture.name not in program.engines:
        return 0, f"no engine for {architecture.name} that opens LoRA files"
    known = [looked_up(client, component, layer, architecture) & names for component, layer in layers]
    lost = 2 * len(names - set().union(*known))
    if program.lost_at_most is not None and lost > program.lost_at_most:
        return 0, f"drops the file whole: {lost} of its tensors have no name there"
    return sum(map(bool, known)), ""
