"""What users can cause: a command says it in a sentence; any other error is a fault of the program, and raises."""

from __future__ import annotations

import errno

import torch
from safetensors import SafetensorError


class DeloraError(ValueError):
    """Something asked for that cannot be; the message says what was asked, what was found and what to do."""


class WeightKindError(DeloraError, TypeError):
    """A weight of a kind that cannot be read or written, as quantised ones."""


class MissingExtraError(DeloraError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""


#: What both commands say in a sentence: of a file, a disk, a connection or a device as well.
USER_ERRORS = (DeloraError, OSError, SafetensorError, torch.OutOfMemoryError)
_WAYS_OUT = {
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room there, or choose another place",
    errno.EACCES: "choose a place that you may use",
    errno.EPERM: "choose a place that you may use",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOTDIR: "a file is where a folder would be: choose another place",
    errno.EEXIST: "a file is where a folder would be: choose another place",
    errno.EISDIR: "a folder is where the file would be: choose another name",
    errno.ENOENT: "is it the right name?",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def sentence_of(error: BaseException) -> str:
    """What to say of one of `USER_ERRORS`, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return f"the device is out of memory: {text.split('. ')[0]}; use smaller pictures or batches, or offload"
    if isinstance(error, SafetensorError):
        return f"a file cannot be read or written: {text}; is the disk full, or the file damaged?"
    if isinstance(error, OSError) and error.strerror:
        name = error.filename2 or error.filename  # of two, the one that was to become
        where = f"{name}: " if name else ""
        out = _WAYS_OUT.get(error.errno or 0)
        return f"{where}{error.strerror}" + (f"; {out}" if out else "")
    return str(error) if isinstance(error, DeloraError) else text
