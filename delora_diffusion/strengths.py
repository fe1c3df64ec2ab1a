"""Which strength to use an adapter at: pictures and figures over the dial, and a recommendation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from .card import figure_table
from .config import ValidationConfig
from .files import complete_file
from .inject import delora_adapters, set_delora_adapters
from .journal import TITLES, in_a_row
from .preview import Prompts, Rows, draw_previews, draw_unrelated
from .sheet import contact_sheet
from .watch import FIDELITY, Gauge, fidelity_of, figures_of

#: Fidelity that a smaller strength may lose, as a share of the best.
TOLERANCE = 0.02
SHEET, TABLE = "strength_sheet.png", "strengths.json"


@dataclass(frozen=True)
class Measured:
    """What was measured at one strength."""

    strength: float
    figures: dict[str, float]


def recommended(rows: Sequence[Measured]) -> float | None:
    """The smallest positive strength whose fidelity is within 2 % of the best one's: drift only grows with strength.

    Returns:
        None if no positive strength was measured.
    """
    scores = {row.strength: fidelity_of(row.figures) for row in rows if row.strength > 0 and row.figures}
    best = max(scores.values(), default=0.0)
    return min((s for s, score in scores.items() if score >= best - TOLERANCE * abs(best)), default=None)


def strength_text(rows: Sequence[Measured], *, sheet: str | None = None) -> str:
    """The recommendation, its rule, the table and the sheet, in Markdown; "" without figures."""
    chosen = recommended(rows)
    if chosen is None:
        return f"![{sheet}]({sheet})" if sheet else ""
    name = next(TITLES[name] for name in FIDELITY if name in rows[0].figures)
    lines = [
        f"Recommended: **{chosen:g}**, the smallest strength whose fidelity ({name}) is within {TOLERANCE:.0%} of the "
        f"best. 0 is the base, 1 as trained.{' One picture a prompt.' if sheet else ''}",
        "",
        figure_table([(_marked(row.strength, chosen), row.figures) for row in rows], of="strength"),
        *(["", f"![{sheet}]({sheet})"] if sheet else []),
    ]
    return "\n".join(lines)


def write_strengths(path: Path, rows: Sequence[Measured]) -> None:
    """Write figures and recommendation as JSON."""
    told = {"recommended": recommended(rows), "strengths": [asdict(row) for row in rows]}
    with complete_file(path) as aside:
        aside.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- at the end of training ----------------------------------------------------------------------


def draw_strengths(
    pipe: Any,
    modules: Mapping[str, nn.Module],
    folder: Path,
    config: ValidationConfig,
    prompts: Prompts,
    unrelated: Prompts,
    *,
    gauge: Gauge | None,
    base: Sequence[Image.Image],
    known: tuple[Rows, Sequence[Image.Image]],
    size: int,
    seed: int,
) -> list[Measured]:
    """Draw the previews' prompts, one image each, at every strength of `strength_sheet`; write `strength_sheet.png`.

    Args:
        base: the base's pictures of the unrelated prompts.
        known: previews and unrelated pictures at strength 1, which are not drawn again.

    Returns:
        A row for each strength, without figures if `gauge` is None.
    """
    found = {}
    strengths = sorted(set(config.strength_sheet))
    now = {name: _weight(module) for name, module in modules.items()}
    try:
        for strength in strengths:
            if strength == 1:
                found[strength] = [row[0] for row in known[0]], list(known[1])
                continue
            for name, module in modules.items():
                set_delora_adapters(module, "default", now[name] * strength)
            rows = draw_previews(pipe, config, prompts, size=size, seed=seed, count=1)
            elsewhere = draw_unrelated(pipe, config, unrelated, size=size, seed=seed) if gauge else []
            found[strength] = [row[0] for row in rows], elsewhere
    finally:
        for name, module in modules.items():
            set_delora_adapters(module, "default", now[name])
    measured = [
        Measured(s, figures_of(gauge, mine, config.validation_prompt, unrelated=others, base=base) if gauge else {})
        for s, (mine, others) in found.items()
    ]
    with complete_file(folder / SHEET) as aside:
        _sheet(measured, found, config).save(aside)
    if gauge:
        write_strengths(folder / TABLE, measured)
    return measured


def _sheet(
    measured: Sequence[Measured], found: Mapping[float, tuple[list[Image.Image], list[Image.Image]]],
    config: ValidationConfig,
) -> Image.Image:  # fmt: skip
    """A column for each strength, with its figures; a row for each prompt, those of the subject first."""
    columns = [[*mine, *others] for mine, others in found.values()]
    chosen = recommended(measured)
    heads = []
    for row in measured:
        shown = [name for name in (*FIDELITY[:2], "drift") if name in row.figures]
        parts = [f"{in_a_row(name)} {row.figures[name]:.2f}" for name in shown]
        heads.append(
            ", ".join([f"strength {row.strength:g}{' (recommended)' if row.strength == chosen else ''}", *parts])
        )
    labels = [*config.validation_prompt, *config.validation_world_prompt][: len(columns[0])]
    return contact_sheet(list(zip(*columns, strict=True)), row_labels=labels, column_labels=heads, cell=160)


def _weight(module: nn.Module) -> float:
    return float(next(iter(delora_adapters(module).values())).delora_weight)


def _marked(strength: float, chosen: float) -> str:
    return f"**{strength:g}**" if strength == chosen else f"{strength:g}"
