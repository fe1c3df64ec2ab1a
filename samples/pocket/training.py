"""The training loop that all pocket models share: Muon, warm-up and cosine, EMA, checkpoints, resumption.

Randomness is seeded per step, so a resumed run sees the batches the uninterrupted one would have seen.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from muon import Muon, fast_dtype
from torch import nn

WARM_UP = 50  # steps
EDGES = ("embed", "conv_in", "conv_out", "token", "projection", "logit_scale")  # names that Muon leaves to AdamW
State = tuple[int, float, list[float]]  # steps done, seconds spent, the losses so far
Optimizers = tuple[torch.optim.Optimizer, torch.optim.Optimizer]


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train. The schedule ends after `steps` steps or `minutes` minutes, what comes first."""

    steps: int
    minutes: float
    batch: int
    muon_lr: float = 0.02  # of the weight matrices inside the network
    adam_lr: float = 2e-3  # of everything else
    ema_decay: float = 0.999
    weight_decay: float = 0.01
    report_every: int = 100  # steps
    save_every: int = 500  # steps


LossOf = Callable[[nn.Module, np.random.Generator, torch.Generator], torch.Tensor]


def train(model: nn.Module, loss_of: LossOf, *, plan: Plan, checkpoint: Path) -> nn.Module:
    """Train `model` in place, resuming from `checkpoint` if it exists; returns the EMA copy, in eval mode.

    `loss_of(model, rng, generator)` draws its own batch from the two generators.
    """
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = new_optimizers(model, plan)
    step, spent, losses = resume(model, ema, optimizers, checkpoint)
    print(f"{checkpoint.stem}: {count(model) / 1e6:.2f} M parameters, from step {step} of {plan.steps}", flush=True)
    clock = time.monotonic() - spent
    while step < plan.steps and (spent := time.monotonic() - clock) < 60 * plan.minutes:
        progress = max(step / plan.steps, spent / 60 / plan.minutes)
        rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))
        loss = loss_of(model, np.random.default_rng((17, step)), torch.Generator().manual_seed(step))
        model.zero_grad()
        loss.backward()
        for optimizer, lr in zip(optimizers, (plan.muon_lr, plan.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
            optimizer.step()
        step += 1
        follow(ema, model, decay=min(plan.ema_decay, step / (step + 10)))
        losses.append(loss.item())
        if step % plan.report_every == 0:
            mean = sum(losses[-plan.report_every :]) / plan.report_every
            print(f"{checkpoint.stem}: step {step} loss {mean:.5f} rate {rate:.2f} {spent / 60:.1f} min", flush=True)
        if step % plan.save_every == 0:
            save(model, ema, optimizers, checkpoint, state=(step, spent, losses))
    save(model, ema, optimizers, checkpoint, state=(step, spent, losses))
    return ema


def new_optimizers(model: nn.Module, plan: Plan) -> Optimizers:
    """Muon for the weight matrices inside the network, AdamW for the rest; the rates are set at every step."""
    inside = [p for n, p in model.named_parameters() if p.ndim >= 2 and not any(edge in n for edge in EDGES)]
    chosen = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=plan.adam_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return Muon(inside, lr=plan.muon_lr, weight_decay=plan.weight_decay), adam


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def follow(ema: nn.Module, model: nn.Module, *, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def save(model: nn.Module, ema: nn.Module, optimizers: Optimizers, path: Path, *, state: State) -> None:
    """Write a checkpoint that is either complete or absent."""
    content = {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "state": state,
    }
    aside = path.with_suffix(".partial")
    torch.save(content, aside)
    os.replace(aside, path)


def resume(model: nn.Module, ema: nn.Module, optimizers: Optimizers, path: Path) -> State:
    """Load a checkpoint in place if there is one; returns steps done, seconds spent and the losses so far."""
    if not path.exists():
        return 0, 0.0, []
    content = torch.load(path, weights_only=True)
    model.load_state_dict(content["model"])
    ema.load_state_dict(content["ema"])
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    step, spent, losses = content["state"]
    return step, spent, losses


def fast_autocast() -> torch.autocast:
    """Autocast to bfloat16, where this processor gains by it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() is torch.bfloat16)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in -1..1, channels last."""
    batch = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    return batch.float().div_(127.5).sub_(1)
