"""What a base in diffusers' layout must have, checked before anything large is read."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DeloraError
from ..families import family_named

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


_LAYOUT = "model_index.json, unet/ (or transformer/), vae/, text_encoder/, tokenizer/ and scheduler/"
_LOGIN = "log in with `hf auth login`"


class BaseModelError(DeloraError):
    """A base model that cannot be loaded; the message says what was asked, what was found and what to do."""


@contextlib.contextmanager
def as_base_error(path: str, revision: str | None = None) -> Iterator[None]:
    """What loading the base model `path` raises, as a BaseModelError."""
    try:
        yield
    except BaseModelError:
        raise
    except (OSError, ImportError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BaseModelError(_message(path, revision, error)) from error


@contextlib.contextmanager
def giving(option: str) -> Iterator[None]:
    """Say which option gives another base than the one that cannot be loaded, and that an adapter may have named."""
    try:
        yield
    except BaseModelError as error:
        raise BaseModelError(f"{error} (--{option} gives another base than the adapter names)") from error


def _message(path: str, revision: str | None, error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if Path(path).is_dir():
        return f"cannot load the base model in {path}: {first} A base is a folder in diffusers' layout, with {_LAYOUT}"
    if Path(path).is_file():
        return f"cannot load the single-file base {path}: {first}"
    return _hub_message(path, revision, first, _causes(error))


def _hub_message(path: str, revision: str | None, first: str, causes: list[BaseException]) -> str:
    """diffusers turns the Hub's errors into OSErrors that do not tell a gated model from none; their cause does."""
    from huggingface_hub import errors

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    page = f"https://huggingface.co/{path}"
    if caused_by(errors.GatedRepoError) or "gated repo" in " ".join(map(str, causes)).lower():
        return f"{path} is gated: accept its terms on {page}, then {_LOGIN}"
    if caused_by(errors.RevisionNotFoundError):
        return f"{path} has no revision {revision!r}; {page} lists those there are"
    if caused_by(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        return (
            f"{path} is neither a folder nor among the models downloaded before, and the Hub cannot be reached; check "
            f"the connection (and HF_HUB_OFFLINE), or give a folder in diffusers' layout"
        )
    if caused_by(errors.EntryNotFoundError):
        return f"{page} is no pipeline in diffusers' layout, with {_LAYOUT}: {first}"
    return f"there is no base model {path}, neither as a folder nor on the Hub: {first} For a private one, {_LOGIN}"


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error, and what it was raised from or while handling."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
