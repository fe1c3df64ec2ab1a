"""Updates as products of two thin matrices, dW = up @ down: add, shorten, lengthen and measure them.

Nothing here ever forms the dense dW (out x in). Everything is reduced to R x R matrices by the QR decomposition of the
factors, up = Q_u R_u and down^T = Q_d R_d, so that dW = Q_u (R_u R_d^T) Q_d^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """down (R, in) and up (out, R)."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """R, the number of components."""
        return self.down.shape[0]


def added(parts: Sequence[Factors]) -> Factors:
    """The exact sum of updates of one layer; their ranks add up."""
    return Factors(torch.cat([part.down for part in parts]), torch.cat([part.up for part in parts], dim=1))


def scaled(factors: Factors, weight: float) -> Factors:
    """`weight` times an update."""
    return Factors(factors.down, factors.up * weight)


def balanced(factors: Factors) -> Factors:
    """The same update with each component's length shared evenly by its two halves, which half precision needs."""
    long = torch.linalg.vector_norm(factors.down, dim=1)
    short = torch.linalg.vector_norm(factors.up, dim=0)
    ratio = torch.where((long > 0) & (short > 0), (short / long).sqrt(), 1.0)
    return Factors(factors.down * ratio[:, None], factors.up / ratio)


def padded(factors: Factors, rank: int) -> Factors:
    """The same update with components of zeros up to `rank`."""
    more = rank - factors.rank
    return Factors(
        torch.nn.functional.pad(factors.down, (0, 0, 0, more)), torch.nn.functional.pad(factors.up, (0, more))
    )


def compressed(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The nearest update of at most `rank` components, and |what is lost|_F.

    By the SVD of the R x R core (Eckart-Young: nothing of this rank is nearer), in fp64; each component's strength is
    shared evenly by its two halves.
    """
    return (factors, 0.0) if factors.rank <= rank else _by_svd(factors, rank)


def halvable(factors: Factors) -> Factors:
    """The same update in factors that half precision holds to 3e-4: `balanced`, and with orthogonal components where
    the given ones cancel, as the two halves of a residual adapter do: half of a large number is a large error of a
    small difference."""
    alone = torch.linalg.vector_norm(factors.down, dim=1) * torch.linalg.vector_norm(factors.up, dim=0)
    if norm(factors) < 0.5 * float(torch.linalg.vector_norm(alone)):
        return _by_svd(factors, factors.rank)[0]
    return balanced(factors)


def norm(factors: Factors) -> float:
    """|up @ down|_F."""
    return float(torch.linalg.matrix_norm(_core(factors)[2]))


def distance(first: Factors, second: Factors) -> float:
    """|up_1 @ down_1 - up_2 @ down_2|_F, without cancellation: it is the norm of one factored matrix."""
    return norm(added([first, scaled(second, -1.0)]))


def _by_svd(factors: Factors, rank: int) -> tuple[Factors, float]:
    q_up, q_down, core = _core(factors)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    root = s[:rank].sqrt()
    down = (root[:, None] * vh[:rank]) @ q_down.T
    up = (q_up @ u[:, :rank]) * root
    return Factors(down.to(factors.down), up.to(factors.up)), float(torch.linalg.vector_norm(s[rank:]))


def _core(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    q_up, r_up = torch.linalg.qr(factors.up.double())
    q_down, r_down = torch.linalg.qr(factors.down.double().T)
    return q_up, q_down, r_up @ r_down.T
