"""Teach a diffusion model one subject from a handful of photos, with DeLoRA.

    accelerate launch train_scripts/train_dreambooth_delora.py --config my_dog.yaml

All options: `--help`. YAML files give the same options by the same names: a later file overrides an earlier one, the
command line all of them, so that `--config my_dog.yaml train_scripts/configs/memory_12gb.yaml` adds what a card needs.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from delora_diffusion.base.checks import BaseModelError
from delora_diffusion.base.config import ModelConfig
from delora_diffusion.base.load import listed_in
from delora_diffusion.base.objective import ObjectiveError, TimestepSampling, objective_of
from delora_diffusion.console import quiet_libraries
from delora_diffusion.data.config import DataConfig
from delora_diffusion.data.encode import fingerprint
from delora_diffusion.data.photos import DataError, instance_examples, told_sizes
from delora_diffusion.data.prompts import read_prompts
from delora_diffusion.evaluation.choose import strength_text
from delora_diffusion.evaluation.encoders import EncoderError
from delora_diffusion.evaluation.scores import METRICS, photo_figures
from delora_diffusion.export.lora import export_lora
from delora_diffusion.export.lora_names import LoraError
from delora_diffusion.families import FamilyError, check_trainable
from delora_diffusion.method.config import ALL_LINEAR, PRESETS, DeloraConfig, DeloraConfigError
from delora_diffusion.method.inject import delora_disabled, inject_delora
from delora_diffusion.method.targets import excluding, target_linears
from delora_diffusion.options import OptionError, parse, to_yaml
from delora_diffusion.pipeline import save_delora_weights
from delora_diffusion.reports.card import push_to_hub, write_card
from delora_diffusion.reports.table import figure_table
from delora_diffusion.run_folder import RunFolder
from delora_diffusion.seeds import derived_seed
from delora_diffusion.training.best import Best, preview_protocol, preview_scorer, read_best
from delora_diffusion.training.checkpoint import CheckpointError
from delora_diffusion.training.config import AdapterConfig, TrainingConfig, ValidationConfig
from delora_diffusion.training.log import PreviewResult, figures_by_step, read_log
from delora_diffusion.training.loop import Interrupted, TrainingError, options_of, train
from delora_diffusion.training.loss import Examples
from delora_diffusion.training.memory import Plan, announce
from delora_diffusion.training.output import check_output, clear_output
from delora_diffusion.training.plot import plot_run
from delora_diffusion.training.prepare import begin, prepare
from delora_diffusion.training.preview import Rows, before_after, draw_unrelated, preview
from delora_diffusion.training.strength_sheet import draw_strengths

GROUPS = (ModelConfig, AdapterConfig, DataConfig, TrainingConfig, ValidationConfig)
KNOWN_ERRORS = (OptionError, DataError, BaseModelError, EncoderError, DeloraConfigError, ObjectiveError, FamilyError,
                CheckpointError, TrainingError, ImportError)  # fmt: skip
log = logging.getLogger("delora_diffusion.train_dreambooth")


def run(
    model: ModelConfig,
    adapter: AdapterConfig,
    data: DataConfig,
    training: TrainingConfig,
    validation: ValidationConfig,
) -> Path:
    """Train one adapter as the options say; returns the output folder."""
    accelerator = _accelerator(training)
    main = accelerator.is_main_process
    logging.getLogger("delora_diffusion").setLevel(logging.INFO if main else logging.ERROR)
    seed, device, out = training.seed, accelerator.device, Path(training.output_dir)

    # ---- what can be refused is refused before anything large is read
    instances = instance_examples(data, seed=seed)
    log.info("%s", told_sizes(instances, data))
    check_output(training)
    measuring = bool(validation.validation_dino or validation.validation_clip)
    world = read_prompts(validation.validation_world_prompt, option="validation_world_prompt") if measuring else []
    prompts = read_prompts(validation.validation_prompt, option="validation_prompt")
    validation = replace(validation, validation_prompt=prompts, validation_world_prompt=world)
    family = check_trainable(listed_in(model), train_text_encoder=adapter.train_text_encoder)
    pipe = begin(model, family, precision=accelerator.mixed_precision)
    objective = objective_of(pipe.scheduler, _timestep_sampling(training))
    denoiser = getattr(pipe, family.denoiser)
    config = _denoiser_config(adapter, family.dead_layers(family.denoiser, denoiser))
    target_linears(denoiser, config)
    on_gpu = device.type == "cuda"
    if main and (on_gpu if training.estimate_memory is None else training.estimate_memory):
        text_adapter = _text_encoder_config(adapter, []) if adapter.train_text_encoder else None
        announce(
            Plan(model, data, training, validation, family, config, text_adapter, accelerator.mixed_precision,
                 like_cuda=on_gpu),
            device,
        )  # fmt: skip

    # ---- load and encode; what only encodes is gone before the denoiser comes
    scorer = preview_scorer(validation, [e.path for e in instances]) if measuring and main else None
    base = prepare(
        pipe, family, model=model, data=data, validation=validation, instances=instances,
        train_text=adapter.train_text_encoder, seed=seed, accelerator=accelerator,
    )  # fmt: skip
    pipe, texts, photos = base.pipe, base.texts, [*instances, *base.classes]
    denoiser = getattr(pipe, family.denoiser)

    # ---- adapt
    modules = {family.denoiser: denoiser}
    inject_delora(denoiser, config, generator=_generator(seed, 0))
    encoders = [name for name in family.text_encoders if getattr(pipe, name, None) is not None]
    for number, name in enumerate(encoders, start=1):
        modules[name] = getattr(pipe, name)
        config = _text_encoder_config(adapter, family.dead_layers(name, modules[name]))
        inject_delora(modules[name], config, generator=_generator(seed, number))
    for name, module in modules.items():
        module.train()
        if training.gradient_checkpointing and name == family.denoiser:
            module.enable_gradient_checkpointing()
        elif training.gradient_checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": False})

    # ---- train: what is in the folder is replaced only now, when nothing can be refused any more
    kept = replace(training, resume_from_checkpoint=None, overwrite_output_dir=False)
    settings_file = to_yaml(model, adapter, data, kept, validation)
    if main:
        clear_output(training)
        if not training.resume_from_checkpoint:
            (out / "config.yaml").write_text(settings_file, encoding="utf-8")
    accelerator.wait_for_everyone()

    def world_pictures() -> list[Image.Image]:
        return draw_unrelated(pipe, validation, texts.unrelated, size=data.resolution, seed=seed) if scorer else []

    with accelerator.autocast(), contextlib.ExitStack() as as_base:
        for module in modules.values():
            as_base.enter_context(delora_disabled(module))
        base_pictures = world_pictures()
    provenance = {"base_model": model.pretrained_model_name_or_path, "base_fingerprint": base.identity,
                  "family": family.name, "seed": str(seed), "instance_prompt": data.instance_prompt or "",
                  "resolution": str(data.resolution), "pipeline": type(pipe).__name__,
                  "prediction_type": str(pipe.scheduler.config.get("prediction_type", ""))}  # fmt: skip
    best = Best(
        scorer=scorer, prompts=validation.validation_prompt, base=base_pictures, folder=out,
        protocol=preview_protocol(scorer, validation), rule=validation.keep_best or "balanced",
        patience=validation.patience,
        save=lambda folder, step: save_delora_weights(folder, modules, provenance=provenance | {"steps": str(step)}),
    ) if scorer else None  # fmt: skip
    latest: tuple[Rows, list[Image.Image]] = ([], [])

    def show(step: int) -> PreviewResult:
        nonlocal latest
        result = PreviewResult()
        if main and validation.validation_prompt:
            with accelerator.autocast():
                rows = preview(pipe, out / "previews", step, validation, texts.shown, size=data.resolution, seed=seed)
                others = base_pictures if step == 0 and adapter.init_weights != "kaiming" else world_pictures()
            latest = rows, others
            result = best.measure(step, rows, others) if best else result
        enough = accelerator.reduce(torch.tensor(float(result.enough), device=device), "sum")  # all wait for it here
        return replace(result, enough=bool(enough))

    options = options_of(model, adapter, data, training, validation)
    if training.report_to:
        accelerator.init_trackers("delora_diffusion", config={k: str(v) for k, v in options.items()})
    examples = Examples(
        instances, base.classes, base.latents, texts.conditioning,
        lambda captions: family.encode_prompt(pipe, captions), texts.preserved, data.base_preservation_weight,
        training.guidance_scale,
    )  # fmt: skip
    content = fingerprint(sorted((e.content, e.caption) for e in photos))
    steps = train(
        accelerator, modules, examples, family, objective, adapter=adapter, training=training, options=options,
        identity={"base model": base.identity, "photos and captions": content},
        preview=show, preview_steps=validation.validation_steps,
    )  # fmt: skip

    # ---- save
    if main:
        (out / "config.yaml").write_text(settings_file, encoding="utf-8")
        saved = save_delora_weights(out, modules, provenance=provenance | {"steps": str(steps)})
        if training.portable_lora:
            try:
                log.info("as a LoRA: %s", export_lora(saved, out, overwrite=True))
            except LoraError as error:
                log.warning("no LoRA is written beside the adapter: %s", error)
        log.info("adapter: %s", saved)
        text = ""
        if validation.strength_sheet:
            with accelerator.autocast():
                measured = draw_strengths(
                    pipe, modules, out, validation, texts.shown, texts.unrelated,
                    scorer=scorer, base=base_pictures, known=latest, size=data.resolution, seed=seed,
                )  # fmt: skip
            text = strength_text(measured, sheet=RunFolder(out).strength_sheet.name)
            if shown_text := strength_text(measured):
                log.info("\n%s\n", shown_text)
            log.info("strength sheet: %s", RunFolder(out).strength_sheet)
        kept_best = read_best(out)
        photos_score = photo_figures(scorer, [e.caption for e in instances]) if scorer else {}
        sheet = before_after(out / "previews", steps, validation,
                             [e.path for e in instances], out / "before_after.png")  # fmt: skip
        plot = plot_run(out, best=int(kept_best["step"]) if kept_best else None, photos=photos_score)
        pictures = [p for p in (sheet, plot) if p]
        figures = _figures(out, kept_best, photos_score)
        if figures:
            log.info("\n%s\n", figures)
        write_card(out, base_model=model.pretrained_model_name_or_path, trigger=data.instance_prompt,
                   pipeline=type(pipe).__name__, options=options,
                   pictures=[p.name for p in pictures], figures=figures, strength=text)  # fmt: skip
        if plot:
            log.info("how it went: %s", plot)
        if sheet:
            log.info("before and after: %s", sheet)
        if training.push_to_hub:
            log.info("uploaded to %s", push_to_hub(out, training.hub_model_id))
    accelerator.end_training()
    return out


def _figures(out: Path, best: dict[str, Any] | None, photos: dict[str, float]) -> str:
    """What was measured before the first step, on the best adapter that was kept, and at the end, beside what the
    photos score; "" if nothing."""
    looks = figures_by_step(read_log(out / "log.jsonl"))
    if not looks:
        return ""
    first, last = min(looks), max(looks)
    rows = [("the base" if first == 0 else f"step {first}", looks[first]), (f"this adapter, step {last}", looks[last])]
    if best:
        rows.insert(1, (f"`best/`, step {best['step']}, kept by {best['rule']}", best))
    if photos:
        rows.append(("the photos themselves", photos))
    return figure_table(rows, METRICS, of="previews")


def _denoiser_config(adapter: AdapterConfig, dead: Sequence[str]) -> DeloraConfig:
    return DeloraConfig(
        r=adapter.rank, **_strength(adapter, adapter.delora_lambda), target_modules=adapter.target_modules,
        exclude_modules=excluding(adapter.exclude_modules, dead), rank_pattern=adapter.rank_pattern,
        lambda_pattern=adapter.lambda_pattern, module_dropout=adapter.module_dropout, bias=adapter.bias,
        init_weights=adapter.init_weights,
    )  # fmt: skip


def _text_encoder_config(adapter: AdapterConfig, dead: Sequence[str]) -> DeloraConfig:
    """Names and patterns of layers are the denoiser's; in a text encoder it is a preset, or the attention."""
    own = adapter.delora_lambda if adapter.text_encoder_lambda is None else adapter.text_encoder_lambda
    return DeloraConfig(
        r=adapter.text_encoder_rank or adapter.rank, **_strength(adapter, own),
        target_modules=adapter.target_modules if adapter.target_modules in (*PRESETS, ALL_LINEAR) else None,
        exclude_modules=excluding(None, dead),
        module_dropout=adapter.module_dropout, init_weights=adapter.init_weights,
    )  # fmt: skip


def _strength(adapter: AdapterConfig, delora_lambda: float | None) -> dict[str, float]:
    return {"relative_lambda": adapter.relative_lambda} if delora_lambda is None else {"delora_lambda": delora_lambda}


def _timestep_sampling(training: TrainingConfig) -> TimestepSampling:
    return TimestepSampling(
        training.timestep_sampling, training.logit_mean, training.logit_std, training.mode_scale,
        training.timestep_shift,
    )  # fmt: skip


def _generator(seed: int, component: int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, "init", component))


def _accelerator(training: TrainingConfig) -> Accelerator:
    name = training.report_to
    try:
        accelerator = Accelerator(
            mixed_precision=training.mixed_precision, log_with=name, project_dir=training.output_dir
        )
    except ValueError as error:  # fp16 without a GPU, an unknown tracker
        raise OptionError(f"mixed_precision {training.mixed_precision}, report_to {name}: {error}") from error
    if name and not accelerator.log_with:
        raise OptionError(f'report_to {name}: it is not installed: pip install "delora_diffusion[{name}]"')
    return accelerator


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, run, and say in one line what went wrong, if something did; returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
    given = sys.argv[1:] if argv is None else argv
    configs = parse(given, *GROUPS, prog="train_dreambooth_delora", description=(__doc__ or "").splitlines()[0])
    quiet_libraries()
    try:
        run(*configs)
    except Interrupted as stop:
        log.warning("%s", stop)
        return 130
    except KNOWN_ERRORS as error:
        log.error("error: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
