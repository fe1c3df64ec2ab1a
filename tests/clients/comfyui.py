"""What ComfyUI's own code makes of our files, at full size and without weights.

    DELORA_COMFYUI=/path/to/ComfyUI python -m tests.clients.comfyui

Prints one JSON object a model: whether its single file is recognised, with which tensors too few or too many, and for
each set of layers how many there are, how many of diffusers' names ComfyUI knows, and which of those lead to a tensor
of another shape; and how many original names it knows.
What ComfyUI imports and does not need for this is replaced by stubs.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest.mock import MagicMock

import torch
from torch import Tensor

from delora_diffusion.export.lora_names import lora_name
from delora_diffusion.export.original_names import PREFIX, original_path
from delora_diffusion.export.single_file import Entry, single_file_entries
from delora_diffusion.families import family_named
from delora_diffusion.families.original import TRANSFORMERS
from delora_diffusion.method.config import DeloraConfig
from delora_diffusion.method.targets import target_layers

from .. import full_size

PIPELINES = {
    "sd3": "StableDiffusion3Pipeline", "flux.1": "FluxPipeline", "flux.2": "Flux2Pipeline",
    "lumina2": "Lumina2Pipeline", "qwen-image": "QwenImagePipeline", "z-image": "ZImagePipeline",
    "pixart": "PixArtAlphaPipeline",
}  # fmt: skip
NOT_NEEDED = (
    "torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchaudio",
    "torchaudio.transforms", "torchaudio.functional", "av", "comfy_kitchen", "kornia", "kornia.filters", "spandrel",
    "scipy", "scipy.ndimage", "torchsde", "sentencepiece", "alembic", "sqlalchemy", "aiohttp", "einops",
)  # fmt: skip


class Stub(types.ModuleType):
    """A module that has everything, and does nothing."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def load_comfyui() -> Any:
    """ComfyUI's modules, for the CPU."""
    for name in NOT_NEEDED:
        try:
            __import__(name)
        except ImportError:
            stub = Stub(name)
            stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = stub
    sys.path.insert(0, os.environ["DELORA_COMFYUI"])
    sys.argv = ["comfyui", "--cpu"]
    options = __import__("comfy.options").options
    options.enable_args_parsing()
    for name in ("comfy.utils", "comfy.lora", "comfy.model_base", "comfy.model_detection"):
        __import__(name)
    return sys.modules["comfy"]


class Named:
    """A pipeline of this class with nothing but a transformer."""

    def __new__(cls, name: str, transformer: Any) -> Any:
        return type(name, (), {"transformer": transformer})()


def outline(family: str, transformer: Any) -> dict[str, Tensor]:
    """The tensors of a single file, on the meta device."""
    entries: dict[str, Entry] = single_file_entries(Named(PIPELINES[family], transformer))
    return {name: entry.tensor("meta") for name, entry in entries.items()}


def trials(comfy: Any) -> Iterator[dict[str, Any]]:
    for name, (family, _) in full_size.MODELS.items():
        if family not in PIPELINES:
            continue
        transformer = full_size.denoiser(name)
        architecture = family_named(PIPELINES[family]).architectures[0]
        found: dict[str, Any] = {"model": name}
        if architecture.name in TRANSFORMERS:
            state = outline(family, transformer)
            config = comfy.model_detection.model_config_from_unet(dict(state), "")
            if config is None:
                yield found | {"recognised": False}
                continue
            config.set_inference_dtype(torch.float16, None)
            try:
                with torch.device("cpu"):
                    model = config.get_model(dict(state), "", device="meta")
            except ValueError as error:  # a version that does not know this size of the model
                yield found | {"as": type(config).__name__, "error": str(error)}
                continue
            known = {key.removeprefix("diffusion_model."): t for key, t in model.state_dict().items()}
            known = {key: t for key, t in known.items() if not key.startswith("model_sampling")}
            found |= {"recognised": True, "as": type(config).__name__, "missing": sorted(set(known) - set(state))}
            found["unexpected"] = sorted(set(state) - set(known))
            found["misshapen"] = sorted(n for n in set(known) & set(state) if known[n].shape != state[n].shape)
            shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
            table = comfy.lora.model_lora_keys_unet(model, {})
            for targets in ("attention+ff", "all-linear"):
                layers = target_layers(transformer, DeloraConfig(target_modules=targets))
                named = {n: lora_name("diffusers", "transformer", n, architecture) for n in layers}
                led = {n: table[own] for n, own in named.items() if own in table}
                wrong = [n for n, place in led.items() if _shape(place, shapes) != _size(layers[n])]
                found[targets] = [len(layers), len(led), wrong[:3]]
                found[f"{targets}, original names"] = sum(
                    f"{PREFIX}{original_path(layer, architecture)}" in table for layer in layers
                )
        yield found


def _shape(place: Any, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the part of a tensor that a name leads to."""
    key, window = (place, None) if isinstance(place, str) else (place[0], place[1])
    shape = shapes[key]
    return shape if window is None else (window[2], *shape[1:])


def _size(linear: torch.nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


if __name__ == "__main__":
    for trial in trials(load_comfyui()):
        print(json.dumps(trial))
