"""The parts of the training loop: one step, and what surrounds it.

The loop itself is in train_scripts/train_dreambooth_delora.py. Everything random is a function of (seed, step, place
in the batch), so a run gives the same adapter, bit for bit, whether it was interrupted or not. On any number of
processes that share a batch the gradients of a step agree to 1e-6 of their norm.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base.denoiser import Denoiser
from ..base.objective import Objective
from ..base.speed import attention_of
from ..console import STOP_SIGNALS, one_line
from ..method.inject import delora_adapters, set_delora_adapters
from ..options import OptionError
from ..seeds import derived_seed
from .config import Options, TrainingConfig
from .log import LOG_STEPS
from .loss import Examples, Pick, batch_loss, passes_of, picks
from .optimizer import ema_update, relative_gradients
from .state import Modules, TrainingError, TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)
#: Seconds between two looks at whether one of several processes was asked to stop.
LOOK = 5.0
#: Seconds within which a signal is the same one once more.
SAME_SIGNAL = 1.0


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
        starts = [(micro * world + process) * size for process in range(world)]
        batches = [[p for place in whole[first : first + size] for p in place] for first in starts]
        counts = zip(*map(passes_of, batches), strict=True) if training.shard_base else ((0,), (0,))
        adapted, of_base = map(max, counts)  # parts of the weights come from processes that run the same passes
        torch.manual_seed(derived_seed(training.seed, "dropout", step, micro, rank))
        with accelerator.autocast():
            loss = batch_loss(
                batches[rank],
                examples,
                denoiser,
                objective,
                total_weight=total_weight,
                snr_gamma=training.snr_gamma,
                passes=(adapted, of_base),
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
    fine = norm.isfinite()
    if scaled and (scale := accelerator.scaler._get_scale_async()) is not None:
        fine |= scale > 1  # a smaller scale may help
    failed: Tensor = ~(loss.isfinite() & fine)
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
    """What steps left on the device and nobody has looked at yet: looking at it waits for the device.

    Of several processes none knows when another is asked to stop, until all look. `late` says when, at the same step
    on every one: after so many steps as take some `LOOK` seconds on the average of them.
    """

    def __init__(self) -> None:
        self.since, self.every = time.monotonic(), LOG_STEPS
        self.losses: list[Tensor] = []
        self.failed: list[Tensor] = []
        self.batches: list[tuple[int, Sequence[Pick]]] = []

    def note(self, step: int, loss: Tensor, failed: Tensor, batch: Sequence[Pick]) -> None:
        """Add what step number `step`, counted from 1, left."""
        self.losses.append(loss.float())
        self.failed.append(failed)
        self.batches.append((step, batch))

    @property
    def late(self) -> bool:
        """Whether it is time to look."""
        return len(self.losses) >= self.every

    def read(self, accelerator: Accelerator, stopping: Sequence[int], out: Path) -> tuple[list[float], bool]:
        """The losses of the steps since the last look, and whether any process has been asked to stop.

        Raises:
            TrainingError: a step that failed; it changed nothing. Its images are named.
        """
        pace = (time.monotonic() - self.since) / max(1, len(self.losses))
        asked = torch.tensor([float(len(stopping)), pace / accelerator.num_processes], device=accelerator.device)
        asked = accelerator.reduce(asked, "sum") if accelerator.num_processes > 1 else asked
        values = torch.stack([*self.losses, *(one.float() for one in self.failed), *asked]).tolist()
        losses, failed = values[: len(self.losses)], values[len(self.losses) : -2]
        for loss, wrong, (step, batch) in zip(losses, failed, self.batches, strict=True):
            if wrong:
                what = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
                names = ", ".join(sorted({str(p.example.path) for p in batch}))
                raise TrainingError(
                    f"{what} at step {step}, on {names}; the checkpoints in {out} are as they were. Look at these "
                    f"images, lower learning_rate or delora_lambda, or train with mixed_precision bf16 or no"
                )
        self.losses, self.failed, self.batches = [], [], []
        if accelerator.num_processes > 1:
            self.since, self.every = time.monotonic(), max(1, min(LOG_STEPS, int(LOOK / max(values[-1], 1e-3))))
        return losses, bool(values[-2])


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
    """A list that is non-empty once a signal asked for an end; a second Ctrl-C stops at once.

    Launchers and shells pass the first one on to a process that has had it from the terminal already. What `nohup`
    has switched off stays off.
    """
    seen: list[int] = []
    first = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if not seen:
            first = time.monotonic()
            log.warning("stopping after this step, with a checkpoint; Ctrl-C once more stops at once, without")
        elif number == signal.SIGINT and time.monotonic() - first > SAME_SIGNAL:
            raise KeyboardInterrupt
        seen.append(number)

    hangup = getattr(signal, "SIGHUP", None)
    numbers = [n for n in STOP_SIGNALS if n != hangup or signal.getsignal(n) != signal.SIG_IGN]
    try:
        before = {number: signal.signal(number, note) for number in numbers}
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
        try:
            accelerator.init_trackers("delora_diffusion", config={k: str(v) for k, v in options.flat().items()})
        except Exception as error:  # each tracker has its own, for a missing login or network
            raise OptionError(f"report_to {options.training.report_to}: {one_line(error)}; leave it out") from error
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
