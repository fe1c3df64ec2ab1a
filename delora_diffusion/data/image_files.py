"""Image files: which files of a folder are read, and how each becomes an upright RGB picture."""

from __future__ import annotations

import functools
import hashlib
import io
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DeloraError

#: Formats of photos that Pillow reads by itself, where it was built with them; HEIF comes from pillow-heif.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
#: What reads a format that is not read here and now.
_NEEDED = {
    **dict.fromkeys((".heic", ".heif", ".hif"), 'pip install "delora_diffusion[heic]" reads it'),
    **dict.fromkeys((".avif", ".avifs"), "Pillow 11.3 or newer reads it"),
}
MASK = "_mask"  # what follows the name of a photo in that of its mask
#: Files that file managers leave behind, besides those with a dot in front.
_LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini")
_PNG = b"\x89PNG\r\n\x1a\n"
_SHOWN = 8  # names in a message
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # TIFF's tags
_WHITE_IS_ZERO, _SIGNED = 0, 2  # and values of the first and the last


class DataError(DeloraError):
    """A folder, photo or caption that cannot be used; the message names it, says what was found and what to do."""


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """Endings, in small letters, of the files that are read as images; HEIF's with the extra heic."""
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:
        pass
    return tuple(sorted(ending for ending, kind in Image.registered_extensions().items() if kind in _FORMATS))


def is_image(path: Path) -> bool:
    """Whether a file is called as an image is, and is none that a file manager made beside it (`._a.jpg`)."""
    return path.suffix.lower() in image_suffixes() and path.name[0] != "." and path.is_file()


def find_images(folder: Path, *, option: str) -> list[Path]:
    """The image files of `folder`, by name, without masks: `a_mask.png` beside `a.jpg`.

    Raises:
        DataError: `folder` is missing, is no folder, or holds no image; the message names `option`.
    """
    if not folder.exists():
        raise DataError(f"{option} {folder} does not exist; give the folder that holds the photos")
    if not folder.is_dir():
        raise DataError(f"{option} {folder} is a file; give the folder that holds the photos")
    images = sorted(path for path in folder.iterdir() if is_image(path))
    masks = set(masks_among(images).values())
    paths = [path for path in images if path not in masks]
    if not paths:
        others = left_out(folder, ()) or sorted(path.name for path in folder.iterdir())
        found = f"holds {some_of(others)}" if others else "is empty"
        raise DataError(
            f"{option} {folder} has no images: it {found}; put {', '.join(image_suffixes())} files straight into it"
        )
    return paths


def masks_among(images: Iterable[Path]) -> dict[Path, Path]:
    """Photo -> its mask, of image files."""
    by_stem = {path.with_suffix(""): path for path in images}
    named = {photo: stem.with_name(f"{stem.name}{MASK}") for stem, photo in by_stem.items()}
    return {photo: by_stem[stem] for photo, stem in named.items() if stem in by_stem}


def left_out(folder: Path, used: Iterable[Path]) -> list[str]:
    """Names of what else is in a folder, each with the reason why it is not read where there is one to tell."""
    known = set(used)
    others = sorted(path for path in folder.iterdir() if path not in known)
    return [_named(path) for path in others if path.name[0] != "." and path.name.lower() not in _LITTER]


def _named(path: Path) -> str:
    if path.is_dir():
        return f"{path.name}/ (a folder)"
    if not path.exists():
        return f"{path.name} (a link to nothing)"
    needed = _NEEDED.get(path.suffix.lower())
    return f"{path.name} ({needed})" if needed and not is_image(path) else path.name


def some_of(names: list[str]) -> str:
    """The first of many names as a list in a sentence, and how many there are besides."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def load_image(path: Path) -> Image.Image:
    """The photo as RGB, upright (EXIF), transparency on white; of a moving picture the first frame.

    Raises:
        DataError: not an image, or a truncated one.
    """
    return read_photo(path)[0]


def read_photo(path: Path) -> tuple[Image.Image, str]:
    """The same, and the hash of the bytes it was made from.

    Raises:
        DataError: as before.
    """
    image_suffixes()  # so that Pillow knows HEIF
    try:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:32]
        try:
            return _rgb(io.BytesIO(content)), digest
        except ValueError:  # PNG from image generators hold texts of a size that Pillow takes for an attack
            if content[:8] != _PNG:
                raise
            return _rgb(io.BytesIO(_without_texts(content))), digest
    except Exception as error:  # Pillow meets damage with nearly any: OSError, SyntaxError, struct.error, TypeError
        what = "it is in no format that is known" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"cannot read the image {path}: {what}; replace it or take it out of the folder") from error


def _rgb(file: io.BytesIO) -> Image.Image:
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "F" or upright.mode.startswith("I"):
            upright = _eight_bits(upright, getattr(image, "tag_v2", {}))
        if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return upright.convert("RGB")


def _eight_bits(image: Image.Image, tags: Any) -> Image.Image:
    """A grey picture of more than 8 bits a pixel, scaled to 8; convert() would clip it instead.

    Args:
        tags: of a TIFF file; empty for others.
    """
    values = np.asarray(image)
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
    if values.dtype == np.int32 and tags and not signed:
        values = values.view(np.uint32)  # Pillow has no mode for these
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are no numbers")
    white = _white(values, tags.get(_BITS, (16,))[0] - signed)
    grey = (values.astype(np.float64) / white).clip(0, 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 1 - grey
    shown = Image.fromarray((255 * grey).round().astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return shown
    return Image.merge("LA", (shown, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))


def _white(values: Any, bits: int) -> float:
    """The value that stands for white.

    Up to 16 bits a file says it. Beyond, programs do not agree: floats are mostly 0 to 1, with highlights above it,
    but some write 0 to 255 or 65535 as floats or in 32 bits; what a picture goes up to tells which.
    """
    floats = values.dtype.kind == "f"
    if not floats and bits <= 16:
        return float(2**bits - 1)
    most = float(values.max())
    if floats and most <= 16:
        return 1.0
    usual = (255, 65535, 2 ** (32 if floats else bits) - 1)
    return float(next((white for white in usual if most <= white), usual[-1]))


def _without_texts(content: bytes) -> bytes:
    """A PNG file without its text chunks (a chunk is length, name, data and checksum)."""
    kept, place = [content[:8]], 8
    while place < len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        end = place + 12 + length
        if name not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(content[place:end])
        place = end
    return b"".join(kept)
