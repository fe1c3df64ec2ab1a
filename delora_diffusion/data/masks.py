"""Masks: what of a photo counts in the loss, white being all of it and black nothing.

A mask is an image file of the photo's size beside it (`dog_mask.png` beside `dog.jpg`), or the photo's alpha channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .image_files import DataError, read_photo


@dataclass(frozen=True)
class Mask:
    """A mask: the file that holds it, whether it is that file's alpha channel, and a hash of the file's bytes."""

    path: Path
    alpha: bool
    content: str

    def part(self, box: tuple[int, int, int, int], *, flip: bool, height: int, width: int) -> Tensor:
        """The mask of a part of the photo, (1, 1, height, width) in 0 .. 1: the mean over what a pixel covers.

        Raises:
            DataError: the file is no longer what it was.
        """
        image = self._values().resize((width, height), Image.Resampling.BOX, box=box)
        values = torch.from_numpy(np.array(ImageOps.mirror(image) if flip else image))
        return values[None, None].float() / 255

    def shows(self, box: tuple[int, int, int, int]) -> bool:
        """Whether anything of a part of the photo counts."""
        return bool(self._values().crop(box).getextrema()[1])

    def _values(self) -> Image.Image:
        image, content = _read(self.path, alpha=self.alpha)
        if content != self.content:
            raise DataError(f"{self.path} has changed since this run first read it; start the run again")
        return image


def mask_of(photo: Path, size: tuple[int, int], *, kind: str, files: Mapping[Path, Path]) -> Mask | None:
    """The mask of a photo, if it has one.

    Args:
        size: width and height of the photo.
        kind: "files", "alpha" or "none".
        files: photo -> the mask beside it.

    Raises:
        DataError: one of another size, or one without anything in it.
    """
    path = photo if kind == "alpha" else files.get(photo) if kind == "files" else None
    if path is None or (kind == "alpha" and not _has_alpha(path)):
        return None
    values, content = _read(path, alpha=kind == "alpha")
    if values.size != size:
        raise DataError(
            f"the mask {path} is {values.size[0]} x {values.size[1]} pixels, and {photo.name} {size[0]} x {size[1]}; "
            f"make it anew from this photo, or take it out"
        )
    if not values.getextrema()[1]:
        what = f"{path} is transparent all over" if kind == "alpha" else f"the mask {path} is black all over"
        raise DataError(f"{what}, so that nothing of {photo.name} would count; white is what counts")
    return Mask(path, kind == "alpha", content)


def _has_alpha(path: Path) -> bool:
    with Image.open(path) as image:
        return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def _read(path: Path, *, alpha: bool) -> tuple[Image.Image, str]:
    """An upright grey image, 0 to 255, and the hash of the file's bytes.

    Raises:
        DataError: not an image, or a truncated one.
    """
    image, content = read_photo(path)
    if not alpha:
        return image.convert("L"), content
    with Image.open(path) as raw:
        return ImageOps.exif_transpose(raw).convert("RGBA").getchannel("A"), content
