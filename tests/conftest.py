"""Fixtures shared by the suite: one tiny base model on disk, and photos."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: the suite never asks the network

import pytest

from . import tiny


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
