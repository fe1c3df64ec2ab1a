"""The real training script on the tiny base: how tests run it, and what they look at afterwards."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from torch import Tensor

from delora_diffusion.run_folder import ADAPTER_NAME

SCRIPT = Path(__file__).parents[1] / "train_scripts" / "train_dreambooth_delora.py"
Run = Callable[..., Path]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_dreambooth_delora", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(base: Path, photos: Path, out: Path, *extra: object) -> list[str]:
    common = {
        "pretrained_model_name_or_path": base, "instance_data_dir": photos, "instance_prompt": "a sks dog",
        "resolution": 16, "rank": 4, "output_dir": out, "max_train_steps": 6, "train_batch_size": 2,
        "validation_num_inference_steps": 2,
    }  # fmt: skip
    return [*(f"--{key}={value}" for key, value in common.items()), *map(str, extra)]


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / ADAPTER_NAME)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
