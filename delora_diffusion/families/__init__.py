"""What differs between model families: one frozen `Family` each, and nothing about a family anywhere else.

To add one: a `Family` value in `FAMILIES`, a `predict` of a few lines, and a tiny pipeline of it in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .dit import LUMINA2, PIXART, SANA, Z_IMAGE
from .family import (
    Architecture,
    Conditioning,
    Family,
    FamilyError,
    Setting,
    from_tensors,
    placed,
    stack_conditioning,
    to_tensors,
)
from .mmdit import FLUX, FLUX2, QWEN_IMAGE, STABLE_DIFFUSION_3
from .unet import STABLE_DIFFUSION, STABLE_DIFFUSION_XL

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "FAMILIES",
    "Architecture",
    "Conditioning",
    "Family",
    "FamilyError",
    "Setting",
    "check_sizes",
    "check_trainable",
    "family_named",
    "family_of",
    "from_tensors",
    "pipeline_names",
    "placed",
    "stack_conditioning",
    "to_tensors",
]
FAMILIES = (
    STABLE_DIFFUSION, STABLE_DIFFUSION_XL, STABLE_DIFFUSION_3, FLUX, FLUX2, PIXART, SANA, LUMINA2, QWEN_IMAGE, Z_IMAGE,
)  # fmt: skip


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a diffusers pipeline, whether it can be trained with or only carries adapters.

    Raises:
        FamilyError: a pipeline of none of the supported families (they are listed).
    """
    return family_named(type(pipe).__name__)


def family_named(name: str) -> Family:
    """The family of a pipeline class called `name`.

    Raises:
        FamilyError: as `family_of`.
    """
    for family in FAMILIES:
        if name in (*family.pipelines, *family.related):
            return family
    raise FamilyError(f"{name} is of no supported family; supported pipelines are {', '.join(pipeline_names())}")


def pipeline_names() -> list[str]:
    """The pipeline classes of all families."""
    return [name for family in FAMILIES for name in (*family.pipelines, *family.related)]


def check_trainable(listed: Mapping[str, Any], *, train_text_encoder: bool) -> Family:
    """The family of a base that is to be trained with, by what its model_index.json lists: no weights are read for it.

    Raises:
        FamilyError: a pipeline that only carries adapters, or text encoders that are not trained.
    """
    name = listed["_class_name"]
    family = family_named(name)
    if name not in family.pipelines:
        raise FamilyError(
            f"{name} carries adapters but is not trained with; give a text-to-image base: "
            f"{', '.join(family.pipelines)}"
        )
    if train_text_encoder and not family.trains_text:
        raise FamilyError(
            f"the text encoder of {family.name} is a large language model, which is not adapted; "
            f"leave train_text_encoder out"
        )
    return family


def check_sizes(pipe: DiffusionPipeline, sizes: Iterable[tuple[int, int]], *, option: str) -> None:
    """Refuse pictures (height, width) that a pipeline, of which only the VAE is looked at, cannot take.

    Raises:
        FamilyError: a side that is not divisible by what the VAE and the denoiser need; it names `option`.
    """
    multiple = family_of(pipe).multiple(pipe)
    for side in sorted({side for size in sizes for side in size}):
        if side % multiple:
            near = max(multiple, round(side / multiple) * multiple)
            raise FamilyError(f"{option} is {side}; {type(pipe).__name__} needs a multiple of {multiple}, e.g. {near}")
