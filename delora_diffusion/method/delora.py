"""DeLoRA, decoupled low-rank adaptation, for any `nn.Module` that holds layers of the kinds in `kinds.py`.

The method (Bini, Girrbach, Akata, ICLR 2025, arXiv 2503.18225). For a frozen weight W (out x in) and rank r

    dW = (lambda / r) * B diag(1 / (|a_i| |b_i|)) A diag(w),        w_j = |W[:, j]|

a_i is row i of A (r x in), b_i column i of B (out x r), lambda one learnable number per layer and w fixed. Direction
(A, B) and strength (lambda) are decoupled: |dW|_F <= lambda * max_j w_j, whatever A and B become.

An adapter is a child module of the layer it adapts, called `delora`, plus one forward hook. Nothing is replaced or
renamed, so checkpoints of the base load before or after injection, and any subclass of such a layer can carry one.

    names = inject_delora(unet, DeloraConfig(r=16, delora_lambda=4.0))
    ... train the parameters that require a gradient ...
    tensors = delora_state_dict(unet)
    remove_delora(unet)                       # the base again, bit for bit
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from .forward_pass import ForwardPass
from .kinds import LINEAR, Host, Kind, add_low_rank
from .lowrank import LowRank, added
from .offloaded import stored, written

#: Norms are floored here, as in PEFT.
NORM_FLOOR = 1e-4
#: Tensors of one layer in a file; the `_init` ones exist with init_weights="residual" only.
TENSOR_NAMES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
INIT_TENSOR_NAMES = ("delora_A_init", "delora_B_init", "delora_lambda_init")


# ---- the formula --------------------------------------------------------------------------------


def delora_factors(A: Tensor, B: Tensor, scale: Tensor, w: Tensor) -> LowRank:
    """The update as a product of two thin matrices, dW = up @ down, of one layer or of a stack of layers (...).

    down = diag(1 / |a_i|) A diag(w) and up = B diag(scale / (r |b_i|)), with `scale` = lambda times the adapter's
    weight. Each is bounded, however long a_i and b_i have become, so both can be cast to half precision.

    Args:
        A: (..., r, in). B: (..., out, r). scale: (..., 1). w: (..., in), the base weight's column norms. All fp32.

    Returns:
        down (..., r, in) and up (..., out, r).
    """
    return _factors(A, B, scale, w, _norms(A, -1), _norms(B, -2))


def _factors(A: Tensor, B: Tensor, scale: Tensor, w: Tensor, a: Tensor, b: Tensor) -> LowRank:
    """The formula, given the floored norms a and b (..., r)."""
    return LowRank(A * (w[..., None, :] / a[..., :, None]), B * (scale / A.shape[-2] / b)[..., None, :])


def factors_of(
    tensors: Mapping[str, Tensor], weight: Tensor | float = 1.0, *, columns: Tensor | None = None
) -> LowRank:
    """`delora_factors` of one layer's tensors by their names in a file; rank 2r where there is an initial update.

    Args:
        tensors: `TENSOR_NAMES`, and `INIT_TENSOR_NAMES` for a residual adapter; A may have a kernel's shape.
        weight: strength; lambda is multiplied by it.
        columns: of W, if only these are needed: indices (n,), for a `down` of (r, n).
    """
    parts = []
    for names, sign in ((TENSOR_NAMES, 1), (INIT_TENSOR_NAMES, -1)):
        if names[0] in tensors:
            A, B, lam = (tensors[name] for name in names[:3])
            A, w = A.flatten(1), tensors["delora_w_norm"]
            a, b = _norms(A, -1), _norms(B, -2)
            if columns is not None:
                A, w = A.index_select(1, columns), w.index_select(0, columns)
            parts.append(_factors(A, B, sign * lam * weight, w, a, b))
    return added(parts) if len(parts) > 1 else parts[0]


def _norms(matrices: Tensor, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=dim)
    return norms.clamp(min=NORM_FLOOR)


class _FormFactors(torch.autograd.Function):
    """The factors of n adapters of one shape, in a few operations and one node of the graph.

    It keeps the parameters, which are there anyway, and their norms, and stacks them again in the backward pass. Its
    inputs are weights and w, stacked, and n times A, B and lambda; its outputs n times `down`, then n times `up`, one
    by one, so that the gradients of layers that read them arrive as they are.
    """

    @staticmethod
    def forward(
        ctx: Any, owner: Any, dtype: torch.dtype, weight: Tensor, w: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n = len(w)
        A, B, lam = (torch.stack(tensors[k * n : (k + 1) * n]) for k in range(3))
        a, b = _norms(A, -1), _norms(B, -2)
        down, up = _factors(A, B, lam * weight, w, a, b)
        ctx.save_for_backward(a, b, lam, weight, w, *tensors[: 2 * n])
        ctx.owner = owner  # lives as long as this node of the graph does
        ctx.set_materialize_grads(False)
        return *down.to(dtype).unbind(), *up.to(dtype).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The chain rule through `delora_factors`; a floored norm is constant.

        With D_i = w grad_down_i, U_i = grad_up[:, i] and s_i = weight lambda / (r |b_i|):
        dA_i = (D_i - <D_i, a_i> a_i / |a_i|^2) / |a_i|,  dB_i = (U_i - <U_i, b_i> b_i / |b_i|^2) s_i,
        dlambda = sum_i <U_i, b_i> s_i / lambda.
        """
        a, b, lam, weight, w, *tensors = ctx.saved_tensors
        n = len(w)
        A, B = torch.stack(tensors[:n]), torch.stack(tensors[n:])
        D, U = _stacked(grads[:n], A) * w[:, None, :], _stacked(grads[n:], B)
        along_b, per_lambda = (U * B).sum(-2), weight / A.shape[-2] / b
        pull_a = (D * A).sum(-1) * ((a > NORM_FLOOR) / a.square())
        pull_b = along_b * ((b > NORM_FLOOR) / b.square())
        grad_A = torch.addcmul(D, A, pull_a[:, :, None], value=-1) / a[:, :, None]
        grad_B = torch.addcmul(U, B, pull_b[:, None, :], value=-1) * (per_lambda * lam)[:, None, :]
        grad_lam: Sequence[Tensor | None] = [None] * n
        if any(ctx.needs_input_grad[-n:]):
            grad_lam = (along_b * per_lambda).sum(-1, keepdim=True).unbind()
        found: list[Tensor | None] = [*grad_A.unbind(), *grad_B.unbind(), *grad_lam]
        for place in range(n):
            if grads[place] is None and grads[n + place] is None:  # a layer that nobody called
                found[place] = found[n + place] = found[2 * n + place] = None
        return None, None, None, None, *found


def _stacked(grads: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Gradients as one fp32 tensor shaped as `like`; zeros where none came."""
    return torch.stack([torch.zeros_like(like[0]) if grad is None else grad for grad in grads]).float()


def form_factors(
    adapters: Sequence[DeloraAdapter], *, dtype: torch.dtype, scale: float = 1.0, owner: Any = None
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """`down` and `up` of adapters of one shape, each (r, in) and (out, r), twice the rank for residual ones.

    Args:
        dtype: in which layers will read them; they are formed in fp32.
        scale: multiplies every adapter's weight.
        owner: kept alive by the graph, until its backward pass is over.
    """
    weight = torch.stack([adapter._buffers["delora_weight"] for adapter in adapters])  # type: ignore[misc]
    w = torch.stack([adapter._buffers["delora_w_norm"] for adapter in adapters])  # type: ignore[misc]
    weight = weight if scale == 1 else weight * scale
    tensors = [adapter._parameters[name] for name in TENSOR_NAMES[:3] for adapter in adapters]
    formed: tuple[Tensor, ...] = _FormFactors.apply(owner, dtype, weight, w, *tensors)  # type: ignore[no-untyped-call]
    down: Sequence[Tensor] = formed[: len(adapters)]
    up: Sequence[Tensor] = formed[len(adapters) :]
    if adapters[0].is_residual:
        with torch.no_grad():
            A, B, lam = (torch.stack([getattr(adapter, leaf) for adapter in adapters]) for leaf in INIT_TENSOR_NAMES)
            start = delora_factors(A, B, -lam * weight, w)
        down = [torch.cat(pair) for pair in zip(down, start.down.to(dtype), strict=True)]
        up = [torch.cat(pair, dim=1) for pair in zip(up, start.up.to(dtype), strict=True)]
    return down, up


# ---- one adapter, and all adapters of one Linear -------------------------------------------------


class DeloraAdapter(nn.Module):
    """One adapter of one layer: A (r, in), B (out, r) and lambda (1,), fp32 on the layer's device, always.

    `delora_weight` is the strength given to the adapter by `set_delora_adapters` and by a lambda ramp; it is no part
    of the file. A tensor, so that changing it recompiles nothing.
    """

    delora_w_norm: Tensor
    delora_weight: Tensor
    delora_A_init: Tensor
    delora_B_init: Tensor
    delora_lambda_init: Tensor

    def __init__(
        self, w_norm: Tensor, out_features: int, *, rank: int, dropout: float, inputs: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.inputs = inputs  # what the columns of A stand for: of a convolution the channels and the kernel
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

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """Add the update's output with factors formed here: x (..., in), y = W x + b (..., out) -> y + dW x."""
        return add_low_rank(x, y, *self.formed(y.dtype, scale))

    def formed(self, dtype: torch.dtype, scale: float, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`down` and `up` at `scale` times the current weight, formed here; of these columns alone if given."""
        down, up = self.factors(columns)
        return down.to(dtype), (up * scale if scale != 1 else up).to(dtype)

    def kind(self) -> tuple[Any, ...]:
        """What adapters have in common whose factors can be formed together: sizes, start and device."""
        A, B = self._parameters["delora_A"], self._parameters["delora_B"]
        assert A is not None and B is not None
        return A.shape[0], A.shape[1], B.shape[0], self.is_residual, A.device

    def factors(self, columns: Tensor | None = None) -> LowRank:
        """The update at the current weight; its rank is 2r for a residual adapter."""
        device = self.delora_weight.device  # a buffer that stays where the rest is brought to
        return factors_of(
            {name: tensor.to(device) for name, tensor in self.tensors().items()}, self.delora_weight, columns=columns
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of this adapter, by PEFT's names; A in the shape of a kernel where it is one."""
        names = (*TENSOR_NAMES, *(INIT_TENSOR_NAMES if self.is_residual else ()))
        return {name: self.shaped(name, stored(self, name)) for name in names}

    def shaped(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of this adapter as a file holds it; one that cannot be of this adapter stays as it is."""
        kernel = len(self.inputs) > 1 and name in (TENSOR_NAMES[0], INIT_TENSOR_NAMES[0])
        fits = kernel and tensor[:1].numel() == math.prod(self.inputs)
        return tensor.view(-1, *self.inputs) if fits else tensor

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):  # a checkpoint of the base alone lacks nothing
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)  # type: ignore[no-untyped-call, no-any-return]


class DeloraLayer(nn.Module):
    """All adapters of one layer. `active` ones add their update, unless they are merged or everything is disabled.

    During a forward pass of the adapted module `factors` holds what was formed for it, and `scale` what it was asked
    for. A layer that is called by itself forms its own.
    """

    def __init__(self, kind: Kind = LINEAR) -> None:
        super().__init__()
        self.kind = kind
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.merged: dict[str, float] = {}  # name -> the weight it was merged with
        self.enabled = True
        self.base_weight: Tensor | None = None  # while the layer holds a merged weight
        self.hook: RemovableHandle | None = None
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.scale = 1.0

    def __getitem__(self, name: str) -> DeloraAdapter:
        adapter = self.adapters[name]
        assert isinstance(adapter, DeloraAdapter)
        return adapter

    def acting(self) -> tuple[str, ...]:
        """The adapters that add their update beside the weight."""
        return tuple(name for name in self.active if name not in self.merged) if self.enabled else ()

    def forward(self, x: Tensor, y: Tensor, host: nn.Module | None = None) -> Tensor:
        """y = W x + b (..., out) plus the updates of the active adapters; `host` is the layer that gave y."""
        again = None if torch.compiler.is_compiling() else ForwardPass.computed_again(self)
        for name in self.acting() if again is None else again.acting[self]:
            adapter = self[name]
            factors = self.factors.get(name) if again is None else again.factors(self, name)
            if self.kind.gathers:
                factors = adapter.formed(y.dtype, self.scale, x.reshape(-1))
                if adapter.dropout is not None:  # of one-hot inputs
                    factors = factors[0] * adapter.dropout(factors[0].new_ones(x.numel())), factors[1]
            elif factors is None or factors[0].dtype != y.dtype:
                factors = adapter.formed(y.dtype, self.scale)
            x_in = x if adapter.dropout is None or self.kind.gathers else adapter.dropout(x)
            y = self.kind.add(host, x_in, y, *factors)
        return y

    @torch.no_grad()
    def restore(self, linear: Host) -> None:
        """Undo a merge: the layer holds its own weight again, bit for bit."""
        if self.base_weight is not None:
            written(linear).copy_(self.base_weight)
            self.base_weight, self.merged = None, {}


def add_update(linear: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], output: Tensor) -> Tensor:
    """The forward hook of an adapted layer."""
    x = args[0] if args else next(iter(kwargs.values()))
    layer: Any = linear._modules["delora"]
    result: Tensor = layer.forward(x, output, linear)
    return result
