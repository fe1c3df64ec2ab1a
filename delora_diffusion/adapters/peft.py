"""PEFT's form of an adapter, translated in both directions: names of tensors, and `adapter_config.json`.

PEFT's DeLoRA has the same formula and the same tensors, so most of this is renaming. Four things are not:

* PEFT has no residual adapter. Its two updates, dW - dW_0, are written as one adapter of rank 2r (`_as_one`), exactly.
* The targets None and "all-linear", regular expressions and what presets exclude are written as the names of the
  layers themselves: PEFT refuses "all-linear" outside transformers, and regular expressions that also match a
  container of layers, and knows no presets.
* PEFT has no relative lambda: the lambdas that follow from it are written.
* A bias of an adapted layer is called `<layer>.base_layer.bias` in PEFT.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DeloraError
from ..method.config import CONFIG_NAME as CONFIG_NAME
from ..method.config import PRESETS, TASK_TYPES, DeloraConfig
from ..method.delora import NORM_FLOOR, TENSOR_NAMES
from ..method.patterns import compiled, starts_of
from ..method.targets import within
from .adapter import Adapter, adapted, in_full, layer_tensors

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
#: In a header: layers of other kinds than Linear.
NOT_LINEAR = "not_linear"


class PeftFormatError(DeloraError):
    """Something that PEFT's form cannot hold; the message says why, and the way out."""


def from_peft(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[DeloraConfig, dict[str, Tensor]]:
    """Our configuration and tensors from a PEFT folder's.

    Raises:
        TypeError, ValueError: values that no configuration can have.
    """
    layers = {key.removeprefix(PREFIX).removesuffix(".delora_A") for key in tensors if key.endswith(".delora_A")}
    config = dataclasses.replace(DeloraConfig.from_peft_fields(values), inference_mode=False)  # PEFT's are all True
    named = {}
    for key, tensor in tensors.items():
        name = _plain_name(key.removeprefix(PREFIX), layers, config)
        if name is not None:
            named[name] = tensor
    return dataclasses.replace(config, modules_to_save=_saved_in(config, named)), named


def _plain_name(name: str, layers: Container[str], config: DeloraConfig) -> str | None:
    """A tensor's name without what PEFT wraps modules in; None for what is the base's.

    PEFT wraps an adapted layer in `base_layer`, and a module of `modules_to_save` in two. It writes more of the base
    than it needs: the weight of an adapted output layer, and what modules that are saved stand in for.
    """
    if ".delora_w_norm." in name:  # PEFT takes it for a module called norm, and writes it again beside itself
        return None
    owner, _, leaf = name.rpartition(".")
    host = owner.removesuffix(".base_layer")
    if host != owner and host in layers:
        return f"{host}.{leaf}" if leaf == "bias" and config.bias != "none" else None
    for wrapper in ("modules_to_save", "original_module"):
        module, found, rest = name.partition(f".{wrapper}.")
        if found and any(_ends_in(module, pattern) for pattern in config.modules_to_save or ()):
            return None if wrapper == "original_module" else f"{module}.{rest}"
    return name


def _saved_in(config: DeloraConfig, named: Mapping[str, Tensor]) -> list[str] | None:
    """`modules_to_save` of a file: of the names that a head may have, those that it has, and embeddings, which PEFT
    writes without saying so where they have been resized or asked for."""
    full, biases = in_full(named), config.bias == "all"
    patterns = [
        pattern
        for pattern in config.modules_to_save or ()
        if pattern not in TASK_TYPES.get(config.task_type or "", ())
        or any(within(pattern, name.rpartition(".")[0]) for name in full)
    ]
    owners = dict.fromkeys(name.rpartition(".")[0] for name in full if not (biases and name.endswith(".bias")))
    adapted_ones = set(adapted(named))
    others = [o for o in owners if o not in adapted_ones and not any(within(pattern, o) for pattern in patterns)]
    return [*patterns, *map(re.escape, others)] or None


def _ends_in(name: str, pattern: str) -> bool:
    """Whether a pattern of `modules_to_save` names the module `name` itself."""
    return any(compiled(pattern).fullmatch(name, start) for start in starts_of(name))


def to_peft(config: DeloraConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of `adapter_config.json` and the tensors of `adapter_model.safetensors`.

    The adapter opens in PEFT with the same outputs. To train on from a residual adapter is something else there: its
    frozen copy is trained as well.

    Args:
        tensors: one component's, as `delora_state_dict` names them.
    """
    layers = adapted(tensors)
    residual = any(name.endswith(".delora_A_init") for name in tensors)
    named: dict[str, Tensor] = {}
    for layer in layers:
        own = layer_tensors(layer, tensors)
        own = _as_one(own) if "delora_A_init" in own else own
        named |= {f"{PREFIX}{layer}.{leaf}": own[leaf] for leaf in TENSOR_NAMES}
    for name, tensor in in_full(tensors).items():
        owner, _, leaf = name.rpartition(".")
        named[f"{PREFIX}{owner}.base_layer.{leaf}" if owner in layers else PREFIX + name] = tensor
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in named.items()}
    config = _absolute(config, {layer: tensors[f"{layer}.delora_w_norm"].numel() for layer in layers})
    return _fields(config, layers, residual=residual, saved=saved_modules(config, tensors)), plain


def saved_modules(config: DeloraConfig, tensors: Iterable[str]) -> list[str]:
    """Full names of the modules that `modules_to_save` names, as far as an adapter's tensors tell."""
    found: dict[str, None] = {}
    for name in tensors:
        parts = name.split(".")
        owners = [".".join(parts[:length]) for length in range(1, len(parts))]
        for pattern in config.modules_to_save or ():
            whole = [owner for owner in owners if _ends_in(owner, pattern)]
            if within(pattern, ".".join(parts[:-1])) and whole:
                found[whole[0]] = None
    return list(found)


def check_expressible(module: nn.Module, config: DeloraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuse `modules_to_save` that PEFT would not find complete in the file.

    PEFT saves every module whose name *ends* in the given text, and all of its buffers.

    Raises:
        PeftFormatError: naming what would be missing.
    """
    saved = saved_modules(config, tensors)
    if own := [name for name in saved if "delora_w_norm".endswith(name)]:
        raise PeftFormatError(
            f"PEFT cannot open this adapter: it would take its own delora_w_norm for the module {own[0]!r} of "
            f"modules_to_save; keep the native file, or merge the adapter into the base (delora merge)"
        )
    for name, child in module.named_modules() if saved else ():
        keys = child.state_dict() if name.endswith(tuple(saved)) else ()
        if missing := [key for key in keys if f"{name}.{key}" not in tensors]:
            raise PeftFormatError(
                f"PEFT cannot open this adapter: for modules_to_save {config.modules_to_save} it expects "
                f"{name}.{missing[0]} in the file, which is not trained; keep the native file, or merge the "
                f"adapter into the base (delora merge)"
            )


def not_linear(modules: Mapping[str, nn.Module], tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """What an adapter's header says of its layers that are not Linear, which PEFT's DeLoRA cannot hold; {} of none.

    Args:
        modules: that carry it, by component.
        tensors: its tensors, by component.
    """
    others = [
        f"{component}.{layer}".lstrip(".")
        for component, named in tensors.items()
        for layer in adapted(named)
        if not isinstance(modules[component].get_submodule(layer), nn.Linear)
    ]
    return {NOT_LINEAR: f"{len(others)} layers ({', '.join(others[:3])})"} if others else {}


def check_kinds(adapter: Adapter) -> None:
    """Refuse layers that PEFT's DeLoRA does not adapt.

    Raises:
        PeftFormatError: naming some.
    """
    convolutions = [n for named in adapter.tensors.values() for n in adapted(named) if named[f"{n}.delora_A"].ndim > 2]
    if found := adapter.provenance.get(NOT_LINEAR) or ", ".join(convolutions[:3]):
        raise PeftFormatError(
            f"PEFT's DeLoRA adapts nn.Linear only, and this adapter is for others too: {found}; keep the native file, "
            f"export a LoRA (delora export, which holds convolutions), or merge it into the base"
        )


def exactly(layers: Iterable[str]) -> str:
    """A regular expression for `target_modules` that matches these layers and nothing else."""
    return "|".join(re.escape(layer) for layer in layers)


def _as_one(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The difference of two updates as one adapter of rank 2r, exactly.

    In one adapter every component has the same strength, lambda' / r'. With r' = 2r and lambda' = 2 max(|lambda|,
    |lambda_0|) that is right for the stronger half. A component of the other must be weaker by s < 1, and the floor f
    of the norms can say so: |b| below f is divided by f and not by |b|, so b' = s f b / max(|b|, f) gives s b / |b|.
    """
    strengths = layer["delora_lambda"].float(), -layer["delora_lambda_init"].float()
    strongest = max(float(strength.abs()) for strength in strengths)
    halves = []
    for B, strength in zip((layer["delora_B"].float(), layer["delora_B_init"].float()), strengths, strict=True):
        share = float(strength) / strongest if strongest else 0.0
        floored = B / torch.linalg.vector_norm(B, dim=0).clamp(min=NORM_FLOOR) * (share * NORM_FLOOR)
        halves.append(B * share if abs(share) == 1 else floored)
    return {
        "delora_A": torch.cat([layer["delora_A"], layer["delora_A_init"]]),
        "delora_B": torch.cat(halves, dim=1),
        "delora_lambda": torch.tensor([2 * strongest]),
        "delora_w_norm": layer["delora_w_norm"],
    }


def _absolute(config: DeloraConfig, inputs: Mapping[str, int]) -> DeloraConfig:
    """The same configuration with the lambdas that follow from a relative one, which PEFT does not know."""
    if config.relative_lambda is None:
        return config
    lambdas = {layer: config.lambda_of(layer, width) for layer, width in inputs.items()}
    ((usual, _),) = Counter(lambdas.values()).most_common(1)
    others = {re.escape(layer): value for layer, value in lambdas.items() if value != usual}
    return dataclasses.replace(config, relative_lambda=None, delora_lambda=usual, lambda_pattern=others)


def _fields(config: DeloraConfig, layers: list[str], *, residual: bool, saved: list[str]) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    del fields["relative_lambda"]
    if residual:
        fields |= {name: 2 * fields[name] for name in ("r", "delora_lambda")}
        for name in ("rank_pattern", "lambda_pattern"):
            fields[name] = {pattern: 2 * value for pattern, value in fields[name].items()}
    preset = isinstance(config.exclude_modules, str) and config.exclude_modules in PRESETS
    if preset or not isinstance(config.target_modules, list):
        chosen = ("exclude_modules", "layers_to_transform", "layers_pattern")
        fields |= {"target_modules": exactly(layers), **dict.fromkeys(chosen)}
    fields |= {"init_weights": config.init_weights == "zero", "modules_to_save": saved or None}
    return {**fields, "peft_type": "DELORA", "inference_mode": True}
