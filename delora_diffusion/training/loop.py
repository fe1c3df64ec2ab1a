"""The parts of the training loop: one step, what it changes besides the adapters, and where it stands.

The loop itself is in train_scripts/train_dreambooth_delora.py. Everything random is a function of (seed, step, place
in the batch), so a run gives the same adapter, bit for bit, whether it was interrupted or not. On any number of
processes that share a batch the gradients of a step agree to 1e-6 of their norm.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters.sources import collect
from ..base.denoiser import Denoiser
from ..base.objective import Objective
from ..base.speed import attention_of
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
from .config import Options, TrainingConfig
from .loss import Examples, Pick, batch_loss, picks
from .optimizer import ema_update, make_optimizer, make_schedule, relative_gradients, set_lengths, trained_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)
#: The adapted components by name, the denoiser first.
Modules = Mapping[str, nn.Module]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, on which images, and what to do."""


class Interrupted(Exception):
    """Somebody asked the run to stop; a checkpoint was written first."""


# ---- where a run stands --------------------------------------------------------------------------


@dataclass(kw_only=True)
class TrainingState:
    """What steps change besides the adapters themselves.

    Attributes:
        step: optimiser steps done.
        parameters: all that is trained, by component and name.
        ema: their moving average, if one is kept.
        warmup: steps over which the strength rises.
        identity: what is compared by content when the run is continued.
    """

    step: int = 0
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Any
    ema: dict[str, Tensor] | None
    warmup: int
    identity: dict[str, Any]

    @property
    def rates(self) -> list[float]:
        """The learning rates of now."""
        return [group["lr"] for group in self.optimizer.param_groups]


def new_state(modules: Modules, options: Options, *, processes: int, identity: Mapping[str, Any]) -> TrainingState:
    """The state before the first step; sets the lengths of A and B.

    Args:
        identity: content of what is trained on.
    """
    training, adapter = options.training, options.adapter
    set_lengths(modules, training)
    optimizer = make_optimizer(modules, training)
    parameters = trained_parameters(modules)
    warmup = training.max_train_steps // 10 if adapter.lambda_warmup_steps is None else adapter.lambda_warmup_steps
    constant = training.lr_scheduler.startswith("constant")
    return TrainingState(
        parameters=parameters,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, training),
        warmup=warmup,
        ema={name: p.detach().clone() for name, p in parameters.items()} if training.use_ema else None,
        identity={
            **identity,
            "photos_per_step": training.train_batch_size * training.gradient_accumulation_steps * processes,
            "schedule_steps": None if constant else training.max_train_steps,
            "lambda_warmup_steps": warmup,
        },
    )


def resume(state: TrainingState, modules: Modules, options: Options) -> Path | None:
    """Take up the checkpoint that `resume_from_checkpoint` means, if there is one; returns its folder.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or one of another run.
    """
    training = options.training
    if not training.resume_from_checkpoint:
        return None
    folder = find_checkpoint(Path(training.output_dir), training.resume_from_checkpoint)
    if folder is None:
        return None
    before = read_progress(folder)
    if options.adapter.lambda_warmup_steps is None:
        state.warmup = state.identity["lambda_warmup_steps"] = before.identity["lambda_warmup_steps"]
    check_continues(folder, before, Progress(before.step, options.flat(), state.identity))
    saved, average = read_checkpoint(folder, state.optimizer)
    for component, module in modules.items():
        load_delora_state_dict(module, saved.tensors[component], check_base=False)
    if state.ema is not None and average is not None:
        state.ema = {name: average[name].to(p.device) for name, p in state.parameters.items()}
    state.step = before.step
    if state.step:  # the rates themselves came with the optimiser's state
        stood = {"last_epoch": state.step, "_step_count": state.step + 1}
        state.schedule.load_state_dict({**state.schedule.state_dict(), **stood})
    return folder


def save(state: TrainingState, modules: Modules, options: Options, accelerator: Accelerator) -> None:
    """Write a checkpoint, and delete the oldest where there are too many; all processes wait for the main one."""
    if accelerator.is_main_process:
        run = RunFolder(Path(options.training.output_dir))
        adapter = collect(modules, "default", at_current_weight=False)
        progress, optimizer = Progress(state.step, options.flat(), state.identity), state.optimizer
        folder = run.checkpoint(state.step)
        write_checkpoint(folder, progress=progress, adapter=adapter, optimizer=optimizer, ema=state.ema)
        keep_newest(run.path, options.training.checkpoints_total_limit)
    accelerator.wait_for_everyone()


@torch.no_grad()
def put_average(state: TrainingState) -> None:
    """Let the moving average, if there is one, be the adapter."""
    for name, value in (state.ema or {}).items():
        state.parameters[name].copy_(value)


# ---- one step ------------------------------------------------------------------------------------


def ramp_weight(step: int, warmup: int) -> float:
    """Strength during optimiser step `step` (counted from 0): rises linearly to 1 over the first `warmup` steps."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def set_strength(modules: Modules, strength: float) -> None:
    """The strength of the adapter that is trained."""
    for module in modules.values():
        set_delora_adapters(module, "default", strength)


def step_gradients(
    accelerator: Accelerator,
    parameters: Sequence[nn.Parameter],
    examples: Examples,
    denoiser: Denoiser,
    objective: Objective,
    training: TrainingConfig,
    *,
    step: int,
) -> tuple[Tensor, list[Pick]]:
    """Leave the gradient of one optimiser step on `parameters`, added up over accumulated batches and processes.

    Returns:
        The step's loss, on the device, and its batch.
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
                batch, examples, denoiser, objective, total_weight=total_weight, snr_gamma=training.snr_gamma
            )
        accelerator.backward(loss)
        total += loss.detach()
    return _sum_gradients(accelerator, parameters, total), [p for place in whole for p in place]


def _sum_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Add up the gradients and losses of all processes: one message for all adapters, which are small."""
    if accelerator.num_processes == 1:
        return loss
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    own = [*(p.grad.flatten() for p in parameters if p.grad is not None), loss.reshape(1).float()]
    *parts, total = accelerator.reduce(torch.cat(own), "sum").split([*(p.numel() for p in parameters), 1])
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part.view_as(p).clone()
    summed: Tensor = total.squeeze()
    return summed


def take_step(
    state: TrainingState,
    modules: Modules,
    training: TrainingConfig,
    accelerator: Accelerator,
    optimizer: Any,
    loss: Tensor,
) -> Tensor:
    """Move the parameters by the gradients that they hold, unless these or the loss are not finite; take them away.

    Nothing waits for the device: the optimiser is told on the device whether to move anything, where it can be.

    Args:
        optimizer: the state's, as accelerate has prepared it.

    Returns:
        Whether the step failed, on the device. (Gradients that only overflow in fp16 are the scaler's business.)
    """
    relative_gradients(modules)
    gradients = [p.grad for p in state.parameters.values() if p.grad is not None]
    if training.max_grad_norm:
        norm = accelerator.clip_grad_norm_(list(state.parameters.values()), training.max_grad_norm)
    else:
        norm = torch.nn.utils.get_total_norm(gradients)
    scaled = accelerator.scaler is not None
    failed = ~loss.isfinite() if scaled else ~(loss.isfinite() & norm.isfinite())
    if not scaled and state.optimizer.defaults.get("fused"):
        state.optimizer.found_inf = failed.float()  # type: ignore[attr-defined]
    if scaled or state.optimizer.defaults.get("fused") or not bool(failed):
        optimizer.step()
    optimizer.zero_grad()
    state.schedule.step()
    if state.ema is not None:
        ema_update(state.ema, state.parameters, training.ema_decay, state.step)
    state.step += 1
    return failed


class Unread:
    """What steps left on the device and nobody has looked at yet: looking at it waits for the device."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.failed: list[Tensor] = []
        self.batches: list[tuple[int, Sequence[Pick]]] = []

    def note(self, step: int, loss: Tensor, failed: Tensor, batch: Sequence[Pick]) -> None:
        """Add what step number `step`, counted from 1, left."""
        self.losses.append(loss.float())
        self.failed.append(failed)
        self.batches.append((step, batch))

    def read(self, accelerator: Accelerator, stopping: Sequence[int], out: Path) -> tuple[list[float], bool]:
        """The losses of the steps since the last look, and whether any process has been asked to stop.

        Raises:
            TrainingError: a step that failed; it changed nothing. Its images are named.
        """
        asked = torch.tensor([float(len(stopping))], device=accelerator.device)
        asked = accelerator.reduce(asked, "sum") if accelerator.num_processes > 1 else asked
        values = torch.stack([*self.losses, *(one.float() for one in self.failed), *asked]).tolist()
        losses, failed = values[: len(self.losses)], values[len(self.losses) : -1]
        for loss, wrong, (step, batch) in zip(losses, failed, self.batches, strict=True):
            if wrong:
                what = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
                names = ", ".join(sorted({str(p.example.path) for p in batch}))
                raise TrainingError(
                    f"{what} at step {step}, on {names}; the checkpoints in {out} are as they were. Look at these "
                    f"images, lower learning_rate or delora_lambda, or train with mixed_precision bf16 or no"
                )
        self.losses, self.failed, self.batches = [], [], []
        return losses, bool(values[-1])


def warn_of_silent_layers(modules: Modules) -> None:
    """Name the layers whose adapter got no gradient at all: they are not on the way from the input to the loss."""
    silent = []
    for component, module in modules.items():
        for name, adapter in delora_adapters(module).items():
            gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
            if not any(bool(g.any()) for g in gradients):
                silent.append(f"{component}.{name}")
    if silent:
        names = ", ".join(silent)
        log.warning("no gradient reaches %d adapted layers, which stay as they are: %s", len(silent), names)


# ---- around it -----------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
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


def announce(
    accelerator: Accelerator,
    modules: Modules,
    examples: Examples,
    state: TrainingState,
    options: Options,
    resumed: Path | None,
) -> None:
    """Say once what will happen, to the tracker as well."""
    if options.training.report_to:
        accelerator.init_trackers("delora_diffusion", config={k: str(v) for k, v in options.flat().items()})
    if not accelerator.is_main_process:
        return
    training = options.training
    if accelerator.device.type == "cpu":
        log.warning("training on the CPU: fine for the pocket base model, very slow for any other")
    trained = sum(p.numel() for p in state.parameters.values())
    log.info("attention: %s%s", attention_of(next(iter(modules.values()))), ", compiled" * training.compile)
    layers = {component: len(delora_adapters(module)) for component, module in modules.items()}
    log.info("adapted layers: %s; %s trained parameters", layers, f"{trained:,}")
    counts = len(examples.instances), len(examples.classes), len(examples.latents)
    log.info("%d photos, %d class images, cached as %d views", *counts)
    log.info(
        "%d steps of %d photos on %s (%d process%s, %s); the strength ramps up over %d steps",
        training.max_train_steps,
        state.identity["photos_per_step"],
        accelerator.device,
        accelerator.num_processes,
        "es" * (accelerator.num_processes > 1),
        accelerator.mixed_precision.replace("no", "no mixed precision"),
        state.warmup,
    )
    if resumed is not None:
        log.info("resumed from %s at step %d", resumed, state.step)
    elif training.resume_from_checkpoint:
        log.info("no checkpoint in %s yet: starting at step 0", training.output_dir)
