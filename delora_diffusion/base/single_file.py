"""A base that is one file, as other programs keep them, opened by diffusers' single-file loader.

The file holds the weights. What they belong to (the pipeline's class, shapes, tokenizer, scheduler) is in a
configuration in diffusers' layout: a folder that is given, or the Hub repository that diffusers knows for such a file.
What the file lacks (FLUX.1's often hold the transformer alone) comes from that folder too, if it is there.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .checks import NOT_NEEDED, BaseModelError, as_base_error, check_layout
from .prediction import marked, predict

_DTYPE = {"F16": torch.float16, "BF16": torch.bfloat16}
_VAE = ("first_stage_model.", "vae.")


def is_single_file(path: str) -> bool:
    """Whether a base is one file rather than a folder or a Hub id."""
    return Path(path).is_file()


def single_file_index(path: str, config: str | None) -> dict[str, Any]:
    """What the model_index.json of a single file's configuration says: the pipeline's class, and its components.

    Args:
        config: folder or Hub id of the configuration; None: the one that diffusers knows for such a file.

    Raises:
        BaseModelError: not a .safetensors file, no such configuration, or the Hub cannot be reached for it.
    """
    from diffusers import DiffusionPipeline

    config = config or _known_config(path)
    try:
        with as_base_error(config):
            listed: dict[str, Any] = DiffusionPipeline.load_config(config)
    except BaseModelError as error:
        raise BaseModelError(
            f"{path} is a single file; its configuration is to come from {config}: {error}. A folder of any base of "
            f"its kind in diffusers' layout will do (weights are not needed): give it as --single_file_config"
        ) from error
    return listed


def open_single_file(path: str, config: str | None, *, dtype: torch.dtype) -> Any:
    """The pipeline of a single file, on the CPU; the VAE is fp32, and the scheduler predicts what the file is marked
    with (see `prediction`).

    Args:
        config: as for `single_file_index`.
        dtype: of the denoiser and the text encoders.

    Raises:
        BaseModelError: as `single_file_index`, or weights that are missing or do not fit the configuration.
    """
    import diffusers

    listed = single_file_index(path, config)
    config = config or _known_config(path)
    check_layout(config, listed)
    kind, vae = getattr(diffusers, listed["_class_name"]), getattr(diffusers, listed["vae"][1])
    parts: dict[str, Any] = {name: None for name in NOT_NEEDED if name in listed}
    keys = _outline(path)
    asked = marked(keys)
    try:
        with as_base_error(path):
            if any(key.startswith(_VAE) for key in keys):
                parts["vae"] = vae.from_single_file(path, config=config, subfolder="vae", torch_dtype=torch.float32)
            else:
                parts["vae"] = vae.from_pretrained(config, subfolder="vae", torch_dtype=torch.float32)
            pipe = kind.from_single_file(path, config=config, torch_dtype=dtype, **parts)
    except NotImplementedError as error:  # what diffusers comes to when weights of its own models are missing
        raise BaseModelError(_lacking(path, config)) from error
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    if any(p.is_meta for module in modules for p in module.parameters()):
        raise BaseModelError(_lacking(path, config))
    predict(pipe, asked)
    return pipe


def _lacking(path: str, config: str) -> str:
    return (
        f"{path} lacks weights of the model that {config} describes; give a folder of a base of the same kind as "
        f"--single_file_config"
    )


def single_file_dtype(path: str) -> torch.dtype:
    """The precision of most of the numbers in a file."""
    sizes: collections.Counter[torch.dtype] = collections.Counter()
    for tensor in _outline(path).values():
        sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0]


def _known_config(path: str) -> str:
    """The Hub id of the configuration that diffusers knows for a file, by its tensors."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    known: str = fetch_diffusers_config(_outline(path))["pretrained_model_name_or_path"]
    return known


def _outline(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, without their numbers."""
    if Path(path).suffix != ".safetensors":
        raise BaseModelError(
            f"{path} is a {Path(path).suffix or 'file without a suffix'}; a single-file base is a .safetensors file "
            f"(a .ckpt can run code when it is opened: convert it first)"
        )
    outline = {}
    try:
        with safe_open(path, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                part = opened.get_slice(key)
                dtype = _DTYPE.get(part.get_dtype(), torch.float32)
                outline[key] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    except SafetensorError as error:
        raise BaseModelError(f"{path} is not a .safetensors file that can be read: {error}") from error
    if any("lora" in key.lower() for key in outline):
        raise BaseModelError(f"{path} is an adapter, not a base; give the base it was trained on")
    return outline
