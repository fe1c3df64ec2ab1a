"""Options of `delora evaluate` and `delora benchmark`; how their images are drawn is `config.DrawingConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from .options import OptionError, option


@dataclass(frozen=True)
class MeasuringConfig:
    """How images are judged."""

    dino: str | None = option(
        None, "folder or Hub id of a DINO, DINOv2, DINOv3 or ViT: likeness to the photos, drift, diversity"
    )
    clip: str | None = option(None, "folder or Hub id of a CLIP: prompt following, and likeness as CLIP-I")
    trigger_token: str = option("sks", "the subject's rare word; prompts without it are unrelated ones, for drift")
    unrelated_prompts_file: str | None = option(
        None, "file with a prompt a line that has nothing to do with the subject, for drift; unset: a list of ours"
    )
    lpips: bool = option(False, "also measure diversity by LPIPS (needs the extra lpips)")

    def __post_init__(self) -> None:
        if not self.dino and not self.clip:
            raise OptionError("no encoder; give --dino (e.g. facebook/dinov2-base), --clip, or better both")
        if not self.trigger_token:
            raise OptionError('trigger_token is empty; give the rare word of the prompts, e.g. "sks"')


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated."""

    images: list[str] = option(
        [],
        "folders of images to judge; prompts and seeds come from their manifest.jsonl, if `delora sample` drew them",
    )
    adapter: list[str] = option([], "adapters to draw with and judge: files, folders or Hub ids")
    pretrained_model_name_or_path: str | None = option(
        None, "folder or Hub id of the base pipeline; unset: the one the adapter was trained on"
    )
    real: str = option("", "folder with the photos the subject was taught from")
    holdout: str | None = option(None, "folder with photos of the subject that training never saw")
    prompts: list[str] = option([], "prompts to draw, with the rare word")
    prompts_file: str | None = option(None, "file with a prompt a line")
    output_dir: str = option("delora-evaluation", "folder for the table (JSON, CSV, Markdown) and the images drawn")

    def __post_init__(self) -> None:
        if not self.images and not self.adapter:
            raise OptionError("nothing to evaluate; give --images (folders) or --adapter")
        if not self.real:
            raise OptionError("real is missing; give the folder with the photos of the subject")
        if self.adapter and not self.prompts and not self.prompts_file:
            raise OptionError("no prompts to draw with the adapter; give --prompts, or --prompts_file with one a line")
        if not self.adapter and (self.prompts or self.prompts_file or self.pretrained_model_name_or_path):
            raise OptionError("prompts, prompts_file and pretrained_model_name_or_path do nothing without adapter")
