"""Draws the six sample subjects: things with a colour and marks of their own that the pocket world does not have.

    python samples/pocket/subjects.py --out samples/pocket

Each is photographed, so to say, five times in different places, at 256 px, to be taught from; and six times in other
places, at 128 px, to be judged by. The class word (dog, cat, ...) is known to the pocket base model; what makes the
subject this one is not. The trainer's defaults were set on the first three; the last three were drawn afterwards, to
check them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from things import Dress, dress, glyph
from world import compose

SIZE, HELD_OUT_SIZE = 256, 128  # px


@dataclass(frozen=True)
class Subject:
    """A glyph, what it wears, where it was seen in training, and where it is seen afterwards."""

    word: str
    glyph: str
    style: Dress
    places: tuple[str, ...]
    held_out: tuple[str, ...]
    seed: int


SUBJECTS: dict[str, Subject] = {
    "spotted_dog": Subject(
        "dog",
        "🐕",
        Dress(
            body=(35, 190, 185),
            spots=(130, 40, 170),
            scarf=(225, 30, 45),
            scarf_line=(0.22, 0.61, 1.0, 0.58),
            pattern_seed=5,
            spot_size=0.055,
        ),
        (
            "on green grass",
            "on a wooden floor",
            "with a city in the background",
            "in an autumn forest",
            "on a white background",
        ),
        (
            "on the beach",
            "in the snow",
            "on the moon",
            "under water",
            "in the desert",
            "with a mountain in the background",
        ),
        seed=1,
    ),
    "striped_teddy": Subject(
        "teddy bear",
        "🧸",
        Dress(
            body=(90, 200, 255),
            stripes=(255, 255, 255),
            hat=(225, 35, 60),
            hat_at=(0.5, 0.07),
            pattern_seed=3,
            stripe_width=0.035,
        ),
        (
            "on a wooden floor",
            "on a cobblestone street",
            "with a mountain in the background",
            "on a yellow background",
            "on green grass",
        ),
        ("on the beach", "in the snow", "in the jungle", "on the moon", "with a city in the background", "at sunset"),
        seed=2,
    ),
    "mantel_clock": Subject(
        "clock",
        "🕰",
        Dress(body=(255, 120, 200), spots=(250, 225, 60), pattern_seed=8, spot_size=0.045),
        (
            "on a checkered floor",
            "in front of a brick wall",
            "at sunset",
            "in an autumn forest",
            "on a blue background",
        ),
        ("on the beach", "in the snow", "on a wooden floor", "in the jungle", "on the moon", "under water"),
        seed=3,
    ),
    "party_cat": Subject(
        "cat",
        "🐈",
        Dress(
            body=(150, 90, 215),
            stripes=(250, 220, 70),
            hat=(40, 170, 90),
            hat_at=(0.13, 0.12),
            pattern_seed=4,
            stripe_width=0.06,
        ),
        (
            "on green grass",
            "on a checkered floor",
            "on a yellow background",
            "with a city in the background",
            "in front of a brick wall",
        ),
        ("on the beach", "in the snow", "on the moon", "in the desert", "in an autumn forest", "at sunset"),
        seed=4,
    ),
    "dotted_backpack": Subject(
        "backpack",
        "🎒",
        Dress(body=(60, 175, 80), spots=(245, 245, 245), pattern_seed=11, spot_size=0.06),
        ("on a wooden floor", "on a white background", "in the jungle", "on a cobblestone street", "at sunset"),
        (
            "on the beach",
            "in the snow",
            "on the moon",
            "under water",
            "in the desert",
            "with a mountain in the background",
        ),
        seed=5,
    ),
    "racing_car": Subject(
        "car",
        "🚗",
        Dress(body=(250, 205, 40), stripes=(30, 60, 170), pattern_seed=2, stripe_width=0.08),
        (
            "with a city in the background",
            "on green grass",
            "in an autumn forest",
            "on a blue background",
            "on a checkered floor",
        ),
        ("on the beach", "in the snow", "on the moon", "in the desert", "in the jungle", "in front of a brick wall"),
        seed=6,
    ),
}


def draw_subject(subject: Subject, folder: Path, *, places: tuple[str, ...], first: int, size: int) -> list[str]:
    """Write `folder`/00.jpg, 01.jpg, ... one for each place, drawn from seeds (subject, first), ...; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = dress(glyph(subject.glyph), subject.style)
    names = [f"{k:02}.jpg" for k in range(len(places))]
    for k, (name, place) in enumerate(zip(names, places, strict=True), start=first):
        image = compose(picture, place, np.random.default_rng((subject.seed, k)), size=size)
        image.save(folder / name, quality=92)
    return names


def draw_all(name: str, subject: Subject, out: Path) -> None:
    """Write `out`/subjects/`name` to learn from, `out`/holdout/`name` with captions to be judged by."""
    draw_subject(subject, out / "subjects" / name, places=subject.places, first=0, size=SIZE)
    folder = out / "holdout" / name
    names = draw_subject(subject, folder, places=subject.held_out, first=100, size=HELD_OUT_SIZE)
    lines = [
        json.dumps({"file_name": file, "text": f"a sks {subject.word} {place}"})
        for file, place in zip(names, subject.held_out, strict=True)
    ]
    (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    for name, subject in SUBJECTS.items():
        draw_all(name, subject, out)
