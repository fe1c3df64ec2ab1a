"""A lock that a process holds while it lives: whoever died, holds none."""

from __future__ import annotations

import errno
import importlib
import os
from pathlib import Path
from typing import IO, Any

#: Place of the byte that is locked on Windows, where nobody else could read it: beyond whatever the file says.
_FAR = 1 << 30


def hold(path: Path) -> IO[bytes] | None:
    """Lock a file, which is made where there is none.

    Returns:
        The file, locked until it is closed or its process ends; None if it is locked already.

    Raises:
        OSError: the file cannot be written, or its file system knows no locks.
    """
    while True:
        file = path.open("a+b")
        try:
            if not _lock(file.fileno()):
                file.close()
                return None
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()  # whoever had the lock has just taken its file away


def let_go(path: Path, file: IO[bytes]) -> None:
    """Take a locked file away and end its lock."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:  # Windows takes no open file away
        file.close()
        path.unlink(missing_ok=True)
    finally:
        file.close()


def _lock(handle: int) -> bool:
    """Lock an open file; whether nobody else had."""
    try:
        unix: Any = importlib.import_module("fcntl")
    except ImportError:
        windows: Any = importlib.import_module("msvcrt")
        os.lseek(handle, _FAR, os.SEEK_SET)
        try:
            windows.locking(handle, windows.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise
        return True
    try:
        unix.flock(handle, unix.LOCK_EX | unix.LOCK_NB)
    except BlockingIOError:
        return False
    return True
