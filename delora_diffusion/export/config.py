"""Options of the commands on adapter files: `delora export | verify | merge | inspect | push`."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.config import DTYPES, SINGLE_FILE_CONFIG
from ..option_checks import check_ranges
from ..options import OptionError, option
from .lora_names import ARCHITECTURES, FORMATS


def _strengths(weights: list[float], adapters: list[str]) -> list[float]:
    """A strength for each adapter: the one that is for all, or its own.

    Raises:
        OptionError: another number of them.
    """
    if len(weights) not in (1, len(adapters)):
        raise OptionError(
            f"{len(adapters)} adapters but {len(weights)} weights; give one weight, or one for each adapter"
        )
    return weights if len(weights) == len(adapters) else weights * len(adapters)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which adapters a LoRA file is, or is to be, made of."""

    adapter: list[str] = option([], "adapters: files, folders or Hub ids; several are added up", path=True)
    weights: list[float] = option([1.0], "their strengths: one for all, or one for each")
    component: str | None = option(
        None, "what a PEFT folder is for: unet, transformer, text_encoder or text_encoder_2"
    )
    architecture: str | None = option(
        None, "family of the base; unset: what the adapter tells", choices=tuple(ARCHITECTURES)
    )
    text_encoders: bool = option(
        True, "the parts for text encoders as well (InvokeAI 6.14 refuses those of FLUX.1 that have some)"
    )

    def __post_init__(self) -> None:
        if not self.adapter:
            raise OptionError("adapter is missing; give at least one file, folder or Hub id")
        _ = self.strengths

    @property
    def strengths(self) -> list[float]:
        """A strength for each adapter."""
        return _strengths(self.weights, self.adapter)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The LoRA file to write."""

    format: str = option(
        "diffusers",
        "names in the file; comfyui: kohya's for a UNet; original: of a transformer; peft: a folder for PEFT",
        choices=(*FORMATS, "peft"),
    )
    output: str | None = option(
        None, "file to write; unset: beside the adapter, named after folder and format", path=True
    )
    rank: int | None = option(None, "compress to this rank and say what is lost; unset: exact", within="[1, inf)")
    lora_dtype: str = option("fp32", "precision of the file", choices=("fp32", "fp16"))
    trigger: str | None = option(None, "trigger words for the header; unset: the prompt it was trained with")
    metadata: bool = option(True, "write the header that user interfaces read")
    sidecar: bool = option(
        True, "format kohya or comfyui: NAME.json beside it, trigger words and strength for A1111, Forge and InvokeAI"
    )
    allow_partial: bool = option(False, "leave out what a LoRA cannot hold instead of refusing")
    overwrite: bool = option(False, "replace the file if it exists")

    def __post_init__(self) -> None:
        check_ranges(self)
        plain = {"rank": None, "lora_dtype": "fp32", "trigger": None, "metadata": True, "sidecar": True}
        plain["allow_partial"] = False
        given = [name for name, default in plain.items() if getattr(self, name) != default]
        if self.format == "peft" and given:
            raise OptionError(
                f"format peft writes an adapter as it is; leave {', '.join(given)} out, or export a LoRA"
            )


@dataclass(frozen=True)
class VerifyConfig:
    """The LoRA file, or PEFT folder, to check."""

    file: str = option("", "LoRA file, or folder with pytorch_lora_weights.safetensors or of PEFT", path=True)
    tolerance: float = option(
        1e-3, "largest relative error of a layer's update that counts as the same", within="[0, 1]"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.file:
            raise OptionError("file is missing; give the LoRA to check")


@dataclass(frozen=True, kw_only=True)
class MergingConfig:
    """Merging adapters into a copy of the base."""

    adapter: list[str] = option([], "adapters to merge: files, folders or Hub ids", path=True)
    weights: list[float] = option([], "strength of each: 1 as trained; none: 1 for all")
    base: str | None = option(
        None, "folder or Hub id of the base pipeline; unset: the one the adapters were trained on", path=True
    )
    single_file_config: str | None = option(None, SINGLE_FILE_CONFIG, path=True)
    revision: str | None = option(None, "revision of the base on the Hub")
    variant: str | None = option(None, "variant of the base's weight files, e.g. fp16")
    output: str = option("", "folder for the merged pipeline, which must not exist yet, or be empty", path=True)
    single_file: bool = option(
        False,
        "output is one .safetensors checkpoint of the original layout: Stable Diffusion 1, 2, XL whole, of SD3.5, "
        "FLUX, Qwen-Image, Z-Image and Lumina 2 the transformer",
    )
    dtype: str = option("auto", "precision of the merged pipeline; auto: that of the base's files", choices=DTYPES)
    dequantize: bool = option(
        False, "let a quantised component be dequantised for good, so that it can be merged into"
    )
    check_base: bool = option(True, "refuse an adapter that was trained on another base")

    def __post_init__(self) -> None:
        if not self.adapter:
            raise OptionError("nothing to merge; give --adapter")
        if not self.output:
            raise OptionError("output is missing; give the folder to write the merged pipeline to")
        if self.single_file != self.output.endswith(".safetensors"):
            raise OptionError(
                f"output is {self.output}; a name that ends in .safetensors goes with single_file, a folder without"
            )
        _ = self.strengths

    @property
    def strengths(self) -> list[float]:
        """A strength for each adapter."""
        return _strengths(self.weights or [1.0], self.adapter)


@dataclass(frozen=True)
class InspectionConfig:
    """Inspecting adapters."""

    adapter: list[str] = option([], "adapters to show, several side by side: files, folders or Hub ids", path=True)
    json: str | None = option(None, "also write every figure to this file", path=True)
    plot: str | None = option(
        None, "also draw |dW|/|W| by block and kind into this PNG (needs the extra: plots)", path=True
    )

    def __post_init__(self) -> None:
        if not self.adapter:
            raise OptionError("nothing to inspect; give --adapter")


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Uploading an adapter to the Hub."""

    folder: str = option("", "folder of the adapter, e.g. what training wrote", path=True)
    repo: str | None = option(None, "name of the repository, e.g. you/my_dog; unset: the folder's name")
    private: bool = option(False, "make a new repository private")
    contact_sheet: str | None = option(None, "contact sheet of delora sample to show on the model card", path=True)

    def __post_init__(self) -> None:
        if not self.folder:
            raise OptionError("folder is missing; give the folder of the adapter")
