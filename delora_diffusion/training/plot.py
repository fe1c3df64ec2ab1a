"""A run in one picture, from its log: loss, fidelity, drift, |dW|/|W| and lambda by block, with previews below."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import complete_file
from ..data.image_files import load_image
from ..evaluation.scores import METRIC, METRICS
from ..reports.figure import blank_figure
from ..run_folder import RunFolder
from .log import figures_by_step, read_log

log = logging.getLogger(__name__)
#: Previews shown below the curves, spread over the run.
PREVIEWS = 8
#: Panel -> how it is headed, where the name alone does not say what is good.
HEADINGS = {
    "fidelity": "fidelity: likeness to the photos",
    "prompt following": "prompt following: likeness to the prompt",
    "drift": "drift: change of other pictures (low is good)",
    "|dW| / |W|": "|dW| / |W| by block: size of the update",
    "lambda, with its ramp": "lambda by block, with its ramp",
}
Curves = Mapping[str, Sequence[tuple[int, float]]]


def plot_run(folder: Path, *, best: int | None = None, photos: Mapping[str, float] | None = None) -> Path | None:
    """Draw `folder`/training.png from `folder`/log.jsonl and the previews beside it.

    Args:
        best: step of the adapter that was kept as the best, marked in every panel.
        photos: what the photos themselves score, by figure: dotted lines.

    Returns:
        The picture; None without matplotlib (the log says how to get it), or without any line in the log.
    """
    run = RunFolder(folder)
    panels = curves_of(read_log(run.log))
    if not panels:
        return None
    previews = _previews(run.previews)
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    size = 4.2 * across, 2.9 * down + (1.9 if previews else 0)
    try:
        figure = blank_figure(figsize=size, dpi=110, layout="constrained")
    except ImportError:
        log.info('no %s: it needs matplotlib: pip install "delora_diffusion[plots]"', run.plot.name)
        return None
    heights = [2.9 * down, 1.9] if previews else [1]
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flatten().tolist()
    if previews:
        _show(parts[1], previews)
    axes = parts[0].subplots(down, across, squeeze=False).flatten().tolist()
    levels = {METRIC[name].title: value for name, value in (photos or {}).items()}
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        _panel(axis, title, curves, best, levels)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    with complete_file(run.plot) as aside:
        figure.savefig(aside)
    return run.plot


def curves_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{panel: {curve: [(step, value)]}} of a log; panels and curves without a value are left out."""
    steps = [line for line in lines if "loss" in line]
    previews = figures_by_step(lines)
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {"loss": {"": [(x["step"], x["loss"]) for x in steps]}}
    for metric in METRICS:
        if metric.panel is not None:
            points = [(step, figures[metric.name]) for step, figures in previews.items() if metric.name in figures]
            panels.setdefault(metric.panel, {})[metric.title] = points
    for title, prefix in (("|dW| / |W|", "update_norm/"), ("lambda, with its ramp", "lambda/")):
        blocks = dict.fromkeys(key for line in steps for key in line if key.startswith(prefix))
        panels[title] = {
            block.removeprefix(prefix): [(line["step"], line[block]) for line in steps if block in line]
            for block in blocks
        }
    kept = {title: {name: points for name, points in curves.items() if points} for title, curves in panels.items()}
    return {title: curves for title, curves in kept.items() if curves}


def merged(curves: Curves) -> dict[str, Sequence[tuple[int, float]]]:
    """The curves, those that are the same as one, under their names (two of them, where there are many)."""
    names: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, points in curves.items():
        names.setdefault(tuple(points), []).append(name)
    return {_listed(same): points for points, same in names.items()}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, {len(names) - 2} more"


def _panel(axis: Any, title: str, curves: Curves, best: int | None, levels: Mapping[str, float]) -> None:
    for name, points in merged(curves).items():
        marker = "." if len(points) < 30 else None
        (line,) = axis.plot(*zip(*points, strict=True), marker=marker, linewidth=1.3, label=name)
        if name in levels:
            axis.axhline(levels[name], color=line.get_color(), linewidth=1, linestyle=":")
    if any(name in levels for name in curves):
        axis.plot([], [], color="0.4", linewidth=1, linestyle=":", label="the photos themselves")
    if best is not None:
        label = f"best, step {best}" if title == "fidelity" else None
        axis.axvline(best, color="0.6", linewidth=1, linestyle="--", label=label)
    axis.set_title(HEADINGS.get(title, title), fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    if title not in ("loss", "fidelity", "prompt following"):
        axis.set_ylim(bottom=0)
    if any(label and label[0] != "_" for label in axis.get_legend_handles_labels()[1]):
        axis.legend(fontsize=6.5, framealpha=0.6)


def _previews(folder: Path) -> list[tuple[int, Path]]:
    """The first picture of up to `PREVIEWS` previews, the first and the last among them."""
    found = sorted((int(p.parent.name.removeprefix("step_")), p) for p in folder.glob("step_*/0_0.png"))
    if len(found) <= PREVIEWS:
        return found
    return [found[round(place * (len(found) - 1) / (PREVIEWS - 1))] for place in range(PREVIEWS)]


def _show(figure: Any, previews: Sequence[tuple[int, Path]]) -> None:
    for axis, (step, path) in zip(figure.subplots(1, len(previews), squeeze=False)[0], previews, strict=True):
        axis.imshow(load_image(path))
        axis.set_title(f"step {step}", fontsize=8)
        axis.set_axis_off()
