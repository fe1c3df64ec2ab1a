"""Which component of a pipeline an adapter is for, and what its layers are called there.

A PEFT folder does not say what it is for: the component whose layers it fits is taken. And transformers 5.6 took the
`text_model.` level out of CLIPTextModel: names are accepted with and without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping

from torch import Tensor, nn

from ..method.config import DeloraConfig, DeloraConfigError
from ..method.kinds import kind_of
from ..method.targets import target_layers
from ..method.wrapped import layer_at
from .adapter import Adapter, adapted
from .peft import exactly
from .safetensors_file import AdapterFileError

Part = tuple[DeloraConfig, dict[str, Tensor]]
_LEVEL = "text_model."


def assign(modules: Mapping[str, nn.Module], adapter: Adapter, component: str | None = None) -> dict[str, Part]:
    """For each component: the configuration and the tensors, by the names that component uses.

    Args:
        modules: the components that can carry an adapter.
        component: what an adapter of a single part is for; found by its layers if None.

    Raises:
        AdapterFileError: no tensors, a component that is not there, or a nameless part that fits none or several.
    """
    if not adapter.tensors:
        raise AdapterFileError("the adapter holds no tensors; there is nothing to load")
    if component is not None and len(adapter.tensors) > 1:
        raise AdapterFileError(
            f"component is {component!r}, but the adapter has parts for {', '.join(adapter.tensors)}; leave it out"
        )
    parts = {}
    for name, tensors in adapter.tensors.items():
        target = component or name or _fitting(modules, tensors)
        if target not in modules:
            raise AdapterFileError(f"the adapter is for {target!r}, but the pipeline has only {', '.join(modules)}")
        parts[target] = renamed(modules[target], adapter.configs[name], tensors)
    return parts


def part_for(module: nn.Module, adapter: Adapter) -> Part:
    """The part of an adapter that `module` has the layers of, by the names `module` uses.

    Raises:
        AdapterFileError: several parts, none of which fits.
    """
    fitting = {name: _fitting_layers(module, tensors) for name, tensors in adapter.tensors.items()}
    if not fitting or (len(fitting) > 1 and not max(fitting.values())):
        parts = ", ".join(fitting) or "nothing"
        raise AdapterFileError(f"the adapter is for {parts}; a {type(module).__name__} has layers of none of these")
    name = max(fitting, key=lambda part: fitting[part])
    return renamed(module, adapter.configs[name], adapter.tensors[name])


def renamed(module: nn.Module, config: DeloraConfig, tensors: Mapping[str, Tensor]) -> Part:
    """An adapter's tensors by the names that `module` uses, and a configuration that names those layers."""
    names = {name: _name_in(module, name) for name in tensors}
    moved = {names[name]: tensor for name, tensor in tensors.items()}
    if all(old == new for old, new in names.items()):
        return config, moved
    config = dataclasses.replace(
        config, modules_to_save=config.modules_to_save and [n.removeprefix(_LEVEL) for n in config.modules_to_save]
    )
    layers = {old: _name_in(module, f"{old}.delora_A").removesuffix(".delora_A") for old in adapted(tensors)}
    with contextlib.suppress(DeloraConfigError):
        if set(target_layers(module, config)) == set(layers.values()):
            return config, moved
    inputs = {old: tensors[f"{old}.delora_w_norm"].numel() for old in layers}
    plain = dataclasses.replace(config, lambda_pattern={})
    return dataclasses.replace(
        config,
        target_modules=exactly(layers.values()),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={
            re.escape(new): rank for old, new in layers.items() if (rank := config.rank_of(old)) != config.r
        },
        lambda_pattern={
            re.escape(new): lam
            for old, new in layers.items()
            if (lam := config.lambda_of(old, inputs[old])) != plain.lambda_of(old, inputs[old])
        },
    ), moved


def _fitting(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> str:
    """The component that has the most of an adapter's layers, with their sizes."""
    count = {
        name: sum(_fits(module, layer, tensors) for layer in adapted(tensors)) for name, module in modules.items()
    }
    best = [name for name, fitting in count.items() if fitting == max(count.values())]
    if not count or not max(count.values()):
        example = next(iter(adapted(tensors)), "(none)")
        raise AdapterFileError(
            f"none of {', '.join(modules)} has the adapter's layers (such as {example!r}) in their sizes; "
            f"load the base it was trained on"
        )
    if len(best) > 1:
        raise AdapterFileError(
            f"the adapter does not say what it is for, and fits {' and '.join(best)}; give component={best[0]!r}"
        )
    return best[0]


def _fitting_layers(module: nn.Module, tensors: Mapping[str, Tensor]) -> int:
    """How many of an adapter's layers `module` has, with their sizes."""
    return sum(_fits(module, layer, tensors) for layer in adapted(tensors))


def _fits(module: nn.Module, layer: str, tensors: Mapping[str, Tensor]) -> bool:
    A, B = tensors[f"{layer}.delora_A"], tensors.get(f"{layer}.delora_B")
    with contextlib.suppress(AttributeError):
        linear = layer_at(module, _name_in(module, f"{layer}.delora_A").removesuffix(".delora_A"))
        kind, sizes = kind_of(linear), (tuple(A.shape[1:]), B.shape[0] if B is not None else None)
        return kind is not None and sizes == (kind.inputs(linear), kind.outputs(linear))
    return False


def _name_in(module: nn.Module, name: str) -> str:
    """The name of a tensor in `module`: as it is, with, or without the `text_model.` level; as it is if all fail."""
    for candidate in (name, _LEVEL + name, name.removeprefix(_LEVEL)):
        with contextlib.suppress(AttributeError):
            module.get_submodule(candidate.rpartition(".")[0])
            return candidate
    return name
