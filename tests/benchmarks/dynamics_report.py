"""Tables, bars and the figure from the record of `dynamics.py`.

    python tests/benchmarks/dynamics_report.py --record tests/benchmarks/results/dynamics_full.jsonl

Writes beside the record, under its name, `.md` (tables, bars), `.json` (the same numbers with command and hardware)
and `.png` (fidelity and drift against the learning rate and the length of training). A figure is the mean over the
subjects and seeds ("cells") that were run, and a method is only compared with another over the cells both have.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FIGURES = ("fidelity", "drift", "following", "heldout_loss", "prediction_drift", "share")
OURS, LORA, SHIPPED = "ours", "PEFT LoRA", "PEFT DeLoRA"
DEFAULT_RATE = 1e-3  # TrainingConfig.learning_rate
COLOURS = {OURS: "#1b7837", LORA: "#762a83", "PEFT DoRA": "#c2a5cf", SHIPPED: "#d95f02"}

Row = dict[str, Any]
Setting = tuple[str, float | None, int, str]  # method, learning rate, steps, options


def setting_of(row: Row) -> Setting:
    """What all cells of a setting share."""
    options = ", ".join(f"{name} {value}" for name, value in sorted(row["options"].items()))
    return row["method"], row["learning_rate"], row["steps"], options


def by_setting(rows: Sequence[Row]) -> dict[Setting, dict[tuple[str, int], Row]]:
    """Rows by setting, then by (subject, seed)."""
    found: dict[Setting, dict[tuple[str, int], Row]] = {}
    for row in rows:
        found.setdefault(setting_of(row), {})[(row["subject"], row["seed"])] = row
    return found


def mean(cells: dict[tuple[str, int], Row], figure: str) -> float:
    """Mean of a figure over cells."""
    return statistics.fmean(row[figure] for row in cells.values())


def table(settings: dict[Setting, dict[tuple[str, int], Row]]) -> str:
    """Every setting with its figures, as Markdown."""
    lines = ["| method | learning rate | steps | options | n | " + " | ".join(FIGURES) + " | share at step 1 |",
             "|---" * (6 + len(FIGURES)) + "|"]  # fmt: skip
    for (method, rate, steps, options), cells in sorted(settings.items(), key=lambda item: _order(item[0])):
        first = statistics.fmean(row["shares"]["1"] for row in cells.values())
        numbers = " | ".join(f"{mean(cells, figure):.3f}" for figure in FIGURES)
        shown = "default" if rate is None else f"{rate:g}"
        lines.append(f"| {method} | {shown} | {steps} | {options} | {len(cells)} | {numbers} | {first:.4f} |")
    return "\n".join(lines)


def _order(setting: Setting) -> tuple[Any, ...]:
    method, rate, steps, options = setting
    return bool(options), method, steps, options, rate or 0.0


# ---- the bars ------------------------------------------------------------------------------------


def bars(settings: dict[Setting, dict[tuple[str, int], Row]], once: int) -> list[tuple[str, str, bool]]:
    """Every bar: what it asks, what was found, whether it is met.

    LoRA's best learning rate is the one of the highest fidelity.
    """
    ours = settings[(OURS, None, once, "")]
    plain = {s: cells for s, cells in sorted(settings.items(), key=lambda item: _order(item[0])) if not s[3]}
    lora = {s[1]: cells for s, cells in plain.items() if s[0] == LORA and s[2] == once}
    best = max(lora, key=lambda rate: mean(lora[rate], "fidelity"))
    found = [_no_jump(settings), _beats(ours, lora[best], f"LoRA at its best rate {best:g}")]
    found.append(_rates(plain, once, mean(lora[best], "drift")))
    if (long := settings.get((OURS, None, 10 * once, ""))) is not None:
        found.append(_length(ours, long))
    found += [_better(ours, cells, f"PEFT DeLoRA at {s[1]:g}") for s, cells in plain.items()
              if s[0] == SHIPPED and s[2] == once]  # fmt: skip
    return found


def _no_jump(settings: dict[Setting, dict[tuple[str, int], Row]]) -> tuple[str, str, bool]:
    worst = max(row["shares"]["1"] / row["share"] for (method, _, _, options), cells in settings.items()
                if method == OURS and not options for row in cells.values())  # fmt: skip
    return (
        "1. |dW|/|W| after step 1 at most 1/20 of the final one",
        f"largest ratio 1/{1 / worst:.0f}",
        worst <= 1 / 20,
    )


def _beats(ours: Any, best: Any, name: str) -> tuple[str, str, bool]:
    both = ours.keys() & best.keys()
    (mine, my_drift), (theirs, their_drift) = ((mean(_only(c, both), "fidelity"), mean(_only(c, both), "drift"))
                                               for c in (ours, best))  # fmt: skip
    return (
        f"2. fidelity at least that of {name}, drift at most 0.8 times",
        f"{mine:.3f} to {theirs:.3f}, drift {my_drift:.3f} to {their_drift:.3f} ({my_drift / their_drift:.2f} times)",
        mine >= theirs and my_drift <= 0.8 * their_drift,
    )


def _rates(plain: Any, once: int, lora_drift: float) -> tuple[str, str, bool]:
    swept = {s[1]: cells for s, cells in plain.items() if s[0] == OURS and s[2] == once}
    shared = set.intersection(*(set(cells) for cells in swept.values()))
    fidelity = [mean(_only(cells, shared), "fidelity") for cells in swept.values()]
    drift = [mean(_only(cells, shared), "drift") for cells in swept.values()]
    told = f"worst {min(fidelity):.3f}, best {max(fidelity):.3f}, largest drift {max(drift):.3f} ({len(shared)} cells)"
    return (
        "3. learning rate from 1/32 to 32 times: worst fidelity at least 95 % of the best, drift within LoRA's best",
        told, len(swept) > 1 and min(fidelity) >= 0.95 * max(fidelity) and max(drift) <= lora_drift,
    )  # fmt: skip


def _length(once: Any, long: Any) -> tuple[str, str, bool]:
    both = once.keys() & long.keys()
    (f1, d1), (f10, d10) = ((mean(_only(c, both), "fidelity"), mean(_only(c, both), "drift")) for c in (once, long))
    told = f"fidelity {f1:.3f} to {f10:.3f}, drift {d1:.3f} to {d10:.3f} ({d10 / d1:.2f} times; {len(both)} cells)"
    return (
        "4. ten times the steps: drift grows by at most 10 %, fidelity does not fall",
        told,
        f10 >= f1 and d10 <= 1.1 * d1,
    )


def _better(ours: Any, other: Any, name: str) -> tuple[str, str, bool]:
    both = ours.keys() & other.keys()
    mine, theirs = (
        [mean(_only(c, both), figure) for figure in ("fidelity", "drift", "following")] for c in (ours, other)
    )
    told = "fidelity {:.3f}, drift {:.3f}, following {:.2f} to {:.3f}, {:.3f}, {:.2f}".format(*mine, *theirs)
    return f"5. better than {name} on both", told, mine[0] > theirs[0] and mine[1] < theirs[1]


def _only(cells: Any, keys: Any) -> Any:
    return {key: cells[key] for key in keys}


# ---- the figure ----------------------------------------------------------------------------------


def figure(settings: dict[Setting, dict[tuple[str, int], Row]], once: int, destination: Path) -> None:
    """Fidelity and drift against the learning rate (top) and the number of steps (bottom)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plots, grid = pyplot.subplots(2, 2, figsize=(9, 6.2), sharey="col", layout="constrained")
    for column, name in enumerate(("fidelity", "drift")):
        for method, colour in COLOURS.items():
            own = {s: cells for s, cells in settings.items() if s[0] == method and not s[3]}
            longest = max((s[2] for s in own), default=once)
            followed = {s: cells for s, cells in own.items() if s[1] in {r[1] for r in own if r[2] == longest}}
            shared = set.intersection(*map(set, followed.values())) if longest > once else set()
            steps = {s: _only(cells, shared) for s, cells in followed.items() if shared}
            for row, chosen, axis in ((0, {s: own[s] for s in own if s[2] == once}, 1), (1, steps, 2)):
                if chosen:
                    grid[row][column].plot(*_series(chosen, axis, name), "o-", color=colour, label=method)
        grid[0][column].set(xscale="log", xlabel="learning rate", ylabel=name, title=f"{name} after {once} steps")
        grid[1][column].set(xscale="log", xlabel="steps", ylabel=name, title=f"{name} over length")
    plots.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    plots.savefig(destination, dpi=110)


def _series(
    settings: dict[Setting, dict[tuple[str, int], Row]], axis: int, name: str
) -> tuple[list[float], list[float]]:
    points = sorted((float(DEFAULT_RATE if s[axis] is None else s[axis]), mean(cells, name))  # type: ignore[arg-type]
                    for s, cells in settings.items())  # fmt: skip
    return [x for x, _ in points], [y for _, y in points]


def main() -> None:
    """Read the record, print the report, write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RESULTS / "dynamics_full.jsonl")
    record: Path = parser.parse_args().record
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    rows = [line for line in lines if "key" in line]
    circumstances = [line for line in lines if "key" not in line]
    settings, once = by_setting(rows), min(row["steps"] for row in rows)
    judged = bars(settings, once)
    verdict = "\n".join(f"| {asked} | {found} | {'yes' if met else '**no**'} |" for asked, found, met in judged)
    text = f"{table(settings)}\n\n| bar | found | met |\n|---|---|---|\n{verdict}\n"
    print(text)
    record.with_suffix(".md").write_text(text, encoding="utf-8")
    told = {"runs": circumstances, "settings": [
        {"method": m, "learning_rate": r, "steps": s, "options": o, "cells": len(c),
         **{name: round(mean(c, name), 4) for name in FIGURES}} for (m, r, s, o), c in settings.items()],
        "bars": [{"asked": asked, "found": found, "met": met} for asked, found, met in judged]}  # fmt: skip
    record.with_suffix(".json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    figure(settings, once, record.with_suffix(".png"))


if __name__ == "__main__":
    main()
