"""Options of `delora evaluate` and `delora benchmark`; how their images are drawn is `config.DrawingConfig`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..data.prompts import DREAMBENCH_PROMPTS
from ..options import OptionError, build, option

KINDS = (*DREAMBENCH_PROMPTS, "captions")


@dataclass(frozen=True, kw_only=True)
class MeasuringConfig:
    """How images are judged."""

    dino: str | None = option(
        None, "folder or Hub id of a DINO, DINOv2, DINOv3 or ViT: likeness to the photos, drift, diversity", path=True
    )
    clip: str | None = option(None, "folder or Hub id of a CLIP: prompt following, and likeness as CLIP-I", path=True)
    trigger_token: str = option("sks", "the subject's rare word; prompts without it are unrelated ones, for drift")
    unrelated_prompts_file: str | None = option(
        None,
        "file with a prompt a line that has nothing to do with the subject, for drift; unset: a list of ours",
        path=True,
    )
    lpips: bool = option(False, "also measure diversity by LPIPS (needs the extra lpips)")

    def __post_init__(self) -> None:
        if not self.dino and not self.clip:
            raise OptionError("no encoder; give --dino (e.g. facebook/dinov2-base), --clip, or better both")
        if not self.trigger_token:
            raise OptionError('trigger_token is empty; give the rare word of the prompts, e.g. "sks"')


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated."""

    images: list[str] = option(
        [],
        "folders of images to judge; prompts and seeds come from their manifest.jsonl, if `delora sample` drew them",
        path=True,
    )
    adapter: list[str] = option([], "adapters to draw with and judge: files, folders or Hub ids", path=True)
    pretrained_model_name_or_path: str | None = option(
        None, "folder or Hub id of the base pipeline; unset: the one the adapter was trained on", path=True
    )
    real: str = option("", "folder with the photos the subject was taught from", path=True)
    holdout: str | None = option(None, "folder with photos of the subject that training never saw", path=True)
    prompts: list[str] = option([], "prompts to draw, with the rare word")
    prompts_file: str | None = option(None, "file with a prompt a line", path=True)
    output_dir: str = option(
        "delora-evaluation", "folder for the table (JSON, CSV, Markdown) and the images drawn", path=True
    )

    def __post_init__(self) -> None:
        if not self.images and not self.adapter:
            raise OptionError("nothing to evaluate; give --images (folders) or --adapter")
        if not self.real:
            raise OptionError("real is missing; give the folder with the photos of the subject")
        if self.adapter and not self.prompts and not self.prompts_file:
            raise OptionError("no prompts to draw with the adapter; give --prompts, or --prompts_file with one a line")
        if not self.adapter and (self.prompts or self.prompts_file or self.pretrained_model_name_or_path):
            raise OptionError("prompts, prompts_file and pretrained_model_name_or_path do nothing without adapter")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One subject of a benchmark."""

    class_word: str = option("", "what it is, e.g. dog")
    photos: str = option("", "folder with the photos to teach it from", path=True)
    holdout: str | None = option(None, "folder with photos that training never sees", path=True)
    kind: str = option(
        "object", "its prompts: a list of DreamBench's, or the captions of the held-out photos", choices=KINDS
    )
    prompts_file: str | None = option(None, "file with its own prompts instead, with the rare word", path=True)
    adapter: str | None = option(None, "an adapter that was trained already; unset: it is trained here", path=True)

    def __post_init__(self) -> None:
        for name in ("class_word", "photos"):
            if not getattr(self, name):
                raise OptionError(f"{name} is missing")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """The benchmark."""

    subjects: dict[str, dict[str, str]] = option(
        {}, "the subjects, {name: {class_word, photos, holdout, kind or prompts_file, adapter}}; best in the YAML file"
    )
    only: list[str] = option([], "names of the subjects to run; none: all")
    output_dir: str = option(
        "delora-benchmark", "folder for adapters, images, table (JSON, CSV, Markdown) and plot", path=True
    )
    pretrained_model_name_or_path: str | None = option(
        None, "folder or Hub id of the base pipeline; unset: the one that train_config or the adapters name", path=True
    )
    train_script: str = option(
        "train_scripts/train_dreambooth_delora.py", "script that trains a subject without an adapter", path=True
    )
    train_config: str | None = option(
        None, "YAML file of its options; photos, prompts and folders are filled in for each subject", path=True
    )
    instance_prompt: str = option("a {}", "caption of photos that have none, {} is the rare word and the class word")
    plot: bool = option(True, "draw likeness against drift over the strengths (needs the extra plots)")

    def __post_init__(self) -> None:
        if not self.subjects:
            raise OptionError("no subjects; give a YAML file of a benchmark with --config")
        if "{}" not in self.instance_prompt:
            raise OptionError(f"instance_prompt is {self.instance_prompt!r}; it needs {{}} for the subject")
        if unknown := sorted(set(self.only) - set(self.subjects)):
            raise OptionError(f"only names {', '.join(unknown)}; the subjects are {', '.join(self.subjects)}")
        untrained = [name for name, subject in self.chosen.items() if not subject.adapter]
        if untrained and not self.train_config:
            raise OptionError(
                f"{', '.join(untrained)} have no adapter, and there is no train_config to train them with; give either"
            )

    @property
    def chosen(self) -> dict[str, Subject]:
        """The subjects to run, by name.

        Raises:
            OptionError: an option of a subject that is unknown, missing or of a wrong type.
        """
        return {
            name: _subject(name, values)
            for name, values in self.subjects.items()
            if not self.only or name in self.only
        }


def _subject(name: str, values: dict[str, str]) -> Subject:
    known = [field.name for field in fields(Subject)]
    for key in values:
        if key not in known:
            raise OptionError(f"subjects[{name}]: unknown option {key!r}; known are {', '.join(known)}")
    try:
        subject: Subject = build(Subject, values)
    except OptionError as error:
        raise OptionError(f"subjects[{name}]: {error}") from error
    return subject
