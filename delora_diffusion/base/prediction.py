"""What a base predicts, where its own scheduler does not say it: the marks of single files, and the user's word.

A v-prediction SDXL checkpoint in one file carries an empty tensor `v_pred`, and `ztsnr` if its schedule ends in pure
noise (zero terminal SNR); its configuration on the Hub is that of a model that predicts the noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .checks import BaseModelError

PREDICTION_TYPE = "what the base predicts; unset: what its scheduler says, or a checkpoint's key v_pred"
ZERO_SNR = "its noise schedule ends in pure noise; unset: what its scheduler says, or a checkpoint's key ztsnr"


@dataclass(frozen=True)
class Prediction:
    """What the model predicts, and whether its noise schedule ends in pure noise; None: as its scheduler says."""

    kind: str | None = None
    zero_snr: bool | None = None

    def over(self, other: Prediction) -> Prediction:
        """This where it says something, `other` where it does not."""
        return Prediction(
            self.kind if self.kind is not None else other.kind,
            self.zero_snr if self.zero_snr is not None else other.zero_snr,
        )


def marked(keys: Iterable[str]) -> Prediction:
    """What the names of a single file's tensors say of it, as ComfyUI reads them.

    Raises:
        BaseModelError: a checkpoint of the EDM schedule, which is not trained here.
    """
    named = set(keys)
    if "v_pred" not in named:
        return Prediction()
    if edm := sorted(named & {"edm_vpred.sigma_max", "edm_vpred.sigma_min"}):
        raise BaseModelError(f"the file predicts v on EDM's noise schedule ({edm[0]}), which is not supported")
    return Prediction("v_prediction", True if "ztsnr" in named else None)


def predict(pipe: Any, asked: Prediction) -> None:
    """Give a pipeline a scheduler that predicts what is asked, if its own does not.

    Raises:
        BaseModelError: for flow matching, whose schedulers know no other prediction.
    """
    config = pipe.scheduler.config
    changes: dict[str, Any] = {}
    if asked.kind is not None and asked.kind != config.get("prediction_type", "epsilon"):
        changes["prediction_type"] = asked.kind
    if asked.zero_snr is not None and asked.zero_snr != bool(config.get("rescale_betas_zero_snr")):
        changes["rescale_betas_zero_snr"] = asked.zero_snr
    if not changes:
        return
    name = type(pipe.scheduler).__name__
    if "beta_schedule" not in config or "FlowMatch" in name or config.get("prediction_type") == "flow_prediction":
        raise BaseModelError(
            f"{', '.join(changes)} is for diffusion with a noise schedule; {name} has none: leave it out"
        )
    if changes.get("rescale_betas_zero_snr"):
        changes["timestep_spacing"] = "trailing"  # else the last step, pure noise, would never be drawn
    if "rescale_betas_zero_snr" in changes and "rescale_betas_zero_snr" not in config:
        from diffusers import EulerDiscreteScheduler

        pipe.scheduler = EulerDiscreteScheduler.from_config(config, **changes)
    else:
        pipe.scheduler = type(pipe.scheduler).from_config(config, **changes)
