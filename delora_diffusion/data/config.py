"""Options of the photos."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import OptionError, at_least, option
from .buckets import bucket_sizes

#: Ways of resizing that Pillow has.
RESAMPLINGS = ("lanczos", "bicubic", "bilinear", "hamming", "box", "nearest")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The photos."""

    instance_data_dir: str = option("", "folder with the photos of the subject", resume="free")
    instance_prompt: str | None = option(
        None, 'caption of photos that have none beside them (PHOTO.txt, metadata.jsonl), e.g. "a photo of sks dog"'
    )
    with_prior_preservation: bool = option(False, "also train on images of the class, so that it keeps its looks")
    class_data_dir: str | None = option(
        None, "folder with those; missing ones are generated there by the base model", resume="free"
    )
    class_prompt: str | None = option(
        None, 'caption of class images, and what the base is to be kept for, e.g. "a photo of a dog"'
    )
    num_class_images: int = option(100, "how many of them")
    sample_batch_size: int = option(4, "class images drawn at once", resume="free")
    prior_loss_weight: float = option(1.0, "weight of a class image in the loss")
    with_base_preservation: bool = option(
        False, "keep the base's own predictions for class_prompt; needs no images, doubles the time of a step"
    )
    base_preservation_weight: float = option(1.0, "weight of such a prediction in the loss")
    resolution: int = option(
        512, "side of the training pictures in pixels; photos are resized to cover it and cropped"
    )
    aspect_ratio_buckets: str | None = option(
        None,
        'train on photos in their own shapes: auto (about resolution^2 pixels each), or sizes "height,width;..."; '
        "unset: squares",
    )
    center_crop: bool = option(True, "crop the middle; --no-center_crop cuts `num_crops` places at random instead")
    num_crops: int = option(4, "crops of each photo with --no-center_crop")
    image_interpolation_mode: str = option("lanczos", "how photos are resized", choices=RESAMPLINGS)
    random_flip: bool = option(False, "mirror photos at random (not for text, logos or asymmetric subjects)")
    cache_dir: str | None = option(
        None, "keep encoded photos and captions here between runs; unset: in memory", resume="free"
    )

    def __post_init__(self) -> None:
        if not self.instance_data_dir:
            raise OptionError("instance_data_dir is missing; give the folder with the photos of the subject")
        if self.with_prior_preservation and not (self.class_data_dir and self.class_prompt):
            raise OptionError(
                "with_prior_preservation needs class_data_dir (an empty folder will do: missing images are generated) "
                'and class_prompt, e.g. "a photo of a dog"'
            )
        if self.with_base_preservation and not self.class_prompt:
            raise OptionError('with_base_preservation needs class_prompt, e.g. "a photo of a dog"')
        if not self.with_prior_preservation and self.class_data_dir:
            raise OptionError("class_data_dir does nothing without with_prior_preservation; add it, or drop this")
        if not (self.with_prior_preservation or self.with_base_preservation) and self.class_prompt:
            raise OptionError(
                "class_prompt does nothing without with_prior_preservation or with_base_preservation; add one of them"
            )
        at_least(self, 1, "num_class_images", "num_crops", "sample_batch_size")
        at_least(self, 0, "prior_loss_weight", "base_preservation_weight")
        if self.resolution < 8 or self.resolution % 8:
            near = max(8, round(self.resolution / 8) * 8)
            raise OptionError(f"resolution is {self.resolution}; it must be a multiple of 8, e.g. {near}")
        bucket_sizes(self.resolution, self.aspect_ratio_buckets)
