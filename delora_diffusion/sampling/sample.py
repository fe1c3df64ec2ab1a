"""Batch sampling: prompts x adapters x strengths x seeds -> images, a manifest and a contact sheet.

An image's file name contains a hash of everything that made it, so a second run draws only what is missing, and an
adapter that was trained again gets new images. Work is split over processes under `accelerate launch`.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ..adapters.adapter import Adapter, adapter_hash, base_of
from ..adapters.read import read_adapter
from ..atomic import clear_scraps, complete_file
from ..base.checks import giving
from ..base.config import ModelConfig
from ..base.load import half_precision, load_base
from ..base.prediction import predict
from ..base.quantise import check_installed, quantise_pipeline
from ..base.speed import compile_blocks
from ..data.image_files import is_image, some_of
from ..data.prompts import read_prompts
from ..families import check_sizes, family_of
from ..options import OptionError
from ..pipeline import load_delora_weights, prediction_told, set_adapters
from ..run_folder import SHEET_NAME
from ..seeds import derived_seed
from .config import DrawingConfig, SamplingConfig
from .contact_sheet import contact_sheet
from .generate import Prompts, generate, quiet, set_sampler
from .manifest import MANIFEST, read_manifest, write_manifest
from .offload import components_on

log = logging.getLogger(__name__)
SIDE = 40  # rows and columns of a contact sheet, before it goes on on another page
_DRAWN = re.compile(rf"{Path(SHEET_NAME).stem}(_\d+)?\.png|[a-z0-9-]+_\d+_[0-9a-f]{{10}}\.png")


@dataclass(frozen=True)
class Job:
    """One image to draw. `settings` is its line in the manifest: all that is needed to draw it again."""

    settings: dict[str, Any]
    adapter: int | None  # place in the list of adapters; None: the base

    @property
    def file(self) -> str:
        """File name: readable, and unique to the settings."""
        info = json.dumps(self.settings, sort_keys=True)
        slug = re.sub(r"[^a-z0-9]+", "-", self.settings["prompt"].lower()).strip("-")[:48] or "image"
        return f"{slug}_{self.settings['seed']}_{hashlib.sha256(info.encode()).hexdigest()[:10]}.png"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be drawn, and with what."""

    adapters: list[Adapter]
    base: str
    precision: str
    jobs: list[Job]


def sample(config: SamplingConfig, drawing: DrawingConfig) -> Path:
    """Draw what is missing in `config.output_dir`; returns the contact sheet.

    Raises:
        OptionError, AdapterFileError, BaseModelError, ValueError: nothing is drawn; images drawn earlier stay.
    """
    state = processes(drawing.device)
    device = drawing.device or state.device
    planned = plan(config, drawing)
    out, jobs = Path(config.output_dir), planned.jobs
    out.mkdir(parents=True, exist_ok=True)
    clear_scraps(out)
    check_own(out)
    rows = read_manifest(out) if state.is_main_process else {}
    missing = [job for job in jobs if not _is_picture(out / job.file)]
    if state.is_main_process:
        there = len(jobs) - len(missing)
        log.info("%d images, %d of them are there already; %s on %s", len(jobs), there, planned.base, device)
    state.wait_for_everyone()  # every process has seen the same files
    try:
        if missing:
            _draw_missing(out, drawing, missing, planned, device, state)
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            write_manifest(out, rows | {job.file: {"file": job.file, **job.settings} for job in jobs})
    if state.is_main_process:
        _write_sheets(out, jobs)
    state.wait_for_everyone()
    return out / SHEET_NAME


def check_own(out: Path) -> None:
    """Refuse a folder of other images, such as the photos: what is drawn there would be trained on next time.

    Raises:
        OptionError: it holds images, and no manifest or name says that they were drawn here.
    """
    if (out / MANIFEST).is_file():
        return
    others = sorted(path.name for path in out.iterdir() if is_image(path) and not _DRAWN.fullmatch(path.name))
    if others:
        raise OptionError(
            f"output_dir {out} holds images that delora sample did not draw ({some_of(others)}); give another folder"
        )


def processes(device: str | None) -> Any:
    """This process among those that were launched together: accelerate's PartialState.

    Where there is no accelerator it must be told so, or each process takes itself for the only one. One that waits for
    others does so for as long as they train or measure.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=datetime.timedelta(days=30))


def plan(config: SamplingConfig, drawing: DrawingConfig) -> Plan:
    """Every image that is asked for, prompt by prompt: the order of the contact sheet. Nothing is drawn."""
    cpu = processes(drawing.device).device.type == "cpu"
    adapters = [read_adapter(source) for source in config.adapter]
    base = config.pretrained_model_name_or_path or base_of(
        adapters, config.adapter, option="pretrained_model_name_or_path"
    )
    with giving("pretrained_model_name_or_path"):
        half = "fp32" if cpu or drawing.dtype != "auto" else half_precision(base, drawing.single_file_config)
    precision = half if drawing.dtype == "auto" else drawing.dtype
    shared = {
        "negative_prompt": drawing.negative_prompt,
        "base": base,
        "scheduler": drawing.scheduler,
        "dtype": precision,
        "num_inference_steps": drawing.num_inference_steps,
        "guidance_scale": drawing.guidance_scale,
        "height": drawing.height,
        "width": drawing.width,
    }
    of_the_base = ("single_file_config", "prediction_type", "rescale_betas_zero_snr")
    quantised = ("base_quantization", "text_encoder_quantization")
    given = {name: getattr(drawing, name) for name in (*of_the_base, *quantised)}
    shared |= {name: value for name, value in given.items() if value not in (None, "none")}
    hashes = [adapter_hash(adapter) for adapter in adapters]
    sources: list[int | None] = list(range(len(adapters))) or [None]
    prompts = read_prompts(config.prompts, config.prompts_file, option="prompts_file")
    repeats = range(config.images_per_prompt)
    jobs = []
    for prompt, number, strength, seed, repeat in itertools.product(
        prompts, sources, drawing.strengths, drawing.seeds, repeats
    ):
        varied_settings = {
            "prompt": prompt,
            "seed": derived_seed(seed, repeat) if repeat else seed,
            "strength": strength if number is not None else None,
            "adapter": config.adapter[number] if number is not None else None,
            "adapter_hash": hashes[number] if number is not None else None,
        }
        jobs.append(Job(varied_settings | shared, number))
    once = list({job.file: job for job in jobs}.values())  # a seed, prompt or strength may be named twice
    return Plan(adapters=adapters, base=base, precision=precision, jobs=once)


def sheets_of(out: Path, jobs: Sequence[Job], *, cell: int = 192) -> Iterator[Image.Image]:
    """The images of `jobs` on grids: a row for each prompt, a column for each adapter, strength and seed.

    Where there are more than `SIDE` of either, they go on on further pages.
    """
    rows: dict[str, list[Job]] = {}
    for job in jobs:
        rows.setdefault(job.settings["prompt"], []).append(job)
    first = next(iter(rows.values()))
    varied = [key for key in ("adapter", "strength", "seed") if len({job.settings[key] for job in first}) > 1]
    columns = [", ".join(_label(job.settings, key) for key in varied) for job in first]
    prompts = list(rows)
    for top, left in itertools.product(range(0, len(prompts), SIDE), range(0, len(first), SIDE)):
        shown = [(prompt, rows[prompt][left : left + SIDE]) for prompt in prompts[top : top + SIDE]]
        yield contact_sheet(
            [[_opened(out / job.file, cell) for job in row] for _, row in shown],
            row_labels=[prompt for prompt, _ in shown],
            row_names=[row[0].file if row else "" for _, row in shown],
            column_labels=columns[left : left + SIDE] if varied else (),
            cell=cell,
        )


def _write_sheets(out: Path, jobs: Sequence[Job]) -> None:
    """Write the pages, the first as contact_sheet.png, and take away those of an earlier run that are no longer."""
    name = Path(SHEET_NAME)
    stale = {path.name for path in out.glob(f"{name.stem}_*{name.suffix}") if re.fullmatch(r".*_\d+", path.stem)}
    for number, page in enumerate(sheets_of(out, jobs), start=1):
        path = out / (SHEET_NAME if number == 1 else f"{name.stem}_{number}{name.suffix}")
        stale.discard(path.name)
        with complete_file(path) as aside:
            page.save(aside)
    for left in stale:
        (out / left).unlink()


def _is_picture(path: Path) -> bool:
    """Whether there is a picture; an empty or damaged file is drawn again."""
    try:
        with Image.open(path) as image:
            return bool(image.size)
    except (OSError, SyntaxError, ValueError):
        return False


def _label(settings: dict[str, Any], key: str) -> str:
    value = settings[key]
    if key == "adapter":
        return Path(value or "base").name
    return f"{key} {value:g}" if key == "strength" else f"{key} {value}"


def _opened(path: Path, side: int) -> Image.Image:
    with Image.open(path) as image:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return image.convert("RGB")


def _draw_missing(
    out: Path, drawing: DrawingConfig, missing: Sequence[Job], planned: Plan, device: Any, state: Any
) -> None:
    base = ModelConfig(
        pretrained_model_name_or_path=planned.base,
        single_file_config=drawing.single_file_config,
        base_dtype=planned.precision,
        base_quantization=drawing.base_quantization,
        text_encoder_quantization=drawing.text_encoder_quantization,
    )
    check_installed(base)
    with giving("pretrained_model_name_or_path"):
        pipe = load_base(base, precision="no")
    predict(pipe, drawing.prediction.over(prediction_told(planned.adapters, planned.base)))
    check_sizes(pipe, [(drawing.height or 0, drawing.width or 0)], option="height or width")
    quantise_pipeline(pipe, base, torch.device(device))
    if drawing.scheduler:
        set_sampler(pipe, drawing.scheduler)
    for number, adapter in enumerate(planned.adapters):
        load_delora_weights(pipe, adapter, f"adapter_{number}")
    if drawing.compile:
        compile_blocks(getattr(pipe, family_of(pipe).denoiser), torch.device(device))
    sizes = {name: value for name, value in (("height", drawing.height), ("width", drawing.width)) if value}
    batches = list(_batches(missing, drawing.batch_size))[state.process_index :: state.num_processes]
    bar = tqdm(total=sum(map(len, batches)), desc="images", disable=not state.is_main_process)
    with components_on(pipe, torch.device(device), offload=drawing.enable_model_cpu_offload), quiet(pipe), bar:
        for batch in batches:
            if batch[0].adapter is not None:
                set_adapters(pipe, f"adapter_{batch[0].adapter}", batch[0].settings["strength"])
            prompts = Prompts(texts=[job.settings["prompt"] for job in batch], negative=drawing.negative_prompt)
            seeds = [job.settings["seed"] for job in batch]
            images = generate(
                pipe,
                prompts,
                seeds,
                num_inference_steps=drawing.num_inference_steps,
                guidance_scale=drawing.guidance_scale,
                **sizes,
            )
            for job, image in zip(batch, images, strict=True):
                info = PngInfo()
                info.add_text("delora", json.dumps(job.settings))
                with complete_file(out / job.file) as aside:
                    image.save(aside, pnginfo=info)
            bar.update(len(batch))


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Jobs that share adapter and strength, at most `size` at once."""
    groups: dict[tuple[int | None, float | None], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.adapter, job.settings["strength"]), []).append(job)
    for group in groups.values():
        for first in range(0, len(group), size):
            yield group[first : first + size]
