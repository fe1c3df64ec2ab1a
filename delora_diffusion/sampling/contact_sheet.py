"""Contact sheets: a grid of images with labels on its rows and columns, as one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP = 6
_INK, _PAPER = "#222222", "#ffffff"


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int | None = None,
) -> Image.Image:
    """Put images on a grid, each fitted into a square cell.

    Args:
        rows: rows of images; None leaves a cell empty. Rows may differ in length.
        row_labels: one text for each row, written left of it.
        column_labels: one text for each column, written above it.
        cell: side of a cell in pixels; the largest side found if None, and at least 96.
    """
    images = [image for row in rows for image in row if image is not None]
    side = cell or max([96, *(max(image.size) for image in images)])
    font = ImageFont.load_default(size=max(11, min(28, side // 11)))
    columns = max((len(row) for row in rows), default=0)
    left = _label_width(row_labels, font, side)
    headers = [_wrapped(label, font, side) for label in column_labels]
    top = max((_height(label, font) for label in headers), default=0) + (_GAP if headers else 0)
    size = (left + columns * (side + _GAP) + _GAP, top + len(rows) * (side + _GAP) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(headers[:columns]):
        draw.multiline_text((left + _GAP + column * (side + _GAP), _GAP // 2), label, fill=_INK, font=font)
    for number, row in enumerate(rows):
        y = top + _GAP + number * (side + _GAP)
        if number < len(row_labels):
            draw.multiline_text((_GAP, y), _wrapped(row_labels[number], font, left - _GAP), fill=_INK, font=font)
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


def _label_width(labels: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, side: int) -> int:
    widest = max((font.getbbox(label)[2] for label in labels), default=0)
    return min(round(widest) + 2 * _GAP, max(side, 96)) if labels else 0


def _wrapped(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    letter = max(1.0, font.getbbox("abcdefghij")[2] / 10)
    return textwrap.fill(label, max(4, int(width / letter)))


def _height(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), label, font=font)
    return int(box[3]) + _GAP
