"""The training objective. Oracles: diffusers' schedulers recover x_0 from the target and noise the same way."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_snr

from delora_diffusion.base.objective import PREDICTIONS, Diffusion, ObjectiveError, objective_of
from delora_diffusion.sampling.config import SCHEDULERS

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TIMESTEPS = [0, 1, 250, 500, 998, 999]


def ddim(prediction_type: str, **config: Any) -> Any:
    return DDIMScheduler(**SD15 | {"prediction_type": prediction_type, "clip_sample": False} | config)


def batch(count: int = len(TIMESTEPS)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise (count, 4, 2, 3) and a timestep for each."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(count, 4, 2, 3, generator=generator) for _ in range(2))
    return latents, noise, torch.tensor(TIMESTEPS[:count])


# ---- noising and target ---------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_fed_its_own_target_the_scheduler_recovers_x_0(kind: type, prediction_type: str) -> None:
    scheduler: Any = kind(**SD15, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    latents, noise, t = batch()
    x_t, target = objective_of(scheduler).noised(latents, noise, t)
    for i, step in enumerate(TIMESTEPS):
        found = scheduler.step(target[i : i + 1], step, x_t[i : i + 1]).pred_original_sample
        assert torch.allclose(found, latents[i : i + 1], atol=1e-3 if step > 900 else 1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_multistep_solver_recovers_x_0_as_well(prediction_type: str) -> None:
    scheduler = DPMSolverMultistepScheduler(**SD15, prediction_type=prediction_type, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(10)
    latents, noise, _ = batch(1)
    for index in (0, 4, 9):
        scheduler._step_index = index
        t = scheduler.timesteps[index : index + 1]
        x_t, target = objective_of(scheduler).noised(latents, noise, t)
        assert torch.allclose(scheduler.convert_model_output(target, sample=x_t), latents, atol=1e-3)


#: What some samplers do not know, by diffusers' own word.
UNKNOWN_THERE = {("PNDMScheduler", "sample"), ("EulerAncestralDiscreteScheduler", "sample")}


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(
    "name", [*SCHEDULERS.values(), "LCMScheduler", "DPMSolverSinglestepScheduler"],
)  # fmt: skip
def test_every_sampler_that_is_fed_the_target_ends_at_x_0(name: str, prediction_type: str) -> None:
    """From any noise, and with new noise on the way where the sampler adds some."""
    one = {"set_alpha_to_one": True} if name in ("PNDMScheduler", "DDIMScheduler") else {}
    spacing = {} if name in ("LCMScheduler", "DPMSolverSinglestepScheduler") else {"timestep_spacing": "trailing"}
    scheduler: Any = getattr(diffusers, name)(**SD15, prediction_type=prediction_type, **one, **spacing)
    scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(10)
    objective, (latents, sample, _) = objective_of(scheduler), batch(2)
    sample = sample * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        assert t == t.long(), "a step of the schedule"
        x_t, level = scheduler.scale_model_input(sample, t), t.long().expand(2)
        signal = objective.noised(torch.ones_like(latents), torch.zeros_like(latents), level)[0]
        sigma = objective.noised(torch.zeros_like(latents), torch.ones_like(latents), level)[0]
        _, target = objective.noised(latents, (x_t - signal * latents) / sigma, level)
        if (name, prediction_type) in UNKNOWN_THERE:
            with pytest.raises((NotImplementedError, ValueError), match="prediction_type"):
                scheduler.step(target, t, sample)
            return
        sample = scheduler.step(target, t, sample, return_dict=False)[0]
    averaged = (name, prediction_type) == ("PNDMScheduler", "v_prediction")  # over steps, exact for noise only
    assert torch.allclose(sample, latents, atol=0.1 if averaged else 2e-3)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("kind", [DDPMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, DDIMScheduler])
def test_noising_and_target_are_diffusers_own(kind: type, prediction_type: str) -> None:
    scheduler: Any = kind(**SD15, prediction_type=prediction_type)
    latents, noise, t = batch()
    x_t, target = objective_of(scheduler).noised(latents, noise, t)
    v = DDPMScheduler(**SD15).get_velocity(latents, noise, t)
    assert torch.allclose(x_t, DDPMScheduler(**SD15).add_noise(latents, noise, t), atol=1e-6)
    assert torch.allclose(target, {"epsilon": noise, "v_prediction": v, "sample": latents}[prediction_type], atol=1e-6)


def test_latents_of_other_ranks_are_noised_the_same() -> None:
    objective = objective_of(ddim("v_prediction"))
    latents, noise, t = batch()
    flat = objective.noised(latents.flatten(1), noise.flatten(1), t)
    for found, expected in zip(flat, objective.noised(latents, noise, t), strict=True):
        assert torch.equal(found, expected.flatten(1))


# ---- the copy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_previews_that_use_the_scheduler_change_nothing(kind: type) -> None:
    scheduler: Any = kind(**SD15)
    objective, (latents, noise, t) = objective_of(scheduler), batch()
    before = [tensor.clone() for tensor in objective.noised(latents, noise, t)]
    scheduler.set_timesteps(7)
    scheduler.alphas_cumprod.mul_(0.5)  # nothing is shared
    for found, expected in zip(objective.noised(latents, noise, t), before, strict=True):
        assert torch.equal(found, expected)
    assert objective.alphas_cumprod.dtype == torch.float32


# ---- timesteps ------------------------------------------------------------------------------------


def test_timesteps_are_uniform_over_the_whole_schedule_and_follow_the_generator() -> None:
    objective = objective_of(DDIMScheduler(num_train_timesteps=8))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([objective.sample_timestep(generator) for _ in range(4000)])
    assert drawn.shape == (4000,) and drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=8)
    assert len(counts) == 8 and (counts - 500).abs().max() < 5 * (4000 * 1 / 8 * 7 / 8) ** 0.5
    again = torch.Generator().manual_seed(0)
    assert torch.equal(torch.cat([objective.sample_timestep(again) for _ in range(4000)]), drawn)


# ---- weights --------------------------------------------------------------------------------------


def diffusers_weight(prediction_type: str, t: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR as diffusers' training scripts compute it."""
    snr = compute_snr(DDPMScheduler(**SD15), t)
    least = torch.stack([snr, gamma * torch.ones_like(t)], dim=1).min(dim=1)[0]
    return {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[prediction_type]


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_are_diffusers_own(prediction_type: str, gamma: float) -> None:
    t = torch.arange(1000)
    found = objective_of(ddim(prediction_type)).snr_weight(t, gamma)
    assert torch.allclose(found, diffusers_weight(prediction_type, t, gamma), rtol=1e-4)
    assert found.shape == (1000,) and found.std() > 0


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_without_gamma_every_timestep_weighs_one(prediction_type: str) -> None:
    assert torch.equal(objective_of(ddim(prediction_type)).snr_weight(torch.arange(9), None), torch.ones(9))


def test_the_weighted_loss_does_not_depend_on_what_is_predicted() -> None:
    """One error of x_0 costs min(SNR, gamma) times its square, whether made through epsilon, v or x_0."""
    latents, noise, t = batch()
    costs = []
    for prediction_type in PREDICTIONS:
        objective = objective_of(ddim(prediction_type))
        x_t, target = objective.noised(latents, noise, t)
        abar = objective.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        wrong = latents + 0.1
        wrong_noise = (x_t - abar.sqrt() * wrong) / (1 - abar).sqrt()
        wrong_v = abar.sqrt() * wrong_noise - (1 - abar).sqrt() * wrong
        made = {"epsilon": wrong_noise, "v_prediction": wrong_v, "sample": wrong}[prediction_type]
        costs.append(objective.snr_weight(t, 5.0) * (made - target).square().mean((1, 2, 3)))
    assert torch.allclose(costs[0], costs[2], rtol=2e-3) and torch.allclose(costs[1], costs[2], rtol=2e-3)


# ---- zero terminal SNR ----------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_zero_terminal_snr_schedule_ends_in_pure_noise(kind: type, prediction_type: str) -> None:
    """Also where the sampler's own copy stops just short of it."""
    scheduler: Any = kind(**SD15, prediction_type=prediction_type, rescale_betas_zero_snr=True)
    objective, (latents, noise, _) = objective_of(scheduler), batch()
    assert objective.alphas_cumprod[-1] == 0 and (objective.alphas_cumprod.diff() < 0).all()
    x_t, target = objective.noised(latents, noise, torch.full((len(latents),), 999))
    assert torch.equal(x_t, noise)
    assert torch.equal(target, {"v_prediction": -latents, "sample": latents}[prediction_type])
    weights = objective.snr_weight(torch.arange(1000), 5.0)
    assert weights.isfinite().all() and weights[-1] == 0 and (weights[:-1] > 0).all()


def test_from_a_zero_terminal_snr_schedule_x_0_is_recovered_at_the_last_step() -> None:
    scheduler = ddim("v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    latents, noise, t = batch()
    x_t, target = objective_of(scheduler).noised(latents, noise, torch.full_like(t, 999))
    scheduler.set_timesteps(10)
    assert torch.allclose(scheduler.step(target, 999, x_t).pred_original_sample, latents, atol=1e-5)


def test_noise_is_not_to_be_predicted_where_there_is_nothing_else() -> None:
    with pytest.raises(ObjectiveError, match=r"in pure noise \(rescale_betas_zero_snr\)"):
        objective_of(ddim("epsilon", rescale_betas_zero_snr=True))


# ---- what cannot be trained with ------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler, said",
    [
        (CogVideoXDDIMScheduler(prediction_type="flow"), "CogVideoXDDIMScheduler predicts 'flow'; can train epsilon"),
        (EDMEulerScheduler(), "cannot train with EDMEulerScheduler"),
        (object(), "cannot train with object: it has no discrete noise schedule and is not flow matching; use a"),
    ],
    ids=["flow", "edm", "no scheduler"],
)
def test_a_scheduler_that_cannot_be_trained_with_is_refused(scheduler: Any, said: str) -> None:
    with pytest.raises(ObjectiveError) as refused:
        objective_of(scheduler)
    assert said in str(refused.value)


def test_every_kind_of_prediction_is_reachable_from_a_scheduler() -> None:
    assert [objective_of(ddim(kind)).prediction_type for kind in PREDICTIONS] == list(PREDICTIONS)
    assert isinstance(objective_of(PNDMScheduler(**SD15)), Diffusion)
