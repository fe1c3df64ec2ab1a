"""A base's denoiser and the error it is trained on: whoever has a `Denoiser` asks nothing more about the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..families import Conditioning, Family, Setting, placed


@dataclass(frozen=True)
class Denoiser:
    """A denoiser as its family calls it: (x_t, t, cond, setting) -> prediction, in fp32.

    Attributes:
        module: the UNet or transformer; what it is given is brought to its device and precision.
        family: how it is called.
    """

    module: nn.Module
    family: Family

    @property
    def device(self) -> torch.device:
        """Where it works."""
        return next(self.module.parameters()).device

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning, setting: Setting) -> Tensor:
        """What the family's pipeline hands to `scheduler.step` for x_t (B, C, H, W) at timesteps t (B,)."""
        device, dtype = self.device, next(p.dtype for p in self.module.parameters() if p.is_floating_point())
        x_t, t, cond = x_t.to(device, dtype), t.to(device), placed(cond, device, dtype)
        return self.family.predict(self.module, x_t, t, cond, setting).float()

    def errors(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Conditioning,
        setting: Setting,
        target: Tensor,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of each example: |prediction - target|^2 (B,), the mean over a target (B, C, H, W).

        Args:
            mask: (B, 1, H, W), what each place of the target weighs in that mean.
        """
        error = (self(x_t, t, cond, setting) - target.to(self.device)).square()
        if mask is None:
            return error.flatten(1).mean(1)
        weight = mask.to(error).expand_as(error).flatten(1)
        return (weight * error.flatten(1)).sum(1) / weight.sum(1)
