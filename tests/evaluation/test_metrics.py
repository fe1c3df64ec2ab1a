"""Measures against values worked out by hand, and against torchmetrics where it is installed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from delora_diffusion.evaluation.metrics import (
    MetricError,
    bootstrap,
    diversity_scores,
    drift_scores,
    fidelity_scores,
    prompt_scores,
    real_scores,
)

X, Y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
HALF = torch.tensor([0.5, math.sqrt(3) / 2])  # 60 degrees from X, 30 from Y
ROOT3 = math.sqrt(3) / 2


def units(n: int, d: int = 5, *, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def mean_of(scores: Callable[..., torch.Tensor], *rows: torch.Tensor) -> float:
    return float(scores(*rows).mean())


def test_fidelity_is_the_mean_over_all_pairs() -> None:
    generated, real = torch.stack([X, HALF]), torch.stack([X, Y, -X])
    # X: 1, 0, -1; HALF: .5, .866, -.5
    assert fidelity_scores(generated, real).tolist() == pytest.approx([0.0, ROOT3 / 3])
    assert mean_of(fidelity_scores, generated, real) == pytest.approx(ROOT3 / 6)


def test_real_against_real_leaves_out_each_photo_with_itself() -> None:
    assert mean_of(real_scores, torch.stack([X, Y, HALF])) == pytest.approx((0 + 0.5 + ROOT3) / 3)
    assert real_scores(torch.stack([X, Y, HALF])).tolist() == pytest.approx([0.25, ROOT3 / 2, (0.5 + ROOT3) / 2])
    assert math.isnan(mean_of(real_scores, X[None]))


def test_prompt_following_and_drift_compare_row_by_row() -> None:
    one, other = torch.stack([X, Y, X]), torch.stack([X, HALF, -X])
    assert mean_of(prompt_scores, one, other) == pytest.approx((1 + ROOT3 - 1) / 3)
    assert drift_scores(one, other).tolist() == pytest.approx([0, (1 - ROOT3) / 2, 1])
    assert mean_of(drift_scores, one, other) == pytest.approx((3 - ROOT3) / 6)
    assert mean_of(drift_scores, one, one) == pytest.approx(0)


def test_diversity_is_within_a_prompt() -> None:
    groups = [torch.stack([X, Y, HALF]), torch.stack([X, X]), X[None]]
    first = 1 - (0 + 0.5 + ROOT3) / 3
    assert diversity_scores(groups)[:2].tolist() == pytest.approx([first, 0], abs=1e-6)
    assert float(diversity_scores(groups).nanmean()) == pytest.approx(first / 2)
    assert math.isnan(float(diversity_scores([X[None]]))) and not len(diversity_scores([]))


def test_agrees_with_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional")
    one, other = units(6), units(4, seed=1)
    assert mean_of(fidelity_scores, one, other) == pytest.approx(
        float(functional.pairwise_cosine_similarity(one, other).mean())
    )
    square = functional.pairwise_cosine_similarity(one, one, zero_diagonal=True)
    assert mean_of(real_scores, one) == pytest.approx(float(square.sum()) / 30, abs=1e-6)
    paired = float(functional.cosine_similarity(one[:4], other, reduction="mean"))
    assert mean_of(prompt_scores, one[:4], other) == pytest.approx(paired, abs=1e-6)
    assert mean_of(drift_scores, one[:4], other) == pytest.approx((1 - paired) / 2, abs=1e-6)


def test_the_bootstrap_interval_has_the_width_of_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap(values, seed=0, rounds=4000)
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.01)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.01)
    assert bootstrap(values, seed=0) == bootstrap(values, seed=0) != bootstrap(values, seed=1)
    narrow = bootstrap(values, seed=0, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_bootstrap_draws_whole_groups() -> None:
    values, groups = [1.0] * 50 + [3.0] * 50, ["a"] * 50 + ["b"] * 50
    assert bootstrap(values, seed=0, groups=groups) == (1.0, 3.0)  # aa, ab, ba, bb are all there is
    low, high = bootstrap(values, seed=0)
    assert 1.7 < low < high < 2.3
    few = bootstrap([0.0, 0.0, 0.0, 1.0], seed=0, groups=["a", "a", "a", "b"])
    assert few == (0.0, 1.0)
    assert bootstrap([2.0], seed=0) == (2.0, 2.0)


def test_the_bootstrap_leaves_out_what_is_not_a_number() -> None:
    assert bootstrap([2.0, float("nan"), 2.0], seed=0, groups=["a", "b", "a"]) == (2.0, 2.0)
    assert all(math.isnan(end) for end in bootstrap([float("nan")], seed=0))
    assert all(math.isnan(end) for end in bootstrap([], seed=0))


def test_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(MetricError, match="different widths"):
        mean_of(fidelity_scores, units(2), units(2, 4))
    with pytest.raises(MetricError, match="2 base and 3 adapted cannot be paired"):
        mean_of(drift_scores, units(2), units(3))
    with pytest.raises(MetricError, match="one embedding a row"):
        mean_of(fidelity_scores, torch.empty(0, 5), units(2))
    with pytest.raises(MetricError, match="1 groups for 2 values"):
        bootstrap([1.0, 2.0], seed=0, groups=["a"])
