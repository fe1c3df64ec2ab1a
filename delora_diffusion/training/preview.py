"""Pictures along the way of a run: previews from the live modules, class images, and the before/after sheet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from ..adapters.sources import components
from ..atomic import complete_file
from ..data.photos import load_image
from ..families import family_of
from ..sampling.contact_sheet import contact_sheet
from ..sampling.generate import Prompts, generate, quiet
from ..sampling.offload import in_turn
from ..seeds import derived_seed
from .config import ValidationConfig

#: A row of images for each prompt
Rows = list[list[Image.Image]]


def preview(
    pipe: Any, folder: Path, step: int, config: ValidationConfig, prompts: Prompts, *, size: int, seed: int
) -> Rows:
    """Draw every prompt with fixed seeds from the live pipeline.

    Writes `folder/step_NNNNNN/` with the images and `folder/step_NNNNNN.png` with all of them.

    Returns:
        A row of images for each prompt.
    """
    rows = draw_previews(pipe, config, prompts, size=size, seed=seed, count=config.num_validation_images)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            with complete_file(folder / f"step_{step:06d}" / f"{row}_{column}.png") as aside:
                image.save(aside)
    with complete_file(folder / f"step_{step:06d}.png") as aside:
        contact_sheet(rows, row_labels=config.validation_prompt).save(aside)
    return rows


def draw_previews(pipe: Any, config: ValidationConfig, prompts: Prompts, *, size: int, seed: int, count: int) -> Rows:
    """`count` images of each prompt with fixed seeds, the first of them the same whatever `count` is."""
    seeds = [derived_seed(seed, "preview", number) for number in range(count)]
    rows = []
    with _drawing(pipe, offload=config.enable_model_cpu_offload):
        for place in range(len(prompts.texts)):
            rows.append(generate(pipe, prompts.at([place] * count), seeds, **_settings(config, size)))
    return rows


def draw_unrelated(
    pipe: Any, config: ValidationConfig, prompts: Prompts, *, size: int, seed: int
) -> list[Image.Image]:
    """One image of each of many prompts, each with a fixed seed of its own."""
    images: list[Image.Image] = []
    with _drawing(pipe, offload=config.enable_model_cpu_offload):
        for first in range(0, len(prompts.texts), config.num_validation_images):
            places = range(len(prompts.texts))[first : first + config.num_validation_images]
            seeds = [derived_seed(seed, "unrelated", place) for place in places]
            images += generate(pipe, prompts.at(places), seeds, **_settings(config, size))
    return images


@contextlib.contextmanager
def _drawing(pipe: Any, *, offload: bool) -> Iterator[None]:
    """The live pipeline as it draws: the VAE comes to the denoiser, for its turn only with `offload`; no dropout, no
    progress bar of its own."""
    denoiser = getattr(pipe, family_of(pipe).denoiser)
    others = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part is not pipe.vae]
    beside = in_turn(pipe, denoiser.device, staying=others) if offload else on_device(pipe, "vae", denoiser)
    trained = [module for module in components(pipe).values() if module.training]
    for module in trained:
        module.eval()
    try:
        with beside, quiet(pipe):
            yield
    finally:
        for module in trained:
            module.train()


def _settings(config: ValidationConfig, size: int) -> dict[str, Any]:
    return {
        "height": size,
        "width": size,
        "guidance_scale": config.validation_guidance_scale,
        "num_inference_steps": config.validation_num_inference_steps,
    }


def before_after(
    folder: Path, step: int, config: ValidationConfig, photos: Sequence[Path], destination: Path
) -> Path | None:
    """One picture from the previews in `folder`: the photos, every prompt before training, every prompt after it.

    Returns:
        `destination`, or None when the previews of step 0 or `step` are not there.
    """
    columns = len(config.validation_prompt)
    first, last = folder / "step_000000", folder / f"step_{step:06d}"
    if not columns or not first.is_dir() or not last.is_dir():
        return None
    rows = [[load_image(path) for path in photos[:columns]]]
    labels = ["photos"]
    for label, source in (("before", first), ("after", last)):
        for number in range(min(2, config.num_validation_images)):
            rows.append([load_image(source / f"{column}_{number}.png") for column in range(columns)])
            labels.append(label)
    with complete_file(destination) as aside:
        contact_sheet(rows, row_labels=labels, column_labels=config.validation_prompt, cell=192).save(aside)
    return destination


@contextlib.contextmanager
def on_device(pipe: Any, component: str, beside: nn.Module) -> Iterator[None]:
    """Bring a component that waits in the CPU's memory to the device of another module, for a while."""
    module: nn.Module = getattr(pipe, component)
    home = next(module.parameters()).device
    module.to(next(beside.parameters()).device)
    try:
        yield
    finally:
        module.to(home)
