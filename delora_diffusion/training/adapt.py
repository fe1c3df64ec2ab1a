"""From options to adapters: the configuration of each component, and the adapters in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..base.speed import compile_blocks
from ..families import Family
from ..method.config import ALL_LINEAR, PRESETS, DeloraConfig
from ..method.inject import adapted_layers, inject_delora
from ..method.kinds import known_kind
from ..method.targets import excluding, target_layers
from ..options import OptionError
from ..seeds import derived_seed
from .config import AdapterConfig, Options
from .initial import fill, part_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def denoiser_config(adapter: AdapterConfig, dead: Sequence[str]) -> DeloraConfig:
    """The denoiser's, without the layers `dead` that do nothing."""
    return DeloraConfig(
        r=adapter.rank,
        **_strength(adapter, adapter.delora_lambda),
        target_modules=adapter.target_modules,
        exclude_modules=excluding(adapter.exclude_modules, dead),
        rank_pattern=adapter.rank_pattern,
        lambda_pattern=adapter.lambda_pattern,
        module_dropout=adapter.module_dropout,
        bias=adapter.bias,
        init_weights=adapter.init_weights,
    )


def text_encoder_config(adapter: AdapterConfig, dead: Sequence[str]) -> DeloraConfig:
    """A text encoder's: names and patterns of layers are the denoiser's; here it is a preset, or the attention."""
    strength = adapter.delora_lambda if adapter.text_encoder_lambda is None else adapter.text_encoder_lambda
    return DeloraConfig(
        r=adapter.text_encoder_rank or adapter.rank,
        **_strength(adapter, strength),
        target_modules=adapter.target_modules if adapter.target_modules in (*PRESETS, ALL_LINEAR) else None,
        exclude_modules=excluding(None, dead),
        module_dropout=adapter.module_dropout,
        init_weights=adapter.init_weights,
    )


def check_ranks(layers: Mapping[str, nn.Module], config: DeloraConfig) -> None:
    """Refuse ranks that a layer cannot have: more directions than its width an update does not have.

    Raises:
        OptionError: the first such layer, with the way out.
    """
    for name, layer in layers.items():
        kind = known_kind(layer)
        rank, most = config.rank_of(name), min(math.prod(kind.inputs(layer)), kind.outputs(layer))
        if rank > most:
            raise OptionError(
                f"the rank of {name} is {rank}, and it is only {most} wide; give a lower rank, "
                f'rank_pattern {{"{name}": {most}}}, or leave it out with exclude_modules'
            )


def adapt(
    pipe: DiffusionPipeline, family: Family, config: DeloraConfig, options: Options, initial: Adapter | None = None
) -> dict[str, nn.Module]:
    """Put an adapter into the denoiser, and into the text encoders that the pipeline still has: they are trained.

    Args:
        config: the denoiser's.
        initial: the adapter to go on from.

    Returns:
        The adapted components, in training mode, the denoiser first.

    Raises:
        OptionError: compile where it cannot be, or an adapter that does not fit.
    """
    components = (family.denoiser, *family.text_encoders)
    modules = {name: module for name in components if (module := getattr(pipe, name, None)) is not None}
    for number, (name, module) in enumerate(modules.items()):
        part = part_of(initial, name, module) if initial and (number == 0 or name in initial.tensors) else None
        usual = config if number == 0 else text_encoder_config(options.adapter, family.dead_layers(name, module))
        if number and not part:
            check_ranks(target_layers(module, usual), usual)
        inject_delora(module, part[0] if part else usual, generator=_generator(options, number))
        if part:
            fill(module, part, source=options.adapter.initial_adapter)
    for name, module in modules.items():
        for _, layer in adapted_layers(module):  # the layer's own weight may wait in the host's memory
            layer.to(next(module.parameters()).device)
        module.train()
        if options.training.gradient_checkpointing and name == family.denoiser:
            module.enable_gradient_checkpointing()
        elif options.training.gradient_checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": False})
    if options.training.compile:
        compile_blocks(modules[family.denoiser], next(modules[family.denoiser].parameters()).device)
    return modules


def _strength(adapter: AdapterConfig, delora_lambda: float | None) -> dict[str, Any]:
    return {"relative_lambda": adapter.relative_lambda} if delora_lambda is None else {"delora_lambda": delora_lambda}


def _generator(options: Options, component: int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(options.training.seed, "init", component))
