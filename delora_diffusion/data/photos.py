"""Subject and class photos with their captions: folders -> examples -> crops."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .buckets import Size, bucket_sizes, largest_part, nearest_size
from .captions import Captions, is_caption_file, read_captions
from .config import DataConfig
from .image_files import DataError, find_images, left_out, read_photo, some_of

CROPPED = 0.2  # share of a photo whose loss is worth a word
ENLARGED = 1.1  # the same of a factor by which it is enlarged
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class View:
    """One way to look at a photo: a part of it, resized, possibly mirrored.

    Attributes:
        box: (left, top, right, bottom) in pixels of the upright photo.
        flip: whether it is mirrored left to right.
        size: (height, width) in pixels that the part is resized to.
        resampling: how, one of `config.RESAMPLINGS`.
    """

    box: tuple[int, int, int, int]
    flip: bool
    size: Size
    resampling: str = "lanczos"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A photo, its caption, its weight in the loss, and the views of it that training chooses from."""

    path: Path
    caption: str
    weight: float
    size: tuple[int, int]  # width and height of the photo in pixels
    views: tuple[View, ...]
    content: str  # hash of the file's bytes

    def key(self, view: View) -> str:
        """Names the pixels of `view`, whatever the file is called."""
        how = "" if view.resampling == "lanczos" else f":{view.resampling}"
        return f"{self.content}:{view.box}:{view.flip}:{view.size}{how}"

    def pixels(self, view: View) -> Tensor:
        """The view as (3, height, width) fp32 in -1 .. 1.

        Raises:
            DataError: the file is no longer what it was: its pixels would be kept under the name of others.
        """
        image, content = read_photo(self.path)
        if content != self.content:
            raise DataError(f"{self.path} has changed since this run first read it; start the run again")
        image = image.resize(view.size[::-1], Image.Resampling[view.resampling.upper()], box=view.box)
        if view.flip:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def instance_examples(config: DataConfig, *, seed: int) -> list[Example]:
    """The subject's photos, weight 1. What of the folder is not used is told.

    Raises:
        DataError: no folder, no photos, an unreadable photo, or a photo without a caption.
    """
    folder = Path(config.instance_data_dir)
    paths = find_images(folder, option="instance_data_dir")
    captions = _told(folder, paths, read_captions(folder, paths, default=config.instance_prompt))
    return [_example(path, captions.texts[path], 1.0, config, seed=seed) for path in paths]


def class_examples(config: DataConfig, *, seed: int) -> list[Example]:
    """The first `num_class_images` images of the class, weight `prior_loss_weight`; none without the prior."""
    if not config.with_prior_preservation or config.class_data_dir is None:
        return []
    folder = Path(config.class_data_dir)
    paths = find_images(folder, option="class_data_dir")
    captions = _told(folder, paths, read_captions(folder, paths, default=config.class_prompt))
    chosen = paths[: config.num_class_images]
    return [_example(path, captions.texts[path], config.prior_loss_weight, config, seed=seed) for path in chosen]


def tell_unused(folder: Path, paths: Sequence[Path], captions: Captions) -> None:
    """Say which files of a folder are neither photos nor captions, and which captions are no photo's."""
    written = [path for path in folder.iterdir() if is_caption_file(path) and path.is_file()]
    for what, names in (("left out", left_out(folder, [*paths, *written])), ("captions not used", captions.unused)):
        if names:
            log.warning("%s: %d %s: %s", folder, len(names), what, some_of(names))


def _told(folder: Path, paths: Sequence[Path], captions: Captions) -> Captions:
    log.info("%s: %d photos; %s", folder, len(paths), captions)
    tell_unused(folder, paths, captions)
    return captions


def describe_sizes(examples: Sequence[Example], config: DataConfig) -> str:
    """How many examples there are of each size, how much is cut off the one that loses most, which are enlarged."""
    counts: dict[Size, int] = {}
    lost, enlarged = [], []
    for example in examples:
        view = example.views[0]
        counts[view.size] = counts.get(view.size, 0) + 1
        width, height = example.size
        left, top, right, bottom = view.box
        lost.append((1 - (right - left) * (bottom - top) / (width * height), example.path.name))
        enlarged.append((view.size[0] / (bottom - top), example.path.name))
    share, name = max(lost)
    sizes = ", ".join(f"{width} x {height}: {count}" for (height, width), count in sorted(counts.items()))
    text = f"photos by size (width x height): {sizes}; at most {share:.0%} is cut off ({name})"
    if config.aspect_ratio_buckets is None and share > CROPPED:
        text += "; aspect_ratio_buckets auto keeps more of them"
    if small := [(times, name) for times, name in enlarged if times > ENLARGED]:
        times, name = max(small)
        text += (
            f"; {len(small)} of {len(examples)} are smaller than that and enlarged, {name} {times:.1f} "
            f"times: what they lack in detail is learned as a blur; give larger photos, or a smaller resolution"
        )
    return text


def _example(path: Path, caption: str, weight: float, config: DataConfig, *, seed: int) -> Example:
    image, content = read_photo(path)
    width, height = image.size
    size = nearest_size(width, height, bucket_sizes(config.resolution, config.aspect_ratio_buckets))
    views = tuple(
        View(box, flip, size, config.image_interpolation_mode)
        for box in _boxes(width, height, size, config, seed=seed, content=content)
        for flip in ((False, True) if config.random_flip else (False,))
    )
    return Example(path=path, caption=caption, weight=weight, size=(width, height), views=views, content=content)


def _boxes(
    width: int, height: int, size: Size, config: DataConfig, *, seed: int, content: str
) -> list[tuple[int, int, int, int]]:
    """Largest parts of the photo in the shape of `size`: the middle one, or `num_crops` at random places."""
    wide, high = largest_part(width, height, size)
    if config.center_crop or (wide, high) == (width, height):
        offsets = [0.5]
    else:
        generator = torch.Generator().manual_seed(seed + int(content[:8], 16))
        offsets = torch.rand(config.num_crops, generator=generator).tolist()
    return [
        (left := round((width - wide) * offset), top := round((height - high) * offset), left + wide, top + high)
        for offset in offsets
    ]
