"""Which strength to use an adapter at: pictures and figures over the dial, and a recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from ..atomic import complete_file
from ..evaluation.choose import (
    FIDELITY,
    Measured,
    recommended,
    write_strengths,
)
from ..evaluation.scores import METRIC, Scorer, preview_figures
from ..method.inject import delora_adapters, set_delora_adapters
from ..run_folder import RunFolder
from ..sampling.contact_sheet import contact_sheet
from ..sampling.generate import Prompts
from .config import ValidationConfig
from .preview import Rows, draw_previews, draw_unrelated

# ---- at the end of training ----------------------------------------------------------------------


def draw_strengths(
    pipe: Any,
    modules: Mapping[str, nn.Module],
    folder: Path,
    config: ValidationConfig,
    prompts: Prompts,
    unrelated: Prompts,
    *,
    scorer: Scorer | None,
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
        A row for each strength, without figures if `scorer` is None.
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
            elsewhere = draw_unrelated(pipe, config, unrelated, size=size, seed=seed) if scorer else []
            found[strength] = [row[0] for row in rows], elsewhere
    finally:
        for name, module in modules.items():
            set_delora_adapters(module, "default", now[name])
    measured = [
        Measured(
            s, preview_figures(scorer, mine, config.validation_prompt, unrelated=others, base=base) if scorer else {}
        )
        for s, (mine, others) in found.items()
    ]
    with complete_file(RunFolder(folder).strength_sheet) as aside:
        _sheet(measured, found, config).save(aside)
    if scorer:
        write_strengths(RunFolder(folder).strengths, measured)
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
        parts = [f"{METRIC[name].in_a_row} {row.figures[name]:.2f}" for name in shown]
        heads.append(
            ", ".join([f"strength {row.strength:g}{' (recommended)' if row.strength == chosen else ''}", *parts])
        )
    labels = [*config.validation_prompt, *config.validation_world_prompt][: len(columns[0])]
    return contact_sheet(list(zip(*columns, strict=True)), row_labels=labels, column_labels=heads, cell=160)


def _weight(module: nn.Module) -> float:
    return float(next(iter(delora_adapters(module).values())).delora_weight)
