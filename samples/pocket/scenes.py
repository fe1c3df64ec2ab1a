"""The training sets, drawn once and kept as plain arrays: scenes of the world, and instances with marks of their own.

    python samples/pocket/scenes.py --work WORK     # scenes.npy and labels.json; instances.npy

Drawing takes 3 ms a scene, so it is shared out over the processor cores and done once.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from things import Dress
from world import PLACE_NAMES, THING_NAMES, Labels, draw_instance, scene, style_of

CHUNK = 500  # scenes that one task draws
VARIANTS = 80  # instances of every thing in training
VIEWS = 6  # pictures of every instance


def draw_chunk(first: int) -> tuple[np.ndarray, list[dict[str, object]]]:
    """Scenes first .. first + CHUNK - 1: uint8 [n, 64, 64, 3] and their labels."""
    scenes = [scene(seed) for seed in range(first, first + CHUNK)]
    return np.stack([np.asarray(s.image) for s in scenes]), [vars(s.labels) for s in scenes]


def draw_all(work: Path, *, count: int) -> None:
    """Write `count` scenes (rounded up to whole chunks) and their labels into `work`."""
    starts = range(0, count, CHUNK)
    images = np.lib.format.open_memmap(
        work / "scenes.partial.npy", "w+", dtype=np.uint8, shape=(len(starts) * CHUNK, 64, 64, 3)
    )
    labels: list[dict[str, object]] = []
    with ProcessPoolExecutor() as pool:
        for first, (block, names) in zip(starts, pool.map(draw_chunk, starts), strict=True):
            images[first : first + CHUNK] = block
            labels.extend(names)
    images.flush()
    (work / "labels.json").write_text(json.dumps(labels))
    (work / "scenes.partial.npy").rename(work / "scenes.npy")


def draw_thing(thing: int, *, first: int = 0, variants: int = VARIANTS, views: int = VIEWS) -> np.ndarray:
    """Random instances of one thing in random places: uint8 [variants, views, 64, 64, 3]. Instance 0 wears nothing."""
    rows = []
    for variant in range(first, first + variants):
        rng = np.random.default_rng((23, thing, variant))
        style = style_of(Labels(THING_NAMES[thing], None, individual=True), rng) if variant else Dress()
        places = rng.choice(PLACE_NAMES, views, replace=False)
        rows.append([np.asarray(draw_instance(THING_NAMES[thing], style, place, rng)) for place in places])
    return np.array(rows)


def draw_instances(work: Path) -> None:
    """Write VARIANTS instances of every thing."""
    with ProcessPoolExecutor() as pool:
        np.save(work / "instances.npy", np.stack(list(pool.map(draw_thing, range(len(THING_NAMES))))))


def load_images(work: Path) -> np.ndarray:
    """uint8 [n, 64, 64, 3], memory-mapped."""
    images: np.ndarray = np.load(work / "scenes.npy", mmap_mode="r")
    return images


def load_instances(work: Path) -> np.ndarray:
    """uint8 [things, VARIANTS, VIEWS, 64, 64, 3], memory-mapped."""
    images: np.ndarray = np.load(work / "instances.npy", mmap_mode="r")
    return images


def load_labels(work: Path) -> list[Labels]:
    """What the scenes show."""
    entries = json.loads((work / "labels.json").read_text())
    return [Labels(**entry | {"marks": tuple(entry["marks"])}) for entry in entries]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--count", type=int, default=128_000)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    draw_instances(arguments.work)
    draw_all(arguments.work, count=arguments.count)
