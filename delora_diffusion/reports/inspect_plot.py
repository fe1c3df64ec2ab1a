"""An adapter's figures as a picture: how strongly each block is changed, by kind of projection."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import complete_file
from ..errors import DeloraError
from .figure import blank_figure
from .inspect import Inspection, LayerFigures, kinds_of, relative_update

#: Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
#: More blocks than this are drawn as lines, and several adapters below each other: bars would be hairs.
_CROWDED = 16


class PlotError(DeloraError):
    """A picture that cannot be made; the message says what to install."""


@dataclass(frozen=True)
class _Look:
    """How a kind is drawn: the second eight kinds have the colours of the first, hatched or dashed."""

    colour: str
    hatch: str | None
    dashes: str


def plot_inspections(inspections: Sequence[Inspection], path: str | Path) -> Path:
    """Write `draw_inspections` as a PNG.

    Raises:
        PlotError: matplotlib is not installed, or the adapters adapt no layer.
    """
    figure = draw_inspections(inspections)
    target = Path(path)
    with complete_file(target) as aside:
        figure.savefig(aside, dpi=130, format="png")
    return target


def draw_inspections(inspections: Sequence[Inspection]) -> Any:
    """A matplotlib figure: a panel for each component and adapter, bars by block, coloured by kind; adapters side by
    side.

    A bar is |dW| / |W| of all layers of that kind in that block together; dots are single layers. With more than 16
    blocks the bars become lines, and the adapters stand below each other.
    """
    everything = [layer for inspection in inspections for layer in inspection.layers]
    components = list(dict.fromkeys(layer.component for layer in everything))
    if not components:
        raise PlotError("there is nothing to plot: no adapted layer")
    widest = max(len(_blocks(layer for layer in everything if layer.component == name)) for name in components)
    crowded = widest > _CROWDED
    columns = 1 if crowded else len(inspections)
    rows = len(components) * len(inspections) // columns
    size = max(4.5, min(14.0, 1.5 + 0.9 * widest)) * columns + 1.5, 3.2 * rows
    try:
        figure = blank_figure(figsize=size, layout="constrained")
    except ImportError as error:
        raise PlotError('plots need matplotlib; install it with: pip install "delora_diffusion[plots]"') from error
    axes = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for component in components:
        layers = [layer for layer in everything if layer.component == component]
        looks = _looks(kinds_of(layers))
        top = 1.05 * max(layer.relative_update for layer in layers) or 1.0
        for number, inspection in enumerate(inspections, 1):
            axis = next(axes)
            (_lines if crowded else _bars)(axis, inspection.of(component), looks)
            which = f"[{number}] " if len(inspections) > 1 else ""
            axis.set_title(f"{which}{Path(inspection.source).name}: {component or 'module'}", loc="left", fontsize=10)
            axis.set(ylim=(0, top), ylabel="|dW| / |W|" if crowded or number == 1 else "")
            axis.spines[["top", "right"]].set_visible(False)
            if crowded or number == len(inspections):
                _legend(axis, looks, lines=crowded)
    return figure


def _blocks(layers: Iterable[LayerFigures]) -> list[str]:
    return list(dict.fromkeys(layer.block for layer in layers))


def _looks(kinds: Sequence[str]) -> dict[str, _Look]:
    round_of = [divmod(number, len(_COLOURS)) for number in range(len(kinds))]
    return {
        kind: _Look(_COLOURS[place], "///" if again else None, "--" if again else "-")
        for kind, (again, place) in zip(kinds, round_of, strict=True)
    }


def _legend(axis: Any, looks: Mapping[str, _Look], *, lines: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=look.colour, linestyle=look.dashes, label=kind)
        if lines
        else Patch(facecolor=look.colour, hatch=look.hatch, edgecolor="white", label=kind)
        for kind, look in looks.items()
    ]
    axis.legend(handles=handles, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _bars(axis: Any, layers: Sequence[LayerFigures], looks: Mapping[str, _Look]) -> None:
    blocks = _blocks(layers)
    for place, block in enumerate(blocks):
        here = [layer for layer in layers if layer.block == block]
        kinds = kinds_of(here)
        bar = min(0.2, 0.8 / len(kinds))
        for number, kind in enumerate(kinds):
            x = place + (number - (len(kinds) - 1) / 2) * bar
            chosen = [layer for layer in here if layer.kind == kind]
            look = looks[kind]
            axis.bar(
                x,
                relative_update(chosen),
                width=0.9 * bar,
                color=look.colour,
                hatch=look.hatch,
                edgecolor="white",
                linewidth=0,
            )
            dots = [layer.relative_update for layer in chosen]
            axis.plot([x] * len(dots), dots, ".", color="#222222", markersize=3)
    axis.set_xticks(range(len(blocks)), blocks, rotation=30, ha="right", fontsize=8)


def _lines(axis: Any, layers: Sequence[LayerFigures], looks: Mapping[str, _Look]) -> None:
    """A line for each kind over the blocks; it is broken where a block lacks that kind."""
    blocks = _blocks(layers)
    for kind in kinds_of(layers):
        chosen = [[layer for layer in layers if (layer.block, layer.kind) == (block, kind)] for block in blocks]
        heights = [relative_update(few) if few else math.nan for few in chosen]
        look = looks[kind]
        axis.plot(heights, marker="o", markersize=3, linewidth=1, color=look.colour, linestyle=look.dashes, label=kind)
    axis.set_xticks(range(len(blocks)), _short(blocks), rotation=90, fontsize=7)
    axis.grid(axis="x", linewidth=0.3)


def _short(blocks: Sequence[str]) -> list[str]:
    """The numbers alone, but for the first block of each container: "layers 0", "1", "2"."""
    before = ["", *(block.rpartition(" ")[0] for block in blocks)]
    return [
        block.rpartition(" ")[2] if container and block.rpartition(" ")[0] == container else block
        for block, container in zip(blocks, before, strict=False)
    ]
