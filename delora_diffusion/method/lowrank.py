"""Updates as products of two thin matrices, dW = up @ down: add, shorten, lengthen and measure them.

Nothing here ever forms the dense dW (out x in). Norms follow from two R x R Gram matrices; all else from the R x R
core of the QR decompositions up = Q_u R_u and down^T = Q_d R_d, dW = Q_u (R_u R_d^T) Q_d^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class LowRank(NamedTuple):
    """down (R, in) and up (out, R)."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """R, the number of components."""
        return self.down.shape[0]

    def scaled(self, weight: float) -> LowRank:
        """`weight` times the update."""
        return LowRank(self.down, self.up * weight)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """|up @ down|_F, a scalar on their device (nothing waits for it): |up down|_F^2 = <up^T up, down down^T>.

        The products are formed in fp64 where the device has it: for a residual adapter near its start two updates
        cancel, and fp32 Gram matrices would leave 3e-4 of either; these leave 1e-8.
        """
        precise = torch.float32 if self.down.device.type == "mps" else torch.float64
        down, up = self.down.to(precise), self.up.to(precise)
        squared: Tensor = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
        return squared.sqrt().float()

    @torch.no_grad()
    def singular_values(self) -> Tensor:
        """Of dW, the largest first, fp64: (min(R, in, out),)."""
        values: Tensor = torch.linalg.svdvals(self._core()[2])
        return values

    def balanced(self) -> LowRank:
        """The same update with each component's length shared evenly by its two halves, which half precision needs."""
        long = torch.linalg.vector_norm(self.down, dim=1)
        short = torch.linalg.vector_norm(self.up, dim=0)
        ratio = torch.where((long > 0) & (short > 0), (short / long).sqrt(), 1.0)
        return LowRank(self.down * ratio[:, None], self.up / ratio)

    def halvable(self) -> LowRank:
        """The same update in factors that half precision holds to 3e-4: `balanced`, and with orthogonal components
        where the given ones cancel, as the two halves of a residual adapter do: half of a large number is a large
        error of a small difference."""
        alone = torch.linalg.vector_norm(self.down, dim=1) * torch.linalg.vector_norm(self.up, dim=0)
        if self.norm() < 0.5 * torch.linalg.vector_norm(alone):
            return self._by_svd(self.rank)[0]
        return self.balanced()

    def padded(self, rank: int) -> LowRank:
        """The same update with components of zeros up to `rank`."""
        more = rank - self.rank
        return LowRank(F.pad(self.down, (0, 0, 0, more)), F.pad(self.up, (0, more)))

    def compressed(self, rank: int) -> tuple[LowRank, float]:
        """The nearest update of at most `rank` components, and |what is lost|_F.

        By the SVD of the core (Eckart-Young: nothing of this rank is nearer), in fp64; each component's strength is
        shared evenly by its two halves.
        """
        return (self, 0.0) if self.rank <= rank else self._by_svd(rank)

    def _by_svd(self, rank: int) -> tuple[LowRank, float]:
        q_up, q_down, core = self._core()
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        root = s[:rank].sqrt()
        down = (root[:, None] * vh[:rank]) @ q_down.T
        up = (q_up @ u[:, :rank]) * root
        return LowRank(down.to(self.down), up.to(self.up)), float(torch.linalg.vector_norm(s[rank:]))

    def _core(self) -> tuple[Tensor, Tensor, Tensor]:
        q_up, r_up = torch.linalg.qr(self.up.double())
        q_down, r_down = torch.linalg.qr(self.down.double().T)
        return q_up, q_down, r_up @ r_down.T


def added(parts: Sequence[LowRank]) -> LowRank:
    """The exact sum of updates of one layer; their ranks add up."""
    return LowRank(torch.cat([part.down for part in parts]), torch.cat([part.up for part in parts], dim=1))


def distance(first: LowRank, second: LowRank) -> float:
    """|up_1 @ down_1 - up_2 @ down_2|_F, by singular values: without the cancellation that Gram matrices have."""
    return float(torch.linalg.vector_norm(added([first, second.scaled(-1.0)]).singular_values()))


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of p_i = s_i / sum_j s_j (Roy and Vetterli, EUSIPCO 2007); 0 for no update at all.

    1 where one direction carries everything, k where k directions carry the same.
    """
    total = singular_values.sum()
    if total == 0:
        return 0.0
    p = singular_values / total
    return float(torch.exp(torch.special.entr(p).sum()))
