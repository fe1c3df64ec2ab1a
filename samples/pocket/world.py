"""The pocket world: small pictures of everyday things in places, each with an English caption.

    python samples/pocket/world.py sheet.png          # draws a contact sheet of scenes

Everything is a pure function of a seed. One pair of thing and place in ten is held out: it never occurs in training,
so that composition can be measured. So is one pair of thing and marks in ten, the sample subjects' among them.
"""

from __future__ import annotations

import sys
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from places import PLACES
from things import COLOURS, MARKS, THINGS, Colour, Dress, dress, random_dress, sprite

THING_NAMES, PLACE_NAMES, COLOUR_NAMES = tuple(THINGS), tuple(PLACES), tuple(COLOURS)
TEMPLATES = ("a {}", "a {}", "a photo of a {}", "a picture of a {}", "one {}", "the {}")
COLOURED = 0.25  # share of scenes with a colour word and no marks
MARKED = 0.25  # share with one or two marks that the caption names, of colours that have names
INDIVIDUAL = 0.12  # share with colours and marks of which the caption says nothing but a meaningless word
SUBJECTS = {  # marks of the sample subjects, kept from training beside those of `marks_held_out`'s rule
    "dog": {"spots", "scarf"}, "teddy bear": {"stripes", "hat"}, "clock": {"spots"}, "cat": {"stripes", "hat"},
    "backpack": {"spots"}, "car": {"stripes"},
}  # fmt: skip
PLACELESS = 0.1  # share of training captions that do not say where
WORDED = 0.15  # share of training captions with a meaningless word before the thing
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SUPERSAMPLING = 2  # scenes are drawn this many times larger, then reduced


@dataclass(frozen=True)
class Labels:
    """What a scene shows, by name.

    Attributes:
        place: None if it is not said.
        colour: None for the thing's own colours.
        marks: at most two, as captions have them ("purple spots", "a red scarf").
        individual: looks as no other thing does, in colours without names; captions do not say how.
    """

    thing: str
    place: str | None
    colour: str | None = None
    marks: tuple[str, ...] = ()
    individual: bool = False


@dataclass(frozen=True)
class Scene:
    """An RGB picture, its caption and its labels."""

    image: Image.Image
    caption: str
    labels: Labels


def held_out(thing: str, place: str) -> bool:
    """Whether this pair is kept from training: one place in ten for every thing, another one for the next thing."""
    return (3 * THING_NAMES.index(thing) + 7 * PLACE_NAMES.index(place)) % 10 == 0


def marks_held_out(thing: str, kinds: Set[str]) -> bool:
    """Whether this thing with marks of these kinds is kept from training: one in ten, and the sample subjects'."""
    code = 7 * THING_NAMES.index(thing) + sum(1 << MARKS.index(kind) for kind in kinds)
    return bool(kinds) and (code % 10 == 0 or SUBJECTS.get(thing) == kinds)


def caption_of(labels: Labels, *, template: str = "a {}", word: str = "") -> str:
    """The caption in words; `word` goes before the thing, as a rare token does in DreamBooth."""
    words = " ".join(w for w in (labels.colour, word, labels.thing) if w)
    marks = "with " + " and ".join(labels.marks) if labels.marks else ""
    return fix_article(" ".join(w for w in (template.format(words), marks, labels.place) if w))


def training_caption(labels: Labels, rng: np.random.Generator) -> tuple[str, Labels]:
    """A caption in one of several wordings and what it says.

    Some contain a meaningless word of two to five letters, those of individuals always: so a rare token such as 'sks'
    says no more than that a thing may look its own way, before it is given a meaning. Some leave out the place.
    """
    worded = labels.individual or rng.random() < WORDED
    word = "".join(rng.choice(list(LETTERS), int(rng.integers(2, 6)))) if worded else ""
    said = replace(labels, place=None) if rng.random() < PLACELESS else labels
    return caption_of(said, template=str(rng.choice(TEMPLATES)), word=word), said


def fix_article(text: str) -> str:
    """'a apple' -> 'an apple'."""
    words = text.split(" ")
    pairs = zip(words, [*words[1:], ""], strict=True)
    return " ".join("an" if w == "a" and after[:1] in set("aeiou") else w for w, after in pairs)


def random_labels(rng: np.random.Generator, *, unseen: bool = False) -> Labels:
    """Labels of a training scene, or of a held-out pair if `unseen`."""
    while True:
        thing, place = str(rng.choice(THING_NAMES)), str(rng.choice(PLACE_NAMES))
        if held_out(thing, place) != unseen:
            continue
        kind = rng.random()
        if kind < COLOURED:
            return Labels(thing, place, str(rng.choice(COLOUR_NAMES)))
        if kind < COLOURED + MARKED:
            return random_marks(thing, place, rng)
        return Labels(thing, place, individual=kind < COLOURED + MARKED + INDIVIDUAL)


def random_marks(thing: str, place: str, rng: np.random.Generator) -> Labels:
    """Labels with one or two marks in colours unlike the body's, which has a colour word in three of five."""
    while True:
        kinds = [str(kind) for kind in rng.choice(MARKS, int(rng.integers(1, 3)), replace=False)]
        colour, *others = (str(name) for name in rng.choice(COLOUR_NAMES, 1 + len(kinds), replace=False))
        if not marks_held_out(thing, set(kinds)):
            break
    pairs = zip(others, kinds, strict=True)
    marks = [f"{name} {kind}" if kind.endswith("s") else f"a {name} {kind}" for name, kind in pairs]
    return Labels(thing, place, colour if rng.random() < 0.6 else None, tuple(map(fix_article, marks)))


def style_of(labels: Labels, rng: np.random.Generator) -> Dress:
    """Colour and marks of these labels, each shade a little different every time."""
    if labels.individual:
        while marks_held_out(labels.thing, (style := random_dress(rng)).kinds):
            pass
        return style

    def shade(name: str) -> Colour:
        r, g, b = (int(c) for c in np.clip(np.array(COLOURS[name]) + rng.integers(-14, 15, 3), 0, 255))
        return r, g, b

    worn = {kind: shade(name) for *_, name, kind in (mark.split() for mark in labels.marks)}
    style = random_dress(rng)
    return replace(style, body=shade(labels.colour) if labels.colour else None, **{k: worn.get(k) for k in MARKS})


def compose(thing: Image.Image, place: str, rng: np.random.Generator, *, size: int = 64) -> Image.Image:
    """An RGBA sprite set into a freshly drawn place: random size, position, mild rotation and flip, with a shadow.

    Returns an RGB image of size x size px.
    """
    side = size * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side))
    PLACES[place](canvas, rng)
    scale = rng.uniform(0.6, 0.78) * side / max(thing.size)
    thing = thing.resize((round(thing.width * scale), round(thing.height * scale)), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    thing = thing.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, expand=True)
    x = round((0.5 + rng.uniform(-0.1, 0.1)) * side - thing.width / 2)
    y = round((0.56 + rng.uniform(-0.06, 0.08)) * side - thing.height / 2)
    if place != "under water":
        cast_shadow(canvas, x + thing.width / 2, y + thing.height * 0.94, thing.width * 0.4)
    canvas.paste(thing, (x, y), thing)
    return canvas.reduce(SUPERSAMPLING)


def cast_shadow(canvas: Image.Image, x: float, y: float, radius: float) -> None:
    """Darken a soft flat ellipse around (x, y); all in px."""
    mask = Image.new("L", canvas.size)
    ImageDraw.Draw(mask).ellipse((x - radius, y - radius / 5, x + radius, y + radius / 5), fill=90)
    mask = mask.filter(ImageFilter.GaussianBlur(canvas.width / 64))
    canvas.paste((20, 20, 30), (0, 0), mask)


def draw(labels: Labels, rng: np.random.Generator, *, size: int = 64) -> Image.Image:
    """A picture of these labels, RGB, size x size px."""
    assert labels.place is not None
    return draw_instance(labels.thing, style_of(labels, rng), labels.place, rng, size=size)


def draw_instance(thing: str, style: Dress, place: str, rng: np.random.Generator, *, size: int = 64) -> Image.Image:
    """A picture of one particular instance of a thing, RGB, size x size px."""
    return compose(dress(sprite(thing), style), place, rng, size=size)


def scene(seed: int, *, size: int = 64, unseen: bool = False) -> Scene:
    """The scene of that seed; `unseen` draws from the held-out pairs instead of the training ones."""
    rng = np.random.default_rng((seed, int(unseen)))
    labels = random_labels(rng, unseen=unseen)
    caption = caption_of(labels, template=str(rng.choice(TEMPLATES)))
    return Scene(draw(labels, rng, size=size), caption, labels)


def contact_sheet(images: list[Image.Image], *, columns: int = 12, gap: int = 2) -> Image.Image:
    """Images of one size in a grid on white."""
    w, h = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (w + gap) + gap, rows * (h + gap) + gap), (255, 255, 255))
    for k, image in enumerate(images):
        sheet.paste(image, (gap + k % columns * (w + gap), gap + k // columns * (h + gap)))
    return sheet


if __name__ == "__main__":
    contact_sheet([scene(k).image for k in range(96)]).save(Path(sys.argv[1] if len(sys.argv) > 1 else "sheet.png"))
