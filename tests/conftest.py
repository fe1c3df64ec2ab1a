"""Fixtures shared by the suite: one tiny base model on disk, photos, and the training script on both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: the suite never asks the network
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n 2: one core each, read when torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from accelerate.state import AcceleratorState

from . import tiny
from .runs import Run, arguments, load_script


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Stable Diffusion pipeline."""
    folder = tmp_path_factory.mktemp("base")
    tiny.stable_diffusion(folder / "parts").save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folder with three photos."""
    tiny.photos(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def run(base: Path, photos: Path, tmp_path: Path, fresh_accelerator: None) -> Run:
    """Train into tmp_path / name and expect an exit code."""

    def train(name: str, *extra: object, code: int = 0) -> Path:
        AcceleratorState._reset_state(True)
        out = tmp_path / name
        assert load_script().main(arguments(base, photos, out, *extra)) == code
        return out

    return train
