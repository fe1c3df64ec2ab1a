"""What loading a base model raises, as one error that says what was asked, what was found and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_LAYOUT = "model_index.json, unet/ (or transformer/), vae/, text_encoder/, tokenizer/ and scheduler/"
_LOGIN = "log in with `hf auth login`"


class BaseModelError(ValueError):
    """A base model that cannot be loaded; the message says what was asked, what was found and what to do."""


@contextlib.contextmanager
def as_base_error(path: str, revision: str | None = None) -> Iterator[None]:
    """What loading the base model `path` raises, as a BaseModelError."""
    try:
        yield
    except BaseModelError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BaseModelError(_message(path, revision, error)) from error


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
