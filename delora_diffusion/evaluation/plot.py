"""Plots, with matplotlib: the extra `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..atomic import complete_file
from ..options import OptionError
from ..reports.figure import blank_figure
from ..reports.table import Row
from .scores import METRIC

_INK, _PALE, _REFERENCE = "#1f4e79", "#b8c7d9", "#888888"


def need_matplotlib(option: str) -> None:
    """Refuse early what could not be drawn in the end.

    Raises:
        OptionError: matplotlib is not installed; the message names `option` and the extra.
    """
    try:
        blank_figure()
    except ImportError as error:
        raise OptionError(
            f'{option} needs the extra plots: pip install "delora_diffusion[plots]", or turn it off: --no-{option}'
        ) from error


def dial_plot(
    path: Path, mean: Sequence[Row], subjects: Mapping[str, Sequence[Row]], *, column: str, reference: float | None
) -> None:
    """Write a PNG of likeness against drift over the strength dial.

    Args:
        mean: one row for each strength, in their order.
        subjects: the same for each subject, drawn pale.
        column: the likeness to show, the name of a metric.
        reference: what the photos themselves score, a dashed line.
    """
    figure = blank_figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, rows in subjects.items():
        x, y = _points(rows, column)
        axes.plot(x, y, ".-", color=_PALE, linewidth=1, markersize=4)
        axes.annotate(name, (x[-1], y[-1]), xytext=(4, 0), textcoords="offset points", fontsize=7, color="#7a8ca0")
    x, y = _points(mean, column)
    axes.plot(x, y, "o-", color=_INK, linewidth=2, label=f"mean of {len(subjects)}")
    for row, across, up in zip(mean, x, y, strict=True):
        axes.annotate(
            f"{row.strength:g}", (across, up), xytext=(5, -11), textcoords="offset points", fontsize=8, color=_INK
        )
    if reference is not None:
        axes.axhline(reference, color=_REFERENCE, linestyle="--", linewidth=1, label="the photos themselves")
    axes.set_xlabel("drift of unrelated prompts (lower is better)")
    axes.set_ylabel(f"likeness to the subject, {METRIC[column].title} (higher is better)")
    axes.set_title("adapter strength, from the base model to beyond “as trained”", fontsize=9)
    axes.margins(x=0.12)  # room for the names at the ends of the curves
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    with complete_file(path) as aside:
        figure.savefig(aside)


def _points(rows: Sequence[Row], column: str) -> tuple[list[float], list[float]]:
    return [row.figures["drift"].value for row in rows], [row.figures[column].value for row in rows]
