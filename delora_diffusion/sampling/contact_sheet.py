"""Contact sheets: a grid of images with labels on its rows and columns, as one picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .fonts import font_for

_GAP = 6
_INK, _PAPER = "#222222", "#ffffff"
#: Pixels of a sheet at most; cells are smaller where it would have more. Pillow warns of pictures of 90 million.
LARGEST = 64_000_000


@dataclass(frozen=True)
class _Label:
    """A text, and a font that has its letters."""

    text: str
    font: ImageFont.FreeTypeFont

    def wrapped(self, width: int) -> str:
        """The text in lines of so many pixels."""
        widths = [self.font.getbbox(text)[2] / len(text) for text in ("abcdefghij", self.text) if text]
        letter = max(1.0, *widths)  # of Latin at least, of wider scripts their own
        return textwrap.fill(self.text, max(4, int(width / letter)))


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    row_names: Sequence[str] = (),
    cell: int | None = None,
) -> Image.Image:
    """Put images on a grid, each fitted into a square cell.

    Args:
        rows: rows of images; None leaves a cell empty. Rows may differ in length.
        row_labels: one text for each row, written left of it.
        column_labels: one text for each column, written above it.
        row_names: what is written instead of a label in a script that no font here has; the row's number if empty.
        cell: side of a cell in pixels; the largest side found if None, and at least 96.
    """
    images = [image for row in rows for image in row if image is not None]
    columns = max((len(row) for row in rows), default=0)
    most = int(math.sqrt(LARGEST / max(1, columns * len(rows)))) - _GAP
    side = max(16, min(cell or max([96, *(max(image.size) for image in images)]), most))
    height = max(11, min(28, side // 11))
    lefts = _legible(row_labels, row_names, "row", height)
    headers = _legible(column_labels, (), "column", height)[:columns]
    left = _label_width(lefts, side)
    top = max((_height(label, side) for label in headers), default=0) + (_GAP if headers else 0)
    size = (left + columns * (side + _GAP) + _GAP, top + len(rows) * (side + _GAP) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(headers):
        place = (left + _GAP + column * (side + _GAP), _GAP // 2)
        draw.multiline_text(place, label.wrapped(side), fill=_INK, font=label.font)
    for number, row in enumerate(rows):
        y = top + _GAP + number * (side + _GAP)
        if number < len(lefts):
            label = lefts[number]
            draw.multiline_text((_GAP, y), label.wrapped(left - _GAP), fill=_INK, font=label.font)
        for column, image in enumerate(row):
            if image is not None:
                x = left + _GAP + column * (side + _GAP)
                fitted = _fitted(image, side)
                sheet.paste(fitted, (x + (side - fitted.width) // 2, y + (side - fitted.height) // 2))
    return sheet


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB") if size == image.size else image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _legible(labels: Sequence[str], names: Sequence[str], kind: str, height: int) -> list[_Label]:
    """Labels with fonts that have their letters; where there is none, a name stands for one, or its number."""
    found = []
    for number, text in enumerate(labels):
        font = font_for(text, height)
        shown = text if font else names[number] if number < len(names) else f"{kind} {number + 1}"
        found.append(_Label(shown, font or ImageFont.load_default(size=height)))
    return found


def _label_width(labels: Sequence[_Label], side: int) -> int:
    widest = max((label.font.getbbox(label.text)[2] for label in labels), default=0)
    return min(round(widest) + 2 * _GAP, max(side, 96)) if labels else 0


def _height(label: _Label, side: int) -> int:
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return int(draw.multiline_textbbox((0, 0), label.wrapped(side), font=label.font)[3]) + _GAP
