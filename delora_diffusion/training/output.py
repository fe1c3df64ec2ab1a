"""The folder a run writes to: refused, or cleared of the run that was there."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..options import OptionError
from ..run_folder import RunFolder
from .config import TrainingConfig


def check_output(training: TrainingConfig) -> None:
    """Refuse an output folder that cannot be used. Nothing is changed.

    Raises:
        OptionError: it is a file, or holds another run which is neither resumed nor to be overwritten.
    """
    out = Path(training.output_dir)
    if out.exists() and not out.is_dir():
        raise OptionError(f"output_dir {out} is a file; give a folder")
    found = RunFolder(out).of_a_run()
    if found and not training.resume_from_checkpoint and not training.overwrite_output_dir:
        raise OptionError(
            f"output_dir {out} holds another run ({', '.join(p.name for p in found)}); give another folder, "
            f"continue it with --resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
        )


def clear_output(training: TrainingConfig) -> None:
    """Take away the run that `overwrite_output_dir` replaces; to be called when nothing can be refused any more."""
    run = RunFolder(Path(training.output_dir))
    run.path.mkdir(parents=True, exist_ok=True)
    if training.overwrite_output_dir and not training.resume_from_checkpoint:
        for path in [*run.of_a_run(), *run.results()]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
