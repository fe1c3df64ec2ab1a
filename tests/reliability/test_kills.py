"""A share of the kills, and that the harness sees what it is there to see."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from delora_diffusion.atomic import ASIDE, complete_file

from . import kills

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are killed in forks")


def harness(*options: str) -> None:
    """In a process of its own: forks of one that has computed gradients cannot compute any."""
    command = [sys.executable, "-m", "tests.reliability.kills", *options]
    job = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert job.returncode == 0, job.stdout[-4000:] + job.stderr[-2000:]
    assert ", 0 not resumed to the same" in job.stdout.splitlines()[-1]


def test_a_share_of_the_kills_costs_nothing() -> None:
    harness("--seed=3", "--count=2", "--areas", "class images and cache")


@pytest.mark.slow
def test_no_kill_costs_anything() -> None:
    harness("--seed=4", "--count=300")


def written(whole: bool, files: int = 4) -> kills.Area:
    """A command that writes files, each whole or in two halves; what is there already it takes for whole."""

    def main(argv: Sequence[str]) -> int:
        for number in range(files):
            path = Path(argv[0]) / f"file-{number}"
            if not path.exists() and whole:
                with complete_file(path) as aside:
                    aside.write_text("first, second")
            elif not path.exists():
                with path.open("w") as file:
                    file.write("first, ")
                os.rename(path, path)
                with path.open("a") as file:
                    file.write("second")
        return 0

    def given(here: Path) -> list[str]:
        return [str(here)]

    return kills.Area(name="files", main=main, first=given, again=given)


@pytest.mark.parametrize("whole", [True, False])
def test_the_harness_sees_a_file_that_is_not_written_at_once(whole: bool, tmp_path: Path) -> None:
    area = written(whole)
    unkilled = kills.whole(area, tmp_path / "whole")
    results = [kills.trial(area, unkilled, tmp_path / f"{n}", random.Random(n)) for n in range(12)]
    assert all(result["resumed"] for result in results)
    assert sum(kill != "too late" for result in results for kill in result["kills"]) >= 6
    assert all(result["identical"] for result in results) is whole


def test_the_harness_sees_what_is_left_lying_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    area = written(whole=True)
    unkilled = kills.whole(area, tmp_path / "whole")
    monkeypatch.setattr("delora_diffusion.atomic.clear_scraps", lambda folder: None)
    results = [kills.trial(area, unkilled, tmp_path / f"{n}", random.Random(n)) for n in range(6)]
    assert any(ASIDE in scrap for result in results for scrap in result["scraps"])
