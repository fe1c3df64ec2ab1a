"""Which layers of a module a `DeloraConfig` names: PEFT's rules.

Nothing in this file knows how an adapter works; see `delora.py` for that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from .config import (
    ALL_LINEAR,
    ATTENTION,
    PRESETS,
    DeloraConfig,
    DeloraConfigError,
    _pattern_for,
)


def target_linears(module: nn.Module, config: DeloraConfig) -> dict[str, nn.Linear]:
    """The Linear layers of `module` that `config` names, by dotted name, in module order.

    Raises:
        DeloraConfigError: nothing matched (the message lists the kinds of Linear there are), a layer that is not
            Linear was named, or a pattern of ranks or lambdas fits none of the matched layers.
    """
    found: dict[str, nn.Linear] = {}
    for name, child in adaptable(module):
        if not is_target(config, name, child, module):
            continue
        if isinstance(child, nn.Linear):
            found[name] = child
        elif isinstance(config.target_modules, list) or next(child.children(), None) is None:
            raise DeloraConfigError(
                f"target_modules names {name!r}, a {type(child).__name__}; DeLoRA adapts nn.Linear only: "
                f"name Linear layers, or leave this one out with exclude_modules"
            )
    if not found:
        kinds = sorted({name.rpartition(".")[2] for name, child in adaptable(module) if isinstance(child, nn.Linear)})
        raise DeloraConfigError(
            f"target_modules {config.target_modules or ATTENTION!r} matched none of the layers of "
            f"{type(module).__name__}; its Linear layers end in: {', '.join(kinds) or '(there are none)'}"
        )
    for what, patterns in (("rank_pattern", config.rank_pattern), ("lambda_pattern", config.lambda_pattern)):
        for pattern in patterns:
            if not any(_pattern_for([pattern], name) == pattern for name in found):
                raise DeloraConfigError(
                    f"{what} {pattern!r} fits none of the {len(found)} adapted layers, e.g. {next(iter(found))!r}"
                )
    return found


def adaptable(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named submodules of `module`, without those that belong to an adapter injected earlier."""
    for name, child in module.named_modules():
        if name and "delora" not in name.split("."):
            yield name, child


def is_target(config: DeloraConfig, name: str, child: nn.Module, root: nn.Module) -> bool:
    """Whether `config` names the layer `name` (PEFT's rules)."""
    if config.exclude_modules and _named(config.exclude_modules, name):
        return False
    if any(within(saved, name) for saved in config.modules_to_save or ()):
        return False
    targets = ATTENTION if config.target_modules is None else config.target_modules
    if targets == ALL_LINEAR:
        head = getattr(root, "get_output_embeddings", lambda: None)()
        return isinstance(child, nn.Linear) and child is not head
    exact = isinstance(targets, list) and name in targets  # PEFT: a whole name needs no layer index
    return exact or (_named(targets, name) and _in_layers(config, name))


def within(pattern: str, name: str) -> bool:
    """Whether the module `name` is one that `pattern` of `modules_to_save` names, or lies inside one."""
    return re.match(rf"(^|.*\.){pattern}($|\..*)", name) is not None


def excluding(exclude: str | list[str] | None, names: Iterable[str]) -> str | list[str] | None:
    """`exclude_modules` that leaves out `names` as well."""
    names = list(names)
    if isinstance(exclude, str) and names:
        return "|".join(f"({pattern})" for pattern in (PRESETS.get(exclude, exclude), *map(re.escape, names)))
    return exclude if isinstance(exclude, str) else [*(exclude or ()), *names] or None


def _named(targets: str | list[str], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(PRESETS.get(targets, targets), name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _in_layers(config: DeloraConfig, name: str) -> bool:
    if config.layers_to_transform is None or config.layers_to_transform == []:
        return True
    wanted = config.layers_to_transform
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        prefix = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        if match := re.match(rf"{prefix}{pattern}\.(\d+)\.", name):
            return int(match.group(1)) in ([wanted] if isinstance(wanted, int) else wanted)
    return False
