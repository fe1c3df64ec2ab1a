"""Aspect-ratio buckets: the sizes of training pictures, and which of them, and which part of it, a photo gets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..options import OptionError

#: Sides of automatic buckets are multiples of this many pixels (of an eighth of small resolutions): what every family
#: can take. The longer side is at most `LONGEST` times the shorter; what a photo has beyond that is cropped.
STEP, LONGEST = 64, 2.0
Size = tuple[int, int]  # height, width in pixels


def bucket_sizes(resolution: int, asked: str | None) -> list[Size]:
    """The sizes (height, width) that photos are sorted into.

    Args:
        resolution: side of the square, which stands for the number of pixels of the others.
        asked: None: the square alone. "auto": the square, and of every width the tallest with no more pixels. Or the
            sizes themselves, "height,width;height,width", as diffusers' scripts take them.

    Raises:
        OptionError: sizes that cannot be read, or that are no multiples of 8.
    """
    square = (resolution, resolution)
    if asked is None:
        return [square]
    if asked != "auto":
        return _read(asked)
    step = STEP if resolution >= 8 * STEP else max(8, resolution // 64 * 8)
    sizes = {square}
    for width in range(step, int(resolution * math.sqrt(LONGEST)) + 1, step):
        height = resolution**2 // width // step * step
        if max(width, height) <= LONGEST * min(width, height):
            sizes |= {(height, width), (width, height)}
    return sorted(sizes)


def _read(asked: str) -> list[Size]:
    try:
        sizes = [(int(height), int(width)) for height, width in (size.split(",") for size in asked.split(";"))]
    except ValueError as error:
        raise OptionError(
            f'aspect_ratio_buckets is {asked!r}; give auto, or sizes "height,width;height,width;..."'
        ) from error
    for height, width in sizes:
        if min(height, width) < 8 or height % 8 or width % 8:
            raise OptionError(
                f"aspect_ratio_buckets has {height},{width}; height and width must be positive multiples of 8"
            )
    return sorted(set(sizes))


def nearest_size(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The size whose shape is nearest to that of a photo, by the ratio of ratios; of equal ones, the largest."""

    def distance(size: Size) -> tuple[float, int]:
        return round(abs(math.log(width / height * size[0] / size[1])), 9), -size[0] * size[1]

    return min(sizes, key=distance)


def largest_part(width: int, height: int, size: Size) -> tuple[int, int]:
    """Width and height, in its own pixels, of the largest part of a photo that has the shape of `size`."""
    if width * size[0] >= height * size[1]:
        return max(1, min(width, round(height * size[1] / size[0]))), height
    return width, max(1, min(height, round(width * size[0] / size[1])))
