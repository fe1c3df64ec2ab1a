"""Subject and class photos with their captions: folders -> examples -> crops."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .buckets import Size, bucket_sizes, largest_part, nearest_size
from .captions import Captions, is_caption_file, read_captions
from .concepts import orders_of, triggers_of, with_triggers
from .config import Concept, DataConfig
from .dataset import read_dataset
from .image_files import DataError, find_images, is_image, left_out, masks_among, read_photo, some_of
from .masks import Mask, mask_of

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
    """A photo, its caption, its weight in the loss, and the views of it that training chooses from.

    Attributes:
        source: where the caption is from.
        orders: the caption in the orders that training chooses from, where it is shuffled.
        concept: the name of what it shows, where there are several.
        repeats: how often it comes in a pass.
        class_prompt: what the base is to be kept for beside it.
    """

    path: Path
    caption: str
    weight: float
    source: str = ""
    orders: tuple[str, ...] = ()
    concept: str = ""
    repeats: int = 1
    class_prompt: str | None = None
    mask: Mask | None = None
    size: tuple[int, int]  # width and height of the photo in pixels
    views: tuple[View, ...]
    content: str  # hash of the file's bytes

    def key(self, view: View) -> str:
        """Names the pixels of `view`, whatever the file is called."""
        how = "" if view.resampling == "lanczos" else f":{view.resampling}"
        masked = f":{self.mask.content}{':alpha' * self.mask.alpha}" if self.mask else ""
        return f"{self.content}:{view.box}:{view.flip}:{view.size}{how}{masked}"

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions that training chooses from."""
        return self.orders or (self.caption,)

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


def instance_examples(config: DataConfig, *, seed: int, trigger: str = "") -> list[Example]:
    """The photos of what is taught. What of their folders is not used is told.

    Args:
        trigger: the rare word of concepts without one of their own.

    Raises:
        DataError: no folder, no photos, an unreadable photo, or a photo without a caption.
    """
    subjects = [concept for concept in config.subjects if concept.role == "subject"]
    return [e for one in subjects for e in _examples(one, config, seed=seed, trigger=trigger)]


def class_examples(config: DataConfig, *, seed: int, drawn: bool = True) -> list[Example]:
    """Images of classes, weighing `prior_loss_weight`: those of concepts with that role, and with the prior the first
    `num_class_images` of each folder of drawn ones, where these are wanted."""
    given, folders = _class_concepts(config)
    found = [_examples(concept, config, seed=seed) for concept in given]
    found += [_examples(one, config, seed=seed, most=config.num_class_images) for one in folders if drawn]
    return [replace(e, weight=e.weight * config.prior_loss_weight) for some in found for e in some]


def class_captions(config: DataConfig) -> list[str]:
    """Captions of class images: of those that are there already, and of those that will be drawn."""
    given, drawn = _class_concepts(config)
    captions = [str(concept.prompt) for concept in drawn]
    for concept in [*given, *drawn]:
        folder = Path(concept.folder)
        there = sorted(path for path in folder.iterdir() if is_image(path)) if folder.is_dir() else []
        captions += read_captions(folder, there, default=concept.prompt).texts.values() if there else []
    return captions


def _class_concepts(config: DataConfig) -> tuple[list[Concept], list[Concept]]:
    """Those that somebody gave images of, and those of which they are drawn."""
    given = [concept for concept in config.subjects if concept.role == "class"]
    return given, [Concept(folder=folder, prompt=prompt) for folder, prompt in config.class_prompts.items()]


def _examples(
    concept: Concept, config: DataConfig, *, seed: int, trigger: str = "", most: int | None = None
) -> list[Example]:
    """The photos of a concept, or the first `most` of them.

    Raises:
        DataError: as `instance_examples`, and a [trigger] that stands for no word.
    """
    option = f"concepts[{concept.name}]" if concept.name else "class_data_dir" if most else "instance_data_dir"
    if config.dataset_name and most is None:
        captions = read_dataset(config)
        files = masks_among(captions.texts)  # of those that are used where they are
        masks = set(files.values())
        paths = [path for path in captions.texts if path not in masks]
    else:
        folder = Path(concept.folder)
        paths, files = find_images(folder, option=option), masks_among(filter(is_image, folder.iterdir()))
        files = {} if (concept.masks or config.masks) != "files" else files
        captions = read_captions(folder, paths, default=concept.prompt or concept.trigger)
        log.info("%s: %d photos%s; %s", folder, len(paths), f", {len(files)} masks" * bool(files), captions)
        tell_unused(folder, [*paths, *files.values()], captions)
    words = triggers_of(config) | {"trigger": concept.trigger or trigger}
    texts = {path: with_triggers(captions.texts[path], words, where=path) for path in paths[:most]}
    found = [_example(path, text, concept, config, seed=seed, masks=files) for path, text in texts.items()]
    return [replace(example, source=captions.sources[example.path]) for example in found]


def tell_unused(folder: Path, paths: Sequence[Path], captions: Captions) -> None:
    """Say which files of a folder are neither photos nor captions, and which captions are no photo's."""
    written = [path for path in folder.iterdir() if is_caption_file(path) and path.is_file()]
    for what, names in (("left out", left_out(folder, [*paths, *written])), ("captions not used", captions.unused)):
        if names:
            log.warning("%s: %d %s: %s", folder, len(names), what, some_of(names))


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


def _example(
    path: Path, caption: str, concept: Concept, config: DataConfig, *, seed: int, masks: Mapping[Path, Path]
) -> Example:
    """A photo of a concept.

    Raises:
        DataError: it cannot be read, or nothing that its mask leaves is in any part of it.
    """
    image, content = read_photo(path)
    width, height = image.size
    size = nearest_size(width, height, bucket_sizes(config.resolution, config.aspect_ratio_buckets))
    mask = mask_of(path, (width, height), kind=concept.masks or config.masks, files=masks)
    boxes = _boxes(width, height, size, config, seed=seed, content=content)
    if mask is not None and not (boxes := [box for box in boxes if mask.shows(box)]):
        raise DataError(
            f"the crop of {path} leaves nothing of what its mask shows; give aspect_ratio_buckets auto, or crop the "
            f"photo around it"
        )
    return Example(
        path=path,
        caption=caption,
        weight=concept.weight,
        orders=orders_of(caption, config, seed=seed, content=content),
        concept=concept.name,
        repeats=concept.repeats,
        class_prompt=concept.class_prompt,
        mask=mask,
        size=(width, height),
        views=tuple(
            View(box, flip, size, config.image_interpolation_mode)
            for box in boxes
            for flip in ((False, True) if config.random_flip else (False,))
        ),
        content=content,
    )


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
