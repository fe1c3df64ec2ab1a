"""The training objective: noising, target and weight of an example, from the scheduler's class and config alone.

Discrete diffusion (Ho et al. 2020): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, and the model is trained to
predict the noise, x_0, or the velocity v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class ObjectiveError(ValueError):
    """A scheduler that cannot be trained with; the message says which can."""


@dataclass(frozen=True)
class Objective:
    """One scheduler's training problem. Everything is copied from the scheduler, which previews may then change.

    Attributes:
        alphas_cumprod: (T,) abar_t in fp32, falling from about 1 to about 0.
        prediction_type: what the model predicts, one of `PREDICTIONS`.
    """

    alphas_cumprod: Tensor
    prediction_type: str

    def sample_timestep(self, generator: torch.Generator) -> Tensor:
        """A timestep (1,) in 0 .. T-1, uniform."""
        return torch.randint(0, len(self.alphas_cumprod), (1,), generator=generator)

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


def objective_of(scheduler: Any) -> Objective:
    """The objective a pipeline's scheduler implies.

    Raises:
        ObjectiveError: a scheduler without a discrete noise schedule, or an unknown prediction type.
    """
    name = type(scheduler).__name__
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ObjectiveError(
            f"cannot train with {name}: it has no discrete noise schedule; use a base whose scheduler is DDPM-like"
        )
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ObjectiveError(f"{name} predicts {prediction!r}; can train {', '.join(PREDICTIONS)}")
    return Objective(scheduler.alphas_cumprod.detach().to("cpu", torch.float32).clone(), prediction)
