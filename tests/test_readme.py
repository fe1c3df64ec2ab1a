"""The three pages are true: their commands run, their code runs, their tables, trees and links name what there is.

python -m tests.test_readme      # writes the tables of options and of diffusers' flags into train_scripts/README.md
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from delora_diffusion.base.config import ModelConfig
from delora_diffusion.cli import COMMANDS
from delora_diffusion.cli import main as delora
from delora_diffusion.data.config import DataConfig
from delora_diffusion.evaluation.config import EvaluationConfig, MeasuringConfig
from delora_diffusion.export.config import ExportConfig, LoraConfig, MergingConfig, PushConfig
from delora_diffusion.options import build, parse, read_yaml, to_table
from delora_diffusion.sampling.config import DrawingConfig
from delora_diffusion.training.config import AdapterConfig, TrainingConfig, ValidationConfig
from delora_diffusion.training.diffusers_flags import DiffusersFlags
from delora_diffusion.training.diffusers_flags import to_table as foreign_table

from .benchmarks import forms
from .test_finetuning import load_script as finetuning
from .test_structure import FLOORS, MODULES, PACKAGE
from .tiny_language import language_base, sentences

ROOT = Path(__file__).parents[1]
README, TRAINING, ARCHITECTURE = PAGES = [
    ROOT / f"{place}README.md" for place in ("", "train_scripts/", "delora_diffusion/")
]
GROUPS = (ModelConfig, AdapterConfig, DataConfig, TrainingConfig, ValidationConfig)
#: Where a table stands on the page, and what it must be.
TABLES = {
    ("<!-- options -->\n", "<!-- end of options -->"): lambda: to_table(*GROUPS),
    ("<!-- diffusers -->\n", "<!-- end of diffusers -->"): foreign_table,
}
#: A word of every command on the pages that a test here runs, or reads; pytest is what runs this.
TESTED = (
    "spotted_dog.yaml",
    "my_dog.yaml",
    "delora_finetuning.py",
    "forms.py",
    "&& pytest",
    *(f"delora {name} " for name in COMMANDS),
)


def text_of(*pages: Path) -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


def blocks(language: str, *pages: Path) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(*(pages or PAGES)), re.S | re.M)


def commands(word: str) -> list[str]:
    """The commands with `word`, of all pages: fenced, or indented by four."""
    joined = [block.replace("\\\n", " ") for block in blocks("bash")]
    whole = re.sub(r"\\\n +", "", text_of(*PAGES))
    indented = re.findall(r"^    ((?:accelerate|delora|pip|python) .*)$", whole, re.M)
    return [line for block in [*joined, *indented] for line in block.splitlines() if word in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's training command was run, for a few steps only."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "samples").symlink_to(ROOT / "samples")
    (folder / "train_scripts").symlink_to(ROOT / "train_scripts")
    language_base(folder / "my" / "llama")
    (folder / "my_texts.txt").write_text("\n".join(sentences(12)))
    command = commands("samples/pocket/spotted_dog.yaml")[0].partition(" && ")[2]
    short = ["--max_train_steps=2", "--validation_num_inference_steps=2", "--num_validation_images=1"]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *shlex.split(command)[1:], *short]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.run(launch, cwd=folder, env=environment, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    assert "before and after: runs/spotted_dog/before_after.png" in job.stderr
    return folder


def test_the_first_command_trains_the_pocket_subject(trained: Path) -> None:
    out = trained / "runs" / "spotted_dog"
    pictures = {"before_after.png", "training.png", "strength_sheet.png"}
    files = {"delora_weights.safetensors", "pytorch_lora_weights.safetensors", "config.yaml", "best"}
    assert {p.name for p in out.iterdir()} >= files | pictures


def test_the_tree_of_the_run_folder_is_what_appears(trained: Path) -> None:
    (tree,) = [block for block in blocks("text", README) if block.startswith("runs/spotted_dog/\n")]
    shown = set(re.findall(r"^  (\S+)", tree, re.M))
    (checkpoints,) = [name for name in shown if name.startswith("checkpoint-")]
    assert f"every {TrainingConfig().checkpointing_steps} steps" in tree
    appeared = {path.name + "/" * path.is_dir() for path in (trained / "runs" / "spotted_dog").iterdir()}
    assert shown - {checkpoints} == appeared, "two steps leave no checkpoint"


def test_every_command_is_tested_and_every_other_training_command_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [line for line in commands("") if not any(word in line for word in TESTED)] == []
    (tmp_path / "train_scripts").symlink_to(ROOT / "train_scripts")
    (tmp_path / "my_dog.yaml").write_text(blocks("yaml", README)[0])
    monkeypatch.chdir(tmp_path)
    mine = commands("my_dog.yaml")
    assert len(mine) == 4
    for command in mine:
        words = shlex.split(command)
        script = next(place for place, word in enumerate(words) if word.endswith(".py"))
        assert words[:2] == ["accelerate", "launch"] and Path(words[script]).is_file()
        assert parse(words[script + 1 :], *GROUPS, prog="train", description="")


def test_the_python_code_runs(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    found = blocks("python")
    assert len(found) == 5
    for code in found:
        exec(compile(code.replace('beach")', 'beach", num_inference_steps=2)'), "README.md", "exec"), {})


def test_the_data_check_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("samples", "train_scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    (command,) = commands("delora check-data")
    assert delora(shlex.split(command)[1:]) == 0
    assert Path("runs/spotted_dog_data.png").is_file()


def test_the_command_for_language_models_runs(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    (command,) = commands("delora_finetuning.py")
    assert finetuning().main(shlex.split(command)[2:]) == 0
    assert Path("runs/words/adapter_model.safetensors").is_file()


def test_the_sampling_command_runs(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    (command,) = commands("delora sample --adapter")
    words = shlex.split(command)
    assert words[0] == "delora"
    assert delora([*words[1:], "--num_inference_steps=1", "--strengths", "1", "--seeds", "0"]) == 0
    assert Path("runs/spotted_dog_samples/contact_sheet.png").is_file()


@pytest.fixture
def unrelated(tmp_path: Path) -> Path:
    """One unrelated prompt instead of the README's 24."""
    (tmp_path / "unrelated.txt").write_text("a cat on the beach\n")
    return tmp_path / "unrelated.txt"


def test_the_evaluation_command_runs(trained: Path, unrelated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    (command,) = commands("delora evaluate")
    short = ["--num_inference_steps=1", "--strengths", "1", f"--unrelated_prompts_file={unrelated}"]
    assert delora([*shlex.split(command)[1:], *short]) == 0
    table = Path("runs/spotted_dog_evaluation/evaluation.md").read_text()
    assert "DINO, same caption" in table and "drift" in table


def test_the_benchmark_command_runs(trained: Path, unrelated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    (command,) = commands("delora benchmark")
    words = shlex.split(command)
    subjects = yaml.safe_load(Path(words[-1]).read_text())["subjects"]
    mine = {"spotted_dog": subjects["spotted_dog"] | {"adapter": "runs/spotted_dog"}}
    short = ["--num_inference_steps=1", "--strengths", "1", "--seeds", "0", f"--unrelated_prompts_file={unrelated}"]
    assert delora([*words[1:], f"--subjects={mine}", *short]) == 0
    written = {path.name for path in Path("runs/pocket_benchmark").iterdir()}
    assert written >= {"benchmark.md", "benchmark.csv", "benchmark.json", "benchmark.png"}


def test_merging_and_inspecting_run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    for word in ("merge", "inspect"):
        (command,) = commands(f"delora {word} ")
        assert delora(shlex.split(command)[1:]) == 0
    assert Path("runs/spotted_dog_model/model_index.json").is_file() and Path("runs/spotted_dog.png").is_file()
    (command,) = commands("delora push ")
    assert parse(shlex.split(command)[2:], PushConfig, prog="delora push", description="")


def test_the_export_and_verify_commands_run(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    for command in (*commands("delora export"), *commands("delora verify")):
        assert delora(shlex.split(command)[1:]) == 0
    said = capsys.readouterr().err
    for program in ("diffusers 0", "ComfyUI 0.19.3", "Forge of June 2025", "A1111 1.10.1"):
        assert f"56/56 layers found by {program}" in said


def test_every_form_of_the_trained_adapter_draws_the_same_pictures(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    (command,) = commands("tests/benchmarks/forms.py")
    words = [*shlex.split(command)[2:], "--steps=2", "--seeds=0", "--prompts=a sks dog"]
    assert forms.main(words) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "LoRA" in line or "PEFT" in line]
    assert len(rows) == 6 and all(row[1] == "56" for row in rows)


def test_the_yaml_for_own_photos_is_valid(tmp_path: Path) -> None:
    (text,), (concepts, watching) = blocks("yaml", README), blocks("yaml", TRAINING)
    (tmp_path / "my_dog.yaml").write_text(text)
    assert read_yaml(tmp_path / "my_dog.yaml", *GROUPS) == yaml.safe_load(text)
    (tmp_path / "my_dog.yaml").write_text(text + watching)
    values = read_yaml(tmp_path / "my_dog.yaml", *GROUPS)
    assert values["strength_sheet"] == [0.5, 0.75, 1, 1.25, 1.5] and all(build(group, values) for group in GROUPS)
    (tmp_path / "my_dog.yaml").write_text(concepts)
    values = read_yaml(tmp_path / "my_dog.yaml", *GROUPS) | {"with_base_preservation": True}
    assert [concept.trigger for concept in build(DataConfig, values).subjects] == ["sks", "zwx"]


@pytest.mark.parametrize(
    "config", [p for p in sorted((ROOT / "samples").glob("*/*.yaml")) if "bench" not in p.stem], ids=lambda p: p.stem
)
def test_sample_configs_are_valid_and_their_folders_exist(config: Path) -> None:
    values = read_yaml(config, *GROUPS)
    assert all(build(group, values) for group in GROUPS)
    assert (ROOT / values["pretrained_model_name_or_path"] / "model_index.json").is_file()
    assert any((ROOT / values["instance_data_dir"]).iterdir())


def without_table(page: Path) -> str:
    text = text_of(page)
    for start, end in TABLES:
        before, _, rest = text.partition(start)
        text = before + rest.partition(end)[2]
    return text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_mentioned_options_exist(page: Path) -> None:
    groups = (
        *GROUPS,
        finetuning().Finetuning,
        EvaluationConfig,
        MeasuringConfig,
        DrawingConfig,
        LoraConfig,
        ExportConfig,
        MergingConfig,
    )
    fields = [field for group in groups for field in dataclasses.fields(group)]
    known = {field.name for field in fields} | {f"no-{field.name}" for field in fields if field.type == "bool"}
    used = set(re.findall(r"--([a-z_-]{4,})", "\n".join(re.findall(r"`(--[^`]*)`", without_table(page)))))
    known |= {"config", "help", *DiffusersFlags().names, "machine_rank"}  # the last is accelerate's
    assert used <= known and (used or page == ARCHITECTURE)


def anchors(page: Path) -> set[str]:
    """What links can point to on a page: its headings, as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "samples/pocket/README.md", ROOT / "tests/benchmarks/README.md"],
    ids=lambda p: p.parent.name,
)
def test_linked_files_and_headings_exist(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]*)\)", text_of(page)) if not link.startswith("https://")]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_maps_show_every_wing_and_every_file() -> None:
    wings = {path.name + "/" for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    (tree,) = [block for block in blocks("text", README) if block.startswith("delora_diffusion/\n")]
    inside = tree.partition("\n")[2].partition("\ntrain_scripts/")[0]
    assert set(re.findall(r"^  (\w+/)", inside, re.M)) == wings
    assert all((ROOT / name).is_dir() for name in re.findall(r"^(\S+/)", tree, re.M))
    parts = re.split(r"^\*\*(.*?)\*\*", text_of(ARCHITECTURE).partition("## Contracts")[0], flags=re.M)[1:]
    shown = {
        title.strip("`") * title.startswith("`") + name
        for title, part in zip(parts[::2], parts[1::2], strict=True)
        for name in re.findall(r"^\| `(\w+\.py)` \|", part, re.M)
    }
    assert shown == {path.relative_to(PACKAGE).as_posix() for path in MODULES if path.name != "__init__.py"}


def test_the_floors_are_those_that_are_checked() -> None:
    (floors,) = blocks("text", ARCHITECTURE)
    assert [tuple(line.split()) for line in reversed(floors.splitlines())] == list(FLOORS)


def test_files_named_in_the_recipes_exist() -> None:
    recipes = text_of(ARCHITECTURE).partition("## To add a family")[2]
    named = {name for name in re.findall(r"`([\w/]+\.py)`", recipes)}
    assert len(named) > 10
    assert [name for name in named if not (PACKAGE / name).is_file() and not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("place", TABLES, ids=lambda place: place[0].strip())
def test_the_tables_list_every_option_and_every_flag(place: tuple[str, str]) -> None:
    table = text_of(TRAINING).partition(place[0])[2].partition(place[1])[0]
    assert table == f"\n{TABLES[place]()}\n\n", "out of date: run `python -m tests.test_readme`"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    (pattern,) = re.findall(r"sed -n '(/.*/)p'", script)
    (line,) = commands("pytest")
    assert line in blocks("bash", README)[1] and re.match(pattern.strip("/").replace(r"\.", "."), line)


if __name__ == "__main__":
    for (start, end), table in TABLES.items():
        before, _, rest = text_of(TRAINING).partition(start)
        TRAINING.write_text(before + start + f"\n{table()}\n\n" + end + rest.partition(end)[2], encoding="utf-8")
