"""Pipelines written as one file, by the names of the original implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from delora_diffusion.export.single_file import single_file_entries, write_single_file


def save_as_one_file(pipe: Any, path: Path, *, dtype: torch.dtype = torch.float32, vae: bool = True) -> Path:
    """Write the weights of a pipeline in the original layout, with or without its VAE."""
    entries = single_file_entries(pipe)
    for name in list(entries):
        if not vae and name.startswith("first_stage_model."):
            del entries[name]
            continue
        parts = entries[name].parts
        entries[name].parts = {number: tensor.to(dtype) for number, tensor in parts.items()}
    write_single_file(path, entries, {"format": "pt"})
    return path
