"""Files that are complete or absent: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends well, and disappears when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    mode = _usual_mode(aside)
    try:
        yield aside
        aside.chmod(mode)
        _flush(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    mode = _usual_mode(aside / ".mode")
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                file.chmod(mode)
            _flush(file)
        if path.exists():
            os.replace(path, old)  # deleting takes a while, and would leave half a folder when interrupted
        os.replace(aside, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _usual_mode(path: Path) -> int:
    """The mode that the umask gives to files, which not every library heeds; `path` is made for it and taken away."""
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return mode


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some file systems cannot flush a folder
        if not path.is_dir():
            raise
    finally:
        os.close(handle)
