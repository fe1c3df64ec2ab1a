"""What the adapters of a module are doing, all layers together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .inject import active_delora_adapters, adapted_layers, delora_names, parameters_of
from .state import count_parameters


@dataclass(frozen=True, kw_only=True)
class ModelStatus:
    """The state of a model's adapters, by the names PEFT has for it."""

    base_model_type: str
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]  # of all parameters of an adapter
    available_adapters: list[str]


def model_status(module: nn.Module) -> ModelStatus:
    """What is adapted, what acts, what is merged and what is trained."""
    layers = [layer for _, layer in adapted_layers(module)]
    merged = {name for layer in layers for name in layer.merged}
    names = delora_names(module)
    trained, total = count_parameters(module)
    return ModelStatus(
        base_model_type=type(module).__name__,
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=all(layer.enabled for layer in layers),
        active_adapters=active_delora_adapters(module),
        merged_adapters=[name for name in names if name in merged],
        requires_grad={name: all(p.requires_grad for p in parameters_of(module, name)) for name in names},
        available_adapters=names,
    )
