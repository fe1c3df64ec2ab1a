"""The architecture, read from the source: imports point downwards, and what is optional or heavy stays out."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import delora_diffusion

PACKAGE = Path(delora_diffusion.__file__).parent
LEVELS = (
    ("targets", "delora", "options", "objective", "families", "latents", "files", "sheet", "seeds", "encoders",
     "metrics", "prompts", "base_error", "tally"),
    ("buckets", "layout", "lowrank", "lora_names", "tensor_file", "block_weights", "architectures"),
    ("single_file", "inject", "config", "report", "peft_format", "spectrum", "lora_header"),
    ("merge", "state", "data", "evaluation_config", "file_config", "dial_plot", "adapter_file"),
    ("encode", "checkpoint", "optimizer", "journal", "pictures", "matching", "inspection"),
    ("pipeline", "batches", "base", "draw", "measure", "watch", "inspection_plot", "run_plot"),
    ("preview", "card", "train", "peft_file", "updates"),
    ("sample", "model", "merged", "strengths", "lora_file", "verify", "stages", "memory"),
    ("evaluate",),
    ("benchmark",),
    ("cli",),
)  # fmt: skip
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(source: str, *, depth: int = 0) -> set[str]:
    """Every module a file imports, anywhere in it, ours as `.name`; what lies in its own folder is not another."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and 0 < node.level <= depth:
            continue
        elif isinstance(node, ast.ImportFrom) and node.level and node.module is None:
            found |= {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * bool(node.level) + (node.module or ""))
    ours = {f".{name.removeprefix('delora_diffusion.')}" for name in found if name.startswith("delora_diffusion.")}
    return found | ours


def module_of(path: Path) -> str:
    """The name in the table; a folder of files is one module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def upwards(module: str, source: str, *, depth: int = 0) -> list[str]:
    """Our modules that `module` imports although they are not below it."""
    ours = sorted(name[1:].split(".")[0] for name in imports(source, depth=depth) if name.startswith("."))
    return [name for name in ours if LEVEL[name] >= LEVEL[module]]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_from_levels_below(path: Path) -> None:
    assert module_of(path) in LEVEL, f"give {module_of(path)} a level in this test"
    depth = len(path.relative_to(PACKAGE).parts) - 1
    assert upwards(module_of(path), path.read_text(encoding="utf-8"), depth=depth) == []


def test_every_module_of_the_table_exists() -> None:
    assert set(LEVEL) == set(map(module_of, MODULES))


@pytest.mark.parametrize(
    "module, source, found",
    [
        ("data", "from .encode import Cache", ["encode"]),
        ("data", "def f():\n    from .pipeline import x", ["pipeline"]),
        ("inject", "from . import delora, merge", ["merge"]),
        ("state", "import delora_diffusion.train", ["train"]),
        ("state", "from delora_diffusion.merge import x", ["merge"]),
        ("state", "from .inject import x\nimport torch", []),
    ],
)
def test_an_import_upwards_or_sideways_would_be_seen(module: str, source: str, found: list[str]) -> None:
    assert upwards(module, source) == found


def test_a_folder_is_one_module() -> None:
    assert upwards("families", "from .family import Family\nfrom ..seeds import x", depth=1) == ["seeds"]


@pytest.mark.parametrize("path", [*MODULES, PACKAGE / "__init__.py"], ids=lambda path: path.stem)
def test_a_module_needs_neither_peft_nor_torchvision_nor_the_tests(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8")) if not name.startswith(".")}
    assert not roots & {"peft", "torchvision", "tests", "train_scripts", "samples"}


@pytest.mark.parametrize("path", [*MODULES, PACKAGE / "__init__.py"], ids=lambda path: path.stem)
def test_a_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("diffusers", "transformers", "accelerate", "peft", "torchvision", "huggingface_hub", "matplotlib")
    code = f"import sys, delora_diffusion; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    assert len(set(delora_diffusion.__all__)) == len(delora_diffusion.__all__)
    assert [name for name in delora_diffusion.__all__ if not hasattr(delora_diffusion, name)] == []
