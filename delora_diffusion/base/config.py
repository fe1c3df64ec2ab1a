"""Options of the base model."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import OptionError, option
from .objective import PREDICTIONS
from .prediction import PREDICTION_TYPE, ZERO_SNR, Prediction

PRECISIONS = ("no", "fp16", "bf16")
DTYPES = ("auto", "fp32", "bf16", "fp16")
#: How the large layers of a frozen component are kept, see `base.quantise`.
QUANTIZATIONS = ("none", "int8", "float8", "nf4")
#: What the option `single_file_config` is, wherever there is a base.
SINGLE_FILE_CONFIG = (
    "for a base in one .safetensors file: folder or Hub id of a base of its kind, in diffusers' layout, for all but "
    "the weights; unset: the Hub repository that diffusers knows"
)
#: What the options `base_quantization` and `text_encoder_quantization` are.
BASE_QUANTIZATION = (
    "keep the Linear layers of the denoiser's blocks in 8 bits (needs the extra torchao) or 4 (nf4, needs the extra "
    "bitsandbytes): half or a quarter of the memory, for a little more time"
)
TEXT_ENCODER_QUANTIZATION = "the same for the text encoders"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model."""

    pretrained_model_name_or_path: str = option(
        "",
        "folder or Hub id of the base pipeline, in diffusers' layout, or one .safetensors file",
        path=True,
        resume="free",
    )
    single_file_config: str | None = option(None, SINGLE_FILE_CONFIG, path=True, resume="free")
    revision: str | None = option(None, "revision of the base on the Hub", resume="free")
    variant: str | None = option(None, "variant of the base's weight files, e.g. fp16", resume="free")
    pretrained_vae_model_name_or_path: str | None = option(
        None, "folder or Hub id of a VAE in place of the base's own", path=True, resume="free"
    )
    prediction_type: str | None = option(None, PREDICTION_TYPE, choices=PREDICTIONS)
    rescale_betas_zero_snr: bool | None = option(None, ZERO_SNR)
    base_dtype: str = option(
        "auto", "precision of the frozen weights; auto follows mixed_precision, fp32 without it", choices=DTYPES
    )
    base_quantization: str = option("none", BASE_QUANTIZATION, choices=QUANTIZATIONS, resume="free")
    text_encoder_quantization: str = option("none", TEXT_ENCODER_QUANTIZATION, choices=QUANTIZATIONS, resume="free")

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise OptionError("pretrained_model_name_or_path is missing; give the folder or Hub id of a base model")

    @property
    def prediction(self) -> Prediction:
        """What the user says of it."""
        return Prediction(self.prediction_type, self.rescale_betas_zero_snr)
