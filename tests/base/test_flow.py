"""Flow matching. Oracles: diffusers' flow schedulers end at x_0 when fed the target; diffusers' own densities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from delora_diffusion.base.objective import FlowMatching, ObjectiveError, TimestepSampling, objective_of

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "euler dynamic": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "euler terminal": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "dpm": lambda: DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
    "dpm single": lambda: DPMSolverSinglestepScheduler(**FLOW, flow_shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
}


def drawn(objective: FlowMatching, count: int = 4000, tokens: int = 256) -> torch.Tensor:
    """That many sigmas."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([objective.sample_timestep(generator, tokens) for _ in range(count)]) / objective.steps


def flow(scheduler: Any, **sampling: Any) -> FlowMatching:
    objective = objective_of(scheduler, TimestepSampling(**sampling))
    assert isinstance(objective, FlowMatching)
    return objective


# ---- noising and target ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_fed_its_own_target_the_scheduler_ends_at_x_0(kind: str) -> None:
    scheduler = SCHEDULERS[kind]()
    settings = {"mu": 0.8} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(6, **settings)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 2, 3, generator=generator) for _ in range(2))
    first = scheduler.sigmas[0] * scheduler.config.num_train_timesteps
    sample, target = objective_of(scheduler).noised(latents, noise, first.float().expand(2))
    for t in scheduler.timesteps:
        sample = scheduler.step(target, t, sample).prev_sample
    assert torch.allclose(sample, latents, atol=2e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_and_times_are_the_schedulers(shift: float) -> None:
    """At every step of the schedule that diffusers' training scripts choose from."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    latents, noise = torch.randn(1000, 3), torch.randn(1000, 3)
    x_t, _ = objective_of(scheduler).noised(latents, noise, scheduler.timesteps)
    assert torch.allclose(x_t, scheduler.scale_noise(latents, scheduler.timesteps, noise), atol=1e-5)
    levels = torch.arange(1000, 0, -1) / 1000
    s = flow(scheduler).shift(0)
    assert torch.allclose(s * levels / (1 + (s - 1) * levels), scheduler.sigmas[:1000], atol=1e-6)


def test_previews_that_use_the_scheduler_change_nothing() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = flow(scheduler)
    before = drawn(objective, 20)
    scheduler.set_shift(9.0)
    scheduler.set_timesteps(4)
    assert torch.equal(drawn(objective, 20), before)


# ---- timesteps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "mode"])
def test_levels_are_distributed_as_in_diffusers(kind: str) -> None:
    """diffusers counts from noise to image, so its mean is ours with the other sign; both means differ from 0 here."""
    ours = drawn(flow(FlowMatchEulerDiscreteScheduler(), kind=kind, logit_mean=0.7, logit_std=0.5, mode_scale=0.8))
    scheme = {"uniform": "none"}.get(kind, kind)
    theirs = 1 - compute_density_for_timestep_sampling(
        scheme, 40000, logit_mean=-0.7, logit_std=0.5, mode_scale=0.8, generator=torch.Generator().manual_seed(1)
    )
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert abs(ours.quantile(q) - theirs.quantile(q)) < 0.025, q
    assert ours.min() >= 0.001 and ours.max() <= 1


DENSITIES: dict[str, Any] = {
    "uniform": lambda u: torch.ones_like(u),
    # Esser et al. 2024, Eq. 19 with location 0.7 and scale 0.5
    "logit_normal": lambda u: torch.exp(-((torch.logit(u) - 0.7) ** 2) / (2 * 0.5**2)) / (u * (1 - u)),
    # Eq. 20 gives the level of a uniform number; its density is the slope of the inverse, here by interpolation
    "mode": lambda u: _slope_of_inverse(lambda v: 1 - v - 0.8 * ((math.pi / 2 * v).cos() ** 2 - 1 + v), u),
}


def _slope_of_inverse(level: Any, u: torch.Tensor) -> torch.Tensor:
    uniform = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    at = level(uniform).flip(0)
    inverse = (torch.searchsorted(at, u).double() / 100_000).clamp(0, 1)
    return torch.gradient(inverse, spacing=(u,))[0].abs()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", DENSITIES)
def test_levels_follow_the_density(kind: str, shift: float) -> None:
    """Kolmogorov and Smirnov's distance from the density written down, moved by the shift; passed by chance once in
    a thousand seeds."""
    settings = {"logit_mean": 0.7, "logit_std": 0.5, "mode_scale": 0.8}
    sigma = drawn(flow(FlowMatchEulerDiscreteScheduler(), kind=kind, shift=shift, **settings)).double().sort()[0]
    unshifted = sigma / (shift - (shift - 1) * sigma)
    u = torch.linspace(1e-4, 1 - 1e-4, 20_001, dtype=torch.float64)
    below = torch.cumulative_trapezoid(DENSITIES[kind](u), u)
    expected = below[torch.searchsorted(u[1:].contiguous(), unshifted).clamp(max=len(below) - 1)] / below[-1]
    empirical = (torch.arange(len(sigma), dtype=torch.float64) + 0.5) / len(sigma)
    assert (expected - empirical).abs().max() < 1.95 / len(sigma) ** 0.5


def test_logit_normal_is_the_usual_for_flow_matching() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    assert torch.equal(drawn(flow(scheduler), 50), drawn(flow(scheduler, kind="logit_normal"), 50))
    assert not torch.equal(drawn(flow(scheduler), 50), drawn(flow(scheduler, kind="uniform"), 50))


def test_more_mean_and_more_shift_are_more_noise() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    median = [drawn(flow(scheduler, **s), 1000).median() for s in ({}, {"logit_mean": 1.0}, {"shift": 6.0})]
    assert median[0] < median[1] and median[0] < median[2]
    assert abs(median[0] - 2 / 3) < 0.02 and abs(median[2] - 6 / 7) < 0.02, "level 1/2 goes to s / (1 + s)"


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_follows_the_size_as_in_sampling(kind: Any, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    s, levels = flow(scheduler).shift(tokens), torch.linspace(0.01, 1, 50)
    theirs = scheduler.time_shift(calculate_shift(tokens), 1.0, levels)
    assert torch.allclose(s * levels / (1 + (s - 1) * levels), theirs, atol=1e-6)
    assert flow(scheduler, shift=4.0).shift(tokens) == 4.0


def test_the_dynamic_shift_is_that_of_the_picture() -> None:
    objective = flow(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    small, large = (drawn(objective, 2000, tokens).median() for tokens in (256, 4096))
    for found, mu in ((small, 0.5), (large, 1.15)):
        assert abs(found - math.exp(mu) / (1 + math.exp(mu))) < 0.02


# ---- weights --------------------------------------------------------------------------------------


def test_the_weight_is_min_snr_in_terms_of_x_0() -> None:
    """An error of x_0 costs min(SNR, gamma) times its square, as in every other prediction."""
    objective = flow(FlowMatchEulerDiscreteScheduler())
    t = torch.tensor([100.0, 500.0, 900.0])
    latents, noise = torch.randn(3, 5), torch.randn(3, 5)
    x_t, target = objective.noised(latents, noise, t)
    sigma = (t / 1000)[:, None]
    wrong = (x_t - (latents + 0.1)) / sigma  # the velocity that leads to latents + 0.1
    cost = objective.snr_weight(t, 5.0) * (wrong - target).square().mean(1)
    snr = ((1 - sigma) / sigma).square()[:, 0]
    assert torch.allclose(cost, snr.clamp(max=5.0) * 0.01, rtol=1e-3)
    assert torch.equal(objective.snr_weight(t, None), torch.ones(3))


def test_a_shift_is_refused_where_there_is_none() -> None:
    from diffusers import DDPMScheduler

    with pytest.raises(ObjectiveError, match="timestep_shift is for flow matching, and DDPMScheduler is not"):
        objective_of(DDPMScheduler(), TimestepSampling(shift=3.0))


def test_a_discrete_schedule_takes_the_other_densities() -> None:
    from diffusers import DDPMScheduler

    objective, generator = (
        objective_of(DDPMScheduler(), TimestepSampling(kind="logit_normal", logit_mean=2.0)),
        torch.Generator(),
    )
    t = torch.cat([objective.sample_timestep(generator) for _ in range(1000)])
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    assert abs(t.float().median() / 1000 - 1 / (1 + math.exp(-2))) < 0.03
