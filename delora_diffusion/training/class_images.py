"""Images of the class, drawn by the base where a folder lacks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import clear_scraps, complete_file
from ..data.image_files import is_image
from ..sampling.generate import Prompts, generate, quiet
from ..seeds import derived_seed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def missing_class_images(folder: Path, count: int) -> list[tuple[int, str]]:
    """Number and name of the images that `folder` lacks to hold `count`, whoever drew those that are there."""
    clear_scraps(folder)
    inside = folder.iterdir() if folder.is_dir() else ()
    present = {path.name for path in inside if is_image(path)}
    foreign = sum(not name.startswith("class_") for name in present)
    names = [f"class_{number:05d}.png" for number in range(max(0, count - foreign))]
    return [(number, name) for number, name in enumerate(names) if name not in present]


def draw_class_images(
    pipe: DiffusionPipeline,
    folder: Path,
    prompt: Prompts,
    missing: Sequence[tuple[int, str]],
    *,
    seed: int,
    settings: Mapping[str, Any],
    batch_size: int,
    progress: Callable[[Any], Any] = iter,
) -> None:
    """Draw the images that are missing, each by its own seed.

    An image is complete or absent, so an interrupted call is continued by the next.

    Args:
        prompt: the class prompt, alone.
        settings: how: size, steps and guidance, as `generate` takes them.
    """
    with quiet(pipe):
        for first in progress(range(0, len(missing), batch_size)):
            part = missing[first : first + batch_size]
            seeds = [derived_seed(seed, "class", number) for number, _ in part]
            images = generate(pipe, prompt.at([0] * len(part)), seeds, **settings)
            for (_, name), image in zip(part, images, strict=True):
                with complete_file(folder / name) as aside:
                    image.save(aside)
