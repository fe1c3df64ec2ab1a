"""Options of drawing images."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..base.config import BASE_QUANTIZATION, DTYPES, QUANTIZATIONS, SINGLE_FILE_CONFIG, TEXT_ENCODER_QUANTIZATION
from ..base.objective import PREDICTIONS
from ..base.prediction import PREDICTION_TYPE, ZERO_SNR, Prediction
from ..base.speed import COMPILE
from ..option_checks import check_ranges
from ..options import OptionError, option

#: Short names of samplers, as A1111 and ComfyUI users know them, and diffusers' classes.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """How images are drawn."""

    single_file_config: str | None = option(None, SINGLE_FILE_CONFIG, path=True)
    prediction_type: str | None = option(None, PREDICTION_TYPE, choices=PREDICTIONS)
    rescale_betas_zero_snr: bool | None = option(None, ZERO_SNR)
    seeds: list[int] = option(
        [0],
        "seeds; a seed gives the same image in any batch to 1/255, to the bit with batch_size 1",
        within="[0, 18446744073709551616)",
    )
    strengths: list[float] = option([1.0], "adapter strengths: 0 is the base, 1 as trained")
    negative_prompt: str | None = option(None, "negative prompt of all images")
    scheduler: str | None = option(None, "sampler; unset: the base's own", choices=tuple(SCHEDULERS))
    num_inference_steps: int | None = option(None, "sampling steps; unset: usual for the base", within="[1, 1000]")
    guidance_scale: float | None = option(
        None, "classifier-free guidance; unset: usual for the base", within="[0, inf)"
    )
    height: int | None = option(None, "height in pixels; unset: the base's own size", within="[8, 16384]")
    width: int | None = option(None, "width in pixels; unset: the base's own size", within="[8, 16384]")
    batch_size: int = option(4, "images drawn at once", within="[1, inf)")
    dtype: str = option(
        "auto", "precision; auto: the family's half precision on a GPU, fp32 on the CPU", choices=DTYPES
    )
    compile: bool = option(False, COMPILE)
    base_quantization: str = option("none", BASE_QUANTIZATION, choices=QUANTIZATIONS)
    text_encoder_quantization: str = option("none", TEXT_ENCODER_QUANTIZATION, choices=QUANTIZATIONS)
    device: str | None = option(None, "cuda, mps or cpu; unset: the best there is")
    enable_model_cpu_offload: bool = option(
        False, "less memory, slower: components wait in the CPU's for their turn, one picture is decoded at a time"
    )

    def __post_init__(self) -> None:
        if not self.seeds or not self.strengths:
            raise OptionError("seeds and strengths need at least one value each")
        check_ranges(self)
        if self.device and not re.fullmatch(r"[a-z]+(:\d+)?", self.device):
            raise OptionError(f"device is {self.device!r}; give cuda, cuda:1, mps, cpu, or leave it out")

    @property
    def prediction(self) -> Prediction:
        """What the user says that the base predicts."""
        return Prediction(self.prediction_type, self.rescale_betas_zero_snr)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Batch sampling."""

    adapter: list[str] = option(
        [], "adapters to draw with, each by itself: files, folders or Hub ids; none: the base", path=True
    )
    pretrained_model_name_or_path: str | None = option(
        None, "folder or Hub id of the base pipeline; unset: the one the adapter was trained on", path=True
    )
    output_dir: str = option("delora-samples", "folder for images, manifest.jsonl and contact_sheet.png", path=True)
    prompts: list[str] = option([], "prompts")
    prompts_file: str | None = option(
        None, "file with a prompt a line; empty lines and lines that start with # are skipped", path=True
    )
    images_per_prompt: int = option(1, "images per prompt and seed", within="[1, inf)")

    def __post_init__(self) -> None:
        if not self.prompts and not self.prompts_file:
            raise OptionError("no prompts; give --prompts, or --prompts_file with one a line")
        if not self.adapter and not self.pretrained_model_name_or_path:
            raise OptionError(
                "nothing to draw with; give --adapter, or --pretrained_model_name_or_path for the base alone"
            )
        check_ranges(self)
