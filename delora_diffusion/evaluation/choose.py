"""Which adapter, and which strength, to use: rules over figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..atomic import complete_file
from ..reports.table import figure_table
from .scores import METRIC, METRICS

#: Fidelity that a smaller strength may lose, as a share of the best.
TOLERANCE = 0.02


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
    name = next(METRIC[name].title for name in FIDELITY if name in rows[0].figures)
    lines = [
        f"Recommended: **{chosen:g}**, the smallest strength whose fidelity ({name}) is within {TOLERANCE:.0%} of the "
        f"best. 0 is the base, 1 as trained.{' One picture a prompt.' if sheet else ''}",
        "",
        figure_table([(_marked(row.strength, chosen), row.figures) for row in rows], METRICS, of="strength"),
        *(["", f"![{sheet}]({sheet})"] if sheet else []),
    ]
    return "\n".join(lines)


def write_strengths(path: Path, rows: Sequence[Measured]) -> None:
    """Write figures and recommendation as JSON."""
    content = {"recommended": recommended(rows), "strengths": [asdict(row) for row in rows]}
    with complete_file(path) as aside:
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _marked(strength: float, chosen: float) -> str:
    return f"**{strength:g}**" if strength == chosen else f"{strength:g}"


#: Likenesses in the order in which a rule takes the first there is: photos that training never saw before those it
#: did, which reward copying, and DINO, which tells one dog from another, before CLIP, which hardly does.
FIDELITY = ("dino_holdout", "dino", "clip_i_holdout", "clip_i")
#: What drift costs in "balanced": 2 drift = 1 - cos(base's picture, adapter's), so that a picture of the subject may
#: come nearer to the photos by no less cosine than other pictures go away from the base model's.
DRIFT_WEIGHT = 2.0


def fidelity_of(figures: Mapping[str, float]) -> float:
    """The likeness that rules go by: the first of `FIDELITY` that was measured."""
    return next(figures[name] for name in FIDELITY if name in figures)


# ---- the best ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BestPreview:
    """The best preview so far, and how many have been looked at since."""

    step: int
    score: float
    since: int


def score_of(figures: Mapping[str, float], rule: str) -> float:
    """What `keep_best` goes by, the higher the better: fidelity, or fidelity - 2 drift ("balanced")."""
    return fidelity_of(figures) - (DRIFT_WEIGHT * figures["drift"] if rule == "balanced" else 0.0)


def best_preview(history: Mapping[int, Mapping[str, float]], rule: str) -> BestPreview | None:
    """The best preview of {step: figures}, the earliest of equals; None before the first of a trained adapter."""
    scores = {step: score_of(figures, rule) for step, figures in sorted(history.items()) if step > 0}
    if not scores:
        return None
    best = max(scores, key=lambda step: (scores[step], -step))
    return BestPreview(best, scores[best], sum(step > best for step in scores))
