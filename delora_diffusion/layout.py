"""What a base in diffusers' layout must have, checked before anything large is read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base_error import BaseModelError
from .families import family_named

#: Listed by pipelines, and used neither in training nor in drawing.
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")


def check_layout(path: str, listed: Mapping[str, Any]) -> list[str]:
    """Refuse a base without one of the components of its family.

    Args:
        path: its folder; of a Hub id only what is listed is checked.
        listed: what its model_index.json says.

    Returns:
        Components that are listed as absent and can be done without (SD3's T5).

    Raises:
        BaseModelError: a component that is not listed, or listed but not in the folder.
        FamilyError: a pipeline of no supported family.
    """
    kind = listed.get("_class_name")
    family = family_named(str(kind))
    absent, optional = [], (*family.optional, *map(_tokenizer, family.optional))
    texts = (*family.text_encoders, *map(_tokenizer, family.text_encoders))
    for name in (family.denoiser, "vae", "scheduler", *texts):
        library, component = listed.get(name) or (None, None)
        place = Path(path) / name
        if library is None and name in optional:
            absent.append(name)
        elif library is None and _holds(kind, name):
            raise BaseModelError(
                f"the base {path} has no {name}: its model_index.json lists none; give a complete {kind}"
            )
        elif library is not None and Path(path).is_dir() and not (place.is_dir() and any(place.iterdir())):
            raise BaseModelError(
                f"the base {path} has no {name}: there is no {component} in {place}, which its model_index.json "
                f"lists; give a complete {kind}, with every folder that it lists"
            )
    return absent


def _tokenizer(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def _holds(kind: Any, component: str) -> bool:
    """Whether pipelines of this class have such a component: a tokenizer may be a processor's (image-to-image)."""
    import diffusers

    pipeline = getattr(diffusers, str(kind))
    return component in inspect.signature(pipeline.__init__).parameters
