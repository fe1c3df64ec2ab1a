"""Strengths that differ by component and by block, in the forms that diffusers' `set_adapters` takes.

    0.7                                                       everywhere
    {"unet": 0.7, "text_encoder": 0.3}                        by component; 1 for those that are not named
    {"unet": {"down": 0.5, "mid": 1, "up": {"block_1": 0.2, "block_2": [0.1, 0.5, 1]}}}     by block of a UNet
    {"transformer": {"transformer_blocks.0": 0.5}}            by any path in a component; the longest one counts

A number is for all of its block, resnets too; a list has one number for each of the block's attentions (and the resnet
before it). What is not named stays at 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import DeloraError

#: A strength, or strengths by component, block or path.
Weight = float | Mapping[str, Any]


def listed(names: str | Sequence[str]) -> list[str]:
    """One name, or several, as a list.

    Raises:
        DeloraError: something that is no name.
    """
    several = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    for name in several:
        if not isinstance(name, str):
            raise DeloraError(f"{name!r} cannot be the name of an adapter; names are texts, such as 'dog'")
    return several


def number(value: Any, name: str) -> float:
    """A strength as a plain number; numpy's and torch's single numbers are taken.

    Raises:
        DeloraError: anything else; `name` says whose it is.
    """
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(plain, bool) or not isinstance(plain, (int, float)):
        raise DeloraError(f"the weight of {name!r} is {value!r}; it must be one number")
    return float(plain)


def weights_of(count: int, weights: Weight | Sequence[Weight]) -> list[Weight]:
    """A weight for each of `count` adapters: the one that is for all, or each its own.

    Raises:
        ValueError: another number of weights.
    """
    alone = isinstance(weights, Mapping) or not isinstance(weights, Iterable) or getattr(weights, "ndim", None) == 0
    values: list[Any] = [weights] * count if alone else list(weights)  # type: ignore[arg-type]
    if len(values) != count:
        raise DeloraError(f"{count} adapters but {len(values)} weights; give one weight, or one for each adapter")
    return values


def one_each(names: Sequence[str], weights: Weight | Sequence[Weight]) -> dict[str, Weight]:
    """Each adapter's weight by its name: the one that is for all, or the one in its place.

    Raises:
        ValueError: a number of weights that is not the number of names, or a name twice.
    """
    values = weights_of(len(names), weights)
    for name in names:
        if names.count(name) > 1:
            raise DeloraError(f"adapter {name!r} is named twice; give it one weight")
    return dict(zip(names, values, strict=True))


def component_weight(weight: Weight, component: str, known: Iterable[str]) -> Weight:
    """The part of `weight` that is for a component; 1 where it does not name it.

    Raises:
        ValueError: it names a component that is not among `known`.
    """
    if not isinstance(weight, Mapping):
        return weight
    for name in weight:
        if name not in known:
            raise DeloraError(f"there is no component {name!r} to weigh; there are {', '.join(known)}")
    part = weight.get(component, 1.0)
    return 1.0 if part is None else part


def layer_weights(weight: Weight, module: nn.Module, layers: Iterable[str]) -> dict[str, float]:
    """A strength for each of `layers` of a component: that of the longest path which holds it, else 1.

    Raises:
        ValueError: a path or block that `module` does not have, or a list that is not as long as the block.
    """
    layers = list(layers)
    if not isinstance(weight, Mapping):
        return dict.fromkeys(layers, number(weight, "adapter"))
    paths = _paths(weight, module)
    found = {}
    for layer in layers:
        holding = [path for path in paths if f"{layer}.".startswith(f"{path}.")]
        found[layer] = paths[max(holding, key=len)] if holding else 1.0
    return found


def _paths(weight: Mapping[str, Any], module: nn.Module) -> dict[str, float]:
    """Strengths by path, with the UNet's short names (down, mid, up, block_N, lists) written out."""
    paths: dict[str, float] = {}
    for key, value in weight.items():
        if key == "mid" and hasattr(module, "mid_block"):
            paths["mid_block"] = _single(value, "mid")
        elif key in ("down", "up") and hasattr(module, f"{key}_blocks"):
            if not isinstance(value, (Mapping, Sequence)):
                paths[f"{key}_blocks"] = number(value, key)
                continue
            blocks = enumerate(getattr(module, f"{key}_blocks"))
            attending = [f"block_{number}" for number, block in blocks if hasattr(block, "attentions")]
            for block, strength in (value if isinstance(value, Mapping) else dict.fromkeys(attending, value)).items():
                path = f"{key}_blocks.{str(block).removeprefix('block_')}"
                paths |= _of_block(path, strength, _submodule(module, path, f"{key}.{block}"))
        else:
            _submodule(module, key, key)
            paths[key] = _single(value, key)
    return paths


def _of_block(path: str, value: Any, block: nn.Module) -> dict[str, float]:
    """One strength for a block, or one for each of its attentions and the resnet beside it."""
    if not isinstance(value, Sequence):
        return {path: number(value, path)}
    count = len(getattr(block, "attentions", ()))
    values = [number(one, path) for one in value] * (count if len(value) == 1 else 1)
    if len(values) != count:
        raise DeloraError(f"{path} has {count} attentions, but {len(values)} weights are given; give 1 or {count}")
    return {f"{path}.{kind}.{n}": v for n, v in enumerate(values) for kind in ("attentions", "resnets")}


def _single(value: Any, name: str) -> float:
    if isinstance(value, Sequence) and len(value) == 1:
        value = value[0]
    return number(value, name)


def _submodule(module: nn.Module, path: str, asked: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        names = ", ".join(name for name, _ in module.named_children())
        raise DeloraError(
            f"there is no block {asked!r} in {type(module).__name__} to weigh; its parts are {names}"
        ) from error
