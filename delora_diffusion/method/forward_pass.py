"""What the layers of an adapted module read in one of its forward passes, for when they are computed again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class ForwardPass:
    """What the layers of an adapted module read in one of its forward passes.

    Non-reentrant checkpointing computes layers again for the backward pass, outside of that forward. They then read
    what they have read, whatever has changed meanwhile. The graph holds the pass, which holds values without a graph.

    Attributes:
        acting: the adapters that acted in each layer.
        values: down, up, and whether they are trained.
    """

    live: ClassVar[weakref.WeakSet[ForwardPass]] = weakref.WeakSet()  # whose backward pass may still come

    def __init__(self) -> None:
        self.acting: dict[nn.Module, tuple[str, ...]] = {}
        self.values: dict[tuple[nn.Module, str], tuple[Tensor, Tensor, bool]] = {}
        ForwardPass.live.add(self)

    def factors(self, layer: nn.Module, name: str) -> tuple[Tensor, Tensor] | None:
        """What a layer has read of an adapter, to be computed with again; None if it formed its own."""
        if (layer, name) not in self.values:
            return None
        down, up, trained = self.values[layer, name]
        return down.detach().requires_grad_(trained), up.detach().requires_grad_(trained)

    @classmethod
    def computed_again(cls, layer: nn.Module) -> ForwardPass | None:
        """The pass of which a layer is computed again at the moment, under non-reentrant checkpointing."""
        if torch._C._current_graph_task_id() == -1:  # no backward pass is under way
            return None
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks is None or not hooks[0].__qualname__.startswith("_recomputation_hook"):
            return None
        passes = [one for one in cls.live if layer in one.acting]
        return passes[0] if len(passes) == 1 else _owner_below(torch._C._current_autograd_node(), passes)


def _owner_below(node: Any, passes: Sequence[ForwardPass]) -> ForwardPass | None:
    """The one of several passes that the part of a graph below `node` belongs to."""
    seen, ahead = set(), [node]
    while passes and ahead:
        node = ahead.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        if (owner := getattr(node, "owner", None)) in passes:
            return owner
        ahead += [following for following, _ in node.next_functions]
    return None
