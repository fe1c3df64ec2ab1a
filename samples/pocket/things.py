"""Things: sprites of the pocket world, cut from an emoji font, and what may be done to them.

`sprite` draws a thing as an RGBA picture; `tint` recolours it and keeps its shading; `Dress` describes marks
(spots, stripes, a scarf, a hat) that make one particular instance out of a kind of thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
FONT_NAME = "NotoColorEmoji.ttf"
FONT_FOLDERS = ("~/.fonts", "~/.local/share/fonts", "/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts")
GLYPH_SIZE = 109  # px; the one size that Noto Color Emoji's bitmaps have

THINGS: dict[str, str] = {
    "cat": "🐈",
    "dog": "🐕",
    "horse": "🐎",
    "cow": "🐄",
    "pig": "🐖",
    "sheep": "🐑",
    "elephant": "🐘",
    "lion": "🦁",
    "tiger": "🐅",
    "panda": "🐼",
    "rabbit": "🐇",
    "fox": "🦊",
    "frog": "🐸",
    "monkey": "🐒",
    "penguin": "🐧",
    "owl": "🦉",
    "duck": "🦆",
    "rooster": "🐓",
    "turtle": "🐢",
    "octopus": "🐙",
    "crab": "🦀",
    "fish": "🐠",
    "whale": "🐳",
    "butterfly": "🦋",
    "ladybug": "🐞",
    "snail": "🐌",
    "giraffe": "🦒",
    "dinosaur": "🦕",
    "apple": "🍎",
    "banana": "🍌",
    "pineapple": "🍍",
    "strawberry": "🍓",
    "watermelon": "🍉",
    "pizza": "🍕",
    "hamburger": "🍔",
    "ice cream": "🍦",
    "cake": "🎂",
    "donut": "🍩",
    "mushroom": "🍄",
    "carrot": "🥕",
    "car": "🚗",
    "bus": "🚌",
    "bicycle": "🚲",
    "locomotive": "🚂",
    "airplane": "🛩",
    "rocket": "🚀",
    "sailboat": "⛵",
    "tractor": "🚜",
    "helicopter": "🚁",
    "house": "🏠",
    "chair": "🪑",
    "backpack": "🎒",
    "teddy bear": "🧸",
    "robot": "🤖",
    "ball": "⚽",
    "guitar": "🎸",
    "umbrella": "☂",
    "clock": "⏰",
    "teapot": "🫖",
    "vase": "🏺",
    "sneaker": "👟",
    "boot": "👢",
    "candle": "🕯",
    "drum": "🥁",
}
COLOURS: dict[str, Colour] = {
    "red": (225, 45, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (65, 175, 70),
    "blue": (55, 105, 225),
    "purple": (150, 65, 200),
    "pink": (245, 130, 190),
    "white": (240, 240, 240),
    "black": (55, 55, 62),
}
MARKS = ("spots", "stripes", "scarf", "hat")


@cache
def font_path() -> Path:
    """Where the emoji font lies on this machine."""
    for folder in FONT_FOLDERS:
        for path in sorted(Path(folder).expanduser().rglob(FONT_NAME)):
            return path
    raise FileNotFoundError(
        f"the pocket world is drawn with {FONT_NAME}, which is in none of {', '.join(FONT_FOLDERS)}; "
        "install it (on Debian and Ubuntu: apt install fonts-noto-color-emoji)"
    )


@cache
def glyph(character: str) -> Image.Image:
    """One emoji as RGBA, cropped to what is visible, longer side at most about 136 px."""
    font = ImageFont.truetype(str(font_path()), GLYPH_SIZE)
    canvas = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(canvas).text((20, 20), character, font=font, embedded_color=True)
    return canvas.crop(canvas.getbbox())


def sprite(thing: str) -> Image.Image:
    """The thing of that name as RGBA."""
    return glyph(THINGS[thing])


def tint(picture: Image.Image, colour: Colour, *, strength: float = 0.85) -> Image.Image:
    """The RGBA picture in another colour.

    The colour is laid over the lightness L (0..1), stretched to the picture's own range: dark stays dark, the middle
    becomes the colour, the lightest parts approach white. `strength` 1 leaves nothing of the old hue.
    """
    pixels = np.asarray(picture).astype(np.float32)
    rgb, alpha = pixels[..., :3], pixels[..., 3]
    light = rgb @ np.array([0.3, 0.59, 0.11], np.float32) / 255
    low, middle = np.percentile(light[alpha > 128], (2, 50))
    pivot = max(float(middle), 0.25)
    dark_part = np.clip((light - min(low, 0.1)) / pivot, 0, 1)[..., None] ** 0.8
    light_part = np.clip((light - pivot) / max(1 - pivot, 0.1), 0, 1)[..., None] * 0.55
    target = np.array(colour, np.float32)
    new = target * dark_part * (1 - light_part) + 255 * light_part
    pixels[..., :3] = strength * new + (1 - strength) * rgb
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGBA")


@dataclass(frozen=True)
class Dress:
    """What makes an instance: its colour and marks. Colours are RGB; positions are fractions of the sprite's box."""

    body: Colour | None = None
    spots: Colour | None = None
    stripes: Colour | None = None
    scarf: Colour | None = None
    scarf_line: tuple[float, float, float, float] = (0.0, 0.45, 1.0, 0.45)
    hat: Colour | None = None
    hat_at: tuple[float, float] = (0.5, 0.08)
    pattern_seed: int = 0
    spot_size: float = 0.07
    stripe_width: float = 0.09

    @property
    def kinds(self) -> set[str]:
        """The marks it has."""
        return {kind for kind in MARKS if getattr(self, kind)}


def dress(picture: Image.Image, style: Dress) -> Image.Image:
    """The RGBA picture recoloured and marked; marks stay inside its outline, except for the hat."""
    out = tint(picture, style.body) if style.body else picture.copy()
    w, h = out.size
    rng, outline = np.random.default_rng(style.pattern_seed), out.getchannel("A")
    paint = Image.new("RGBA", out.size)
    brush = ImageDraw.Draw(paint)
    if style.spots:
        centres: list[np.ndarray] = []
        for centre in rng.uniform(0, 1, (60, 2)):
            if all(np.abs(centre - other).max() > 2.6 * style.spot_size for other in centres):
                centres.append(centre)
                x, y, r = centre[0] * w, centre[1] * h, style.spot_size * max(w, h)
                brush.ellipse((x - r, y - r, x + r, y + r), fill=(*style.spots, 235))
    if style.stripes:
        tilt, step = rng.uniform(-0.3, 0.3), rng.uniform(0.2, 0.28)
        for x in np.arange(-0.3, 1.3, step):
            ends = ((x - tilt) * w, 0, (x + tilt) * w, h)
            brush.line(ends, fill=(*style.stripes, 235), width=round(style.stripe_width * w))
    if style.scarf:
        x0, y0, x1, y1 = style.scarf_line
        brush.line((x0 * w, y0 * h, x1 * w, y1 * h), fill=(*style.scarf, 255), width=round(0.13 * h))
    clipped = Image.composite(paint, Image.new("RGBA", out.size), outline)
    out = Image.alpha_composite(out, clipped)
    return put_on_hat(out, style) if style.hat else out


def put_on_hat(picture: Image.Image, style: Dress) -> Image.Image:
    """A pointed hat with a white bobble, its foot at `hat_at`; the picture grows upwards to make room."""
    assert style.hat is not None
    w, h = picture.size
    x, foot = style.hat_at[0] * w, style.hat_at[1] * h
    wide, tall = 0.2 * w, 0.34 * h
    room = max(0, round(tall + 0.07 * h - foot))
    out = Image.new("RGBA", (w, h + room))
    out.paste(picture, (0, room))
    brush, foot = ImageDraw.Draw(out), foot + room
    brush.polygon(((x - wide, foot), (x + wide, foot), (x, foot - tall)), fill=(*style.hat, 255))
    r = 0.06 * h
    brush.ellipse((x - r, foot - tall - r, x + r, foot - tall + r), fill=(255, 255, 255, 255))
    return out


def random_dress(rng: np.random.Generator) -> Dress:
    """A random instance: a colour of its own (four in five) and one or two marks."""

    def colour() -> Colour:
        r, g, b = (int(c) for c in rng.integers(20, 250, 3))
        return r, g, b

    marks = set(rng.choice(MARKS, int(rng.integers(1, 3)), replace=False).tolist())
    y0, y1 = rng.uniform(0.25, 0.75, 2)
    return Dress(
        body=colour() if rng.random() < 0.8 else None,
        spots=colour() if "spots" in marks else None,
        stripes=colour() if "stripes" in marks else None,
        scarf=colour() if "scarf" in marks else None,
        scarf_line=(0.0, float(y0), 1.0, float(y1)),
        hat=colour() if "hat" in marks else None,
        pattern_seed=int(rng.integers(1 << 30)),
        spot_size=float(rng.uniform(0.05, 0.09)),
    )
