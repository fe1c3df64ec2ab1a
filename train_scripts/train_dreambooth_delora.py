"""Teach a diffusion model one subject from a handful of photos, with DeLoRA.

    accelerate launch train_scripts/train_dreambooth_delora.py --config my_dog.yaml

All options: `--help`. YAML files give the same options by the same names: a later file overrides an earlier one, the
command line all of them, so that `--config my_dog.yaml train_scripts/configs/memory_12gb.yaml` adds what a card needs.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration
from tqdm.contrib.logging import logging_redirect_tqdm

from delora_diffusion.base.denoiser import Denoiser
from delora_diffusion.console import lasting_output, optional, quiet_libraries
from delora_diffusion.errors import USER_ERRORS, sentence_of
from delora_diffusion.evaluation.scorer import Scorer
from delora_diffusion.method.inject import delora_disabled
from delora_diffusion.options import OptionError, parse
from delora_diffusion.pipeline import save_delora_weights
from delora_diffusion.reports.card import push_to_hub
from delora_diffusion.run_folder import RunFolder
from delora_diffusion.training import loop, memory
from delora_diffusion.training.adapt import adapt
from delora_diffusion.training.best import Best, preview_protocol, preview_scorer
from delora_diffusion.training.check import Checked, check
from delora_diffusion.training.checkpoint import keep_newest
from delora_diffusion.training.config import GROUPS, Options
from delora_diffusion.training.diffusers_flags import DiffusersFlags
from delora_diffusion.training.log import LOG_STEPS, TrainingLog, due
from delora_diffusion.training.output import clear_output, only_run
from delora_diffusion.training.prepare import Prepared, content_of, examples_of, prepare, provenance_of
from delora_diffusion.training.preview import Previews
from delora_diffusion.training.processes import by_main, watched
from delora_diffusion.training.results import save_result, write_results, write_settings
from delora_diffusion.training.state import (
    Interrupted,
    Modules,
    check_finite,
    new_state,
    put_average,
    resume,
    save,
    save_before_the_end,
)

log = logging.getLogger("delora_diffusion.train_dreambooth")


def run(options: Options, accelerator: Accelerator) -> Path:
    """Train one adapter as the options say; returns the output folder."""
    main, out = accelerator.is_main_process, RunFolder(Path(options.training.output_dir))

    # ---- refuse what can be refused before anything large is read
    checked = check(options, accelerator)
    options = checked.options
    wanted = options.training.estimate_memory
    if main and (accelerator.device.type == "cuda" if wanted is None else wanted):
        memory.announce(memory.plan_of(checked, accelerator), accelerator.device)

    # ---- read and encode; what only encodes is gone before the denoiser comes
    scorer = preview_scorer(options.validation, [e.path for e in checked.measured]) if main else None
    base = prepare(checked, accelerator)
    provenance = provenance_of(checked, base)

    # ---- adapt; what is in the folder is replaced only now, when nothing can be refused any more
    modules = adapt(base.pipe, checked.family, checked.config, options, checked.initial)
    if main:
        clear_output(options.training)
        if not options.training.resume_from_checkpoint:
            write_settings(out, options)
    accelerator.wait_for_everyone()
    previews = Previews(
        pipe=base.pipe, run=out, config=options.validation, shown=base.texts.shown, unrelated=base.texts.unrelated,
        size=options.data.resolution, seed=options.training.seed,
        starts_as_base=options.adapter.init_weights != "kaiming" and checked.initial is None,
    )  # fmt: skip
    denoiser = modules[checked.family.denoiser]
    best = partial(keeper, scorer, previews, modules, provenance, accelerator)
    previews.best = by_main(accelerator, denoiser, lambda: best() if scorer else None)

    # ---- the loop
    steps = train(checked, base, modules, previews, provenance, accelerator)

    # ---- finish
    by_main(accelerator, denoiser, lambda: write_results(checked, modules, previews, steps, accelerator))
    if main and options.training.push_to_hub:
        log.info("uploaded to %s", push_to_hub(out.path, options.training.hub_model_id))
    with optional("last word to the tracker"):
        accelerator.end_training()
    return out.path


def train(
    checked: Checked,
    base: Prepared,
    modules: Modules,
    previews: Previews,
    provenance: Mapping[str, str],
    accelerator: Accelerator,
) -> int:
    """Train the adapters in place, from the start or from a checkpoint, and save them; returns the steps done.

    Raises:
        TrainingError: something is not finite, and the newest checkpoint stays; or the adapter is saved elsewhere.
        Interrupted: after a signal that asks for an end, once a checkpoint is written.
        CheckpointError: nothing to resume from, or a checkpoint of another run.
    """
    options, training, main = checked.options, checked.options.training, accelerator.is_main_process
    denoiser, examples = Denoiser(modules[checked.family.denoiser], checked.family), examples_of(checked, base)
    state = new_state(
        modules,
        options,
        processes=accelerator.num_processes,
        identity=content_of(checked, base),
        provenance=provenance,
    )
    optimizer, parameters = accelerator.prepare(state.optimizer), list(state.parameters.values())
    resumed = resume(state, modules, options)
    if main and training.resume_from_checkpoint == "latest":  # a killed run had no time to delete one too many
        keep_newest(previews.run.path, training.checkpoints_total_limit)
    loop.announce(accelerator, modules, examples, state, options, resumed)
    run_log = TrainingLog(
        previews.run.log if main else None, state.step, total=training.max_train_steps, losses=state.unlogged,
        track=accelerator.log if accelerator.trackers else None,
    )  # fmt: skip
    loop.set_strength(modules, loop.ramp_weight(state.step - 1, state.warmup))

    def preview() -> bool:
        with run_log.paused():
            result = previews.show(state.step, accelerator)
        run_log.measured(state.step, result)
        return result.enough

    unread = loop.Unread()
    with loop.stop_signals() as stopping, logging_redirect_tqdm(), run_log.bar:
        for step in range(state.step, training.max_train_steps):
            if due(step, options.validation.validation_steps) and preview():
                break
            if step <= state.warmup:
                loop.set_strength(modules, loop.ramp_weight(step, state.warmup))
            loss, batch = loop.step_gradients(
                accelerator, parameters, examples, denoiser, checked.objective, training, step=step
            )
            if step == 0:
                loop.warn_of_silent_layers(modules)
            failed = loop.take_step(state, modules, training, accelerator, optimizer, loss)
            unread.note(state.step, loss, failed, batch)
            run_log.bar.update()
            line = due(state.step, LOG_STEPS) or state.step in (1, training.max_train_steps)
            checkpoint = due(state.step, training.checkpointing_steps)
            stop = bool(stopping) and accelerator.num_processes == 1
            if line or checkpoint or stop or unread.late or due(state.step, options.validation.validation_steps):
                losses, stop = unread.read(accelerator, stopping, previews.run.path)
                run_log.add(state.step, losses, state.rates, denoiser.module, line=line)
            if stop:
                how = save_before_the_end(state, modules, options, accelerator)
                raise Interrupted(f"stopped at step {state.step}; {how}")
            if checkpoint:
                save(state, modules, options, accelerator)
        loop.set_strength(modules, loop.ramp_weight(state.step - 1, state.warmup))
        put_average(state)
        check_finite(state, options)
        if main:  # before the last pictures, which take a while
            save_result(previews.run, modules, {**provenance, "steps": str(state.step)})
    if state.step == training.max_train_steps or state.ema is not None:
        preview()  # a run that ended early has its last pictures already
    return state.step


def keeper(
    scorer: Scorer, previews: Previews, modules: Modules, provenance: Mapping[str, str], accelerator: Accelerator
) -> Best:
    """What measures the previews against the base's pictures, and keeps the best adapter."""
    config = previews.config
    with accelerator.autocast(), contextlib.ExitStack() as as_base:
        for module in modules.values():
            as_base.enter_context(delora_disabled(module))
        pictures = previews.draw_unrelated()
    return Best(
        scorer=scorer, prompts=previews.shown.texts, base=pictures, folder=previews.run.path,
        protocol=preview_protocol(scorer, config), rule=config.keep_best or "balanced", patience=config.patience,
        save=lambda folder, step: save_delora_weights(folder, modules, provenance={**provenance, "steps": str(step)}),
    )  # fmt: skip


def start(options: Options) -> Accelerator:
    """accelerate, as the options set it up. Processes without a GPU must be told so, or each takes itself for the
    only one; and whoever waits for the main one's pictures does so for as long as they take."""
    training, name = options.training, options.training.report_to
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=30))
    try:
        folders = ProjectConfiguration(training.output_dir, str(Path(training.output_dir, training.logging_dir or "")))
        accelerator = Accelerator(
            mixed_precision=training.mixed_precision, log_with=name, project_config=folders,
            cpu=several and not torch.accelerator.is_available(), kwargs_handlers=[patience],
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop's own; not the launcher's
        )  # fmt: skip
    except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        # fp16 without a GPU, an unknown tracker, what `accelerate config` wrote for another machine
        raise OptionError(f"mixed_precision {training.mixed_precision}, report_to {name}: {error}") from error
    if name and not accelerator.log_with:
        raise OptionError(f'report_to {name}: it is not installed: pip install "delora_diffusion[{name}]"')
    if training.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if "MASTER_ADDR" in os.environ and "ACCELERATE_USE_CPU" in os.environ and accelerator.num_processes == 1:
        log.warning(
            "the launcher was asked for several processes and started one. For two on this machine's CPU, type: "
            "torchrun --nproc_per_node 2 %s and your options",
            sys.argv[0],
        )
    logging.getLogger("delora_diffusion").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    return accelerator


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, run, and say in one line what went wrong, if something did; returns the exit code."""
    with lasting_output():
        logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
        given = sys.argv[1:] if argv is None else argv
        title = (__doc__ or "").splitlines()[0]
        parsed: Any = parse(
            given, *GROUPS, prog="train_dreambooth_delora", description=title, translation=DiffusersFlags()
        )
        options = Options(**dict(zip(("model", "adapter", "data", "training", "validation"), parsed, strict=True)))
        quiet_libraries()
        try:
            accelerator = start(options)
            with watched(accelerator), only_run(options.training, accelerator):
                run(options, accelerator)
        except Interrupted as stop:
            log.warning("%s", stop)
            return 130
        except KeyboardInterrupt:
            log.warning("stopped; checkpoints, if there are any, are as they were: --resume_from_checkpoint latest")
            return 130
        except USER_ERRORS as error:
            log.error("error: %s", sentence_of(error))
            return 1
        return 0


if __name__ == "__main__":
    sys.exit(main())
