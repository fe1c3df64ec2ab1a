"""The training objective: noising, target and weight of an example, from the scheduler's class and config alone.

Discrete diffusion (Ho et al. 2020): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, and the model is trained to
predict the noise, x_0, or the velocity v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022).

Flow matching (Lipman et al. 2023, Liu et al. 2023): x_t = (1 - sigma) x_0 + sigma noise, and the model is trained to
predict the velocity noise - x_0; the scheduler's t is sigma times its number of training timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DeloraError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal", "mode")


class ObjectiveError(DeloraError):
    """A scheduler that cannot be trained with, or not in the way asked for; the message says what can."""


@dataclass(frozen=True, kw_only=True)
class TimestepSampling:
    """How noise levels are drawn (Esser et al. 2024, section 3.1), 0 being the image and 1 the noise.

    Attributes:
        kind: one of `TIMESTEP_SAMPLINGS`; None: logit_normal for flow matching, else uniform.
        logit_mean: of the logit-normal density; above 0 there is more noise.
        logit_std: its width.
        mode_scale: s of the density with a mode in the middle (Eq. 20); above 0 the middle is drawn more often.
        shift: in place of the scheduler's own shift, for flow matching.
    """

    kind: str | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float | None = None

    def level(self, generator: torch.Generator, *, default: str) -> Tensor:
        """A noise level (1,) between 0 and 1, before any shift."""
        kind = self.kind or default
        if kind == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * torch.randn(1, generator=generator))
        u = torch.rand(1, generator=generator)
        if kind == "mode":
            return 1 - u - self.mode_scale * ((math.pi / 2 * u).cos().square() - 1 + u)
        return u


@dataclass(frozen=True)
class Diffusion:
    """Discrete diffusion. Everything is copied from the scheduler, which previews may then change.

    Attributes:
        alphas_cumprod: (T,) abar_t in fp32, falling from about 1 to about 0, or to 0 (zero terminal SNR).
        prediction_type: what the model predicts, one of `PREDICTIONS`.
        sampling: how timesteps are drawn.
    """

    alphas_cumprod: Tensor
    prediction_type: str
    sampling: TimestepSampling = TimestepSampling()

    def sample_timestep(self, generator: torch.Generator, tokens: int = 0) -> Tensor:
        """A timestep (1,) in 0 .. T-1, whatever the number of image tokens."""
        steps = len(self.alphas_cumprod)
        if self.sampling.kind in (None, "uniform"):
            return torch.randint(0, steps, (1,), generator=generator)
        return (self.sampling.level(generator, default="uniform") * steps).long().clamp(0, steps - 1)

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the target for latents x_0 and noise (B, C, H, W) at timesteps t (B,)."""
        abar = self.alphas_cumprod.to(latents.device)[t].reshape(-1, *[1] * (latents.dim() - 1))
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        x_t = signal * latents + sigma * noise
        if self.prediction_type == "epsilon":
            return x_t, noise
        if self.prediction_type == "sample":
            return x_t, latents
        return x_t, signal * noise - sigma * latents

    def snr_weight(self, t: Tensor, gamma: float | None) -> Tensor:
        """Min-SNR weight (B,) at timesteps t (B,): min(SNR, gamma) in x_0 terms (Hang et al. 2023, Eq. 7 and 8).

        A squared error of the noise, of v and of x_0 is SNR^-1, (SNR + 1)^-1 and 1 times its weight in x_0 terms.
        """
        abar = self.alphas_cumprod.to(t.device)[t]
        if gamma is None:
            return torch.ones_like(abar)
        snr = abar / (1 - abar)
        per_x0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.prediction_type]
        return snr.clamp(max=gamma) / per_x0.clamp(min=1e-8)


@dataclass(frozen=True)
class FlowMatching:
    """Flow matching. Nothing is read from the scheduler after construction.

    Attributes:
        steps: T, its number of training timesteps.
        shift: number of image tokens -> s, which moves a level u to sigma = s u / (1 + (s - 1) u) (Esser et al., Eq.
            23): larger pictures need more noise to hide as much.
        sampling: how u is drawn.
    """

    steps: int
    shift: Callable[[int], float]
    sampling: TimestepSampling = TimestepSampling()

    def sample_timestep(self, generator: torch.Generator, tokens: int = 0) -> Tensor:
        """A timestep (1,), sigma T, with sigma in 1/T .. 1, for a picture of so many tokens."""
        u, s = self.sampling.level(generator, default="logit_normal"), self.shift(tokens)
        return (s * u / (1 + (s - 1) * u)).clamp(1 / self.steps, 1.0) * self.steps

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the target for latents x_0 and noise (B, C, H, W) at timesteps t (B,)."""
        sigma = (t.to(latents.device) / self.steps).reshape(-1, *[1] * (latents.dim() - 1))
        return (1 - sigma) * latents + sigma * noise, noise - latents

    def snr_weight(self, t: Tensor, gamma: float | None) -> Tensor:
        """Min-SNR weight (B,) as in `Diffusion`: SNR = (1 - sigma)^2 / sigma^2, and x_0's error is sigma v's."""
        sigma = t / self.steps
        if gamma is None:
            return torch.ones_like(sigma)
        return ((1 - sigma) / sigma).square().clamp(max=gamma) * sigma.square()


Objective = Diffusion | FlowMatching


def objective_of(scheduler: Any, sampling: TimestepSampling | None = None) -> Objective:
    """The objective a pipeline's scheduler implies.

    Raises:
        ObjectiveError: a scheduler without a noise schedule that can be trained on, an unknown prediction type, noise
            to be predicted where there is nothing but noise, or a shift for a schedule that has none.
    """
    name, sampling = type(scheduler).__name__, sampling or TimestepSampling()
    config: Any = getattr(scheduler, "config", {})
    prediction = config.get("prediction_type", "epsilon")
    if "FlowMatch" in name or prediction == "flow_prediction":
        return FlowMatching(config.num_train_timesteps, _shift_of(config, sampling.shift), sampling)
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ObjectiveError(
            f"cannot train with {name}: it has no discrete noise schedule and is not flow matching; use a base whose "
            f"scheduler is DDPM-like or FlowMatchEuler"
        )
    if prediction not in PREDICTIONS:
        raise ObjectiveError(f"{name} predicts {prediction!r}; can train {', '.join(PREDICTIONS)} and flow_prediction")
    if sampling.kind is None and (sampling.logit_mean, sampling.logit_std) != (0.0, 1.0):
        raise ObjectiveError(
            f"logit_mean and logit_std do nothing with {name}: without flow matching noise levels are uniform; give "
            f"timestep_sampling logit_normal, or leave them out"
        )
    if sampling.shift is not None:
        raise ObjectiveError(f"timestep_shift is for flow matching, and {name} is not; leave it out")
    alphas_cumprod = scheduler.alphas_cumprod.detach().to("cpu", torch.float32).clone()
    if config.get("rescale_betas_zero_snr"):
        alphas_cumprod[-1] = 0  # some samplers keep it just above, for a division of their own
    if alphas_cumprod[-1] == 0 and prediction == "epsilon":
        raise ObjectiveError(
            f"the schedule of {name} ends in pure noise (rescale_betas_zero_snr), of which noise tells nothing: it is "
            f"for bases with prediction_type v_prediction or sample, and this one's is epsilon"
        )
    return Diffusion(alphas_cumprod, prediction, sampling)


def _shift_of(config: Any, given: float | None) -> Callable[[int], float]:
    """The shift by number of image tokens: the one given, the scheduler's fixed one, or its line through two sizes."""
    if given is not None or not config.get("use_dynamic_shifting"):
        fixed = given or config.get("shift") or config.get("flow_shift") or 1.0
        return lambda tokens: fixed
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    exponential = config.get("time_shift_type", "exponential") == "exponential"

    def shift(tokens: int) -> float:
        mu = low + (high - low) * (tokens - few) / (many - few)
        return math.exp(mu) if exponential else mu

    return shift
