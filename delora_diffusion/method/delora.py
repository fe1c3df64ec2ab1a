"""DeLoRA, decoupled low-rank adaptation, for any `nn.Module` that holds `nn.Linear` layers.

The method (Bini, Girrbach, Akata, ICLR 2025, arXiv 2503.18225). For a frozen weight W (out x in) and rank r

    dW = (lambda / r) * B diag(1 / (|a_i| |b_i|)) A diag(w),        w_j = |W[:, j]|

a_i is row i of A (r x in), b_i column i of B (out x r), lambda one learnable number per layer and w fixed. Direction
(A, B) and strength (lambda) are decoupled: |dW|_F <= lambda * max_j w_j, whatever A and B become.

An adapter is a child module of the Linear it adapts, called `delora`, plus one forward hook. Nothing is replaced or
renamed, so checkpoints of the base load before or after injection, and any subclass of `nn.Linear` can carry one.

    names = inject_delora(unet, DeloraConfig(r=16, delora_lambda=4.0))
    ... train the parameters that require a gradient ...
    tensors = delora_state_dict(unet)
    remove_delora(unet)                       # the base again, bit for bit
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from .lowrank import LowRank, added

#: Norms are floored here, as in PEFT.
NORM_FLOOR = 1e-4
#: Tensors of one layer in a file; the `_init` ones exist with init_weights="residual" only.
TENSOR_NAMES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
INIT_TENSOR_NAMES = ("delora_A_init", "delora_B_init", "delora_lambda_init")


# ---- the formula --------------------------------------------------------------------------------


def delora_factors(A: Tensor, B: Tensor, scale: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The update as a product of two thin matrices, dW = up @ down.

    down = diag(1 / |a_i|) A diag(w) and up = B diag(scale / (r |b_i|)), with `scale` = lambda times the adapter's
    weight. Each is bounded, however long a_i and b_i have become, so both can be cast to half precision.

    Args:
        A: (r, in). B: (out, r). scale: (1,). w: (in,), the column norms of the base weight. All fp32.

    Returns:
        down (r, in) and up (out, r).
    """
    return A * (w / _row_norms(A)[:, None]), B * (scale / (A.shape[0] * _row_norms(B.T)))


def factors_of(tensors: Mapping[str, Tensor], weight: Tensor | float = 1.0) -> LowRank:
    """`delora_factors` of one layer's tensors by their names in a file; rank 2r where there is an initial update.

    Args:
        tensors: `TENSOR_NAMES`, and `INIT_TENSOR_NAMES` for a residual adapter.
        weight: strength; lambda is multiplied by it.
    """
    w = tensors["delora_w_norm"]
    down, up = delora_factors(tensors["delora_A"], tensors["delora_B"], tensors["delora_lambda"] * weight, w)
    if "delora_A_init" in tensors:
        scale = -tensors["delora_lambda_init"] * weight
        down_0, up_0 = delora_factors(tensors["delora_A_init"], tensors["delora_B_init"], scale, w)
        return added([LowRank(down, up), LowRank(down_0, up_0)])
    return LowRank(down, up)


def _row_norms(matrix: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1)
    return norms.clamp(min=NORM_FLOOR)


class _AddUpdate(torch.autograd.Function):
    """y + x dW^T, keeping only x, x down^T and the parameters for the backward pass.

    Autograd on `delora_factors` would keep several (r, in) and (out, r) temporaries for every layer; here they are
    formed again in the backward pass, so an adapter keeps as much as a LoRA does. `x` is kept as it came, which lets
    q, k and v of one attention share it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, A: Tensor, B: Tensor, lam: Tensor, weight: Tensor, w: Tensor
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # the layer has chosen the dtype of y: keep to it
            down, up = delora_factors(A, B, lam * weight, w)
            h = x.to(y.dtype).reshape(-1, x.shape[-1]) @ down.to(y.dtype).T
            result = torch.addmm(y.reshape(-1, y.shape[-1]), h, up.to(y.dtype).T).view(y.shape)
        trained = any(ctx.needs_input_grad[2:5])
        ctx.save_for_backward(*((x, h) if trained else (None, None)), A, B, lam, weight, w)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        x, h, A, B, lam, weight, w = ctx.saved_tensors
        grad_x = None
        with torch.autocast(grad_y.device.type, enabled=False):
            down, up = delora_factors(A, B, lam * weight, w)
            g = grad_y.reshape(-1, grad_y.shape[-1])
            grad_h = g @ up.to(g.dtype)
            if ctx.needs_input_grad[0]:
                grad_x = (grad_h @ down.to(g.dtype)).view(ctx.x_shape).to(ctx.x_dtype)
            if x is None:
                return grad_x, grad_y, None, None, None, None, None
            grad_down = (grad_h.T @ x.to(g.dtype).reshape(-1, x.shape[-1])).float()
            grad_up = (g.T @ h).float()
            return grad_x, grad_y, *_factor_gradients(A, B, lam, weight, w, grad_down, grad_up), None, None


def _factor_gradients(
    A: Tensor, B: Tensor, lam: Tensor, weight: Tensor, w: Tensor, grad_down: Tensor, grad_up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The chain rule through `delora_factors`: gradients with respect to A, B and lambda.

    With D_i = grad_down_i w, U_i = grad_up[:, i] and s_i = weight lambda / (r |b_i|), a floored norm being constant:
    dA_i = (D_i - <D_i, a_i> a_i / |a_i|^2) / |a_i|,  dB_i = (U_i - <U_i, b_i> b_i / |b_i|^2) s_i,
    dlambda = sum_i <U_i, b_i> s_i / lambda.
    """
    a, b = _row_norms(A), _row_norms(B.T)
    along_a, along_b = (grad_down * w * A).sum(1), (grad_up * B).sum(0)
    pull_a = torch.where(a > NORM_FLOOR, along_a / a.square(), 0.0)
    pull_b = torch.where(b > NORM_FLOOR, along_b / b.square(), 0.0)
    per_lambda = weight / (A.shape[0] * b)
    grad_A = (grad_down * w - A * pull_a[:, None]) / a[:, None]
    grad_B = (grad_up - B * pull_b) * (per_lambda * lam)
    return grad_A, grad_B, (along_b * per_lambda).sum().reshape(1)


# ---- one adapter, and all adapters of one Linear -------------------------------------------------


class DeloraAdapter(nn.Module):
    """One adapter of one Linear: A (r, in), B (out, r) and lambda (1,), fp32 on the Linear's device, always.

    `delora_weight` is the strength given to the adapter by `set_delora_adapters` and by a lambda ramp; it is no part
    of the file. A tensor, so that changing it recompiles nothing.
    """

    delora_w_norm: Tensor
    delora_weight: Tensor
    delora_A_init: Tensor
    delora_B_init: Tensor
    delora_lambda_init: Tensor

    def __init__(self, w_norm: Tensor, out_features: int, *, rank: int, dropout: float) -> None:
        super().__init__()
        device = w_norm.device
        self.delora_A = nn.Parameter(torch.empty(rank, w_norm.numel(), dtype=torch.float32, device=device))
        self.delora_B = nn.Parameter(torch.empty(out_features, rank, dtype=torch.float32, device=device))
        self.delora_lambda = nn.Parameter(torch.empty(1, dtype=torch.float32, device=device))
        self.register_buffer("delora_w_norm", w_norm)
        self.register_buffer("delora_weight", torch.ones(1, dtype=torch.float32, device=device), persistent=False)
        self.dropout = nn.Dropout(dropout) if dropout else None

    @torch.no_grad()
    def initialise(self, delora_lambda: float, init_weights: str, generator: torch.Generator | None) -> None:
        """Set A, B and lambda by the named choice of `DeloraConfig.init_weights`."""
        nn.init.kaiming_uniform_(self.delora_A, a=math.sqrt(5), generator=generator)
        nn.init.kaiming_uniform_(self.delora_B, a=math.sqrt(5), generator=generator)
        self.delora_lambda.fill_(delora_lambda)
        if init_weights == "zero":
            self.delora_B.zero_()
        elif init_weights == "paired":
            self.delora_A[1::2] = self.delora_A[0::2]
            self.delora_B[:, 1::2] = -self.delora_B[:, 0::2]
        elif init_weights == "residual":
            self.add_residual()

    def add_residual(self) -> None:
        """Freeze a copy of A, B and lambda, whose update is subtracted from now on (paper, Eq. 9)."""
        for name in INIT_TENSOR_NAMES:
            self.register_buffer(name, getattr(self, name.removesuffix("_init")).detach().clone())

    @property
    def rank(self) -> int:
        """Number of trained components."""
        return self.delora_A.shape[0]

    @property
    def is_residual(self) -> bool:
        """Whether the initial update is subtracted (init_weights="residual")."""
        return "delora_A_init" in self._buffers

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the update's output: x (..., in), y = W x + b (..., out) -> y + dW x, in y's dtype."""
        if self.dropout is not None:
            x = self.dropout(x)
        y = self._add(x, y, self.delora_A, self.delora_B, self.delora_lambda)
        if self.is_residual:
            y = self._add(x, y, self.delora_A_init, self.delora_B_init, -self.delora_lambda_init)
        return y

    def _add(self, x: Tensor, y: Tensor, A: Tensor, B: Tensor, lam: Tensor) -> Tensor:
        result: Tensor = _AddUpdate.apply(x, y, A, B, lam, self.delora_weight, self.delora_w_norm)  # type: ignore[no-untyped-call]
        return result

    def factors(self) -> LowRank:
        """The update at the current weight; its rank is 2r for a residual adapter."""
        return factors_of(self.tensors(), self.delora_weight)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of this adapter, by PEFT's names."""
        return {
            name: getattr(self, name) for name in (*TENSOR_NAMES, *(INIT_TENSOR_NAMES if self.is_residual else ()))
        }

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):  # a checkpoint of the base alone lacks nothing
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)  # type: ignore[no-untyped-call, no-any-return]


class DeloraLayer(nn.Module):
    """All adapters of one Linear. `active` ones add their update, unless they are merged or everything is disabled."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.merged: dict[str, float] = {}  # name -> the weight it was merged with
        self.enabled = True
        self.base_weight: Tensor | None = None  # W, while the Linear holds a merged weight
        self.hook: RemovableHandle | None = None

    def __getitem__(self, name: str) -> DeloraAdapter:
        adapter = self.adapters[name]
        assert isinstance(adapter, DeloraAdapter)
        return adapter

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y = W x + b (..., out) plus the updates of the active adapters."""
        if self.enabled:
            for name in self.active:
                if name not in self.merged:
                    y = self[name](x, y)
        return y

    @torch.no_grad()
    def restore(self, linear: nn.Linear) -> None:
        """Undo a merge: the Linear holds its own W again, bit for bit."""
        if self.base_weight is not None:
            linear.weight.copy_(self.base_weight)
            self.base_weight, self.merged = None, {}


def add_update(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The forward hook of an adapted Linear."""
    result: Tensor = linear.delora(args[0], output)  # type: ignore[operator]
    return result


def base_weight(linear: nn.Linear) -> Tensor:
    """The frozen weight W (out, in) in fp32: unmerged, and dequantised where the layer is quantised.

    Raises:
        TypeError: a quantised weight of a kind that cannot be read.
    """
    layer = getattr(linear, "delora", None)
    weight: Any = linear.weight if layer is None or layer.base_weight is None else layer.base_weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    elif type(weight.data) is not Tensor and hasattr(weight, "dequantize"):  # torchao and other tensor subclasses
        weight = weight.dequantize()
    if not weight.is_floating_point():
        raise TypeError(
            f"cannot read the weight of a {type(linear).__name__} ({weight.dtype}); "
            f"plain, torchao and bitsandbytes 4-bit Linear layers can be adapted"
        )
    plain: Tensor = weight.detach().to(linear.weight.device).float()
    return plain
