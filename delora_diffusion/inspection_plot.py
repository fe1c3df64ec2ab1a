"""An adapter's figures as a picture: how strongly each block is changed, by kind of projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import complete_file
from .inspection import Inspection, LayerFigures, kinds_of, relative_update

#: Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")


class PlotError(ValueError):
    """A picture that cannot be made; the message says what to install."""


def plot_inspections(inspections: Sequence[Inspection], path: str | Path) -> Path:
    """Write a PNG: a row for each component, a column for each adapter, bars by block, coloured by kind.

    A bar is |dW| / |W| of all layers of that kind in that block together; dots are single layers.

    Raises:
        PlotError: matplotlib is not installed, or the adapters adapt no layer.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise PlotError('plots need matplotlib; install it with: pip install "delora_diffusion[plots]"') from error

    components = list(dict.fromkeys(layer.component for inspection in inspections for layer in inspection.layers))
    if not components:
        raise PlotError("there is nothing to plot: no adapted layer")
    everything = [layer for inspection in inspections for layer in inspection.layers]
    widest = max(len({layer.block for layer in everything if layer.component == name}) for name in components)
    size = max(4.5, min(14.0, 1.5 + 0.9 * widest)) * len(inspections) + 1.5, 3.2 * len(components)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(components), len(inspections), squeeze=False, sharey="row")
    for row, component in zip(axes, components, strict=True):
        kinds = kinds_of(layer for layer in everything if layer.component == component)
        colours = {kind: _COLOURS[number % len(_COLOURS)] for number, kind in enumerate(kinds)}
        for axis, inspection in zip(row, inspections, strict=True):
            _bars(axis, inspection.of(component), colours)
            axis.set_title(f"{Path(inspection.source).name}: {component or 'module'}", loc="left", fontsize=10)
        row[0].set_ylabel("|dW| / |W|")
        swatches = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
        row[-1].legend(handles=swatches, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    target = Path(path)
    with complete_file(target) as aside:
        figure.savefig(aside, dpi=130, format="png")
    return target


def _bars(axis: Any, layers: Sequence[LayerFigures], colours: Mapping[str, str]) -> None:
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    for place, block in enumerate(blocks):
        here = [layer for layer in layers if layer.block == block]
        kinds = kinds_of(here)
        bar = min(0.2, 0.8 / len(kinds))
        for number, kind in enumerate(kinds):
            x = place + (number - (len(kinds) - 1) / 2) * bar
            chosen = [layer for layer in here if layer.kind == kind]
            axis.bar(x, relative_update(chosen), width=0.9 * bar, color=colours[kind])
            dots = [layer.relative_update for layer in chosen]
            axis.plot([x] * len(dots), dots, ".", color="#222222", markersize=3)
    axis.set_xticks(range(len(blocks)), blocks, rotation=30, ha="right", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
