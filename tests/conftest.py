"""Fixtures shared by the suite: one tiny base model on disk, and photos."""

from __future__ import annotations

from pathlib import Path

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
