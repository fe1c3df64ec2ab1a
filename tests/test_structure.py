"""The architecture, read from the source: imports point downwards, and what is optional or heavy stays out."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import delora_diffusion

PACKAGE = Path(delora_diffusion.__file__).parent
#: Wings, and files beside them, from the ground up. One imports only from rows above its own; inside a wing, files
#: import each other without a circle.
FLOORS = (
    ("errors", "interval", "locks", "yaml_text"),
    ("atomic", "console", "options", "peft_bridge", "run_folder", "same_module", "seeds"),
    ("option_checks",),
    ("method", "families"),
    ("base", "adapters"),
    ("pipeline", "data"),
    ("export", "sampling"),
    ("reports",),
    ("model",),
    ("evaluation",),
    ("training",),
    ("cli",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    """A file's dotted name in the package: `method.delora`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path) for path in MODULES}


def imports(source: str, name: str) -> set[str]:
    """Every module that a file imports, anywhere in it; ours by dotted names in the package, with a dot in front."""
    is_package = any(other.startswith(f"{name}.") for other in NAMES)
    here = name.split(".") if is_package else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            stem = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
            start = ".".join(part for part in stem if part)
            inner = {f"{start}.{alias.name}".lstrip(".") for alias in node.names} & NAMES
            found |= {f".{module}" for module in inner or {start}}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    prefix = "delora_diffusion."
    return {"." + module.removeprefix(prefix) if module.startswith(prefix) else module for module in found}


def upwards(name: str, source: str) -> list[str]:
    """Our wings that a file imports from although they are not below its own."""
    wing = name.split(".")[0]
    others = {module[1:].split(".")[0] for module in imports(source, name) if module.startswith(".")} - {wing}
    return sorted(other for other in others if FLOOR[other] >= FLOOR[wing])


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a ring, or none."""
    left = dict(arrows)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_wings_import_only_from_wings_below(path: Path) -> None:
    name = name_of(path)
    assert name.split(".")[0] in FLOOR, f"give {name} a floor in this test"
    assert upwards(name, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("wing", sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()))
def test_no_wing_has_a_circle_inside(wing: str) -> None:
    inside = {name_of(path): path for path in MODULES if path.parts[len(PACKAGE.parts)] == wing}
    arrows = {
        name: {target[1:] for target in imports(path.read_text(encoding="utf-8"), name)
               if target[1:] in inside and target[1:] != name}
        for name, path in inside.items()
    }  # fmt: skip
    assert circle(arrows) == []


def test_every_floor_of_the_table_exists() -> None:
    assert set(FLOOR) == {name_of(path).split(".")[0] for path in MODULES}


@pytest.mark.parametrize(
    "name, source, found",
    [
        ("data.photos", "from .encode import Cache", []),
        ("data.photos", "def f():\n    from ..pipeline import x", ["pipeline"]),
        ("method.inject", "from ..base import load", ["base"]),
        ("method.state", "import delora_diffusion.training.loop", ["training"]),
        ("base.load", "from delora_diffusion.adapters.read import x", ["adapters"]),
        ("pipeline", "from .method import inject\nimport torch", []),
    ],
)
def test_an_import_upwards_or_sideways_would_be_seen(name: str, source: str, found: list[str]) -> None:
    assert upwards(name, source) == found


def test_a_circle_would_be_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("path", [*MODULES, PACKAGE / "__init__.py"], ids=name_of)
def test_a_module_needs_neither_peft_nor_torchvision_nor_the_tests(path: Path) -> None:
    roots = {
        name.split(".")[0]
        for name in imports(path.read_text(encoding="utf-8"), name_of(path))
        if not name.startswith(".")
    }
    assert not roots & {"torchvision", "tests", "train_scripts", "samples"}
    assert "peft" not in roots or name_of(path) == "peft_bridge"


@pytest.mark.parametrize("path", [*MODULES, PACKAGE / "__init__.py"], ids=name_of)
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
