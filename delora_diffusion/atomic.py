"""Files and folders that are complete or absent: written aside, flushed to the disk, then renamed.

What is written aside is in a hidden folder beside the place it is for, and locked. What a killed process left there is
cleared away by the next that writes into the same folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .locks import hold, let_go

ASIDE = ".delora-tmp"
#: Seconds between attempts to replace a file, which Windows refuses while somebody reads it.
_PAUSES = (0.02, 0.1, 0.4, 1.0)


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends well, and disappears when it does not."""
    with _aside(path.parent) as (place, mode):
        new = place / path.name
        yield new
        _flush(new)
        new.chmod(mode)  # the umask's, which not every library heeds
        _replace(new, path)
        _flush(path.parent)


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of `path` when the block ends well."""
    with _aside(path.parent) as (place, mode):
        new, old = place / "new" / path.name, place / "old" / path.name
        new.mkdir(parents=True)
        yield new
        for file in [*new.rglob("*"), new]:
            _flush(file)
            if file.is_file():
                file.chmod(mode)
        if path.exists():
            old.parent.mkdir()
            _replace(path, old)  # deleting takes a while, and would leave half a folder when interrupted
        try:
            _replace(new, path)
        except BaseException:
            if old.exists() and not path.exists():
                _replace(old, path)
            raise
        _flush(path.parent)


def remove(path: Path) -> None:
    """Delete a file or folder, which is there or not at all, whenever that is interrupted."""
    with _aside(path.parent) as (place, _):
        _replace(path, place / path.name)


def check_writable(folder: Path) -> None:
    """Try to write into a folder, which is made where it is missing.

    Raises:
        OSError: why that cannot be done.
    """
    with _aside(folder) as (place, _):
        (place / "written").write_bytes(bytes(4096))


def clear_scraps(folder: Path) -> None:
    """Clear away what processes that are dead left aside in `folder`, and end what they had only to rename."""
    for lock in (folder / ASIDE).glob("*.lock"):
        with contextlib.suppress(OSError):  # no lock is to be had here, or somebody else clears it away
            if (file := hold(lock)) is not None:
                place = lock.with_suffix("")
                for old in (place / "old").glob("*"):
                    new, target = place / "new" / old.name, folder / old.name
                    if not target.exists():
                        _replace(new if new.exists() else old, target)
                _let_go(place, file)


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[tuple[Path, int]]:
    """An empty folder on the disk of `folder`, taken away when the block ends; and the mode of new files."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _flush(made.parent)
    clear_scraps(folder)
    place, file = _claim(folder / ASIDE)
    try:
        place.mkdir()
        yield place, os.fstat(file.fileno()).st_mode & 0o777
    finally:
        _let_go(place, file)


def _claim(parent: Path) -> tuple[Path, IO[bytes]]:
    """A name that nobody has, on any machine that shares the disk, and its lock."""
    for _ in range(1000):
        place = parent / secrets.token_hex(8)
        try:
            parent.mkdir(exist_ok=True)
            if (file := hold(place.with_suffix(".lock"))) is not None:
                return place, file
        except FileNotFoundError:  # somebody else has just ended, and taken the empty folder away
            continue
        except OSError:
            if not place.with_suffix(".lock").is_file():
                raise
            return place, place.with_suffix(".lock").open("a+b")  # a disk without locks
    raise FileNotFoundError(f"{parent} disappears whenever it is made")


def _let_go(place: Path, file: IO[bytes]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    if place.exists():  # not all of it can be deleted: the lock's file says to whom comes next that it is a scrap
        return file.close()
    with contextlib.suppress(OSError):
        let_go(place.with_suffix(".lock"), file)
    with contextlib.suppress(OSError):  # somebody else is writing
        place.parent.rmdir()


def _replace(source: Path, target: Path) -> None:
    for pause in _PAUSES:
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(pause)
    os.replace(source, target)


def _flush(path: Path) -> None:
    """Wait until what was written is on the disk; a folder's names only where a folder can be flushed."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except OSError:  # Windows opens no folders
        if is_folder:
            return
        raise
    try:
        os.fsync(handle)
    except OSError:
        if not is_folder:
            raise
    finally:
        os.close(handle)
