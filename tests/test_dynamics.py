"""The dynamics bench runs: a few steps of each way of training, and a report that judges its record."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
RECORDS = [path.stem for path in sorted((BENCHMARKS / "results").glob("dynamics_*.jsonl"))]


@pytest.fixture(scope="module")
def modules() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import dynamics
        import dynamics_bench
        import dynamics_report
    finally:
        sys.path.remove(str(BENCHMARKS))
    return dynamics, dynamics_bench, dynamics_report


def test_every_method_trains_and_starts_from_the_base(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dynamics, dynamics_bench, _ = modules
    monkeypatch.setattr(dynamics_bench, "SUBJECTS", {"spotted_dog": "dog"})
    monkeypatch.setattr(dynamics_bench, "UNSEEN", {})
    monkeypatch.setattr(dynamics_bench, "CLASS_IMAGES", 2)
    monkeypatch.setattr(dynamics_bench, "SAMPLING_STEPS", 1)
    bench = dynamics_bench.Bench()
    assert bench.cheap(bench.denoiser, "spotted_dog")["prediction_drift"] == 0
    kept = [((f"with_{kind}_preservation", True),) for kind in ("base", "prior")]
    for method, options in ((dynamics.OURS, kept[0]), (dynamics.OURS, kept[1]), (dynamics.LORA, ())):
        rate = None if method == dynamics.OURS else 1e-3
        (row,) = dynamics.measure(bench, dynamics.Run("spotted_dog", 0, method, rate, 2, options))
        assert row["shares"]["1"] > 0 and row["share"] > 0 and row["prediction_drift"] > 0, method
        assert -1 <= row["fidelity"] <= 1 and 0 <= row["following"] <= 1 and 0 < row["drift"] < 1


def test_runs_have_keys_of_their_own_and_the_full_plan_holds_the_small_one(modules: Any) -> None:
    dynamics, _, _ = modules
    full = [run.key for run in dynamics.full_plan()]
    assert len(set(full)) == len(full) and {run.key for run in dynamics.small_plan()} <= set(full)
    assert not {run.subject for run in dynamics.unseen_plan()} & {run.subject for run in dynamics.full_plan()}


@pytest.mark.parametrize("record", RECORDS)
def test_the_committed_tables_are_those_of_the_committed_record(record: str, modules: Any) -> None:
    _, _, report = modules
    lines = (BENCHMARKS / "results" / f"{record}.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "key" in row]
    settings = report.by_setting(rows)
    told = (BENCHMARKS / "results" / f"{record}.md").read_text()
    assert report.table(settings) in told
    for asked, found, met in report.bars(settings, min(row["steps"] for row in rows)):
        assert f"| {asked} | {found} | {'yes' if met else '**no**'} |" in told


def test_a_worse_run_fails_the_bars(modules: Any) -> None:
    _, _, report = modules

    def row(method: str, rate: float | None, fidelity: float, drift: float, steps: int = 100) -> dict[str, Any]:
        return {"method": method, "learning_rate": rate, "steps": steps, "options": {}, "subject": "dog", "seed": 0,
                "fidelity": fidelity, "drift": drift, "following": 1.0, "share": 0.1, "shares": {"1": 0.001},
                }  # fmt: skip

    good = [row("ours", None, 0.8, 0.05), row("ours", 1.0, 0.79, 0.06), row("ours", None, 0.8, 0.054, 1000),
            row("PEFT LoRA", 1e-3, 0.5, 0.01), row("PEFT LoRA", 1e-2, 0.7, 0.1),
            row("PEFT DeLoRA", 1e-3, 0.7, 0.2)]  # fmt: skip
    assert [met for *_, met in report.bars(report.by_setting(good), 100)] == [True] * 5
    for number, change in ((0, {"shares": {"1": 0.02}}), (1, {"fidelity": 0.69}), (2, {"drift": 0.2})):
        bad = [*good]
        bad[1 if number == 2 else 0] = bad[1 if number == 2 else 0] | change
        assert not report.bars(report.by_setting(bad), 100)[number][2], change
    longer = [*good[:2], good[2] | {"drift": 0.056}, *good[3:]]
    assert not report.bars(report.by_setting(longer), 100)[3][2]
