"""Which layers of a module a `DeloraConfig` names: PEFT's rules.

Nothing in this file knows how an adapter works; see `delora.py` for that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .config import ALL_LINEAR, ATTENTION, PRESETS, TASK_TYPES, DeloraConfig, DeloraConfigError, _pattern_for
from .delora import DeloraLayer
from .fused import PARTS, is_fused
from .kinds import LINEAR, TRANSPOSED, Host, kind_of, why_not
from .patterns import compiled, starts_of
from .wrapped import layer_at, named_layers

#: nn.MultiheadAttention's `out_proj`: it reads the weight without calling the layer, whose hooks never run.
_NEVER_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear
#: Heads of transformers' classifiers, which a pretrained model comes without: random, so trained in full or not.
_NEW_HEADS = ("score", "classifier")
_ANY_CONTAINER = r"[^.]*"  # the first numbered one


def target_layers(module: nn.Module, config: DeloraConfig) -> dict[str, Host]:
    """The layers of `module` that `config` names, by dotted name, in module order.

    Raises:
        DeloraConfigError: nothing matched (the message lists the kinds of Linear there are), a layer of
            another kind was named, or a pattern of ranks or lambdas fits none of the matched layers.
    """
    found: dict[str, Any] = {}
    for name, child in adaptable(module):
        if not is_target(config, name, child, module):
            continue
        if isinstance(child, _NEVER_CALLED):
            raise DeloraConfigError(
                f"target_modules names {name!r}, whose weight nn.MultiheadAttention reads without calling the layer: "
                f"an adapter would not act; leave it out with exclude_modules"
            )
        if kind_of(child) is not None:
            found[name] = child
        elif isinstance(config.target_modules, list) or next(child.children(), None) is None:
            raise DeloraConfigError(
                f"target_modules names {name!r}, a {type(child).__name__}{why_not(child)}; DeLoRA adapts nn.Linear, "
                f"nn.Conv2d, nn.Embedding and transformers' Conv1D only: name such layers, or leave this one out with "
                f"exclude_modules"
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
    """Named submodules of `module`, without those that belong to an adapter injected earlier, or copy others."""
    inside = "\0"  # nothing begins so
    for name, child in named_layers(module):
        owner, _, leaf = name.rpartition(".")
        if isinstance(child, DeloraLayer):
            inside = f"{name}."
        copied = leaf in PARTS and is_fused(layer_at(module, owner), leaf)
        if name and not f"{name}.".startswith(inside) and not copied:
            yield name, child


def is_target(config: DeloraConfig, name: str, child: nn.Module, root: nn.Module) -> bool:
    """Whether `config` names the layer `name` (PEFT's rules)."""
    if config.exclude_modules and _named(config.exclude_modules, name):
        return False
    if any(within(saved, name) for saved in config.modules_to_save or ()):
        return False
    targets = ATTENTION if config.target_modules is None else config.target_modules
    if isinstance(child, _NEVER_CALLED) and targets in (ALL_LINEAR, *PRESETS, *PRESETS.values()):
        return False
    if targets == ALL_LINEAR:
        head = getattr(root, "get_output_embeddings", lambda: None)()
        new = hasattr(root, "base_model_prefix") and name.partition(".")[0] in _NEW_HEADS
        return kind_of(child) in (LINEAR, TRANSPOSED) and child is not head and not new
    exact = isinstance(targets, list) and name in targets  # PEFT: a whole name needs no layer index
    return exact or (_named(targets, name) and _in_layers(config, name))


def within(pattern: str, name: str) -> bool:
    """Whether the module `name` is one that `pattern` of `modules_to_save` names, or lies inside one."""
    ends = [*(found.start() for found in re.finditer(r"\.", name)), len(name)]
    spans = [(start, end) for start in starts_of(name) for end in ends if start < end]
    return any(compiled(pattern).fullmatch(name, *span) for span in spans)


def excluding(exclude: str | list[str] | None, names: Iterable[str]) -> str | list[str] | None:
    """`exclude_modules` that leaves out `names` as well."""
    names = list(names)
    if isinstance(exclude, str) and names:
        return "|".join(f"({pattern})" for pattern in (PRESETS.get(exclude, exclude), *map(re.escape, names)))
    return exclude if isinstance(exclude, str) else [*(exclude or ()), *names] or None


def _named(targets: str | list[str], name: str) -> bool:
    if isinstance(targets, str):
        return bool(compiled(PRESETS.get(targets, targets)).fullmatch(name))
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _in_layers(config: DeloraConfig, name: str) -> bool:
    if config.layers_to_transform is None or config.layers_to_transform == []:
        return True
    wanted = config.layers_to_transform
    patterns = config.layers_pattern or [_ANY_CONTAINER]
    numbered = [(found.start(), int(found[1])) for found in re.finditer(r"\.(?=(\d+)\.)", name)]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for start in starts_of(name)[pattern == _ANY_CONTAINER :]:
            for end, index in reversed(numbered):
                if start <= end and compiled(pattern).fullmatch(name, start, end):
                    return index in ([wanted] if isinstance(wanted, int) else wanted)
    return False


# ---- when nobody says which ---------------------------------------------------------------------

#: The choice that PEFT makes by `config.model_type`.
_MODEL_TYPES: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 "
    "qwen3",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("q", "v"): "t5 mt5",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("query_key_value",): "bloom gpt_neox falcon chatglm RefinedWeb RefinedWebModel",
    ("qkv_proj",): "codegen",
    ("Wqkv",): "mpt",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("c_proj", "c_attn"): "btlm",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}
#: {model type: names of the layers, or one regular expression}
TARGETS: dict[str, str | list[str]] = {
    name: list(layers) for layers, names in _MODEL_TYPES.items() for name in names.split()
} | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}


def only_layers(config: DeloraConfig, layers: Iterable[str]) -> DeloraConfig:
    """`config` for exactly these layers, by their whole names."""
    named = "|".join(re.escape(layer) for layer in layers)
    return dataclasses.replace(
        config, target_modules=named, exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )


def with_head(module: nn.Module, config: DeloraConfig) -> DeloraConfig:
    """`config` that saves the head of its task, where `module` has one: a new classification is trained in full."""
    saved = config.modules_to_save or []
    owners = {name.rpartition(".")[0] for name, _ in module.named_parameters()}
    heads = [head for head in TASK_TYPES.get(config.task_type or "", ()) if any(within(head, o) for o in owners)]
    new = [head for head in heads if head not in saved]
    return dataclasses.replace(config, modules_to_save=[*saved, *new]) if new else config


def with_targets(module: nn.Module, config: DeloraConfig) -> DeloraConfig:
    """`config` with `target_modules` filled in for `module`, if it names none.

    Raises:
        DeloraConfigError: a model type that is not listed, without layers of the usual attention names.
    """
    if config.target_modules is not None:
        return config
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if kind in TARGETS:
        return dataclasses.replace(config, target_modules=TARGETS[kind])
    if not any(is_target(config, name, child, module) for name, child in adaptable(module)):
        raise DeloraConfigError(
            f"target_modules is not given, and there is no default for {kind or type(module).__name__!r}; "
            f'give names of Linear layers, or "all-linear"'
        )
    return dataclasses.replace(config, target_modules=ATTENTION)
