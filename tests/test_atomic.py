"""Files and folders are complete or absent, whatever interrupts the writing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from delora_diffusion import atomic as files
from delora_diffusion.atomic import ASIDE, clear_scraps, complete_file, complete_folder, remove
from delora_diffusion.locks import hold, let_go

Writer = Callable[[Path], AbstractContextManager[Path]]


def fill(aside: Path, text: str) -> None:
    """Write `text` to a file aside, or into a folder aside."""
    target = aside / "sub" / "text" if aside.is_dir() else aside
    target.parent.mkdir(exist_ok=True)
    target.write_text(text)


def content(path: Path) -> str:
    return (path / "sub" / "text" if path.is_dir() else path).read_text()


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("write", [complete_file, complete_folder])
@pytest.mark.parametrize("old", [None, "old"])
def test_what_was_written_takes_the_place_when_the_block_ends_well(
    write: Writer, old: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "made.txt"
    for text in filter(None, [old, "new"]):
        with write(path) as aside:
            fill(aside, text)
            assert not path.exists() or content(path) == old, "nothing is to be seen before the end"
    assert content(path) == "new" and left(path.parent) == [path.name]


@pytest.mark.parametrize("write", [complete_file, complete_folder])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_an_interrupted_block_leaves_the_old_one_and_no_scraps(
    write: Writer, error: type[BaseException], old: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "made"
    if old:
        with write(path) as aside:
            fill(aside, old)
    with pytest.raises(error), write(path) as aside:
        fill(aside, "half")
        raise error
    assert left(tmp_path) == ([path.name] if old else [])
    assert not old or content(path) == old


@pytest.mark.parametrize("write", [complete_file, complete_folder])
def test_a_failing_flush_leaves_the_old_one(write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "made"
    with write(path) as aside:
        fill(aside, "old")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"), write(path) as aside:
        fill(aside, "new")
    assert content(path) == "old" and left(tmp_path) == ["made"]


def test_everything_is_flushed_to_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = files.os.fsync, files.os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    with complete_folder(tmp_path / "made") as aside:
        (aside / "a").write_text("a")
        (aside / "b").write_text("b")
    assert order.index("replace") >= 2 and order[:2] == ["fsync", "fsync"]


def test_interrupting_the_deletion_of_an_old_folder_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "made"
    for name in ("a", "b", "c"):
        path.mkdir(exist_ok=True)
        (path / name).write_text("old")

    def interrupted(folder: Any, *args: Any, **kwargs: Any) -> None:
        (Path(folder) / "old" / "made" / "b").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), complete_folder(path) as aside:
        (aside / "new").write_text("new")
    monkeypatch.undo()
    assert left(path) == ["new"]
    clear_scraps(tmp_path)
    assert left(tmp_path) == ["made"]


def write_all(path: Path, renames: int) -> None:
    """Replace a folder, write a file and remove the folder, to be killed right before the n-th rename."""
    replace, to_go = os.replace, [renames]

    def killed(*names: Any) -> None:
        to_go[0] -= 1
        if to_go[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)

    files.os.replace = killed
    with complete_folder(path) as aside:
        (aside / "text").write_text("new")
    with complete_file(path.with_name("file")) as aside:
        aside.write_text("new")
    remove(path)


@pytest.mark.parametrize(("renames", "expected"), list(enumerate(["old", "new", "new", "new"])))
def test_whenever_a_process_is_killed_the_next_finds_all_or_nothing_and_no_scraps(
    renames: int, expected: str, tmp_path: Path
) -> None:
    """Right before its n-th rename; in the second case the old folder is away and the new one not yet there."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "text").write_text("old")
    if not (child := os.fork()):
        write_all(tmp_path / "made", renames)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (tmp_path / ASIDE).is_dir()
    clear_scraps(tmp_path)
    assert left(tmp_path) == (["made"] if renames < 3 else ["file", "made"])
    assert (tmp_path / "made" / "text").read_text() == expected


def test_whoever_writes_into_a_folder_clears_what_the_dead_left_there_and_nothing_of_the_living(
    tmp_path: Path,
) -> None:
    dead = tmp_path / ASIDE / "0123456789abcdef"
    dead.mkdir(parents=True)
    (dead / "half").write_text("half")
    dead.with_suffix(".lock").touch()
    with complete_folder(tmp_path / "living") as living:
        assert not dead.exists()
        with complete_file(tmp_path / "other") as aside:
            aside.write_text("other")
        clear_scraps(tmp_path)
        (living / "sub").mkdir()
        fill(living, "whole")
    assert left(tmp_path) == ["living", "other"] and content(tmp_path / "living") == "whole"


def test_a_folder_that_cannot_take_its_place_gives_it_back_to_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with complete_folder(tmp_path / "made") as aside:
        fill(aside, "old")
    replace = files.os.replace

    def failing(source: Path, target: Path) -> None:
        if "new" in Path(source).parts:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(OSError, match="Input/output"), complete_folder(tmp_path / "made") as aside:
        fill(aside, "new")
    assert content(tmp_path / "made") == "old" and left(tmp_path) == ["made"]


def test_what_is_removed_is_there_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "folder" / "sub", tmp_path / "file"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    monkeypatch.setattr(files.shutil, "rmtree", lambda *args, **kwargs: None)
    remove(tmp_path / "folder")
    monkeypatch.undo()
    assert left(tmp_path) == [ASIDE, "file"]
    remove(tmp_path / "file")
    assert left(tmp_path) == []


def test_files_have_the_mode_of_the_umask_and_the_name_that_writers_go_by(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with complete_file(tmp_path / "sheet.png") as aside:
            assert aside.name == "sheet.png"
            aside.touch(0o600)
        with complete_folder(tmp_path / "folder") as aside:
            (aside / "inside").touch(0o600)
    finally:
        os.umask(before)
    for path in (tmp_path / "sheet.png", tmp_path / "folder" / "inside"):
        assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("write", [complete_file, complete_folder])
def test_the_folder_and_those_made_for_it_are_flushed_after_the_rename(
    write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    flush, replace = files._flush, files.os.replace
    monkeypatch.setattr(files, "_flush", lambda path: (flushed.append(path.name), flush(path))[1])
    monkeypatch.setattr(files.os, "replace", lambda a, b: (flushed.append("replaced"), replace(a, b))[1])
    with write(tmp_path / "new" / "made") as aside:
        fill(aside, "text")
    assert flushed[0] == tmp_path.name and flushed[-2:] == ["replaced", "new"] and "made" in flushed[1:-2]


def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """os as on Windows: no fcntl, no opening of folders, no flushing of what is open for reading, no taking away of
    what is open, and files that a reader holds for a moment longer."""
    locked: dict[tuple[int, int], int] = {}
    opened, flags, fsync, unlink, replace = os.open, dict[int, int](), os.fsync, Path.unlink, os.replace
    busy = [2]

    def locking(handle: int, mode: int, count: int) -> None:
        file = os.fstat(handle)
        if is_open(locked.get((file.st_dev, file.st_ino), handle), file, but=handle):
            raise OSError(errno.EACCES, "Permission denied")
        locked[file.st_dev, file.st_ino] = handle

    def is_open(handle: int, file: os.stat_result, *, but: int = -1) -> bool:
        try:
            return handle != but and os.path.samestat(os.fstat(handle), file)
        except OSError:
            return False

    def open_file(path: Any, mode: int, *args: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        handle = opened(path, mode, *args)
        flags[handle] = mode
        return handle

    def flush(handle: int) -> None:
        if not flags.get(handle, os.O_RDWR) & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(handle)

    def take_away(path: Path, missing_ok: bool = False) -> None:
        if path.is_file() and any(is_open(handle, path.stat()) for handle in locked.values()):
            raise PermissionError(errno.EACCES, "in use")
        unlink(path, missing_ok=missing_ok)

    def rename(source: Path, target: Path) -> None:
        busy[0] -= 1
        if busy[0] >= 0:
            raise PermissionError(errno.EACCES, "in use")
        replace(source, target)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(
        files, "os", SimpleNamespace(**vars(os) | {"open": open_file, "fsync": flush, "replace": rename})
    )
    monkeypatch.setattr(Path, "unlink", take_away)


@pytest.mark.parametrize("write", [complete_file, complete_folder])
def test_it_holds_on_windows_too(write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows(monkeypatch)
    for text in ("old", "new"):
        with write(tmp_path / "made") as aside:
            fill(aside, text)
            clear_scraps(tmp_path)
    assert content(tmp_path / "made") == "new" and left(tmp_path) == ["made"]


@pytest.mark.parametrize("write", [complete_file, complete_folder])
def test_a_disk_without_locks_can_be_written_to(
    write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with write(tmp_path / "made") as aside:
        fill(aside, "text")
        clear_scraps(tmp_path)
    assert content(tmp_path / "made") == "text" and left(tmp_path) == ["made"]


def test_a_lock_is_had_by_one_and_by_the_next_when_the_file_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = hold(path)
    assert held is not None and hold(path) is None
    let_go(path, held)
    assert not path.exists()
    again = hold(path)
    assert again is not None
    again.close()
