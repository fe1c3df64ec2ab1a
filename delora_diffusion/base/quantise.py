"""A base whose large layers are kept in fewer bits: int8 and float8 by torchao, NF4 by bitsandbytes.

Quantised are the Linear layers of the repeated blocks, where nearly all weights of a transformer are. Embedders,
norms, convolutions and the output layer stay. It is done after reading, layer by layer on the device, so that it works
for a base from anywhere, which is fingerprinted as it is in its files, and every layer knows the column norms of its
unquantised weight (`weights.note_norms`): an adapter has the same norms w on any precision of its base.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import MissingExtraError
from ..families import family_of
from ..method.weights import base_weight, is_quantised, keep_unpacked, note_norms
from .checks import BaseModelError
from .config import ModelConfig

log = logging.getLogger(__name__)
#: The package that each kind needs, which is the name of the extra as well.
PACKAGES = {"int8": "torchao", "float8": "torchao", "nf4": "bitsandbytes"}


def check_installed(model: ModelConfig) -> None:
    """Refuse what cannot be quantised here.

    Raises:
        MissingExtraError: a package is missing; the message names the extra that brings it.
    """
    for option in ("base_quantization", "text_encoder_quantization"):
        kind = getattr(model, option)
        if package := PACKAGES.get(kind):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise MissingExtraError(
                    f'{option} {kind} needs {package} ({error}): pip install "delora_diffusion[{package}]"'
                ) from error


def quantise_pipeline(pipe: Any, model: ModelConfig, device: torch.device) -> None:
    """Quantise the denoiser and the text encoders of a pipeline as the options say; raises what `quantise` raises."""
    family = family_of(pipe)
    quantise(getattr(pipe, family.denoiser), model.base_quantization, device)
    for name in family.text_encoders:
        if getattr(pipe, name, None) is not None:
            quantise(getattr(pipe, name), model.text_encoder_quantization, device)


def quantise(module: nn.Module, kind: str, device: torch.device, home: torch.device | None = None) -> None:
    """Put quantised layers in the place of the Linear layers of a module's repeated blocks.

    Args:
        kind: one of `config.QUANTIZATIONS`; "none" does nothing.
        device: where it is computed, layer by layer.
        home: where the new weights are afterwards; `device` if None.

    Raises:
        BaseModelError: a module that is quantised already, or has no such layers.
    """
    if kind == "none":
        return
    name = type(module).__name__
    if any(isinstance(part, nn.Linear) and is_quantised(part) for part in module.modules()):
        raise BaseModelError(
            f"this {name} is quantised in its files already; leave the option {kind} out, or give the unquantised base"
        )
    layers = dict(quantisable(module))
    if not layers:
        raise BaseModelError(f"this {name} has no Linear layers in repeated blocks to quantise to {kind}")
    for path, linear in layers.items():
        owner, _, leaf = path.rpartition(".")
        made = _quantised(linear, kind, device)
        if home is not None and home != device:
            _send(made, home)
        setattr(module.get_submodule(owner), leaf, made)
    keep_unpacked(module)
    log.info("%s: %d layers in %s", name, len(layers), kind)


def quantisable(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The Linear layers of a module's repeated blocks, without those that its class wants in fp32 (T5's `wo`)."""
    blocks = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, nn.ModuleList))
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and name.startswith(blocks) and not kept & set(name.split(".")):
            yield name, part


def _quantised(linear: nn.Linear, kind: str, device: torch.device) -> nn.Linear:
    weight, bias = linear.weight.data.to(device), linear.bias
    made: Any
    if kind == "nf4":
        made = _nf4(linear, weight)
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        made = QuantisedLinear(linear.in_features, linear.out_features, bias=bias is not None, device="meta")
        made.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(made, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
    if bias is not None:
        made.bias = nn.Parameter(bias.data.to(device), requires_grad=False)
    note_norms(made, torch.linalg.vector_norm(base_weight(linear), dim=0).cpu())
    made.requires_grad_(False).train(linear.training)
    return made  # type: ignore[no-any-return]


def _send(linear: nn.Linear, home: torch.device) -> None:
    """Move a quantised weight; the scales of bitsandbytes, which are small and no parameters, stay."""
    weight: Any = linear.weight
    if getattr(weight, "quant_state", None) is None:
        linear.weight = nn.Parameter(weight.data.to(home), requires_grad=False)
    else:
        weight.data = weight.data.to(home)


def _nf4(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """NF4 in blocks of 64, whose scales are in 8 bits (Dettmers et al. 2023)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    made = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    packed = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made)
    made.weight = packed.to(weight.device)
    made.register_forward_pre_hook(_to_autocast)
    return made  # type: ignore[no-any-return]


def _to_autocast(linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """bitsandbytes answers in the precision it was asked in; under autocast a Linear answers in that of autocast."""
    kind = args[0].device.type
    return (args[0].to(torch.get_autocast_dtype(kind)),) if torch.is_autocast_enabled(kind) else args


def quantised_bytes(linear: nn.Linear, kind: str, dtype: torch.dtype) -> int:
    """Bytes that the weight of a Linear takes when it is quantised from `dtype`; "none": as it is."""
    count = linear.in_features * linear.out_features
    if kind == "none":
        return count * dtype.itemsize
    if kind == "nf4":  # half a byte; one for the scale of 64; four for 256 of these, and two tables
        blocks = -(-count // 64)
        return -(-count // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)
    return count + linear.out_features * (5 if kind == "int8" else 4)  # a scale for each row, and a zero point


class QuantisedLinear(nn.Linear):
    """A frozen Linear whose weight torchao keeps in 8 bits.

    As such a layer is, it keeps its weight plain from the forward to the backward pass; this one forms it twice.
    """

    def forward(self, input: Tensor) -> Tensor:
        """y = W x + b (..., out) for x (..., in)."""
        y: Tensor = _FormedTwice.apply(input, self.bias, self)  # type: ignore[no-untyped-call]
        return y

    def formed(self) -> Tensor:
        """The weight as plain numbers (out, in). torchao's own way has five times the memory alive meanwhile."""
        weight: Any = self.weight
        plain: Tensor = weight.qdata.to(weight.dtype).mul_(weight.scale)
        return plain


class _OutlinedLinear(QuantisedLinear):
    def formed(self) -> Tensor:
        return self.weight.clone()


def quantise_outline(module: nn.Module, kind: str) -> None:
    """Let the layers of an outline that would be quantised have alive what they would have; there are no numbers."""
    for path, linear in dict(quantisable(module)).items() if kind != "none" else ():
        stand_in = _OutlinedLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        owner, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(owner), leaf, stand_in.requires_grad_(False))


class _FormedTwice(torch.autograd.Function):
    """y = W x + b, and the gradients of x and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantisedLinear) -> Tensor:
        ctx.layer, ctx.dtypes = layer, (x.dtype, None if bias is None else bias.dtype)
        return nn.functional.linear(x, layer.formed(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_dtype, bias_dtype = ctx.dtypes
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ ctx.layer.formed().to(grad.dtype)).to(x_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0).to(bias_dtype)
        return grad_x, grad_bias, None
