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


def missing_batches(folder: Path, count: int, size: int) -> list[list[tuple[int, str]]]:
    """Number and name of the images that `folder` lacks to hold `count`, whoever drew those that are there.

    A batch of `size` images of which one is missing is listed whole: a picture that is drawn in other company differs
    in its rounding.
    """
    clear_scraps(folder)
    inside = folder.iterdir() if folder.is_dir() else ()
    present = {path.name for path in inside if is_image(path)}
    foreign = sum(not name.startswith("class_") for name in present)
    wanted = [(number, f"class_{number:05d}.png") for number in range(max(0, count - foreign))]
    batches = [wanted[first : first + size] for first in range(0, len(wanted), size)]
    return [batch for batch in batches if any(name not in present for _, name in batch)]


def draw_class_images(
    pipe: DiffusionPipeline,
    folder: Path,
    prompt: Prompts,
    batches: Sequence[Sequence[tuple[int, str]]],
    *,
    seed: int,
    settings: Mapping[str, Any],
    progress: Callable[[Any], Any] = iter,
) -> None:
    """Draw batches of images, each by its own seed, and write those that are missing.

    An image is complete or absent, so an interrupted call is continued by the next.

    Args:
        prompt: the class prompt, alone.
        settings: how: size, steps and guidance, as `generate` takes them.
    """
    with quiet(pipe):
        for batch in progress(batches):
            seeds = [derived_seed(seed, "class", number) for number, _ in batch]
            images = generate(pipe, prompt.at([0] * len(batch)), seeds, **settings)
            for (_, name), image in zip(batch, images, strict=True):
                if not (folder / name).is_file():
                    with complete_file(folder / name) as aside:
                        image.save(aside)
