"""Optimiser, learning-rate schedule and moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainingConfig
from .delora import DeloraAdapter


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
        ImportError: the optimiser's package is missing; the message names the extra that brings it.
    """
    lambdas: list[nn.Parameter] = []
    groups: list[dict[str, Any]] = []
    for number, module in enumerate(modules.values()):
        own = [child.delora_lambda for child in module.modules() if isinstance(child, DeloraAdapter)]
        if training.lambda_learning_rate == 0:
            for parameter in own:
                parameter.requires_grad_(False)
        lambdas += [p for p in own if p.requires_grad]
        known = {id(p) for p in own}
        rate = training.learning_rate if number == 0 or training.text_encoder_lr is None else training.text_encoder_lr
        groups.append(
            {"params": [p for p in module.parameters() if p.requires_grad and id(p) not in known], "lr": rate}
        )
    if lambdas:
        shared = training.optimizer == "prodigy"
        groups.append({"params": lambdas, "lr": training.learning_rate if shared else training.lambda_learning_rate})
    betas = (training.adam_beta1, training.adam_beta2)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=training.adam_epsilon, weight_decay=0.0)
    if training.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ImportError(
                'optimizer adamw8bit needs bitsandbytes: pip install "delora_diffusion[adamw8bit]"'
            ) from error
        optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=betas, eps=training.adam_epsilon, weight_decay=0.0)
        return optimizer
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ImportError('optimizer prodigy needs prodigyopt: pip install "delora_diffusion[prodigy]"') from error
    optimizer = Prodigy(groups, lr=training.learning_rate, betas=betas, eps=training.adam_epsilon, weight_decay=0.0)
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, training: TrainingConfig) -> Any:
    """The named learning-rate schedule, counted in optimiser steps."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        training.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=training.lr_warmup_steps,
        num_training_steps=training.max_train_steps,
    )


@torch.no_grad()
def ema_update(average: dict[str, Tensor], parameters: Mapping[str, nn.Parameter], decay: float, step: int) -> None:
    """average <- d average + (1 - d) parameter, with d = min(decay, (1 + step) / (10 + step)): it starts fast."""
    keep = min(decay, (1 + step) / (10 + step))
    for name, parameter in parameters.items():
        average[name].lerp_(parameter, 1 - keep)
