"""Loading a base pipeline, and the folder a run writes to."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from ..families import family_named
from .checks import NOT_NEEDED, BaseModelError, as_base_error, check_layout
from .config import ModelConfig
from .prediction import predict
from .single_file import is_single_file, open_single_file, single_file_index

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def load_base(model: ModelConfig, *, precision: str, given: Mapping[str, Any] | None = None) -> Any:
    """The base pipeline on the CPU, without parts that training does not need; the VAE is always fp32.

    Args:
        precision: accelerate's mixed precision (no, bf16, fp16), which `base_dtype` "auto" follows.
        given: components of a folder that are not read: those in memory already, an `outline`, or None for one to
            leave out. A pipeline that is read in stages equals the one that is read at once.

    Raises:
        BaseModelError: nothing there, not a pipeline, one without a component, or another prediction asked for than
            it can have.
        FamilyError: a pipeline of no supported family.
    """
    from diffusers import DiffusionPipeline

    path = model.pretrained_model_name_or_path
    path, dtype = model.pretrained_model_name_or_path, base_dtype(model, precision=precision)
    if is_single_file(path):
        pipe = open_single_file(path, model.single_file_config, dtype=dtype)
    else:
        listed = listed_in(model)
        unused = dict.fromkeys([*check_layout(path, listed), *(name for name in NOT_NEEDED if name in listed)])
        with as_base_error(path, model.revision):
            dtypes = {"default": dtype, "vae": torch.float32}
            pipe = DiffusionPipeline.from_pretrained(
                path, dtype=dtypes, revision=model.revision, variant=model.variant, **(unused | dict(given or {}))
            )
    if model.pretrained_vae_model_name_or_path and "vae" not in (given or {}):
        pipe.register_modules(vae=_other_vae(model.pretrained_vae_model_name_or_path, pipe.vae))
    predict(pipe, model.prediction)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    return pipe


def _other_vae(path: str, own: Any) -> Any:
    """A VAE in place of a base's own, in fp32.

    Raises:
        BaseModelError: there is none, or its latents have another number of channels.
    """
    from diffusers import AutoModel

    try:
        vae = AutoModel.from_pretrained(path, dtype=torch.float32)
    except (OSError, ImportError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BaseModelError(
            f"cannot load pretrained_vae_model_name_or_path {path}: {str(error).splitlines()[0]} Give the folder or "
            f"Hub id of a VAE itself (config.json and its weights)"
        ) from error
    channels, wanted = (getattr(one.config, "latent_channels", None) for one in (vae, own))
    if channels != wanted:
        raise BaseModelError(
            f"pretrained_vae_model_name_or_path {path} is a {type(vae).__name__} with latents of {channels} channels, "
            f"and the base's have {wanted}; give one that was made for this base"
        )
    return vae


def base_dtype(model: ModelConfig, *, precision: str) -> torch.dtype:
    """The precision of the frozen weights, but for the VAE's."""
    return DTYPE[precision if model.base_dtype == "auto" else model.base_dtype]


def outline(model: ModelConfig, name: str) -> torch.nn.Module:
    """A component of a base folder by its config.json alone: every layer, on the meta device, without weights.

    Raises:
        BaseModelError: the base has no such component, or its config.json cannot be read.
    """
    path = model.pretrained_model_name_or_path
    library, kind = listed_in(model).get(name) or (None, None)
    place = {"subfolder": name, "revision": model.revision}
    with as_base_error(path, model.revision), torch.device("meta"):
        if library is None or kind is None:
            raise ValueError(f"model_index.json lists no {name}.")
        cls = getattr(importlib.import_module(library), kind)
        module: torch.nn.Module
        if library == "diffusers":
            module = cls.from_config(cls.load_config(path, **place))
        else:
            module = cls(cls.config_class.from_pretrained(path, **place))
    return module.requires_grad_(False)


def listed_in(model: ModelConfig) -> dict[str, Any]:
    """What the model_index.json of the base, or of a single file's configuration, says: class and components.

    Raises:
        BaseModelError: there is none.
    """
    if is_single_file(model.pretrained_model_name_or_path):
        return single_file_index(model.pretrained_model_name_or_path, model.single_file_config)
    return _listed(model.pretrained_model_name_or_path, model.revision)


def half_precision(path: str, single_file_config: str | None = None) -> str:
    """The half precision that the family of the base pipeline at `path` is drawn in: bf16 or fp16.

    Raises:
        BaseModelError, FamilyError: nothing there, or a pipeline of no supported family.
    """
    return family_named(
        listed_in(ModelConfig(pretrained_model_name_or_path=path, single_file_config=single_file_config))[
            "_class_name"
        ]
    ).half


def _listed(path: str, revision: str | None) -> dict[str, Any]:
    """What model_index.json says: the pipeline's class, and its components."""
    from diffusers import DiffusionPipeline

    with as_base_error(path, revision):
        listed: dict[str, Any] = DiffusionPipeline.load_config(path, revision=revision)
    return listed
