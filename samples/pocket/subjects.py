"""Draws the three sample subjects: things with a colour and marks of their own that the pocket world does not have.

    python samples/pocket/subjects.py --out samples/pocket/subjects

Each is photographed, so to say, five times in different places, at 256 px. The class word (dog, teddy bear, clock) is
known to the pocket base model; what makes the subject this one is not.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from things import Dress, dress, glyph
from world import compose

SIZE = 256  # px


@dataclass(frozen=True)
class Subject:
    """A glyph, what it wears and where it was seen."""

    glyph: str
    style: Dress
    places: tuple[str, ...]
    seed: int


SUBJECTS: dict[str, Subject] = {
    "spotted_dog": Subject(
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
        seed=1,
    ),
    "striped_teddy": Subject(
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
        seed=2,
    ),
    "mantel_clock": Subject(
        "🕰",
        Dress(body=(255, 120, 200), spots=(250, 225, 60), pattern_seed=8, spot_size=0.045),
        (
            "on a checkered floor",
            "in front of a brick wall",
            "at sunset",
            "in an autumn forest",
            "on a blue background",
        ),
        seed=3,
    ),
}


def draw_subject(subject: Subject, folder: Path) -> None:
    """Write `folder`/00.jpg, 01.jpg, ... one for each place."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = dress(glyph(subject.glyph), subject.style)
    for k, place in enumerate(subject.places):
        image = compose(picture, place, np.random.default_rng((subject.seed, k)), size=SIZE)
        image.save(folder / f"{k:02}.jpg", quality=92)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "subjects")
    out = parser.parse_args().out
    for name, subject in SUBJECTS.items():
        draw_subject(subject, out / name)
