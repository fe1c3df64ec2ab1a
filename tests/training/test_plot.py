"""The picture of a run: its curves by hand, that it is drawn, and that nothing fails without matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from delora_diffusion.training.plot import PREVIEWS, curves_of, merged, plot_run

from ..runs import Run

LINES = [
    {"step": 0, "dino": 0.1, "clip_t": 0.3, "drift": 0.0},
    {"step": 1, "loss": 1.0, "update_norm/mid_block": 0.01, "lambda/mid_block": 0.5, "lambda/up_blocks.1": 0.4},
    {"step": 10, "loss": 0.5, "update_norm/mid_block": 0.05, "lambda/mid_block": 1.5, "lambda/up_blocks.1": 1.4},
    {"step": 10, "dino": 0.6, "clip_t": 0.2, "drift": 0.04},
]


def written(folder: Path, lines: list[dict[str, float]]) -> Path:
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_every_panel_has_its_curves() -> None:
    assert curves_of(LINES) == {
        "loss": {"": [(1, 1.0), (10, 0.5)]},
        "fidelity": {"DINO": [(0, 0.1), (10, 0.6)]},
        "prompt following": {"CLIP-T": [(0, 0.3), (10, 0.2)]},
        "drift": {"drift": [(0, 0.0), (10, 0.04)]},
        "|dW| / |W|": {"mid_block": [(1, 0.01), (10, 0.05)]},
        "lambda, with its ramp": {"mid_block": [(1, 0.5), (10, 1.5)], "up_blocks.1": [(1, 0.4), (10, 1.4)]},
    }
    assert list(curves_of(LINES[1:2])) == ["loss", "|dW| / |W|", "lambda, with its ramp"]
    assert curves_of([]) == {}


def test_the_picture_shows_curves_the_best_and_the_previews(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written(tmp_path, LINES)
    pictures = {}
    for name, best, previews in (("plain", None, 0), ("best", 10, 0), ("previews", None, 20)):
        for step in range(previews):
            (tmp_path / "previews" / f"step_{step:06d}").mkdir(parents=True)
            Image.new("RGB", (16, 16), (255, 0, 255)).save(tmp_path / "previews" / f"step_{step:06d}" / "0_0.png")
        assert plot_run(tmp_path, best=best) == tmp_path / "training.png"
        with Image.open(tmp_path / "training.png") as image:
            pictures[name] = np.asarray(image.convert("RGB")).astype(int)
    assert (pictures["plain"] != 255).any(-1).sum() > 5000
    assert pictures["best"].shape == pictures["plain"].shape and (pictures["best"] != pictures["plain"]).any()
    assert pictures["previews"].shape[0] > pictures["plain"].shape[0]
    magenta = (pictures["previews"] == (255, 0, 255)).all(-1)
    row = magenta[np.nonzero(magenta.any(1))[0].mean().astype(int)].astype(int)
    assert (np.diff(row) == 1).sum() == PREVIEWS, "spread over the run, not all twenty"


def test_curves_that_are_the_same_are_drawn_once_under_their_names() -> None:
    up, down = [(1, 0.0), (10, 1.0)], [(1, 1.0), (10, 0.0)]
    assert merged({"a": up, "b": down, "c": list(up)}) == {"a, c": tuple(up), "b": tuple(down)}
    assert list(merged({str(number): up for number in range(6)})) == ["0, 1, 4 more"]


def test_the_best_and_what_the_photos_score_are_lines_at_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn: list[tuple[str, float]] = []
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **style: drawn.append((style["linestyle"], y)))
    marked: list[float] = []
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **style: marked.append(x))
    plot_run(written(tmp_path, LINES), best=10, photos={"dino": 0.9, "clip_t": 0.25, "clip_i": 0.8})
    assert drawn == [(":", 0.9), (":", 0.25)], "CLIP-I was not measured on previews"
    assert marked == [10] * 6, "in every panel"


def test_a_run_without_any_line_has_no_picture(tmp_path: Path) -> None:
    assert plot_run(tmp_path) is None and not (tmp_path / "training.png").exists()


def test_without_matplotlib_a_run_ends_well_and_says_how_to_get_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    out = run("out", "--max_train_steps=1")
    assert not (out / "training.png").exists() and (out / "README.md").is_file()
    told = 'no training.png: it needs matplotlib: pip install "delora_diffusion[plots]"'
    assert capsys.readouterr().err.splitlines().count(told) == 1
