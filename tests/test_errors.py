"""What users can cause is a sentence and exit code 1, whatever the command; a fault of the program raises."""

from __future__ import annotations

import copy
import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import delora_diffusion.cli as cli
from delora_diffusion import (
    Adapter,
    DeloraConfig,
    export_lora,
    fuse_delora,
    inject_delora,
    load_delora_weights,
    set_adapters,
    unfuse_delora,
    unload_delora_weights,
    write_adapter,
)
from delora_diffusion.adapters.sources import collect
from delora_diffusion.errors import DeloraError, MissingExtraError, WeightKindError, sentence_of
from delora_diffusion.method import merge

from . import tiny
from .runs import arguments, load_script


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("errors"))


@pytest.fixture(scope="module")
def adapter(pipe: Any) -> Adapter:
    parts = {"unet": copy.deepcopy(pipe.unet), "text_encoder": copy.deepcopy(pipe.text_encoder)}
    for part in parts.values():
        inject_delora(part, DeloraConfig(r=2, init_weights="kaiming"), generator=torch.Generator().manual_seed(0))
    return collect(parts, "default", provenance={"base_model": "some/base"})


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command that is to fail: the one line it says."""

    def run(*words: object) -> str:
        capfd.readouterr()
        assert cli.main([str(word) for word in words]) == 1
        lines = capfd.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:] and "Traceback" not in str(lines)
        return lines[-1]

    return run


# ---- which errors are the user's -----------------------------------------------------------------

OURS = [ValueError("x"), TypeError("x"), KeyError("x"), RuntimeError("x"), AssertionError(), ZeroDivisionError()]
THEIRS = [
    DeloraError("a b"),
    WeightKindError("a b"),
    MissingExtraError("a b"),
    OSError(errno.ENOSPC, "No space left on device", "/some/file"),
    PermissionError(errno.EACCES, "Permission denied", "/some/file"),
    ConnectionError("the Hub hangs up\nafter a while"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB. GPU 0 has a total capacity of ..."),
]


@pytest.fixture(params=["delora", "the trainer"])
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run a command in whose midst an error is raised; its exit code."""

    def run(error: Exception) -> int:
        def fails(*args: Any) -> None:
            raise error

        if request.param == "delora":
            monkeypatch.setitem(cli.COMMANDS, "inspect", fails)
            return cli.main(["inspect"])
        script = load_script()
        monkeypatch.setattr(script, "start", fails)
        return int(script.main(arguments(tmp_path, tmp_path, tmp_path / "out")))

    return run


@pytest.mark.parametrize("error", OURS, ids=lambda error: type(error).__name__)
def test_a_fault_of_the_program_raises(error: Exception, failing: Any) -> None:
    with pytest.raises(type(error)):
        failing(error)


@pytest.mark.parametrize("error", THEIRS, ids=lambda error: type(error).__name__)
def test_what_a_user_can_cause_is_a_sentence(
    error: Exception, failing: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    assert failing(error) == 1
    said = capfd.readouterr().err.splitlines()
    assert said == [f"error: {sentence_of(error)}"]


def test_a_sentence_about_a_disk_names_the_place_and_the_way_out() -> None:
    full = sentence_of(OSError(errno.ENOSPC, "No space left on device", "/some/file"))
    assert full == "/some/file: No space left on device; make room there, or choose another place"
    assert "Tried" not in (said := sentence_of(THEIRS[-1])) and said.startswith("the device is out of memory: CUDA")


# ---- places that cannot be written to ------------------------------------------------------------


def test_a_place_that_cannot_be_written_to_is_said_by_every_command(
    told: Any, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_adapter(tmp_path / "adapter", adapter)
    (tmp_path / "file").touch()
    (tmp_path / "folder.json" / "x").mkdir(parents=True)
    inside, folder = tmp_path / "file" / "out", tmp_path / "folder.json"
    for words in (
        ("export", "--adapter", source, "--output", inside),
        ("export", "--adapter", source, "--output", inside, "--format", "peft"),
        ("inspect", "--adapter", source, "--json", inside / "figures.json"),
        ("inspect", "--adapter", source, "--plot", inside / "figures.png"),
    ):
        assert str(tmp_path / "file") in told(*words), words
    assert str(folder) in told("inspect", "--adapter", source, "--json", folder)

    def full(*args: Any, **settings: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("delora_diffusion.adapters.safetensors_file.save_file", full)
    assert "No space left on device" in told("export", "--adapter", source, "--output", tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.safetensors"))


# ---- LoRA files of another shape -----------------------------------------------------------------


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: torch.tensor(1.0), "are no halves of one update"),
        (lambda t: t[:1], "are no halves of one update"),
        (lambda t: t[0], "are no halves of one update"),
        (lambda t: t[:, :0], "are no halves of one update"),
        (lambda t: t.to(torch.int32), "are no halves of one update"),
        (lambda t: torch.cat([t, t], 1), "the file is for another base"),
        (lambda t: t.to(torch.float8_e4m3fn), "is stored as F8_E4M3, of which no adapter is made"),
        (lambda t: t * torch.nan, "not finite"),
    ],
    ids=["scalar", "other rank", "vector", "empty", "integers", "other size", "float8", "nan"],
)
def test_a_lora_that_is_damaged_or_for_another_base_is_said(
    change: Any, said: str, told: Any, adapter: Adapter, tmp_path: Path
) -> None:
    source = write_adapter(tmp_path / "adapter", adapter)
    file = export_lora(adapter, tmp_path / "x.safetensors").path
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    save_file(tensors | {name: change(tensors[name]).contiguous()}, tmp_path / "changed.safetensors")
    assert said in told("verify", "--adapter", source, "--file", tmp_path / "changed.safetensors")


def test_an_update_that_is_not_finite_is_said(told: Any, adapter: Adapter, tmp_path: Path) -> None:
    name = next(name for name in adapter.tensors["unet"] if name.endswith("delora_lambda"))
    large = adapter.tensors["unet"] | {
        name: torch.tensor([3e38]),
        name.replace("lambda", "w_norm"): torch.full((8,), 3e38),
    }
    source = write_adapter(tmp_path, Adapter({"unet": large}, {"unet": adapter.configs["unet"]}))
    for words in (("inspect",), ("export", "--output", tmp_path / "x.safetensors")):
        assert "is not finite; the adapter is of no use" in told(words[0], "--adapter", source, *words[1:])


# ---- strengths and names in Python ---------------------------------------------------------------


@pytest.fixture
def loaded(adapter: Adapter, tmp_path: Path) -> Any:
    pipe = tiny.stable_diffusion(tmp_path / "pipe")
    load_delora_weights(pipe, adapter, "dog", check_base=False)
    return pipe


def strengths(pipe: Any) -> set[float]:
    modules = [*pipe.unet.modules(), *pipe.text_encoder.modules()]
    return {round(float(m.delora_weight), 6) for m in modules if hasattr(m, "delora_weight")}


def test_numbers_of_numpy_and_torch_are_strengths(loaded: Any, adapter: Adapter, tmp_path: Path) -> None:
    half = [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)]
    for value in half:
        blocks = {"down": value, "mid": value, "up": value}
        each = {"unet": value, "text_encoder": value}
        for given in (value, [value], each, each | {"unet": blocks}):
            set_adapters(loaded, "dog", 1.0)
            set_adapters(loaded, "dog", given)
            assert strengths(loaded) == {0.5}, given
    for several in (np.array([0.25]), torch.tensor([0.25]), (0.25,)):
        set_adapters(loaded, ["dog"], several)  # type: ignore[arg-type]
        assert strengths(loaded) == {0.25}
    set_adapters(loaded, "dog", 1)
    assert strengths(loaded) == {1.0}
    fuse_delora(loaded, scale=torch.tensor(0.5))  # type: ignore[arg-type]
    assert {type(v) for m in loaded.unet.modules() for v in getattr(m, "merged", {}).values()} == {float}
    for value in half:
        path = export_lora(adapter, tmp_path / "x.safetensors", weights=value, overwrite=True).path  # type: ignore[arg-type]
    assert path.exists()


@pytest.mark.parametrize(
    "value", [None, "1", True, [[1.0]], 1j, object(), torch.ones(1, 2), {"unet": "a"}, {"unet": True}]
)
def test_what_is_no_strength_is_said_and_changes_nothing(value: Any, loaded: Any) -> None:
    set_adapters(loaded, "dog", 0.5)
    with pytest.raises(DeloraError):
        set_adapters(loaded, "dog", value)
    assert strengths(loaded) == {0.5}


@pytest.mark.parametrize("name", [3, None, 1.5, ("dog", 3), [["dog"]]])
def test_what_is_no_name_is_said(name: Any, loaded: Any, adapter: Adapter) -> None:
    with pytest.raises(DeloraError, match="cannot be the name of an adapter; names are texts"):
        set_adapters(loaded, name)
    if isinstance(name, (int, float)):
        with pytest.raises(DeloraError, match="names are texts"):
            load_delora_weights(loaded, adapter, name, check_base=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("x"), ValueError("x")], ids=repr)
@pytest.mark.parametrize("before", [False, True], ids=["nothing fused", "one fused before"])
def test_fusing_is_all_or_nothing_over_components(
    error: BaseException, before: bool, loaded: Any, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_delora_weights(loaded, adapter, "cat", check_base=False)
    if before:
        fuse_delora(loaded, "dog")
    weights = {name: t.clone() for part in (loaded.unet, loaded.text_encoder) for name, t in part.state_dict().items()}
    written, calls = merge._write_sum, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == len(list(adapter.tensors["unet"])) // 4 + 3:  # the third layer of the second component
            raise error
        return written(*args)

    monkeypatch.setattr(merge, "_write_sum", failing)
    with pytest.raises(type(error)):
        fuse_delora(loaded, "cat")
    after = {name: t for part in (loaded.unet, loaded.text_encoder) for name, t in part.state_dict().items()}
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    monkeypatch.undo()
    fuse_delora(loaded, "cat")
    assert any(not torch.equal(loaded.unet.state_dict()[name], weights[name]) for name in loaded.unet.state_dict())
    unfuse_delora(loaded)
    unload_delora_weights(loaded)
