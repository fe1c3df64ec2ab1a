"""The manifest and the pages of a folder of samples, and folders that are somebody else's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from delora_diffusion.evaluation.images import read_pictures
from delora_diffusion.options import OptionError
from delora_diffusion.sampling import sample
from delora_diffusion.sampling.manifest import read_manifest, write_manifest

ODD = "a dog\u2028in the \x85 snow \x0b"


def jobs_in(folder: Path, prompts: int, seeds: int) -> list[sample.Job]:
    """Jobs whose images are there."""
    jobs = [
        sample.Job({"prompt": f"dog {p}", "seed": s, "strength": 1.0, "adapter": "a"}, 0)
        for p in range(prompts)
        for s in range(seeds)
    ]
    for job in jobs:
        Image.new("RGB", (8, 8)).save(folder / job.file)
    return jobs


def test_a_prompt_may_hold_what_unicode_calls_the_end_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    rows = {"a.png": {"file": "a.png", "prompt": ODD, "seed": 0}}
    write_manifest(tmp_path, rows)
    assert read_manifest(tmp_path) == rows
    assert [picture.prompt for picture in read_pictures(tmp_path)] == [ODD]


def test_broken_lines_are_told_and_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = {"a.png": {"file": "a.png", "prompt": "x"}}
    (tmp_path / "a.png").touch()
    broken = ["{broken", "3", '{"prompt": "x"}', '{"file": 3}', "[" * 100_000]
    content = "\n".join([*broken, json.dumps(rows["a.png"]), ""])
    (tmp_path / "manifest.jsonl").write_text(content)
    assert read_manifest(tmp_path) == rows
    told = [record.getMessage().split(" is ")[0][-6:] for record in caplog.records]
    assert told[:5] == [f"line {number}" for number in range(1, 6)]
    write_manifest(tmp_path, rows)
    assert read_manifest(tmp_path) == rows and len(caplog.records) == 6
    assert (tmp_path / "manifest.damaged.jsonl").read_text() == content


def test_many_prompts_and_seeds_go_on_on_further_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SIDE", 2)
    jobs = jobs_in(tmp_path, 3, 3)
    sample._write_sheets(tmp_path, jobs)
    names = ["contact_sheet.png", "contact_sheet_2.png", "contact_sheet_3.png", "contact_sheet_4.png"]
    assert sorted(path.name for path in tmp_path.glob("contact*")) == names
    sample._write_sheets(tmp_path, jobs[:6])
    assert sorted(path.name for path in tmp_path.glob("contact*")) == names[:2]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["photo.jpg"], "images that delora sample did not draw (photo.jpg)"),
        (["contact_sheet.png", "contact_sheet_2.png", "a-dog_3_0123456789.png", "notes.txt"], None),
        ([], None),
        (["photo.jpg", "manifest.jsonl"], None),
    ],
)
def test_a_folder_of_other_images_is_refused(names: list[str], said: Any, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    if said is None:
        return sample.check_own(tmp_path)
    with pytest.raises(OptionError) as refused:
        sample.check_own(tmp_path)
    assert said in str(refused.value)
