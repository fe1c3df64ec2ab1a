"""Pictures along the way of a run, from the live pipeline, and the before/after sheet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from ..adapters.sources import components
from ..atomic import complete_file
from ..console import optional
from ..data.image_files import load_image
from ..families import family_of
from ..run_folder import RunFolder
from ..sampling.contact_sheet import contact_sheet
from ..sampling.generate import Prompts, generate, quiet
from ..sampling.offload import in_turn
from ..seeds import derived_seed
from .best import Best
from .config import ValidationConfig
from .log import PreviewResult
from .processes import by_main

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline

#: A row of images for each prompt
Rows = list[list[Image.Image]]


@dataclass(kw_only=True)
class Previews:
    """The previews of a run: which prompts are drawn, from which pipeline, and what came of it last.

    Attributes:
        shown: the prompts of the previews.
        unrelated: prompts that have nothing to do with the subject.
        size: of the pictures, in pixels.
        seed: the run's.
        best: measures what is drawn; None without encoders.
        starts_as_base: whether the adapter changes nothing before the first step.
        latest: the last rows, and the last pictures of unrelated prompts.
    """

    pipe: DiffusionPipeline
    run: RunFolder
    config: ValidationConfig
    shown: Prompts
    unrelated: Prompts
    size: int
    seed: int
    best: Best | None = None
    starts_as_base: bool = True
    latest: tuple[Rows, Sequence[Image.Image]] = ([], ())

    def show(self, step: int, accelerator: Accelerator) -> PreviewResult:
        """Draw and measure the preview after `step` steps, on the main process; all wait and learn if it is enough."""
        denoiser = getattr(self.pipe, family_of(self.pipe).denoiser)
        shown = by_main(accelerator, denoiser, lambda: self._measured(step, accelerator)) if self.shown.texts else None
        result = shown or PreviewResult()
        enough = accelerator.reduce(torch.tensor(float(result.enough), device=accelerator.device), "sum")
        return replace(result, enough=bool(enough))

    def _measured(self, step: int, accelerator: Accelerator) -> PreviewResult | None:
        """Draw and measure; None where that fails or nothing is measured."""
        with optional(f"preview of step {step}"):
            with accelerator.autocast():
                rows, elsewhere = self.write(step), self._elsewhere(step)
            self.latest = rows, elsewhere
            return self.best.measure(step, rows, elsewhere) if self.best else None
        return None

    def write(self, step: int) -> Rows:
        """Draw every prompt; write `previews/step_NNNNNN/` with the images, `previews/step_NNNNNN.png` with all."""
        rows = self.draw(self.config.num_validation_images)
        for row, images in enumerate(rows):
            for column, image in enumerate(images):
                with complete_file(self._folder(step) / f"{row}_{column}.png") as aside:
                    image.save(aside)
        with complete_file(self._folder(step).with_suffix(".png")) as aside:
            contact_sheet(rows, row_labels=self.shown.texts).save(aside)
        return rows

    def draw(self, count: int) -> Rows:
        """`count` images of each prompt with fixed seeds, the first of them the same whatever `count` is."""
        seeds = [derived_seed(self.seed, "preview", number) for number in range(count)]
        with self._drawing():
            return [
                generate(self.pipe, self.shown.at([place] * count), seeds, **self._settings())
                for place in range(len(self.shown.texts))
            ]

    def draw_unrelated(self) -> list[Image.Image]:
        """One image of each unrelated prompt, each with a fixed seed of its own."""
        places, together = range(len(self.unrelated.texts)), self.config.num_validation_images
        images: list[Image.Image] = []
        with self._drawing():
            for part in (places[first : first + together] for first in places[::together]):
                seeds = [derived_seed(self.seed, "unrelated", place) for place in part]
                images += generate(self.pipe, self.unrelated.at(part), seeds, **self._settings())
        return images

    def before_after(self, step: int, photos: Sequence[Path]) -> Path | None:
        """Write one picture: the photos, every prompt before training, every prompt after `step` steps.

        Returns:
            The picture; None when the previews of step 0 or `step` are not there.
        """
        columns = len(self.shown.texts)
        if not columns or not self._folder(0).is_dir() or not self._folder(step).is_dir():
            return None
        rows = [[load_image(path) for path in photos[:columns]]]
        labels = ["photos"]
        for label, source in (("before", self._folder(0)), ("after", self._folder(step))):
            for number in range(min(2, self.config.num_validation_images)):
                rows.append([load_image(source / f"{column}_{number}.png") for column in range(columns)])
                labels.append(label)
        with complete_file(self.run.before_after) as aside:
            contact_sheet(rows, row_labels=labels, column_labels=self.shown.texts, cell=192).save(aside)
        return self.run.before_after

    def _elsewhere(self, step: int) -> Sequence[Image.Image]:
        if self.best is None:
            return ()
        return self.best.base if step == 0 and self.starts_as_base else self.draw_unrelated()

    def _folder(self, step: int) -> Path:
        return self.run.previews / f"step_{step:06d}"

    def _settings(self) -> dict[str, Any]:
        return {
            "height": self.size,
            "width": self.size,
            "guidance_scale": self.config.validation_guidance_scale,
            "num_inference_steps": self.config.validation_num_inference_steps,
        }

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """The live pipeline as it draws: the VAE comes to the denoiser, for its turn only with offloading; no dropout,
        no progress bar of its own."""
        pipe = self.pipe
        denoiser = getattr(pipe, family_of(pipe).denoiser)
        others = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part is not pipe.vae]
        offload = self.config.enable_model_cpu_offload
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


@contextlib.contextmanager
def on_device(pipe: DiffusionPipeline, component: str, beside: nn.Module) -> Iterator[None]:
    """Bring a component that waits in the CPU's memory to the device of another module, for a while."""
    module: nn.Module = getattr(pipe, component)
    home = next(module.parameters()).device
    module.to(next(beside.parameters()).device)
    try:
        yield
    finally:
        module.to(home)
