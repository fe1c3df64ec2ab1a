"""Optimiser, learning-rate schedule and moving average of the trained parameters.

The update of a DeLoRA depends on the directions of a_i and b_i alone. Two functions here make training depend on
nothing else either: `set_lengths` measures the initial lengths in learning rates, and `relative_gradients` takes the
current lengths out of the gradients. The learning rate then cancels, and what a run does depends little on its number
of steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MissingExtraError
from ..method.delora import NORM_FLOOR, DeloraAdapter
from .config import TrainingConfig

TURN_STEPS = 100  # the length of run whose turn `direction_turn` is


def trained_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Everything that is trained in the adapted components, by component and name."""
    return {f"{c}.{n}": p for c, module in modules.items() for n, p in module.named_parameters() if p.requires_grad}


def make_optimizer(modules: Mapping[str, nn.Module], training: TrainingConfig) -> torch.optim.Optimizer:
    """The named optimiser over directions and strengths, without weight decay.

    Directions A and B (and what is trained in full) have `learning_rate` (`text_encoder_lr` in a text encoder), the
    strengths lambda `lambda_learning_rate`; with 0 they are frozen. Prodigy estimates one rate for all groups, so
    there lambda shares that of A and B.

    Args:
        modules: adapted components by name, the denoiser first.

    Raises:
        MissingExtraError: the optimiser's package is missing; the message names the extra that brings it.
    """
    lambdas: list[nn.Parameter] = []
    groups: list[dict[str, Any]] = []
    for number, module in enumerate(modules.values()):
        strengths = [child.delora_lambda for child in module.modules() if isinstance(child, DeloraAdapter)]
        if training.lambda_learning_rate == 0:
            for parameter in strengths:
                parameter.requires_grad_(False)
        lambdas += [p for p in strengths if p.requires_grad]
        known = {id(p) for p in strengths}
        rate = training.learning_rate if number == 0 or training.text_encoder_lr is None else training.text_encoder_lr
        groups.append(
            {"params": [p for p in module.parameters() if p.requires_grad and id(p) not in known], "lr": rate}
        )
    if lambdas:
        shared = training.optimizer == "prodigy"
        groups.append({"params": lambdas, "lr": training.learning_rate if shared else training.lambda_learning_rate})
    betas = (training.adam_beta1, training.adam_beta2)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=training.adam_epsilon, weight_decay=0.0, fused=True)
    if training.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MissingExtraError(
                'optimizer adamw8bit needs bitsandbytes: pip install "delora_diffusion[adamw8bit]"'
            ) from error
        optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=betas, eps=training.adam_epsilon, weight_decay=0.0)
        return optimizer
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        needed = 'optimizer prodigy needs prodigyopt: pip install "delora_diffusion[prodigy]"'
        raise MissingExtraError(needed) from error
    optimizer = Prodigy(
        groups, lr=training.learning_rate, betas=betas, eps=training.adam_epsilon, weight_decay=0.0,
        beta3=training.prodigy_beta3, use_bias_correction=training.prodigy_use_bias_correction,
        safeguard_warmup=training.prodigy_safeguard_warmup,
    )  # fmt: skip
    return optimizer


@torch.no_grad()
def set_lengths(modules: Mapping[str, nn.Module], training: TrainingConfig) -> None:
    """Scale the initial A and B to an RMS of 10 learning_rate (max_train_steps / 100)^(3/4) / direction_turn.

    Zeros stay, and no update changes. Adam moves an entry by at most about learning_rate a step, mostly to and fro, so
    over 100 steps noise turns a direction by about `direction_turn` radians, whatever the learning rate and the width
    of the layer. In N times as many steps noise turns it sqrt(N) times as far, and a steady gradient N times: with
    N^(3/4) longer runs turn a little less by noise and a little more by what is learnt (other powers: see
    tests/benchmarks). Prodigy, which finds a rate of its own, and direction_turn 0 keep the lengths of the start.
    """
    if training.optimizer == "prodigy" or not training.direction_turn or not training.learning_rate:
        return
    runs = training.max_train_steps / TURN_STEPS
    length = training.learning_rate * math.sqrt(TURN_STEPS) * runs**0.75 / training.direction_turn
    for module in modules.values():
        for adapter in (child for child in module.modules() if isinstance(child, DeloraAdapter)):
            for name in ("delora_A", "delora_B"):
                matrix, subtracted = getattr(adapter, name), getattr(adapter, f"{name}_init", None)
                if rms := float(matrix.square().mean().sqrt()):
                    matrix.mul_(length / rms)
                    if subtracted is not None:  # the same rounding, so that both still cancel
                        subtracted.mul_(length / rms)


@torch.no_grad()
def relative_gradients(modules: Mapping[str, nn.Module]) -> None:
    """Multiply the gradient of every a_i and b_i by its length, which makes it that of a relative change.

    The update does not depend on the lengths, so their gradients fall as 1 / length. B starts at zero: unscaled, the
    first minibatch's gradient is up to 10^4 times the later ones, and Adam, which divides by the RMS over some
    1 / (1 - beta2) steps, would leave B where that one minibatch put it.
    """
    shapes: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for module in modules.values():
        for adapter in (child for child in module.modules() if isinstance(child, DeloraAdapter)):
            for matrix, along in ((adapter.delora_A, -1), (adapter.delora_B, -2)):
                if matrix.grad is not None:
                    shapes.setdefault((along, matrix.shape, matrix.device), []).append(matrix)
    for (along, *_), matrices in shapes.items():  # a few operations for all layers of a shape
        lengths = torch.linalg.vector_norm(torch.stack(list(matrices)), dim=along, keepdim=True)
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        torch._foreach_mul_(gradients, lengths.clamp_(min=NORM_FLOOR).unbind())


def make_schedule(optimizer: torch.optim.Optimizer, training: TrainingConfig) -> Any:
    """The named learning-rate schedule, counted in optimiser steps."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        training.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=training.lr_warmup_steps,
        num_training_steps=training.max_train_steps,
        num_cycles=training.lr_num_cycles,
        power=training.lr_power,
    )


@torch.no_grad()
def ema_update(average: dict[str, Tensor], parameters: Mapping[str, nn.Parameter], decay: float, step: int) -> None:
    """average <- d average + (1 - d) parameter, with d = min(decay, (1 + step) / (10 + step)): it starts fast."""
    keep = min(decay, (1 + step) / (10 + step))
    for name, parameter in parameters.items():
        average[name].lerp_(parameter, 1 - keep)
