"""Places: the backgrounds of the pocket world, each drawn anew with random variation.

A place is a function `(canvas, rng) -> None` that paints an RGB Pillow image of any square size. Coordinates are
fractions of the side (0 top/left, 1 bottom/right), so a place looks the same at 64 and at 256 px.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Painter = Callable[[Image.Image, np.random.Generator], None]


def vary(colour: Sequence[float], rng: np.random.Generator, *, by: int = 10) -> Colour:
    """The colour (RGB, 0..255) with every channel moved by at most `by`."""
    r, g, b = (int(np.clip(c + rng.integers(-by, by + 1), 0, 255)) for c in colour)
    return r, g, b


def gradient(canvas: Image.Image, top: Colour, bottom: Colour, *, start: float = 0.0, end: float = 1.0) -> None:
    """Fill the rows from `start` to `end` with a vertical gradient."""
    side = canvas.width
    first, last = int(start * side), int(end * side)
    ramp = np.linspace(0, 1, max(last - first, 1))[:, None, None]
    rows = (1 - ramp) * np.array(top) + ramp * np.array(bottom)
    block = np.broadcast_to(rows, (rows.shape[0], side, 3)).astype(np.uint8)
    canvas.paste(Image.fromarray(np.ascontiguousarray(block)), (0, first))


class Brush:
    """Draws on a canvas in fractions of its side."""

    def __init__(self, canvas: Image.Image) -> None:
        self.side = canvas.width
        self.draw = ImageDraw.Draw(canvas)

    def box(self, x0: float, y0: float, x1: float, y1: float, *, fill: Colour, radius: float = 0.0) -> None:
        corners = [c * self.side for c in (x0, y0, x1, y1)]
        self.draw.rounded_rectangle(corners, radius * self.side, fill=fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, *, fill: Colour) -> None:
        self.draw.ellipse([c * self.side for c in (x - rx, y - ry, x + rx, y + ry)], fill=fill)

    def polygon(self, *points: tuple[float, float], fill: Colour) -> None:
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=fill)

    def line(self, *points: tuple[float, float], fill: Colour, width: float) -> None:
        pixels = [(x * self.side, y * self.side) for x, y in points]
        self.draw.line(pixels, fill=fill, width=max(1, round(width * self.side)))


def hills(brush: Brush, rng: np.random.Generator, *, base: float, height: float, fill: Colour) -> None:
    """A rolling skyline whose ground reaches from about `base` to the bottom edge."""
    phase, waves = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.3)
    xs = np.linspace(0, 1, 25)
    ys = base - height * np.sin(2 * np.pi * waves * xs + phase)
    brush.polygon((0, 1), *zip(xs.tolist(), ys.tolist(), strict=True), (1, 1), fill=fill)


def beach(canvas: Image.Image, rng: np.random.Generator) -> None:
    horizon, shore, brush = rng.uniform(0.3, 0.4), rng.uniform(0.52, 0.62), Brush(canvas)
    gradient(canvas, vary((120, 195, 245), rng), vary((205, 235, 250), rng), end=horizon)
    gradient(canvas, vary((25, 120, 190), rng), vary((70, 190, 205), rng), start=horizon, end=shore + 0.03)
    hills(brush, rng, base=shore, height=0.015, fill=(250, 250, 245))
    hills(brush, rng, base=shore + 0.03, height=0.015, fill=vary((238, 212, 150), rng))
    if rng.random() < 0.6:
        brush.ellipse(rng.uniform(0.1, 0.9), 0.12, 0.07, 0.07, fill=(255, 236, 130))


def snow(canvas: Image.Image, rng: np.random.Generator) -> None:
    base, brush = rng.uniform(0.45, 0.55), Brush(canvas)
    gradient(canvas, vary((150, 175, 210), rng), vary((215, 225, 240), rng), end=0.7)
    for x in rng.uniform(0, 1, 4):
        for k in range(3):
            w, y = 0.06 + 0.025 * k, base - 0.26 + 0.09 * k
            brush.polygon((x, y - 0.08), (x - w, y + 0.06), (x + w, y + 0.06), fill=(60, 105, 95))
            brush.polygon((x, y - 0.08), (x - w / 2, y), (x + w / 2, y), fill=(235, 242, 248))
    hills(brush, rng, base=base + 0.02, height=0.03, fill=vary((228, 234, 244), rng, by=5))
    hills(brush, rng, base=base + 0.2, height=0.03, fill=(247, 249, 253))
    for x, y in rng.uniform(0, 1, (14, 2)):
        brush.ellipse(x, y, 0.012, 0.012, fill=(255, 255, 255))


def wooden_floor(canvas: Image.Image, rng: np.random.Generator) -> None:
    wood, brush, planks = vary((176, 118, 66), rng, by=14), Brush(canvas), int(rng.integers(5, 7))
    for k in range(planks):
        y0, y1 = k / planks, (k + 1) / planks
        brush.box(0, y0, 1, y1, fill=vary(wood, rng, by=12))
        brush.line((0, y0), (1, y0), fill=(96, 58, 28), width=0.014)
        x = rng.uniform(0.05, 0.95)
        brush.line((x, y0), (x, y1), fill=(96, 58, 28), width=0.014)


def city(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush, ground, x = Brush(canvas), rng.uniform(0.7, 0.76), -0.05
    gradient(canvas, vary((140, 180, 220), rng), vary((225, 220, 215), rng), end=ground + 0.01)
    while x < 1:
        w, top = rng.uniform(0.12, 0.2), rng.uniform(0.08, 0.42)
        brush.box(x, top, x + w, ground, fill=vary((90, 100, 125), rng, by=22))
        for wy in np.arange(top + 0.04, ground - 0.04, 0.08):
            for wx in np.arange(x + 0.03, x + w - 0.04, 0.055):
                brush.box(wx, wy, wx + 0.025, wy + 0.035, fill=(250, 225, 140))
        x += w + rng.uniform(0, 0.02)
    brush.box(0, ground, 1, 1, fill=vary((105, 105, 110), rng))
    brush.line((0, 0.9), (1, 0.9), fill=(235, 235, 225), width=0.02)


def jungle(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush = Brush(canvas)
    gradient(canvas, vary((20, 75, 35), rng), vary((40, 110, 45), rng))
    for x, y, r, shade in rng.uniform(0, 1, (14, 4)):
        fill = vary((25 + 40 * shade, 95 + 65 * shade, 35 + 25 * shade), rng, by=6)
        brush.ellipse(x, y, 0.05 + 0.05 * r, 0.14 + 0.06 * r, fill=fill)
    for x in rng.uniform(0, 1, 2):
        brush.line((x, 0), (x + rng.uniform(-0.06, 0.06), 1), fill=(85, 60, 30), width=0.05)


def moon(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush, base = Brush(canvas), rng.uniform(0.5, 0.6)
    gradient(canvas, (6, 6, 18), (18, 18, 40))
    for x, y in rng.uniform((0, 0), (1, base), (16, 2)):
        brush.ellipse(x, y, 0.009, 0.009, fill=(240, 240, 255))
    hills(brush, rng, base=base, height=0.02, fill=vary((150, 150, 155), rng))
    for x, y in rng.uniform((0, base + 0.08), (1, 0.97), (7, 2)):
        r = rng.uniform(0.04, 0.08)
        brush.ellipse(x, y, r, r / 2, fill=(112, 112, 118))
        brush.ellipse(x, y + 0.012, r * 0.8, r * 0.36, fill=(132, 132, 138))


def cobblestone(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush, rows, shift = Brush(canvas), 7, rng.uniform(0, 0.2)
    canvas.paste((70, 66, 66), (0, 0, canvas.width, canvas.height))
    for k in range(rows + 1):
        for x in np.arange(-0.2 + shift + 0.1 * (k % 2), 1.1, 0.2):
            y, grey = k / rows - 0.05, rng.integers(-18, 19)
            brush.box(
                x + 0.01,
                y + 0.01,
                x + 0.19,
                y + 1 / rows - 0.01,
                fill=vary((150 + grey, 144 + grey, 138 + grey), rng, by=4),
                radius=0.04,
            )


def under_water(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush = Brush(canvas)
    gradient(canvas, vary((60, 185, 225), rng), vary((5, 60, 130), rng))
    hills(brush, rng, base=0.9, height=0.02, fill=(140, 150, 130))
    for x in rng.uniform(0, 1, 5):
        xs, ys = x + 0.02 * np.sin(np.arange(8)), np.linspace(0.95, rng.uniform(0.55, 0.75), 8)
        brush.line(*zip(xs.tolist(), ys.tolist(), strict=True), fill=(20, 130, 90), width=0.035)
    for x, y, r in rng.uniform((0, 0, 0.012), (1, 0.9, 0.03), (9, 3)):
        brush.ellipse(x, y, r, r, fill=(190, 235, 250))


def desert(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush, base = Brush(canvas), rng.uniform(0.45, 0.55)
    gradient(canvas, vary((250, 180, 100), rng), vary((255, 225, 165), rng), end=0.7)
    hills(brush, rng, base=base, height=0.05, fill=vary((222, 150, 80), rng))
    x, green = rng.uniform(0.05, 0.95), (60, 125, 60)
    brush.box(x - 0.03, base - 0.3, x + 0.03, base + 0.1, fill=green, radius=0.03)
    brush.box(x - 0.1, base - 0.1, x + 0.1, base - 0.05, fill=green, radius=0.02)
    brush.box(x - 0.1, base - 0.2, x - 0.06, base - 0.05, fill=green, radius=0.02)
    brush.box(x + 0.06, base - 0.24, x + 0.1, base - 0.05, fill=green, radius=0.02)
    hills(brush, rng, base=base + 0.15, height=0.05, fill=vary((205, 128, 62), rng))


def mountain(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush, base = Brush(canvas), rng.uniform(0.58, 0.66)
    gradient(canvas, vary((95, 160, 230), rng), vary((190, 220, 245), rng), end=base + 0.03)
    for x in (rng.uniform(0.05, 0.35), rng.uniform(0.65, 0.95)):
        top, w = rng.uniform(0.05, 0.18), rng.uniform(0.32, 0.42)
        slope = w / (base - top)
        brush.polygon((x, top), (x - w, base), (x + w, base), fill=vary((112, 112, 132), rng))
        cap = 0.14
        brush.polygon(
            (x, top),
            (x - slope * cap, top + cap),
            (x, top + cap * 0.75),
            (x + slope * cap, top + cap),
            fill=(248, 250, 255),
        )
    hills(brush, rng, base=base, height=0.02, fill=vary((100, 165, 80), rng))


def grass(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush = Brush(canvas)
    gradient(canvas, vary((120, 200, 70), rng), vary((75, 165, 45), rng))
    for x, y in rng.uniform(0, 1, (18, 2)):
        brush.line((x - 0.015, y - 0.05), (x, y), (x + 0.02, y - 0.045), fill=(55, 135, 35), width=0.012)
    for x, y in rng.uniform(0, 1, (7, 2)):
        brush.ellipse(x, y, 0.034, 0.034, fill=(255, 250, 240))
        brush.ellipse(x, y, 0.014, 0.014, fill=(250, 200, 40))


def brick_wall(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush, rows, shift = Brush(canvas), 8, rng.uniform(0, 0.25)
    canvas.paste((215, 200, 185), (0, 0, canvas.width, canvas.height))
    for k in range(rows):
        for x in np.arange(-0.25 + shift + 0.125 * (k % 2) - 0.125, 1.1, 0.25):
            brush.box(x + 0.01, k / rows + 0.01, x + 0.24, (k + 1) / rows - 0.01, fill=vary((170, 75, 55), rng, by=14))


def rug(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush, pink = Brush(canvas), vary((235, 130, 175), rng)
    canvas.paste((205, 185, 160), (0, 0, canvas.width, canvas.height))
    for inset, fill in ((0.05, (190, 60, 125)), (0.11, pink), (0.2, (250, 205, 225)), (0.24, pink)):
        brush.box(inset, inset, 1 - inset, 1 - inset, fill=fill, radius=0.03)


def checkered_floor(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush, cell, (dx, dy) = Brush(canvas), rng.uniform(0.17, 0.21), rng.uniform(0, 0.2, 2)
    canvas.paste((238, 236, 230), (0, 0, canvas.width, canvas.height))
    for i in range(-2, 8):
        for j in range(-2, 8):
            if (i + j) % 2:
                x, y = i * cell + dx, j * cell + dy
                brush.box(x, y, x + cell, y + cell, fill=(42, 42, 48))


def sunset(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush, base = Brush(canvas), rng.uniform(0.66, 0.74)
    gradient(canvas, vary((85, 45, 130), rng), vary((255, 135, 80), rng), end=base + 0.05)
    brush.ellipse(rng.uniform(0.15, 0.85), base - 0.06, 0.16, 0.16, fill=(255, 225, 110))
    hills(brush, rng, base=base, height=0.02, fill=vary((50, 30, 60), rng, by=6))


def autumn_forest(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush, base = Brush(canvas), rng.uniform(0.66, 0.74)
    gradient(canvas, vary((235, 215, 180), rng), vary((245, 230, 200), rng), end=base + 0.03)
    for x in np.linspace(0.02, 0.98, 5) + rng.uniform(-0.06, 0.06, 5):
        brush.box(x - 0.025, 0.25, x + 0.025, base + 0.02, fill=(90, 60, 45))
        shade = rng.random()
        crown = vary((225 - 40 * shade, 120 - 60 * shade, 35), rng, by=12)
        brush.ellipse(x, rng.uniform(0.12, 0.26), rng.uniform(0.12, 0.17), 0.17, fill=crown)
    hills(brush, rng, base=base, height=0.015, fill=vary((185, 100, 40), rng))
    for x, y in rng.uniform((0, base + 0.06), (1, 1), (10, 2)):
        brush.ellipse(x, y, 0.025, 0.014, fill=(225, 160, 50))


def eiffel_tower(canvas: Image.Image, rng: np.random.Generator) -> None:
    brush, x, base, iron = Brush(canvas), rng.uniform(0.2, 0.8), rng.uniform(0.72, 0.78), (120, 85, 65)
    gradient(canvas, vary((170, 190, 235), rng), vary((245, 225, 235), rng), end=base + 0.01)
    brush.polygon(
        (x - 0.01, 0.02),
        (x + 0.01, 0.02),
        (x + 0.06, 0.42),
        (x + 0.2, base),
        (x + 0.11, base),
        (x + 0.05, base - 0.12),
        (x - 0.05, base - 0.12),
        (x - 0.11, base),
        (x - 0.2, base),
        (x - 0.06, 0.42),
        fill=iron,
    )
    brush.box(x - 0.08, 0.4, x + 0.08, 0.44, fill=(95, 65, 50))
    brush.box(x - 0.13, 0.56, x + 0.13, 0.6, fill=(95, 65, 50))
    brush.box(0, base, 1, 1, fill=vary((135, 175, 95), rng))


def plain(colour: Colour) -> Painter:
    """A painter of one colour with a faint vertical gradient."""

    def paint(canvas: Image.Image, rng: np.random.Generator) -> None:
        shade = vary(colour, rng)
        gradient(canvas, vary(shade, rng, by=8), vary(shade, rng, by=8))

    return paint


PLACES: dict[str, Painter] = {
    "on the beach": beach,
    "in the snow": snow,
    "on a wooden floor": wooden_floor,
    "with a city in the background": city,
    "in the jungle": jungle,
    "on the moon": moon,
    "on a cobblestone street": cobblestone,
    "under water": under_water,
    "in the desert": desert,
    "with a mountain in the background": mountain,
    "on green grass": grass,
    "in front of a brick wall": brick_wall,
    "on a pink rug": rug,
    "on a checkered floor": checkered_floor,
    "at sunset": sunset,
    "in an autumn forest": autumn_forest,
    "with the Eiffel Tower in the background": eiffel_tower,
    "on a red background": plain((215, 45, 45)),
    "on a blue background": plain((50, 95, 215)),
    "on a yellow background": plain((250, 215, 65)),
    "on a white background": plain((243, 243, 243)),
}
