"""Files and folders are complete or absent, whatever interrupts the writing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from delora_diffusion import atomic as files
from delora_diffusion.atomic import complete_file, complete_folder

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
    rmtree = shutil.rmtree

    def interrupted(folder: Any, *args: Any, **kwargs: Any) -> None:
        if Path(folder).is_dir() and (Path(folder) / "b").exists():
            (Path(folder) / "b").unlink()
            monkeypatch.setattr(files.shutil, "rmtree", rmtree)
            raise KeyboardInterrupt
        rmtree(folder, *args, **kwargs)

    monkeypatch.setattr(files.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), complete_folder(path) as aside:
        (aside / "new").write_text("new")
    assert left(path) in (["a", "b", "c"], ["new"])


def test_scraps_of_a_killed_process_do_not_get_into_a_new_folder(tmp_path: Path) -> None:
    with complete_folder(tmp_path / "made") as aside:
        name = aside.name
        (aside / "a").write_text("a")
    (tmp_path / name).mkdir()
    (tmp_path / name / "scrap").write_text("from before")
    with complete_folder(tmp_path / "made") as aside:
        assert left(aside) == []
        (aside / "b").write_text("b")
    assert left(tmp_path / "made") == ["b"]


def test_the_suffix_is_kept_aside_because_writers_go_by_it(tmp_path: Path) -> None:
    with complete_file(tmp_path / "sheet.png") as aside:
        assert aside.suffix == ".png" and aside.parent == tmp_path and aside.name.startswith(".")
        aside.write_bytes(b"")
