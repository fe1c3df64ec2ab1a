"""A frozen denoiser shared out over processes: each holds a part of every block, and the whole of one at a time.

This is FSDP2. Adapters are put in afterwards, so they are plain tensors, whole on every process: a step, its sum over
processes, checkpoints and files are what they are without. Before a block, its parts come from all processes; so all
of them must run the same forward passes, which `by_main` and `batch_loss` see to.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..families import Family
from ..method.weights import column_norms, note_norms

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def shard(denoiser: nn.Module, family: Family, accelerator: Accelerator) -> None:
    """Share a denoiser out that is in the CPU's memory; each process's part comes to its device.

    The column norms of its layers are noted first: no process can read a whole weight afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for linear in denoiser.modules():
        if isinstance(linear, nn.Linear):
            note_norms(linear, column_norms(linear))
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for name, block in list(denoiser.named_modules()):
        if re.fullmatch(family.blocks, name):
            fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)


def is_sharded(denoiser: nn.Module) -> bool:
    """Whether a process holds only a part of a denoiser."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(denoiser, FSDPModule)
