"""Where a training run stands: what steps change besides the adapters, saved and taken up again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters.sources import collect
from ..console import one_line
from ..errors import DeloraError
from ..method.state import load_delora_state_dict
from ..run_folder import RunFolder
from .checkpoint import (
    Progress,
    check_continues,
    find_checkpoint,
    keep_newest,
    read_checkpoint,
    read_progress,
    write_checkpoint,
)
from .config import Options
from .optimizer import make_optimizer, make_schedule, set_lengths, trained_parameters
from .output import write_elsewhere

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)
#: The adapted components by name, the denoiser first.
Modules = Mapping[str, nn.Module]


class TrainingError(DeloraError, RuntimeError):
    """Training cannot go on; the message says at which step, on which images, and what to do."""


class Interrupted(Exception):
    """Somebody asked the run to stop; a checkpoint was written first."""


@dataclass(kw_only=True)
class TrainingState:
    """What steps change besides the adapters themselves.

    Attributes:
        step: optimiser steps done.
        parameters: all that is trained, by component and name.
        ema: their moving average, if one is kept.
        warmup: steps over which the strength rises.
        identity: what is compared by content when the run is continued.
        unlogged: losses that no line of the log holds yet.
    """

    step: int = 0
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Any
    ema: dict[str, Tensor] | None
    warmup: int
    identity: dict[str, Any]
    unlogged: list[float] = field(default_factory=list)
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def rates(self) -> list[float]:
        """The learning rates of now."""
        return [group["lr"] for group in self.optimizer.param_groups]


def new_state(
    modules: Modules,
    options: Options,
    *,
    processes: int,
    identity: Mapping[str, Any],
    provenance: Mapping[str, str] | None = None,
) -> TrainingState:
    """The state before the first step; sets the lengths of A and B.

    Args:
        identity: content of what is trained on.
        provenance: what checkpoints say of where they come from.
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
        provenance=provenance or {},
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
    check_continues(folder, before, replace(before, options=options.flat(), identity=state.identity))
    for name in ("base_quantization", "text_encoder_quantization"):
        if (then := before.options.get(name, "none")) != (now := getattr(options.model, name)):
            log.warning("%s was %s and is %s: from here on gradients are those of another rounding", name, then, now)
    saved, average = read_checkpoint(folder, state.optimizer, ema=state.ema is not None)
    for component, module in modules.items():
        load_delora_state_dict(module, saved.tensors[component], check_base=False)
    if state.ema is not None and average is not None:
        state.ema = {name: average[name].to(p.device) for name, p in state.parameters.items()}
    state.step, state.unlogged = before.step, before.unlogged
    if state.step:  # the rates themselves came with the optimiser's state
        stood = {"last_epoch": state.step, "_step_count": state.step + 1}
        state.schedule.load_state_dict({**state.schedule.state_dict(), **stood})
    return folder


def save(state: TrainingState, modules: Modules, options: Options, accelerator: Accelerator) -> str:
    """Write a checkpoint, and delete the oldest where there are too many; all processes wait for the main one.

    Returns:
        Why there is no checkpoint, "" if there is one: the disk may have room again before the next is due.

    Raises:
        TrainingError: the state is not finite; nothing is written or deleted.
    """
    check_finite(state, options)
    problem = ""
    if accelerator.is_main_process:
        run = RunFolder(Path(options.training.output_dir))
        try:
            _write(run.checkpoint(state.step), state, modules, options)
            keep_newest(run.path, options.training.checkpoints_total_limit)
        except OSError as error:
            problem = one_line(error)
            log.warning("no checkpoint at step %d: %s; earlier ones are as they were", state.step, problem)
    accelerator.wait_for_everyone()
    return problem


def save_before_the_end(state: TrainingState, modules: Modules, options: Options, accelerator: Accelerator) -> str:
    """Write a checkpoint, wherever that is possible, since there is no later one; returns how to go on."""
    problem = save(state, modules, options, accelerator)
    if not problem:
        return "go on with --resume_from_checkpoint latest"
    elsewhere = write_elsewhere(lambda place: _write(place / f"checkpoint-{state.step}", state, modules, options))
    return f"go on with --resume_from_checkpoint {elsewhere}" if elsewhere else "and no checkpoint could be written"


def _write(folder: Path, state: TrainingState, modules: Modules, options: Options) -> Path:
    lambdas = {
        f"{component}.{name}": tensor.tolist()
        for component, tensors in collect(modules, "default", at_current_weight=False).tensors.items()
        for name, tensor in tensors.items()
        if name.rpartition(".")[2].startswith("delora_lambda")
    }
    progress = Progress(
        step=state.step,
        options=options.flat(),
        identity=state.identity,
        unlogged=list(state.unlogged),
        lambdas=lambdas,
    )
    adapter = collect(modules, "default", provenance={**state.provenance, "steps": str(state.step)})
    write_checkpoint(folder, progress=progress, adapter=adapter, optimizer=state.optimizer, ema=state.ema)
    return folder


def check_finite(state: TrainingState, options: Options) -> None:
    """Refuse to save what training has broken.

    Raises:
        TrainingError: an adapter, its average or the optimiser's state is not finite.
    """
    moments = [t for values in state.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    tensors = [*state.parameters.values(), *(state.ema or {}).values(), *moments]
    if not bool(torch.stack([t.isfinite().all().to(tensors[0].device) for t in tensors]).all()):
        raise TrainingError(
            f"the adapter is not finite after step {state.step}; it is not saved, and the checkpoints in "
            f"{options.training.output_dir} are as they were. Lower learning_rate or delora_lambda"
        )


@torch.no_grad()
def put_average(state: TrainingState) -> None:
    """Let the moving average, if there is one, be the adapter."""
    for name, value in (state.ema or {}).items():
        state.parameters[name].copy_(value)
