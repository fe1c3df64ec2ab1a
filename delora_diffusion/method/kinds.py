"""The kinds of layers that can carry an adapter. All are one matrix W (out, in) to the method; a kind says how it lies
in the layer's weight, and what W's update does to the layer's output.

* Linear: y = W x.
* Conv1D of transformers (GPT-2): the same, its weight lies transposed.
* Conv2d: W's columns stand for the inputs at each place of the kernel, in * kh * kw of them. The update is a
  convolution of the kernel's size by `down`, then one of 1 x 1 by `up`.
* Embedding: x is one-hot, so W's columns are the tokens' vectors. Only those of the tokens in x are ever formed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Layers that can carry an adapter (and transformers' Conv1D, which has a weight, a bias and a forward as these do).
Host = nn.Linear | nn.Conv2d | nn.Embedding


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What differs between kinds of layers.

    Attributes:
        inputs: of a layer: the shape of what W's columns stand for, (in,) or (in, kh, kw); W has its product of them.
        outputs: of a layer: how many rows W has.
        matrix: a layer's weight, or a tensor of its shape, as W (out, in).
        add: layer, x, y, down (r, in), up (out, r), both in y's dtype -> y + dW x. Where the kind gathers, `down`
            holds the columns of x's tokens alone, (r, tokens).
        gathers: x holds indices of W's columns.
    """

    inputs: Callable[[Any], tuple[int, ...]]
    outputs: Callable[[Any], int]
    matrix: Callable[[Tensor], Tensor]
    add: Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]
    gathers: bool = False

    def as_weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrix`, for a weight of this shape."""
        return matrix.reshape(shape) if len(shape) > 2 else self.matrix(matrix)


def add_low_rank(x: Tensor, y: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """y + x (up @ down)^T: x (..., in), y (..., out), down and up in y's dtype. It keeps a LoRA's activations."""
    if torch.is_autocast_enabled(x.device.type):  # the layer has chosen the dtype of y: keep to it
        with torch.autocast(x.device.type, enabled=False):
            return add_low_rank(x, y, down, up)
    h = (x if x.dtype is y.dtype else x.to(y.dtype)).reshape(-1, x.shape[-1]).mm(down.t())
    return torch.addmm(y.reshape(-1, y.shape[-1]), h, up.t()).view(y.shape)


def _add_linear(layer: Any, x: Tensor, y: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return add_low_rank(x, y, down, up)


def _add_convolution(layer: Any, x: Tensor, y: Tensor, down: Tensor, up: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        kernel = down.view(-1, *layer.weight.shape[1:])
        h = layer._conv_forward(x.to(y.dtype), kernel, None)  # with the layer's stride, padding and dilation
        update: Tensor = F.conv2d(h, up[:, :, None, None])
        return y + update


def _add_rows(layer: Any, x: Tensor, y: Tensor, down: Tensor, up: Tensor) -> Tensor:
    with torch.autocast(y.device.type, enabled=False):
        rows: Tensor = (down.t() @ up.t()).view(y.shape)
        return y + rows * getattr(layer, "embed_scale", 1.0)  # which some layers multiply their vectors by


def _linear_inputs(layer: Any) -> tuple[int, ...]:
    return (layer.in_features,)


def _linear_outputs(layer: Any) -> int:
    return int(layer.out_features)


def _first(layer: Any) -> tuple[int, ...]:
    return tuple(layer.weight.shape[:1])


def _second(layer: Any) -> int:
    return int(layer.weight.shape[1])


def _kernel(layer: Any) -> tuple[int, ...]:
    return tuple(layer.weight.shape[1:])


def _channels(layer: Any) -> int:
    return int(layer.out_channels)


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _turned(weight: Tensor) -> Tensor:
    return weight.t()


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten(1)


LINEAR = Kind(inputs=_linear_inputs, outputs=_linear_outputs, matrix=_as_it_is, add=_add_linear)
TRANSPOSED = Kind(inputs=_first, outputs=_second, matrix=_turned, add=_add_linear)
CONVOLUTION = Kind(inputs=_kernel, outputs=_channels, matrix=_flat, add=_add_convolution)
EMBEDDING = Kind(inputs=_first, outputs=_second, matrix=_turned, add=_add_rows, gathers=True)


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer; None where it cannot carry an adapter."""
    if isinstance(layer, nn.Linear):
        return LINEAR
    if isinstance(layer, nn.Conv2d):
        return CONVOLUTION if layer.groups == 1 else None
    if isinstance(layer, nn.Embedding):
        reads_rows = type(layer).forward is nn.Embedding.forward or hasattr(layer, "embed_scale")
        return EMBEDDING if layer.max_norm is None and reads_rows else None
    transformers = sys.modules.get("transformers.pytorch_utils")
    return TRANSPOSED if transformers is not None and isinstance(layer, transformers.Conv1D) else None


def known_kind(layer: nn.Module) -> Kind:
    """The kind of a layer that carries an adapter, or is to."""
    kind = kind_of(layer)
    assert kind is not None, layer
    return kind


def why_not(layer: nn.Module) -> str:
    """What keeps a layer from carrying an adapter, if it is nearly of a kind that can; else ""."""
    if isinstance(layer, nn.Conv2d):
        return f" in {layer.groups} groups, whose weight is no one matrix"
    if isinstance(layer, nn.Embedding):
        return " that changes its weight while it reads it, or reads more than rows"
    return ""
