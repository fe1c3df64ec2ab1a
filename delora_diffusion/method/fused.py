"""Adapters in attention whose projections diffusers has fused (`pipe.fuse_qkv_projections()`).

It copies the weights of several Linear layers into one beside them, and calls that instead. Its output is the outputs
of its parts, side by side; so the adapters of a part act on the part's columns, and what is merged into a part is
copied again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

#: The layer that diffusers makes in an attention module, and the layers it stands for, in their order.
PARTS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def is_fused(owner: nn.Module, name: str) -> bool:
    """Whether the layer `name` of `owner` would be a fused copy of layers beside it."""
    return name in PARTS and all(isinstance(owner._modules.get(part), nn.Linear) for part in PARTS[name])


@dataclass(eq=False)
class Place:
    """Where layers are, or could be, fused of which one at least is adapted.

    Attributes:
        owner: the attention module.
        name: what the fused layer is called in it.
        parts: the layers it stands for.
        fused: the fused layer when this was last looked at.
        hook: by which the adapters of the parts act on it.
    """

    owner: nn.Module
    name: str
    parts: tuple[nn.Linear, ...]
    fused: nn.Module | None = None
    hook: RemovableHandle | None = None

    def moved(self) -> bool:
        """Whether diffusers has fused, or unfused, since this was last looked at."""
        return self.owner._modules.get(self.name) is not self.fused

    def attach(self) -> None:
        """Let the adapters of the parts act on what is fused now.

        Raises:
            RuntimeError: within a graph that is being compiled, which would go on without the adapters.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("projections were fused since the last call; call the module once before compiling it")
        self.detach()
        self.fused = self.owner._modules.get(self.name)
        if self.fused is not None:
            add = functools.partial(_add_updates, self.parts)
            self.hook = self.fused.register_forward_hook(add, with_kwargs=True)

    def detach(self) -> None:
        """Take the hook away."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    @torch.no_grad()
    def copy_again(self) -> None:
        """Write the parts' weights and biases into the fused layer, if there is one."""
        fused = self.owner._modules.get(self.name)
        for leaf in ("weight", "bias"):
            whole = getattr(fused, leaf, None)
            if whole is not None and not whole.is_meta:
                torch.cat([getattr(part, leaf) for part in self.parts], out=whole.data)


def fused_places(module: nn.Module) -> list[Place]:
    """Where layers are, or could be, fused of which one at least is adapted."""
    found = []
    for owner in module.modules():
        for name in (name for name in PARTS if is_fused(owner, name)):
            parts: tuple[Any, ...] = tuple(owner._modules[part] for part in PARTS[name])
            if any("delora" in part._modules for part in parts):
                found.append(Place(owner, name, parts))
    return found


def _add_updates(
    parts: tuple[nn.Linear, ...], fused: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], y: Tensor
) -> Tensor:
    """The forward hook of a fused layer."""
    x = args[0] if args else kwargs["input"]
    pieces = torch.split(y, [part.out_features for part in parts], dim=-1)
    layers: list[Any] = [part._modules.get("delora") for part in parts]
    updated = [piece if layer is None else layer(x, piece) for layer, piece in zip(layers, pieces, strict=True)]
    return torch.cat(updated, dim=-1)
