"""A share of the mutated files, and that the harness sees what it is there to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from delora_diffusion.adapters import adapter as native
from delora_diffusion.errors import DeloraError

from . import mutate


@pytest.fixture(autouse=True)
def not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest has a fault handler of its own."""
    monkeypatch.setattr(mutate.faulthandler, "dump_traceback_later", lambda *args, **settings: None)


def test_a_share_of_mutated_files_has_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutate, "SECONDS", float("inf"))  # the suite asserts no times
    outcomes, faults = mutate.run(tmp_path, seed=0, count=40)
    assert not faults and sum(outcomes.values()) == 40
    assert {"native: refused (read)", "older: refused (read)", "peft: refused (read)"} <= set(outcomes)


@pytest.mark.slow
def test_every_mutated_file_is_what_it_was_or_a_file_error(tmp_path: Path) -> None:
    for number, kinds in enumerate((("native",), mutate.KINDS)):
        outcomes, faults = mutate.run(tmp_path / str(number), seed=1, count=2000, kinds=kinds)
        assert not faults, outcomes


def test_the_harness_sees_other_values_other_errors_and_files_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faults(name: str, kind: str) -> str:
        return " ".join(mutate.run(tmp_path / name, seed=0, count=12, kinds=[kind])[1])

    with monkeypatch.context() as patch:
        patch.setattr(native, "check_sum", lambda path, tensors, header, needed: header.pop("checksum"))
        assert "compare: AssertionError: other" in faults("values", "native")
    with monkeypatch.context() as patch:
        patch.setattr(native, "AdapterFileError", DeloraError)
        assert "no file error" in faults("kind", "native")
    written = mutate.verify_lora

    def outside(path: Path, *args: Any) -> Any:
        (path.parent.parent / "outside").touch()
        return written(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(mutate, "verify_lora", outside)
        assert "wrote" in faults("place", "lora")
