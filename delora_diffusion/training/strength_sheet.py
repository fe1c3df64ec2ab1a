"""Which strength to use an adapter at: pictures and figures over the dial, and a recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image
from torch import nn

from ..atomic import complete_file
from ..evaluation.choose import FIDELITY, Measured, recommended, write_strengths
from ..evaluation.scorer import preview_figures
from ..evaluation.scores import METRIC
from ..method.inject import delora_adapters, set_delora_adapters
from ..sampling.contact_sheet import contact_sheet
from .preview import Previews


def draw_strengths(previews: Previews, modules: Mapping[str, nn.Module]) -> list[Measured]:
    """Draw the previews' prompts, one image each, at every strength of `strength_sheet`; write `strength_sheet.png`.

    What was drawn last, at strength 1, is not drawn again.

    Returns:
        A row for each strength, without figures if the previews are not measured.
    """
    found: dict[float, tuple[list[Image.Image], Sequence[Image.Image]]] = {}
    now = {name: _weight(module) for name, module in modules.items()}
    try:
        for strength in sorted(set(previews.config.strength_sheet)):
            for name, module in modules.items():
                set_delora_adapters(module, "default", now[name] * strength)
            rows, elsewhere = previews.latest
            if strength != 1:
                rows, elsewhere = previews.draw(1), previews.draw_unrelated() if previews.best else []
            found[strength] = [row[0] for row in rows], elsewhere
    finally:
        for name, module in modules.items():
            set_delora_adapters(module, "default", now[name])
    measured = [Measured(s, _figures(previews, mine, elsewhere)) for s, (mine, elsewhere) in found.items()]
    with complete_file(previews.run.strength_sheet) as aside:
        _sheet(measured, found, previews).save(aside)
    if previews.best:
        write_strengths(previews.run.strengths, measured)
    return measured


def _figures(previews: Previews, mine: Sequence[Image.Image], elsewhere: Sequence[Image.Image]) -> dict[str, float]:
    best, prompts = previews.best, previews.shown.texts
    return preview_figures(best.scorer, mine, prompts, unrelated=elsewhere, base=best.base) if best else {}


def _sheet(
    measured: Sequence[Measured],
    found: Mapping[float, tuple[list[Image.Image], Sequence[Image.Image]]],
    previews: Previews,
) -> Image.Image:
    """A column for each strength, with its figures; a row for each prompt, those of the subject first."""
    columns = [[*mine, *others] for mine, others in found.values()]
    chosen = recommended(measured)
    heads = []
    for row in measured:
        shown = [name for name in (*FIDELITY[:2], "drift") if name in row.figures]
        parts = [f"{METRIC[name].in_a_row} {row.figures[name]:.2f}" for name in shown]
        heads.append(
            ", ".join([f"strength {row.strength:g}{' (recommended)' if row.strength == chosen else ''}", *parts])
        )
    labels = [*previews.shown.texts, *previews.unrelated.texts][: len(columns[0])]
    return contact_sheet(list(zip(*columns, strict=True)), row_labels=labels, column_labels=heads, cell=160)


def _weight(module: nn.Module) -> float:
    return float(next(iter(delora_adapters(module).values())).delora_weight)
