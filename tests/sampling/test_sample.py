"""`delora sample`: what is drawn, what is written, what a second run does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from delora_diffusion import DeloraConfig, inject_delora, load_delora_weights, save_delora_weights
from delora_diffusion.cli import main
from delora_diffusion.method.inject import delora_adapters
from delora_diffusion.sampling.config import SCHEDULERS

from .. import tiny

Rows = list[dict[str, object]]


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the tiny base, strong enough to be seen."""
    folders = []
    for seed in (0, 1):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
        config = DeloraConfig(r=2, delora_lambda=5.0, init_weights="kaiming")
        inject_delora(pipe.unet, config, generator=torch.Generator().manual_seed(seed))
        folders.append(tmp_path_factory.mktemp("adapter") / f"adapter{seed}")
        save_delora_weights(folders[-1], pipe, provenance={"base_model": str(base)})
    return folders


def sample(out: Path, *arguments: object, code: int = 0) -> Rows:
    """Run the command; returns the manifest."""
    assert main(["sample", f"--output_dir={out}", "--num_inference_steps=2", *map(str, arguments)]) == code
    return rows_of(out)


def rows_of(out: Path) -> Rows:
    path = out / "manifest.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def pixels(out: Path, row: dict[str, object]) -> np.ndarray:
    return tiny.as_array(Image.open(out / str(row["file"])))


def test_draws_the_whole_product_with_manifest_and_sheet(adapters: list[Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# places\na cat\n\na dog\n")
    rows = sample(
        tmp_path / "out", "--adapter", *adapters, f"--prompts_file={tmp_path / 'prompts.txt'}", "--prompts=a cow",
        "--seeds", 3, 4, "--strengths", 0.5, 1, "--images_per_prompt=2",
    )  # fmt: skip
    assert len(rows) == 3 * 2 * 2 * 2 * 2
    assert len({str(row["file"]) for row in rows}) == len(rows)
    assert {row["prompt"] for row in rows} == {"a cow", "a cat", "a dog"}
    assert {3, 4} < {row["seed"] for row in rows} and len({row["seed"] for row in rows}) == 4
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.height > 3 * 192 and sheet.width > 16 * 192
    with Image.open(tmp_path / "out" / str(rows[0]["file"])) as image:
        assert {"file": rows[0]["file"], **json.loads(image.text["delora"])} == rows[0]  # type: ignore[attr-defined]


def test_strength_zero_is_the_base_and_an_image_can_be_drawn_again(
    adapters: list[Path], base: Path, tmp_path: Path
) -> None:
    zero, one = sample(tmp_path / "out", f"--adapter={adapters[0]}", "--prompts=a cat", "--strengths", 0, 1)
    (plain,) = sample(tmp_path / "base", f"--pretrained_model_name_or_path={base}", "--prompts=a cat")
    assert np.array_equal(pixels(tmp_path / "out", zero), pixels(tmp_path / "base", plain))
    assert np.abs(pixels(tmp_path / "out", one) - pixels(tmp_path / "out", zero)).max() > 20
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    load_delora_weights(pipe, adapters[0])
    again = pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.abs(tiny.as_array(again) - pixels(tmp_path / "out", one)).max() <= 1


def test_an_image_does_not_depend_on_its_neighbours(adapters: list[Path], tmp_path: Path) -> None:
    common = (f"--adapter={adapters[0]}", "--prompts", "a cat", "a dog", "--seeds", 0, 1, 2, "--scheduler=euler_a")
    alone = sample(tmp_path / "alone", *common, "--batch_size=1")
    together = sample(tmp_path / "together", *common, "--batch_size=5")
    again = sample(tmp_path / "again", *common[:-4], 2, 1, "--scheduler=euler_a", "--batch_size=1")
    for one, other in zip(alone, together, strict=True):
        assert one["file"] == other["file"]
        assert np.abs(pixels(tmp_path / "alone", one) - pixels(tmp_path / "together", other)).max() <= 1
    for one in again:
        assert np.array_equal(pixels(tmp_path / "alone", one), pixels(tmp_path / "again", one))


def test_a_second_run_draws_only_what_is_missing(adapters: list[Path], tmp_path: Path) -> None:
    common = (f"--adapter={adapters[0]}", "--prompts", "a cat", "a dog")
    rows = sample(tmp_path, *common, "--seeds", 0, 1)
    files = [tmp_path / str(row["file"]) for row in rows]
    files[0].unlink()
    kept = {file: file.stat().st_mtime_ns for file in files[1:]}
    more = sample(tmp_path, *common, "--seeds", 1, 0, 2)
    assert files[0].is_file() and {file: file.stat().st_mtime_ns for file in files[1:]} == kept
    assert len(more) == 6


def test_a_retrained_adapter_gets_new_images(adapters: list[Path], base: Path, tmp_path: Path) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    load_delora_weights(pipe, adapters[0])
    save_delora_weights(tmp_path / "mine", pipe, provenance={"base_model": str(base)})
    common = (f"--adapter={tmp_path / 'mine'}", "--prompts=a cat")
    before = sample(tmp_path / "out", *common)
    with torch.no_grad():
        for adapter in delora_adapters(pipe.unet).values():
            adapter.delora_lambda.mul_(2)
    save_delora_weights(tmp_path / "mine", pipe, provenance={"base_model": str(base)})
    after = sample(tmp_path / "out", *common)
    assert len(after) == 2 and after[0] == before[0] and after[1]["file"] != before[0]["file"]


def test_processes_share_the_work_and_draw_the_same(adapters: list[Path], tmp_path: Path) -> None:
    arguments = [f"--adapter={adapters[0]}", "--prompts", "a cat", "a dog", "--seeds", "0", "1", "--batch_size=1"]
    rows = sample(tmp_path / "one", *arguments)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-m", "delora_diffusion.cli", "sample", f"--output_dir={tmp_path / 'two'}", "--num_inference_steps=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    job = subprocess.run([*launch, *command, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert job.returncode == 0, job.stderr
    assert rows_of(tmp_path / "two") == rows
    for row in rows:
        assert np.array_equal(pixels(tmp_path / "one", row), pixels(tmp_path / "two", row)), "one by one: to the bit"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_name_draws(base: Path, tmp_path: Path, name: str) -> None:
    chosen = (f"--scheduler={name}", "--num_inference_steps=6")
    (row,) = sample(tmp_path, f"--pretrained_model_name_or_path={base}", "--prompts=a cat", *chosen)
    assert pixels(tmp_path, row).std() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no prompts"),
        (("--prompts=a cat",), "nothing to draw with"),
        (("--prompts=a cat", "--adaptor=x"), "did you mean --adapter"),
        (("--prompts=a cat", "--pretrained_model_name_or_path=x", "--scheduler=eular"), "did you mean euler"),
        (("--prompts=a cat", "--pretrained_model_name_or_path=x", "--strengths", "strong"), "must be a number"),
    ],
)
def test_refuses_options(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sample(tmp_path, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapter=nothing/here",), "there is no"),
        (("--pretrained_model_name_or_path=no/base",), "no/base is neither a folder nor among the models downloaded"),
        (("--pretrained_model_name_or_path=no/base", "--prompts_file=none.txt"), "cannot read prompts_file"),
    ],
)
def test_refuses_what_is_not_there(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(tmp_path, "--prompts=a cat", *arguments, code=1) == []
    assert message in capsys.readouterr().err


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0 and "sample" in capsys.readouterr().out
    assert main(["smaple"]) == 2 and "commands are " in capsys.readouterr().err


def test_what_is_named_twice_is_drawn_once_and_what_is_no_picture_again(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    given = (f"--pretrained_model_name_or_path={base}", "--prompts=a cat", "--seeds", 1, 1, 2, 1)
    rows = sample(tmp_path / "out", *given)
    assert [row["seed"] for row in rows] == [1, 2]
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("a-cat*")}
    empty, damaged = (tmp_path / "out" / str(row["file"]) for row in rows)
    empty.write_bytes(b"")
    damaged.write_bytes(b"no picture")
    with (tmp_path / "out" / "manifest.jsonl").open("a") as file:
        file.write('{"prompt": "a row without its file"}\n[1]\n{"fi\n')
    assert sample(tmp_path / "out", *given) == rows
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("a-cat*")} == before
    said = capsys.readouterr().err
    told = [line for line in (3, 4, 5) if f"manifest.jsonl line {line} is no line of delora sample" in said]
    assert told == [3, 4, 5]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--height=-8"], "height is -8; it must be at least 8"),
        (["--width=0"], "width is 0; it must be at least 8"),
        ([f"--seeds={2**64}"], "seeds is 18446744073709551616; it must be at least 0 and below 18446744073709551616"),
    ],
)
def test_sizes_and_seeds_that_cannot_be_are_refused(flags: list[str], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "--pretrained_model_name_or_path=x", "--prompts=a cat", *flags])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_what_cannot_be_drawn_or_written_is_said_in_a_sentence(
    base: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (f"--pretrained_model_name_or_path={base}", "--prompts=a cat")
    sample(tmp_path / "out", *given, "--height=11", code=1)
    assert "height or width is 11; StableDiffusionPipeline needs a multiple of" in capsys.readouterr().err
    (tmp_path / "file").write_text("a file")
    sample(tmp_path / "file" / "out", *given, code=1)
    said = capsys.readouterr().err
    assert f"{tmp_path / 'file'}" in said and "Not a directory" in said

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("delora_diffusion.atomic._aside", full)
    sample(tmp_path / "full", *given, code=1)
    assert "No space left on device" in (said := capsys.readouterr().err) and "Traceback" not in said


def test_a_relative_base_is_found_from_the_adapter_or_the_option_is_named(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The training was started in a project's folder; the drawing is from elsewhere."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(base, project / "models" / "tiny")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    load_delora_weights(pipe, adapters[0])
    save_delora_weights(project / "runs" / "dog", pipe, provenance={"base_model": "models/tiny"})
    monkeypatch.chdir(elsewhere)
    (row,) = sample(elsewhere / "out", f"--adapter={project / 'runs' / 'dog'}", "--prompts=a cat")
    (known,) = sample(elsewhere / "known", f"--adapter={adapters[0]}", "--prompts=a cat")
    assert np.array_equal(pixels(elsewhere / "out", row), pixels(elsewhere / "known", known))
    shutil.rmtree(project / "models")
    sample(elsewhere / "lost", f"--adapter={project / 'runs' / 'dog'}", "--prompts=a cat", code=1)
    said = capsys.readouterr().err
    assert "models/tiny" in said and "--pretrained_model_name_or_path gives another base" in said
