"""Fonts for labels: Pillow's own, or one of the system's where that lacks the script of a label."""

from __future__ import annotations

import functools
import importlib.util
import os
import unicodedata
from pathlib import Path

from PIL import ImageFont

#: Where systems keep fonts.
_FOLDERS = (
    "~/.fonts", "~/.local/share/fonts", "/usr/local/share/fonts", "/usr/share/fonts", "~/Library/Fonts",
    "/Library/Fonts", "/System/Library/Fonts", "$WINDIR/Fonts",
)  # fmt: skip
_STYLES = ("bold", "italic", "oblique", "mono", "serif", "condensed", "light", "math", "sym", "display", "cm")
_NO_CHARACTER = "\uffff"  # what a font lacks looks like this


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font that has every letter of a text; None if there is none on this system.

    Args:
        size: height of a line in pixels.
    """
    return _font_for("".join(sorted({letter for letter in text if _is_drawn(letter)})), size)


@functools.cache
def _font_for(letters: str, size: int) -> ImageFont.FreeTypeFont | None:
    own: ImageFont.FreeTypeFont = ImageFont.load_default(size=size)
    if _has(own, letters):
        return own
    for path in _system_fonts():
        try:
            font = ImageFont.truetype(path, size)
        except OSError:  # of one size only, as fonts of coloured pictures are, or damaged
            continue
        if _has(font, letters):
            return font
    return None


def _has(font: ImageFont.FreeTypeFont, letters: str) -> bool:
    try:
        missing = font.getmask(_NO_CHARACTER)
        looks = [font.getmask(letter) for letter in letters]
    except (OSError, UnicodeError):  # Pillow without FreeType has Latin letters alone
        return False
    return all(look.size != missing.size or bytes(look) != bytes(missing) for look in looks)


def _is_drawn(letter: str) -> bool:
    """Whether a letter leaves ink of its own: no space, no control, no mark on another."""
    return unicodedata.category(letter)[0] not in "ZCM"


@functools.cache
def _system_fonts() -> tuple[Path, ...]:
    """The font files there are, plain ones first, without those that have a box for every letter there is."""
    folders = [Path(os.path.expanduser(os.path.expandvars(folder))) for folder in _FOLDERS]
    plots = importlib.util.find_spec("matplotlib")
    if plots is not None and plots.origin:
        folders.append(Path(plots.origin).parent / "mpl-data" / "fonts" / "ttf")
    found = [path for folder in folders for path in folder.rglob("*") if "lastresort" not in path.stem.lower()]
    return tuple(sorted((path for path in found if path.suffix.lower() in (".ttf", ".otf", ".ttc")), key=_plainness))


def _plainness(path: Path) -> tuple[int, str]:
    """Sorts plain fonts before those that are slanted, bold, narrow or for formulas."""
    return sum(word in path.stem.lower() for word in _STYLES), str(path)
