"""What a finished run leaves: the adapter, a LoRA, the strength sheet, plot, before/after sheet and model card."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..atomic import complete_file
from ..evaluation.choose import strength_text
from ..evaluation.scorer import photo_figures
from ..evaluation.scores import METRICS
from ..export.lora import export_lora
from ..export.lora_names import LoraError
from ..pipeline import save_delora_weights
from ..reports.card import write_card
from ..reports.table import figure_table
from ..run_folder import RunFolder
from .best import read_best
from .check import Checked
from .config import Options
from .log import figures_by_step, read_log
from .plot import plot_run
from .preview import Previews
from .strength_sheet import draw_strengths

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


def write_settings(run: RunFolder, options: Options) -> None:
    """Write the file that repeats the run."""
    with complete_file(run.settings) as aside:
        aside.write_text(options.to_yaml(), encoding="utf-8")


def write_results(
    checked: Checked,
    modules: Mapping[str, nn.Module],
    previews: Previews,
    provenance: Mapping[str, str],
    steps: int,
    accelerator: Accelerator,
) -> None:
    """Write the adapter as it is now after `steps` steps, and all that tells of it."""
    options, run = checked.options, previews.run
    write_settings(run, options)
    saved = save_delora_weights(run.path, modules, provenance={**provenance, "steps": str(steps)})
    if options.training.portable_lora:
        try:
            log.info("as a LoRA: %s", export_lora(saved, run.path, overwrite=True))
        except LoraError as error:
            log.warning("no LoRA is written beside the adapter: %s", error)
    log.info("adapter: %s", saved)
    strength = _strengths(previews, modules, accelerator) if options.validation.strength_sheet else ""
    best, photos = read_best(run.path), {}
    if previews.best:
        photos = photo_figures(previews.best.scorer, [e.caption for e in checked.instances])
    sheet = previews.before_after(steps, [e.path for e in checked.instances])
    plot = plot_run(run.path, best=int(best["step"]) if best else None, photos=photos)
    if figures := _figures(run.log, best, photos):
        log.info("\n%s\n", figures)
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
