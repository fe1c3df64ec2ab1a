"""What a finished run leaves: the adapter, a LoRA, the strength sheet, plot, before/after sheet and model card."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..atomic import complete_file
from ..console import one_line, optional
from ..evaluation.choose import strength_text
from ..evaluation.scorer import photo_figures
from ..evaluation.scores import METRICS
from ..export.lora import export_lora
from ..pipeline import save_delora_weights
from ..reports.card import write_card
from ..reports.table import figure_table
from ..run_folder import RunFolder
from .best import read_best
from .check import Checked
from .config import Options
from .log import figures_by_step, read_log
from .output import write_elsewhere
from .plot import plot_run
from .preview import Previews
from .state import TrainingError
from .strength_sheet import draw_strengths

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


def write_settings(run: RunFolder, options: Options) -> None:
    """Write the file that repeats the run."""
    with optional(run.settings.name), complete_file(run.settings) as aside:
        aside.write_text(options.to_yaml(), encoding="utf-8")


def save_result(run: RunFolder, modules: Mapping[str, nn.Module], provenance: Mapping[str, str]) -> None:
    """Write the adapter as it is now.

    Raises:
        TrainingError: the run's folder does not take it; the message says where it is instead.
    """
    try:
        log.info("adapter: %s", save_delora_weights(run.path, modules, provenance=provenance))
    except OSError as error:
        place = write_elsewhere(lambda folder: save_delora_weights(folder, modules, provenance=provenance))
        where = f"it is in {place}; move it from there" if place else "nor anywhere else, and is lost"
        raise TrainingError(f"the adapter cannot be written to {run.path}: {one_line(error)}; {where}") from error


def write_results(
    checked: Checked, modules: Mapping[str, nn.Module], previews: Previews, steps: int, accelerator: Accelerator
) -> None:
    """Write all that tells of the adapter, which is saved already and is as it was after `steps` steps."""
    options, run = checked.options, previews.run
    write_settings(run, options)
    if options.training.portable_lora:
        with optional("LoRA is written beside the adapter"):
            log.info("as a LoRA: %s", export_lora(run.adapter, run.path, overwrite=True))
    strength, figures = "", ""
    photos: dict[str, float] = {}
    sheet = plot = None
    if options.validation.strength_sheet:
        with optional("strength sheet"):
            strength = _strengths(previews, modules, accelerator)
    best = read_best(run.path)
    if previews.best:
        with optional("figures of the photos"):
            photos = photo_figures(previews.best.scorer, [e.caption for e in checked.measured])
    with optional("before/after sheet"):
        sheet = previews.before_after(steps, [e.path for e in checked.instances])
    with optional("plot of the run"):
        plot = plot_run(run.path, best=int(best["step"]) if best else None, photos=photos)
    if figures := _figures(run.log, best, photos):
        log.info("\n%s\n", figures)
    with optional("model card"):
        write_card(
            run.path,
            base_model=options.model.pretrained_model_name_or_path,
            trigger=options.data.instance_prompt,
            pipeline=type(previews.pipe).__name__,
            options=options.flat(),
            pictures=[p.name for p in (sheet, plot) if p],
            figures=figures,
            strength=strength,
        )
    for what, path in (("how it went", plot), ("before and after", sheet)):
        if path:
            log.info("%s: %s", what, path)


def _strengths(previews: Previews, modules: Mapping[str, nn.Module], accelerator: Accelerator) -> str:
    """Draw the strength sheet; the recommendation for the card."""
    with accelerator.autocast():
        measured = draw_strengths(previews, modules)
    if shown := strength_text(measured):
        log.info("\n%s\n", shown)
    log.info("strength sheet: %s", previews.run.strength_sheet)
    return strength_text(measured, sheet=previews.run.strength_sheet.name)


def _figures(path: Path, best: Mapping[str, Any] | None, photos: Mapping[str, float]) -> str:
    """What was measured before the first step, on the best adapter that was kept, and at the end, beside what the
    photos score; "" if nothing."""
    shown = figures_by_step(read_log(path))
    if not shown:
        return ""
    first, last = min(shown), max(shown)
    rows: Sequence[tuple[str, Mapping[str, float]]] = [
        ("the base" if first == 0 else f"step {first}", shown[first]),
        *([(f"`best/`, step {best['step']}, kept by {best['rule']}", best)] if best else []),
        (f"this adapter, step {last}", shown[last]),
        *([("the photos themselves", photos)] if photos else []),
    ]
    return figure_table(rows, METRICS, of="previews")
