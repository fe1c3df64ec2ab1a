"""The training loop: which example at which step, the loss, the step, and what is written along the way.

Everything random is a function of (seed, step, place in the batch). A run therefore gives the same adapter, bit for
bit, whether it was interrupted or not, and the same up to rounding on any number of processes that share a batch.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..adapters.sources import collect
from ..base.objective import Objective
from ..families import Family
from ..method.inject import delora_adapters, set_delora_adapters
from ..method.state import load_delora_state_dict
from ..run_folder import RunFolder
from ..seeds import derived_seed
from .checkpoint import (
    Progress,
    check_continues,
    find_checkpoint,
    keep_newest,
    read_checkpoint,
    read_progress,
    write_checkpoint,
)
from .config import AdapterConfig, TrainingConfig
from .log import PreviewResult, TrainingLog
from .loss import Examples, Pick, batch_loss, picks
from .optimizer import ema_update, make_optimizer, make_schedule, relative_gradients, set_lengths, trained_parameters

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, on which images, and what to do."""


class Interrupted(Exception):
    """Somebody asked the run to stop; a checkpoint was written first."""


# ---- one step ------------------------------------------------------------------------------------


def ramp_weight(step: int, warmup: int) -> float:
    """Strength during optimiser step `step` (counted from 0): rises linearly to 1 over the first `warmup` steps."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def step_gradients(
    accelerator: Any,
    parameters: Sequence[nn.Parameter],
    examples: Examples,
    denoiser: nn.Module,
    family: Family,
    objective: Objective,
    training: TrainingConfig,
    *,
    step: int,
) -> tuple[Tensor, list[list[Pick]]]:
    """Leave the gradient of one optimiser step on `parameters`, added up over accumulated batches and processes.

    Returns:
        This process's part of the step's loss, and the whole step's batch.
    """
    rank, world, size = accelerator.process_index, accelerator.num_processes, training.train_batch_size
    whole = picks(examples, seed=training.seed, step=step, count=size * training.gradient_accumulation_steps * world)
    total_weight = sum(p.example.weight for place in whole for p in place)
    total = torch.zeros((), device=accelerator.device)
    for micro in range(training.gradient_accumulation_steps):
        first = (micro * world + rank) * size
        batch = [p for place in whole[first : first + size] for p in place]
        torch.manual_seed(derived_seed(training.seed, "dropout", step, micro, rank))
        with accelerator.autocast():
            loss = batch_loss(
                batch, examples, denoiser, family, objective,
                total_weight=total_weight, snr_gamma=training.snr_gamma, device=accelerator.device,
            )  # fmt: skip
        accelerator.backward(loss)
        total += loss.detach()
    _sum_gradients(accelerator, parameters)
    return total, whole


def _sum_gradients(accelerator: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Add up the gradients of all processes: one message for all adapters, which are small."""
    if accelerator.num_processes == 1:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), "sum")
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).clone()


def _without_gradient(modules: dict[str, nn.Module]) -> list[str]:
    """Layers whose adapter got no gradient at all: they are not on the way from the input to the loss."""
    silent = []
    for component, module in modules.items():
        for name, adapter in delora_adapters(module).items():
            gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
            if not any(bool(g.any()) for g in gradients):
                silent.append(f"{component}.{name}")
    return silent


# ---- the run -------------------------------------------------------------------------------------


def train(
    accelerator: Any,
    modules: dict[str, nn.Module],
    examples: Examples,
    family: Family,
    objective: Objective,
    *,
    adapter: AdapterConfig,
    training: TrainingConfig,
    options: dict[str, Any],
    identity: dict[str, Any],
    preview: Callable[[int], PreviewResult],
    preview_steps: int,
) -> int:
    """Train the adapters in `modules` in place, from the start or from a checkpoint, to `max_train_steps`.

    Args:
        modules: the adapted components by name, the denoiser first.
        options: every option of the run, stored in checkpoints.
        identity: content of what is trained on, compared when a run is continued.
        preview: called with the number of steps done: before the first, every `preview_steps`, and at the end; what
            it measured is logged, and training ends early when it has seen enough.

    Returns:
        Steps done.

    Raises:
        TrainingError: the loss is not finite; the newest checkpoint stays.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
        CheckpointError: nothing to resume from, or a checkpoint of another run.
    """
    out, main, last = Path(training.output_dir), accelerator.is_main_process, training.max_train_steps
    denoiser = modules[family.denoiser]
    per_step = training.train_batch_size * training.gradient_accumulation_steps * accelerator.num_processes
    warmup = last // 2 if adapter.lambda_warmup_steps is None else adapter.lambda_warmup_steps
    set_lengths(modules, training)
    optimizer = make_optimizer(modules, training)
    parameters = trained_parameters(modules)
    schedule = make_schedule(optimizer, training)
    prepared = accelerator.prepare(optimizer)
    ema = {name: p.detach().clone() for name, p in parameters.items()} if training.use_ema else None
    identity = identity | {"photos_per_step": per_step} | _schedule_identity(training)

    # ---- where to start
    start = 0
    folder = find_checkpoint(out, training.resume_from_checkpoint) if training.resume_from_checkpoint else None
    if folder is not None:
        before = read_progress(folder)
        if adapter.lambda_warmup_steps is None:
            warmup = before.identity["lambda_warmup_steps"]
        check_continues(folder, before, Progress(before.step, options, identity | {"lambda_warmup_steps": warmup}))
        saved, average = read_checkpoint(folder, optimizer)
        for component, module in modules.items():
            load_delora_state_dict(module, saved.tensors[component], check_base=False)
        if ema is not None and average is not None:
            ema = {name: average[name].to(p.device) for name, p in parameters.items()}
        start = before.step
        _continue_schedule(schedule, start)
    identity |= {"lambda_warmup_steps": warmup}

    def checkpoint(done: int) -> None:
        if main:
            progress = Progress(done, options, identity)
            raw = collect(modules, "default", at_current_weight=False)
            write_checkpoint(
                RunFolder(out).checkpoint(done), progress=progress, adapter=raw, optimizer=optimizer, ema=ema
            )
            keep_newest(out, training.checkpoints_total_limit)
        accelerator.wait_for_everyone()

    _announce(accelerator, modules, examples, start, training, per_step, warmup, folder)
    training_log = TrainingLog(RunFolder(out).log, start) if main else None
    bar = tqdm(total=last, initial=start, desc="train", disable=not main)
    _set_weight(modules, ramp_weight(start - 1, warmup))

    def look(done: int) -> bool:
        started = time.perf_counter()
        found = preview(done)
        if training_log is not None:
            training_log.paused(time.perf_counter() - started)
        if training_log is not None and found.figures:
            bar.set_postfix(training_log.measured(done, found))
            if accelerator.trackers:
                accelerator.log(found.figures, step=done)
        return found.enough

    # ---- the loop
    done = start
    with _stop_signals() as stopping, logging_redirect_tqdm(), bar:
        for step in range(start, last):
            if step % preview_steps == 0 and look(step):
                break
            if step <= warmup:
                _set_weight(modules, ramp_weight(step, warmup))
            part, whole = step_gradients(
                accelerator, list(parameters.values()), examples, denoiser, family, objective, training, step=step
            )
            if step == 0 and (silent := _without_gradient(modules)):
                log.warning("no gradient reaches %d adapted layers, which stay as they are: %s",
                            len(silent), ", ".join(silent))  # fmt: skip
            loss, stop = accelerator.reduce(torch.stack([part, part.new_tensor(float(len(stopping)))]), "sum").tolist()
            if not math.isfinite(loss):
                raise TrainingError(_not_finite(loss, step, whole, out))
            relative_gradients(modules)
            if training.max_grad_norm:
                accelerator.clip_grad_norm_(list(parameters.values()), training.max_grad_norm)
            prepared.step()
            prepared.zero_grad()
            schedule.step()
            if ema is not None:
                ema_update(ema, parameters, training.ema_decay, step)

            done = step + 1
            bar.update()
            if training_log is not None:
                rates = [group["lr"] for group in optimizer.param_groups]
                bar.set_postfix(training_log.add(done, loss, rates, denoiser, last=done == last))
                if accelerator.trackers and training_log.fresh:
                    accelerator.log(training_log.fresh, step=done)
            if stop or (training.checkpointing_steps and done % training.checkpointing_steps == 0):
                checkpoint(done)
            if stop:
                raise Interrupted(f"stopped at step {done}; go on with --resume_from_checkpoint latest")
    _set_weight(modules, ramp_weight(done - 1, warmup))
    if ema is not None:
        _put(parameters, ema)
    if done == last or ema is not None:  # a run that ended early has its last pictures already
        look(done)
    return done


def _schedule_identity(training: TrainingConfig) -> dict[str, Any]:
    constant = training.lr_scheduler.startswith("constant")
    return {"schedule_steps": None if constant else training.max_train_steps}


def _continue_schedule(schedule: Any, step: int) -> None:
    """Put a schedule where it stood after `step` steps; the rates themselves came with the optimiser's state."""
    if step:
        schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step, "_step_count": step + 1})


def _set_weight(modules: dict[str, nn.Module], weight: float) -> None:
    for module in modules.values():
        set_delora_adapters(module, "default", weight)


@torch.no_grad()
def _put(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is non-empty once SIGINT or SIGTERM came; a second one stops at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        log.warning("stopping after this step, with a checkpoint; once more stops at once, without")

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: nothing to catch
        yield seen
        return
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(
    accelerator: Any, modules: dict[str, nn.Module], examples: Examples, start: int, training: TrainingConfig,
    per_step: int, warmup: int, folder: Path | None,
) -> None:  # fmt: skip
    if not accelerator.is_main_process:
        return
    if accelerator.device.type == "cpu":
        log.warning("training on the CPU: fine for the pocket base model, very slow for any other")
    trained = sum(p.numel() for p in trained_parameters(modules).values())
    layers = {component: len(delora_adapters(module)) for component, module in modules.items()}
    log.info("adapted layers: %s; %s trained parameters", layers, f"{trained:,}")
    log.info(
        "%d photos, %d class images, cached as %d views",
        len(examples.instances),
        len(examples.classes),
        len(examples.latents),
    )
    precision = accelerator.mixed_precision.replace("no", "no mixed precision")
    log.info("%d steps of %d photos on %s (%d process%s, %s); the strength ramps up over %d steps",
             training.max_train_steps, per_step, accelerator.device, accelerator.num_processes,
             "es" * (accelerator.num_processes > 1), precision, warmup)  # fmt: skip
    if folder is not None:
        log.info("resumed from %s at step %d", folder, start)
    elif training.resume_from_checkpoint:
        log.info("no checkpoint in %s yet: starting at step 0", training.output_dir)


def _not_finite(loss: float, step: int, whole: list[list[Pick]], out: Path) -> str:
    names = ", ".join(sorted({str(p.example.path) for place in whole for p in place}))
    return (
        f"the loss is {loss} at step {step + 1}, on {names}; the checkpoints in {out} are as they were. Look at these "
        f"images, lower learning_rate or delora_lambda, or train with mixed_precision bf16 or no"
    )


def options_of(*configs: Any) -> dict[str, Any]:
    """All options of the given configurations in one dictionary."""
    return {key: value for config in configs for key, value in asdict(config).items()}
