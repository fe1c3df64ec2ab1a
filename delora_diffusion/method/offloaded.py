"""Weights that accelerate keeps elsewhere and brings for the length of a forward (`cpu_offload`, a device map).

Outside of it a module holds tensors on the meta device, which have a shape and no values. What is read or written
between two forwards is what its hook keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DeloraError
from .kinds import Host


def stored(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of `module` with its values, wherever they are kept; of an outline, as it is."""
    tensor: Tensor = getattr(module, name)
    kept = getattr(_hook(module), "weights_map", None) if tensor.is_meta else None
    value: Tensor = tensor if kept is None else kept[name]
    return value


def written(linear: Host) -> Tensor:
    """The weight of a Linear, to be written to in place.

    Raises:
        ValueError: it is kept on disk, where writing does not reach.
    """
    weight = stored(linear, "weight")
    if weight is not linear.weight and stored(linear, "weight").data_ptr() != weight.data_ptr():
        raise DeloraError("the weights are offloaded to disk, where nothing can be merged into them; merge first")
    return weight


def runs_on(module: nn.Module) -> torch.device | None:
    """Where the weights of an offloaded module are brought to; None for one that is not offloaded."""
    hook = _hook(module)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None and getattr(hook, "offload", False) else None


def _hook(module: nn.Module) -> Any:
    """accelerate's hook that brings the weights of a module, also out of several in a row; None without one."""
    hook = module.__dict__.get("_hf_hook")
    return next((one for one in getattr(hook, "hooks", (hook,)) if hasattr(one, "weights_map")), None)
