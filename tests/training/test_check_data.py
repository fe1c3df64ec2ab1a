"""`delora check-data` and `delora masks`: what is said of photos before training, and what is made for it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from delora_diffusion.cli import main as delora

from .. import tiny


def odd_folder(folder: Path) -> Path:
    """A wide photo, the same smaller and saved again, a tiny one, and one with a long caption and a mask."""
    random = np.random.default_rng(0)
    folder.mkdir()
    coarse = random.integers(0, 255, (6, 12, 3), dtype=np.uint8)
    wide = Image.fromarray(coarse).resize((96, 48), Image.Resampling.BICUBIC)
    wide.save(folder / "a_wide.png")
    wide.resize((64, 32)).save(folder / "b_again.jpg", quality=90)
    Image.fromarray(random.integers(0, 255, (10, 10, 3), dtype=np.uint8)).save(folder / "c_tiny.png")
    Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / "d.png")
    Image.new("L", (32, 32), 255).save(folder / "d_mask.png")
    (folder / "d.txt").write_text("a sks dog on a very long beach")
    return folder


def test_the_table_says_what_becomes_of_each_photo(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sheet = odd_folder(tmp_path / "photos"), tmp_path / "sheet.png"
    words = [f"--instance_data_dir={folder}", "--instance_prompt=a sks dog", "--resolution=32", f"--sheet={sheet}"]
    assert delora(["check-data", *words, f"--pretrained_model_name_or_path={base}"]) == 0
    head, *lines = capsys.readouterr().out.strip().splitlines()
    assert head.split() == [
        "photo",
        "size",
        "trained",
        "at",
        "cut",
        "off",
        "mask",
        "caption",
        "from",
        "tokens",
        "notes",
    ]
    wide, again, small, long = (" ".join(line.split()) for line in lines)
    assert wide == "a_wide.png 96 x 48 32 x 32 50% a sks dog the prompt 9"
    assert again.startswith("b_again.jpg 64 x 32") and again.endswith("nearly the same as a_wide.png")
    assert small.endswith("9 too small: enlarged 3.2 times")
    assert long == (
        "d.png 32 x 32 32 x 32 0% yes a sks dog on a very long beach text files 25 caption cut off: 16 tokens are read"
    )
    red = np.asarray(Image.open(sheet)).astype(int)
    assert ((red[..., 0] > 230) & (red[..., 1] < 90) & (red[..., 2] < 130)).sum() > 4 * 100, "crops are drawn in"
    assert delora(["check-data", *words, "--aspect_ratio_buckets=auto", "--no-center_crop"]) == 0
    printed = capsys.readouterr()
    assert "lengths of captions are not checked" in printed.err and "tokens" not in printed.out


def test_everything_that_training_would_refuse_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.photos(tmp_path / "photos", 4)
    for name in ("01.png", "03.png"):
        (tmp_path / "photos" / name).write_bytes(b"no picture")
    words = ["check-data", f"--instance_data_dir={tmp_path / 'photos'}", f"--sheet={tmp_path / 'sheet.png'}"]
    assert delora([*words, "--instance_prompt=a dog"]) == 1
    error = capsys.readouterr().err
    assert error.count("cannot read the image") == 2 and "01.png" in error and "03.png" in error
    for name in ("01.png", "03.png"):
        (tmp_path / "photos" / name).unlink()
    assert delora(words) == 1
    assert "00.png has no caption" in capsys.readouterr().err
    assert not (tmp_path / "sheet.png").exists()


def test_masks_are_made_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    paths = tiny.photos(folder)
    monkeypatch.setitem(sys.modules, "rembg", None)
    assert delora(["masks", f"--folder={folder}"]) == 1
    assert 'pip install "delora_diffusion[masks]"' in capsys.readouterr().err

    def remove(image: Any, *, session: str, only_mask: bool) -> Image.Image:
        assert only_mask and session == "session of u2net"
        return Image.new("L", image.size, 0 if image.getpixel((0, 0)) == dark else 255)

    with Image.open(paths[1]) as image:
        dark = image.convert("RGB").getpixel((0, 0))
    fake = SimpleNamespace(new_session=lambda name: f"session of {name}", remove=remove)
    monkeypatch.setitem(sys.modules, "rembg", fake)
    Image.new("L", (24, 20), 77).save(folder / "00_mask.png")
    assert delora(["masks", f"--folder={folder}"]) == 1, "one photo in which nothing is found"
    assert "found nothing to keep in 01.png; paint their masks" in capsys.readouterr().err
    assert sorted(path.name for path in folder.glob("*_mask.png")) == ["00_mask.png", "02_mask.png"]
    with Image.open(folder / "00_mask.png") as mask:
        assert mask.getextrema() == (77, 77), "what is there stays"
    assert delora(["masks", f"--folder={tmp_path / 'none'}"]) == 1
    assert "folder" in capsys.readouterr().err
