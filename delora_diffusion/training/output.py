"""The folder a run writes to: its alone, or refused; cleared of the run that was there."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..atomic import ASIDE, check_writable, clear_scraps, remove
from ..data.config import DataConfig
from ..locks import hold, let_go
from ..options import OptionError
from ..run_folder import RunFolder
from .config import TrainingConfig
from .processes import from_main

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


@contextlib.contextmanager
def only_run(training: TrainingConfig, accelerator: Accelerator) -> Iterator[None]:
    """Have the output folder alone while the block lasts, cleared of what killed runs did not finish there.

    Raises:
        OptionError: another run has it, or nothing can be written there; on every process.
    """
    run, problem, file = RunFolder(Path(training.output_dir)), "", None
    missing = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    if accelerator.is_main_process:
        file, problem = _taken(run)
    try:
        if problem := from_main(accelerator, lambda: problem):
            raise OptionError(problem)
        yield
    finally:
        if file is not None:
            let_go(run.lock, file)
        with contextlib.suppress(OSError):  # a run that was refused leaves no empty folders
            for folder in missing:
                folder.rmdir()


def _taken(run: RunFolder) -> tuple[IO[bytes] | None, str]:
    """The lock of a run's folder, or why there is none."""
    if run.path.exists() and not run.path.is_dir():
        return None, f"output_dir {run.path} is a file; give a folder"
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        check_writable(run.path)
    except OSError as error:
        return None, (
            f"output_dir {run.path} cannot be written to: {error.strerror or error}; give another folder, or make "
            f"this one writable and see that its disk has room"
        )
    try:
        file = hold(run.lock)
    except OSError as error:
        log.warning("%s cannot be locked (%s): start no second run there", run.path, error.strerror or error)
        file = None
    else:
        if file is None:
            return None, f"output_dir {run.path} is in use by {_holder(run.lock)}; let it end, or give another folder"
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"process": os.getpid(), "machine": platform.node(), "since": since}).encode())
        file.flush()
    for aside in run.path.rglob(ASIDE):
        clear_scraps(aside.parent)
    return file, ""


def _holder(lock: Path) -> str:
    """Whoever holds a lock, as far as its file tells."""
    try:
        held = json.loads(lock.read_text(encoding="utf-8"))
        return f"another run (process {held['process']} on {held['machine']}, since {held['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"


def check_output(training: TrainingConfig) -> None:
    """Refuse an output folder that holds another run. Nothing is changed.

    Raises:
        OptionError: that run is neither resumed nor to be overwritten.
    """
    out = Path(training.output_dir)
    found = RunFolder(out).of_a_run()
    if found and not training.resume_from_checkpoint and not training.overwrite_output_dir:
        raise OptionError(
            f"output_dir {out} holds another run ({', '.join(p.name for p in found)}); give another folder, "
            f"continue it with --resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
        )


def check_folders(data: DataConfig) -> None:
    """Try to write wherever a run writes besides its own folder.

    Raises:
        OptionError: naming the option whose folder cannot be written to.
    """
    for option in ("cache_dir", "class_data_dir"):
        if not (given := getattr(data, option)):
            continue
        folder = Path(given)
        if folder.exists() and not folder.is_dir():
            raise OptionError(f"{option} {folder} is a file; give a folder")
        try:
            check_writable(folder)
        except OSError as error:
            raise OptionError(
                f"{option} {folder} cannot be written to: {error.strerror or error}; give another folder"
            ) from error


def clear_output(training: TrainingConfig) -> None:
    """Take away the run that `overwrite_output_dir` replaces; to be called when nothing can be refused any more."""
    run = RunFolder(Path(training.output_dir))
    if training.overwrite_output_dir and not training.resume_from_checkpoint:
        for path in [*run.of_a_run(), *run.results()]:
            remove(path)


def write_elsewhere(write: Callable[[Path], Path]) -> Path | None:
    """Write what the output folder cannot take into a new folder on another disk; None if no disk takes it."""
    for place in (tempfile.gettempdir(), Path.home(), Path.cwd()):
        try:
            return write(Path(tempfile.mkdtemp(prefix="delora-", dir=place)))
        except OSError as error:
            log.warning("%s cannot be written to either: %s", place, error.strerror or error)
    return None
