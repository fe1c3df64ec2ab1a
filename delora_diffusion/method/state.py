"""The tensors of an adapter: read them out of a module, load them into one, measure them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import DeloraError
from .config import DeloraConfig
from .delora import INIT_TENSOR_NAMES, TENSOR_NAMES
from .inject import delora_adapters, delora_layers, names_in_full, record_of, value_of
from .kinds import known_kind
from .targets import target_layers
from .weights import norms_off

#: Between a layer's name and an adapter's, in the module's own names.
IN_MODULE = ".delora.adapters."


def delora_state_dict(
    module: nn.Module,
    adapter_name: str = "default",
    *,
    at_current_weight: bool = False,
    gathered: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The adapter's tensors: `<layer>.delora_A` (r, in), or (r, in, kh, kw) of a convolution, `.delora_B` (out, r),
    `.delora_lambda` (1,), `.delora_w_norm` (in,), or (in * kh * kw,); `_init` copies for a residual adapter;
    parameters trained in full under their own names.

    Args:
        at_current_weight: multiply lambda by the weight the adapter has now, as `set_delora_adapters` gave it.
        gathered: the module's state dict, where its own parameters are spread over processes.
    """
    tensors, values = {}, gathered or {}
    for name, adapter in delora_adapters(module, adapter_name).items():
        for leaf, own in adapter.tensors().items():
            tensor = values.get(f"{name}{IN_MODULE}{adapter_name}.{leaf}", own).detach().view_as(own)
            scaled = at_current_weight and leaf.startswith("delora_lambda")
            tensors[f"{name}.{leaf}"] = tensor * adapter.delora_weight.to(tensor.device) if scaled else tensor
    full = record_of(module).values_in_full(module, adapter_name)
    return tensors | {name: values.get(name, parameter).detach() for name, parameter in full.items()}


@dataclass(frozen=True)
class StateReport:
    """What was filled: adapted layers, parameters trained in full, and how far the base's column norms are from those
    that the adapter was trained on (the largest relative difference of a layer; None if not compared)."""

    layers: int
    in_full: int
    base_off: float | None


def check_fits(module: nn.Module, config: DeloraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that an adapter of this configuration in `module` does not have, before it is made: the sizes in
    a file's configuration may be any.

    Raises:
        ValueError: as `load_delora_state_dict` does.
    """
    targets = target_layers(module, config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, linear in targets.items():
        kind, rank = known_kind(linear), config.rank_of(name)
        inputs = kind.inputs(linear)
        sizes = ((rank, *inputs), (kind.outputs(linear), rank), (1,), (math.prod(inputs),))
        shapes |= {f"{name}.{leaf}": size for leaf, size in zip(TENSOR_NAMES, sizes, strict=True)}
        if config.init_weights == "residual":
            shapes |= {f"{name}.{leaf}": size for leaf, size in zip(INIT_TENSOR_NAMES, sizes, strict=False)}
    full = names_in_full(module, config, targets)
    _compare(module, shapes | {name: tuple(value_of(module, name).shape) for name in full}, tensors)


@torch.no_grad()
def load_delora_state_dict(
    module: nn.Module, tensors: dict[str, Tensor], adapter_name: str = "default", *, check_base: bool = True
) -> StateReport:
    """Fill an injected adapter from `delora_state_dict`'s tensors. Nothing is changed unless everything fits.

    Args:
        check_base: compare the stored column norms with those of `module`. The stored ones are used either way, so
            that the update is the one that was trained.

    Raises:
        ValueError: missing, left-over, misshapen or non-finite tensors, or another base; with counts and names.
    """
    present = delora_state_dict(module, adapter_name)
    _compare(module, {name: tuple(tensor.shape) for name, tensor in present.items()}, tensors)
    if other := [n for n, t in present.items() if tensors[n].is_floating_point() != t.is_floating_point()]:
        raise DeloraError(f"{other[0]} is {tensors[other[0]].dtype}, not {present[other[0]].dtype}; it is damaged")
    off = _check_base(module, present, tensors) if check_base else None
    for name, tensor in present.items():
        tensor.copy_(tensors[name])
    layers = delora_adapters(module, adapter_name)
    return StateReport(len(layers), len(record_of(module).trained_in_full[adapter_name]), off)


def _compare(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those of an adapter of these names and shapes."""
    problems = [
        _listed("missing", [name for name in shapes if name not in tensors]),
        _listed("unexpected", [name for name in tensors if name not in shapes]),
        _listed(
            "of another shape",
            [
                f"{name} {tuple(tensors[name].shape)} for {shape}"
                for name, shape in shapes.items()
                if name in tensors and tuple(tensors[name].shape) != shape
            ],
        ),
        _listed("not finite", [name for name, tensor in tensors.items() if not tensor.isfinite().all()]),
    ]
    if any(problems):
        raise DeloraError(f"adapter does not fit {type(module).__name__}: {'; '.join(filter(None, problems))}")


def _check_base(module: nn.Module, present: dict[str, Tensor], tensors: dict[str, Tensor]) -> float | None:
    """The largest difference of a layer's column norms, or an error where it is that of another base."""
    layers = delora_layers(module)
    largest = None
    for name in (n for n in present if n.endswith(".delora_w_norm") and not present[n].is_meta):
        off, fits = norms_off(layers[name.removesuffix(".delora_w_norm")], tensors[name])
        largest = max(off, largest or 0.0)
        if not fits:
            raise DeloraError(
                f"adapter was trained on another base than this {type(module).__name__}: the column norms of "
                f"{name.removesuffix('.delora_w_norm')} differ by {off:.1%}; load the base it was trained on, or pass "
                f"check_base=False to apply it all the same"
            )
    return largest


def _listed(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


@torch.no_grad()
def update_norms(module: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """|dW|_F / |W|_F of every adapted layer, at the adapter's current weight (see `LowRank.norm`)."""
    ratios = {
        name: adapter.factors().norm() / torch.linalg.vector_norm(adapter.delora_w_norm)
        for name, adapter in delora_adapters(module, adapter_name).items()
    }
    return dict(zip(ratios, torch.stack(list(ratios.values())).tolist(), strict=True))


@torch.no_grad()
def current_lambdas(module: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """lambda of every adapted layer, times the weight that the adapter has now."""
    values = {n: a.delora_lambda * a.delora_weight for n, a in delora_adapters(module, adapter_name).items()}
    return dict(zip(values, torch.cat(list(values.values())).tolist(), strict=True))


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """How many parameters of a module are trained, and how many there are."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def print_trainable_parameters(module: nn.Module) -> None:
    """Print how many parameters are trained, of how many, in PEFT's words."""
    trained, total = count_parameters(module)
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")
