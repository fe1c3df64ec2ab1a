"""Subject and class photos with their captions: folders -> examples -> crops."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .buckets import Size, bucket_sizes, largest_part, nearest_size
from .config import DataConfig

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
CROPPED = 0.2  # share of a photo whose loss is worth a word


class DataError(ValueError):
    """A folder, photo or caption that cannot be used; the message names it, says what was found and what to do."""


@dataclass(frozen=True)
class View:
    """One way to look at a photo: a part of it, resized, possibly mirrored.

    Attributes:
        box: (left, top, right, bottom) in pixels of the upright photo.
        flip: whether it is mirrored left to right.
        size: (height, width) in pixels that the part is resized to.
    """

    box: tuple[int, int, int, int]
    flip: bool
    size: Size


@dataclass(frozen=True, kw_only=True)
class Example:
    """A photo, its caption, its weight in the loss, and the views of it that training chooses from."""

    path: Path
    caption: str
    weight: float
    views: tuple[View, ...]
    content: str  # hash of the file's bytes

    def key(self, view: View) -> str:
        """Names the pixels of `view`, whatever the file is called."""
        return f"{self.content}:{view.box}:{view.flip}:{view.size}"

    def pixels(self, view: View) -> Tensor:
        """The view as (3, height, width) fp32 in -1 .. 1."""
        image = load_image(self.path).resize(view.size[::-1], Image.Resampling.LANCZOS, box=view.box)
        if view.flip:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def instance_examples(config: DataConfig, *, seed: int) -> list[Example]:
    """The subject's photos, weight 1.

    Raises:
        DataError: no folder, no photos, an unreadable photo, or a photo without a caption.
    """
    folder = Path(config.instance_data_dir)
    paths = find_images(folder, option="instance_data_dir")
    captions = read_captions(folder, paths, default=config.instance_prompt)
    return [_example(path, captions[path], 1.0, config, seed=seed) for path in paths]


def class_examples(config: DataConfig, *, seed: int) -> list[Example]:
    """The first `num_class_images` images of the class, weight `prior_loss_weight`; none without the prior."""
    if not config.with_prior_preservation or config.class_data_dir is None:
        return []
    folder = Path(config.class_data_dir)
    paths = find_images(folder, option="class_data_dir")[: config.num_class_images]
    captions = read_captions(folder, paths, default=config.class_prompt)
    return [_example(path, captions[path], config.prior_loss_weight, config, seed=seed) for path in paths]


def find_images(folder: Path, *, option: str) -> list[Path]:
    """The image files of `folder`, by name.

    Raises:
        DataError: `folder` is missing, is no folder, or holds no image; the message names `option`.
    """
    if not folder.exists():
        raise DataError(f"{option} {folder} does not exist; give the folder that holds the photos")
    if not folder.is_dir():
        raise DataError(f"{option} {folder} is a file; give the folder that holds the photos")
    paths = sorted(
        p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and p.name[0] != "."
    )
    if not paths:
        inside = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
        found = f"holds {', '.join(inside[:5])}" if inside else "is empty"
        raise DataError(
            f"{option} {folder} has no images: it {found}; put {', '.join(IMAGE_SUFFIXES)} files straight into it"
        )
    return paths


def read_captions(folder: Path, paths: Sequence[Path], *, default: str | None) -> dict[Path, str]:
    """The caption of each image: PHOTO.txt beside it, else its line in metadata.jsonl, else `default`.

    metadata.jsonl has one {"file_name": ..., "text": ...} a line ("caption" and "prompt" do as well).

    Raises:
        DataError: a photo without a caption, an empty one, or a metadata.jsonl that cannot be read.
    """
    listed = _read_metadata(folder / "metadata.jsonl")
    captions = {}
    for path in paths:
        beside = path.with_suffix(".txt")
        caption = _read_text(beside).strip() if beside.is_file() else listed.get(path.name, default)
        if not caption:
            found = f"{beside.name} is empty" if beside.is_file() else "there is none"
            raise DataError(
                f"{path} has no caption: {found}; give instance_prompt, write {beside.name}, or use metadata.jsonl"
            )
        captions[path] = caption
    return captions


def load_image(path: Path) -> Image.Image:
    """The photo as RGB, upright (EXIF), transparency on white.

    Raises:
        DataError: not an image, or a truncated one.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            elif upright.mode.startswith("I"):  # 16 bits a pixel: convert() would clip instead of scale
                grey = (np.asarray(upright, dtype=np.float64) / 257).round().clip(0, 255)
                upright = Image.fromarray(grey.astype(np.uint8))
            return upright.convert("RGB")
    except Exception as error:  # Pillow meets damage with nearly any: OSError, SyntaxError, struct.error, TypeError
        raise DataError(f"cannot read the image {path}: {error}; replace it or take it out of the folder") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; save it as UTF-8 text") from error


def _read_metadata(path: Path) -> dict[str, str]:
    captions = {}
    if path.is_file():
        for number, line in enumerate(_read_text(path).splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = row["file_name"]
                captions[name] = next(row[key] for key in ("text", "caption", "prompt") if key in row).strip()
            except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
                raise DataError(
                    f'{path} line {number} is not {{"file_name": ..., "text": ...}}: {line[:80]}'
                ) from error
    return captions


def describe_sizes(examples: Sequence[Example], config: DataConfig) -> str:
    """How many examples there are of each size, how much is cut off the one that loses most, and what would help."""
    counts: dict[Size, int] = {}
    lost = []
    for example in examples:
        view = example.views[0]
        counts[view.size] = counts.get(view.size, 0) + 1
        width, height = load_image(example.path).size
        left, top, right, bottom = view.box
        lost.append((1 - (right - left) * (bottom - top) / (width * height), example.path.name))
    share, name = max(lost)
    sizes = ", ".join(f"{width} x {height}: {count}" for (height, width), count in sorted(counts.items()))
    sizes_text = f"photos by size (width x height): {sizes}; at most {share:.0%} is cut off ({name})"
    helps = config.aspect_ratio_buckets is None and share > CROPPED
    return sizes_text + ("; aspect_ratio_buckets auto keeps more of them" if helps else "")


def _example(path: Path, caption: str, weight: float, config: DataConfig, *, seed: int) -> Example:
    width, height = load_image(path).size
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    size = nearest_size(width, height, bucket_sizes(config.resolution, config.aspect_ratio_buckets))
    views = tuple(
        View(box, flip, size)
        for box in _boxes(width, height, size, config, seed=seed, content=content)
        for flip in ((False, True) if config.random_flip else (False,))
    )
    return Example(path=path, caption=caption, weight=weight, views=views, content=content)


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
