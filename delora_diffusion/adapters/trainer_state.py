"""The file in a checkpoint of transformers' Trainer from which it resumes: the adapters, exactly, without the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..atomic import complete_file
from ..method.raw_state import is_raw_adapter_state, raw_adapter_state
from .safetensors_file import write_tensors

#: What such a trainer resumes from, and takes the best model back from.
TRAINER_STATE_NAME = "model.safetensors"


def write_trainer_state(module: nn.Module, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Into a Trainer's checkpoint, what it resumes from; out of any other folder, what such a trainer copied there.

    Args:
        state_dict: the module's, if it is at hand already.
    """
    path = folder / TRAINER_STATE_NAME
    if folder.name.startswith("checkpoint-"):
        tensors = {name: tensor.contiguous() for name, tensor in raw_adapter_state(module, state_dict).items()}
        with complete_file(path) as aside:
            write_tensors(aside, tensors, {"format": "pt", "holds": "adapters"})
    elif path.is_file() and is_raw_adapter_state(module, _names_in(path)):
        path.unlink()


def _names_in(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), torch.empty(0))
