"""Options of the photos."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from ..option_checks import check_ranges, refuse_unused
from ..options import OptionError, build, option
from .buckets import bucket_sizes

#: Ways of resizing that Pillow has.
RESAMPLINGS = ("lanczos", "bicubic", "bilinear", "hamming", "box", "nearest")


@dataclass(frozen=True, kw_only=True)
class MasksConfig:
    """Masks."""

    folder: str = option("", "folder with the photos; the masks are written beside them")
    model: str = option("u2net", "rembg's model, which it downloads once: u2net, isnet-general-use, birefnet-general")
    overwrite: bool = option(False, "make those anew that are there")

    def __post_init__(self) -> None:
        if not self.folder:
            raise OptionError("folder is missing; give the folder with the photos")


#: Where masks are from, see `masks.py`.
MASKS = ("files", "alpha", "none")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """Photos that are taught alike: one subject of several, or images of a class."""

    name: str = option("", "how it is called in messages, and as [name] in prompts")
    folder: str = option("", "folder with its photos", path=True)
    prompt: str | None = option(None, "caption of photos that have none beside them; unset: its trigger")
    trigger: str | None = option(None, "its rare word, which [trigger] stands for in captions and prompts")
    class_prompt: str | None = option(None, "what the base is to be kept for")
    role: str = option("subject", "what its photos are", choices=("subject", "class"))
    repeats: int = option(1, "how often each photo comes in a pass", within="[1, inf)")
    weight: float = option(1.0, "weight of its photos in the loss", within="(0, inf)")
    masks: str | None = option(None, "as the option of that name", choices=MASKS)

    def __post_init__(self) -> None:
        if not self.folder:
            raise OptionError("folder is missing; give the one with its photos")
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The photos."""

    instance_data_dir: str = option("", "folder with the photos of the subject", path=True, resume="free")
    instance_prompt: str | None = option(
        None, 'caption of photos that have none beside them (PHOTO.txt, metadata.jsonl), e.g. "a photo of sks dog"'
    )
    repeats: int = option(1, "how often each photo comes in a pass", within="[1, inf)")
    concepts: dict[str, dict[str, str]] = option(
        {},
        "several subjects in place of instance_data_dir, {name: {folder, prompt or trigger, class_prompt, role, "
        "repeats, weight, masks}}; best in the YAML file",
    )
    dataset_name: str | None = option(
        None,
        "data set in place of instance_data_dir: Hub id, folder or file that datasets reads",
        path=True,
        resume="free",
    )
    dataset_config_name: str | None = option(None, "which of a data set's configurations")
    dataset_split: str = option("train", "which of its parts")
    image_column: str | None = option(None, "its column of photos; unset: image, or the only one that holds images")
    caption_column: str | None = option(None, "its column of captions; unset: instance_prompt is the caption of all")
    shuffle_caption: bool = option(False, "shuffle what stands between commas in a caption")
    keep_tokens: int = option(0, "with shuffle_caption: so many stay in front", within="[0, inf)")
    num_caption_orders: int = option(
        8, "with shuffle_caption: orders of each caption that training chooses from", within="[1, inf)"
    )
    caption_dropout: float = option(0.0, "share of places that are trained without a caption", within="[0, 1)")
    masks: str = option(
        "files",
        "what of a photo counts in the loss: white in PHOTO_mask.png where there is one (files), what is not "
        "transparent (alpha), everything (none)",
        choices=MASKS,
    )
    unmasked_weight: float = option(0.0, "weight in the loss of what a mask leaves out", within="[0, 1]")
    with_prior_preservation: bool = option(False, "also train on images of the class, so that it keeps its looks")
    class_data_dir: str | None = option(
        None, "folder with those; missing ones are generated there by the base model", path=True, resume="free"
    )
    class_prompt: str | None = option(
        None, 'caption of class images, and what the base is to be kept for, e.g. "a photo of a dog"'
    )
    num_class_images: int = option(100, "how many of them", within="[1, inf)")
    sample_batch_size: int = option(4, "class images drawn at once", within="[1, inf)", resume="free")
    prior_loss_weight: float = option(1.0, "weight of a class image in the loss", within="[0, inf)")
    with_base_preservation: bool = option(
        False, "keep the base's own predictions for class_prompt; needs no images, doubles the time of a step"
    )
    base_preservation_weight: float = option(1.0, "weight of such a prediction in the loss", within="[0, inf)")
    resolution: int = option(
        512, "side of the training pictures in pixels; photos are resized to cover it and cropped"
    )
    aspect_ratio_buckets: str | None = option(
        None,
        'train on photos in their own shapes: auto (about resolution^2 pixels each), or sizes "height,width;..."; '
        "unset: squares",
    )
    center_crop: bool = option(True, "crop the middle; --no-center_crop cuts `num_crops` places at random instead")
    num_crops: int = option(4, "crops of each photo with --no-center_crop", within="[1, inf)")
    image_interpolation_mode: str = option("lanczos", "how photos are resized", choices=RESAMPLINGS)
    random_flip: bool = option(False, "mirror photos at random (not for text, logos or asymmetric subjects)")
    cache_dir: str | None = option(
        None, "keep encoded photos and captions here between runs; unset: in memory", path=True, resume="free"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        self._check_sources()
        class_prompts = [concept.class_prompt for concept in self.subjects if concept.class_prompt]
        if self.with_prior_preservation and not (self.class_data_dir and class_prompts):
            raise OptionError(
                "with_prior_preservation needs class_data_dir (an empty folder will do: missing images are generated) "
                'and class_prompt, e.g. "a photo of a dog"'
            )
        if self.with_base_preservation and not class_prompts:
            raise OptionError('with_base_preservation needs class_prompt, e.g. "a photo of a dog"')
        if not (self.with_prior_preservation or self.with_base_preservation) and class_prompts:
            raise OptionError(
                "class_prompt does nothing without with_prior_preservation or with_base_preservation; add one of them"
            )
        refuse_unused(self, "with_prior_preservation", "class_data_dir")
        refuse_unused(self, "with_base_preservation", "base_preservation_weight")
        refuse_unused(self, "center_crop", "num_crops", at=False)
        refuse_unused(self, "shuffle_caption", "keep_tokens", "num_caption_orders")
        if self.resolution < 8 or self.resolution % 8:
            near = max(8, round(self.resolution / 8) * 8)
            raise OptionError(f"resolution is {self.resolution}; it must be a multiple of 8, e.g. {near}")
        bucket_sizes(self.resolution, self.aspect_ratio_buckets)

    @property
    def subjects(self) -> list[Concept]:
        """What is taught, and, with the role class, images of classes that are kept in a folder.

        Raises:
            OptionError: an option of a concept that is unknown, missing or of a wrong type; two with one trigger.
        """
        if self.concepts:
            return [_concept(name, values) for name, values in self.concepts.items()]
        return [
            Concept(
                folder=self.instance_data_dir or str(self.dataset_name),
                prompt=self.instance_prompt,
                class_prompt=self.class_prompt,
                repeats=self.repeats,
            )
        ]

    @property
    def class_prompts(self) -> dict[str, str]:
        """Folder for drawn images of a class -> their prompt; with the prior only."""
        if not self.with_prior_preservation or self.class_data_dir is None:
            return {}
        return {
            str(Path(self.class_data_dir, concept.name)): concept.class_prompt
            for concept in self.subjects
            if concept.class_prompt
        }

    def _check_sources(self) -> None:
        """One source of photos, and nothing beside it that would not be used."""
        sources = ("instance_data_dir", "concepts", "dataset_name")
        given = [name for name in sources if getattr(self, name)]
        if not given:
            raise OptionError(
                "instance_data_dir is missing; give the folder with the photos of the subject (or dataset_name, or "
                "concepts)"
            )
        if len(given) > 1:
            raise OptionError(f"{' and '.join(given)} are given; photos come from one of them")
        beside = ("dataset_config_name", "image_column", "caption_column")
        if not self.dataset_name and (unused := [name for name in beside if getattr(self, name)]):
            raise OptionError(f"{' and '.join(unused)} do nothing without dataset_name; add it, or drop them")
        if self.concepts:
            if unused := [name for name in ("instance_prompt", "class_prompt") if getattr(self, name)]:
                raise OptionError(f"{' and '.join(unused)} do nothing beside concepts; each has its own")
            if self.repeats != 1:
                raise OptionError("repeats does nothing beside concepts; each has its own")
            self._check_concepts()

    def _check_concepts(self) -> None:
        concepts = self.subjects
        if all(concept.role == "class" for concept in concepts):
            raise OptionError("concepts holds images of a class only; add a concept to teach (role subject)")
        seen: dict[str, str] = {}
        for concept in concepts:
            if concept.trigger and (other := seen.setdefault(concept.trigger.lower(), concept.name)) != concept.name:
                raise OptionError(
                    f"concepts {other} and {concept.name} have one trigger, {concept.trigger!r}; give each its own"
                )


def _concept(name: str, values: dict[str, str]) -> Concept:
    known = [field.name for field in fields(Concept) if field.name != "name"]
    for key in values:
        if key not in known:
            raise OptionError(f"concepts[{name}]: unknown option {key!r}; known are {', '.join(known)}")
    try:
        concept: Concept = build(Concept, {**values, "name": name})
    except OptionError as error:
        raise OptionError(f"concepts[{name}]: {error}") from error
    return concept
