"""How large an update is and of how many directions it is made, without forming dW.

dW (out x in) = up @ down with k = r (2r for a residual adapter) thin columns, so its norm follows from two k x k Gram
matrices and its singular values from the two k x k triangles of a QR decomposition. |W|_F follows from the stored
column norms, |W|_F^2 = sum_j w_j^2: nothing here needs the base model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .delora import DeloraAdapter, factors_of

Factors = tuple[Tensor, Tensor]


def file_factors(tensors: Mapping[str, Tensor]) -> Factors:
    """(down, up) with dW = up @ down, from the tensors of one layer as a file holds them.

    Args:
        tensors: `delora_A` (r, in), `delora_B` (out, r), `delora_lambda` (1,), `delora_w_norm` (in,), and for a
            residual adapter their `_init` copies, whose update is subtracted.

    Returns:
        down (k, in) and up (out, k), fp32, k = r or 2r.
    """
    return factors_of({name: tensor.float() for name, tensor in tensors.items()})


def update_norm(down: Tensor, up: Tensor) -> Tensor:
    """|dW|_F, a scalar: |up down|_F^2 = <up^T up, down down^T>.

    The products are formed in fp64 where the device has it: for a residual adapter near its start two updates cancel,
    and fp32 Gram matrices would leave 3e-4 of either.
    """
    precise = torch.float32 if down.device.type == "mps" else torch.float64
    down, up = down.to(precise), up.to(precise)
    squared: Tensor = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
    norm: Tensor = squared.sqrt().float()
    return norm


@torch.no_grad()
def relative_update(adapter: DeloraAdapter) -> Tensor:
    """|dW|_F / |W|_F of a live adapter at its current weight, a scalar on its device (nothing waits for it)."""
    ratio: Tensor = update_norm(*adapter.factors()) / torch.linalg.vector_norm(adapter.delora_w_norm)
    return ratio


@torch.no_grad()
def spectrum(down: Tensor, up: Tensor) -> Tensor:
    """Singular values of dW = up @ down, largest first: (min(k, in, out),)."""
    right, left = (torch.linalg.qr(factor, mode="r").R for factor in (down.T, up))
    values: Tensor = torch.linalg.svdvals(left @ right.T)
    return values


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of p_i = s_i / sum_j s_j (Roy and Vetterli, EUSIPCO 2007); 0 for no update at all.

    1 where one direction carries everything, k where k directions carry the same.
    """
    total = singular_values.sum()
    if total == 0:
        return 0.0
    p = singular_values / total
    return float(torch.exp(torch.special.entr(p).sum()))
