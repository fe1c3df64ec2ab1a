"""Images of the class, drawn by the base where a folder lacks them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import complete_file
from ..data.image_files import is_image
from ..sampling.generate import Prompts, generate, quiet
from ..seeds import derived_seed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def fill_class_folder(
    pipe: DiffusionPipeline,
    folder: Path,
    prompt: Prompts,
    count: int,
    *,
    size: int,
    seed: int,
    settings: dict[str, Any],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[Any], Any] = iter,
) -> int:
    """Draw the images that `folder` lacks to hold `count`, each with its own name and seed, split over processes.

    An image is complete or absent, so an interrupted call is continued by the next.

    Args:
        prompt: the class prompt, alone.

    Returns:
        How many images this process drew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    present = {path.name for path in folder.iterdir() if is_image(path)}
    foreign = len([name for name in present if not name.startswith("class_")])
    names = [f"class_{number:05d}.png" for number in range(max(0, count - foreign))]
    missing = [(number, name) for number, name in enumerate(names) if name not in present][rank::world]
    with quiet(pipe):
        for first in progress(range(0, len(missing), batch_size)):
            part = missing[first : first + batch_size]
            seeds = [derived_seed(seed, "class", number) for number, _ in part]
            images = generate(pipe, prompt.at([0] * len(part)), seeds, height=size, width=size, **settings)
            for (_, name), image in zip(part, images, strict=True):
                with complete_file(folder / name) as aside:
                    image.save(aside)
    return len(missing)
