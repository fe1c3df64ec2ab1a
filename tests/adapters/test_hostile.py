"""Adapter files that were damaged, changed or made to harm: nothing but their values is loaded, or a file error."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from delora_diffusion import (
    Adapter,
    AdapterFileError,
    DeloraConfig,
    DeloraConfigError,
    DeloraModel,
    export_lora,
    export_peft,
    inject_delora,
    load_delora_weights,
    read_adapter,
    write_adapter,
)
from delora_diffusion.adapters.sources import collect
from delora_diffusion.reports.inspect import as_table, inspect_adapter
from delora_diffusion.run_folder import ADAPTER_NAME

from .. import tiny

Change = Callable[[dict[str, Any]], None]
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def adapter(pipe: Any) -> Adapter:
    unet = copy.deepcopy(pipe.unet)
    config = DeloraConfig(r=2, target_modules=["to_q", "to_k"], init_weights="kaiming", modules_to_save=["conv_out"])
    inject_delora(unet, config, generator=torch.Generator().manual_seed(0))
    told = {"base_model": "some/base", "seed": "3", "instance_prompt": "a dog", "steps": "9", "pipeline": "X"}
    return collect({"unet": unet}, "default", provenance=told)


def refusal(source: Path) -> str:
    with pytest.raises(AdapterFileError) as refused:
        read_adapter(source)
    return str(refused.value)


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


def with_header(path: Path, change: Change) -> None:
    """Change a file's header, and nothing else."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def without_checksum(path: Path) -> None:
    """Make a file one of the time when there were no checksums."""

    def older(header: dict[str, Any]) -> None:
        del header["__metadata__"]["checksum"]
        header["__metadata__"]["format"] = "delora-1"

    with_header(path, older)


# ---- the checksum --------------------------------------------------------------------------------


def test_one_adapter_is_always_the_same_bytes(adapter: Adapter, tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    turned = Adapter(
        {"unet": dict(reversed(adapter.tensors["unet"].items()))},
        adapter.configs,
        dict(reversed(adapter.provenance.items())),
    )
    layers = {name: tensor for name, tensor in adapter.tensors["unet"].items() if "delora" in name}
    plain = dataclasses.replace(adapter, tensors={"unet": layers})
    for number in range(6):  # five texts in the header: a shuffled order would be the same one time in 120
        write_adapter(tmp_path / f"native{number}.safetensors", (adapter, turned)[number % 2])
        export_peft(adapter, tmp_path / f"peft{number}")
        export_lora(plain, tmp_path / f"lora{number}.safetensors")
    for name in ("native{}.safetensors", "peft{}/unet/adapter_model.safetensors", "peft{}/unet/adapter_config.json"):
        assert len({digest(tmp_path / name.format(number)) for number in range(6)}) == 1, name
    headers = [header_of(tmp_path / f"lora{number}.safetensors")["__metadata__"] for number in range(6)]
    assert all(list(header) == sorted(header) for header in headers)


def test_a_byte_changed_anywhere_is_seen(adapter: Adapter, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, adapter)
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 80):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert str(path) in refusal(path)
    path.write_bytes(whole)
    read_adapter(path)


def test_what_happens_to_files_is_seen(adapter: Adapter, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, adapter)
    whole = path.read_bytes()
    tensors = load(whole)
    with safe_open(path, framework="pt") as file:
        text = file.metadata()
    path.write_bytes(whole[:-600] + bytes(512) + whole[-88:])
    assert "is not as it was written: its checksum does not fit" in refusal(path)
    one, other = (f"unet.{LAYER.replace('to_q', leaf)}.delora_A" for leaf in ("to_q", "to_k"))
    assert tensors[one].shape == tensors[other].shape
    save_file(tensors | {one: tensors[other], other: tensors[one].clone()}, path, metadata=text)
    assert "its checksum does not fit" in refusal(path)
    save_file(tensors, path, metadata=text | {"instance_prompt": "a cat"})
    assert "its checksum does not fit" in refusal(path)
    save_file(tensors, path, metadata={k: v for k, v in text.items() if k != "checksum"})
    assert "its checksum does not fit" in refusal(path)
    save_file(tensors, path, metadata=text)
    assert read_adapter(path).provenance == adapter.provenance, "the same content, written by somebody else"


def test_pefts_folder_of_ours_has_one_too_and_one_of_pefts_need_not(adapter: Adapter, tmp_path: Path) -> None:
    file = export_peft(adapter, tmp_path)["unet"] / "adapter_model.safetensors"
    tensors = load_file(file)
    assert "checksum" not in read_adapter(tmp_path).provenance
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert "adapter_model.safetensors is not as it was written" in refusal(tmp_path / "unet")
    save_file(tensors, file, metadata={"format": "pt"})
    assert read_adapter(tmp_path / "unet").tensors[""].keys() == adapter.tensors["unet"].keys()


def test_a_file_without_a_checksum_is_read_one_of_another_version_is_told(adapter: Adapter, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, adapter)
    without_checksum(path)
    found = read_adapter(path)
    assert found.provenance == adapter.provenance and found.configs == adapter.configs
    with_header(path, lambda header: header["__metadata__"].update(format="delora-3"))
    assert "it is of another version than this delora_diffusion reads; update it" in refusal(path)


# ---- kinds of numbers, and sizes -----------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, said",
    [
        ("I32", f"unet.{LAYER}.delora_A holds int32, where fractions belong"),
        ("F8_E4M3", f"unet.{LAYER}.delora_A is stored as F8_E4M3, of which no adapter is made"),
        ("F4", "is stored as F4"),
        ("C64", "is stored as C64"),
        ("BOOL", "holds bool"),
    ],
)
def test_other_kinds_of_numbers_are_refused(kind: str, said: str, adapter: Adapter, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, adapter)
    without_checksum(path)
    size = {"I32": 1, "F8_E4M3": 4, "F4": 8, "C64": 0.5, "BOOL": 4}[kind]

    def change(header: dict[str, Any]) -> None:
        entry = header[f"unet.{LAYER}.delora_A"]
        entry["dtype"], entry["shape"] = kind, [entry["shape"][0], int(entry["shape"][1] * size)]

    with_header(path, change)
    assert said in refusal(path)


def test_ranks_are_compared_before_anything_is_made(
    pipe: Any, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = dataclasses.replace(adapter.configs["unet"], r=10**9)
    path = write_adapter(tmp_path, dataclasses.replace(adapter, configs={"unet": huge}))
    assert "delora_A has rank 2, and the configuration says 1000000000" in refusal(path)
    # layers that the file does not hold: only the module knows them
    wide = dataclasses.replace(huge, rank_pattern={".*attn1.*": 2}, target_modules=["to_q", "to_k", "to_v"])
    some = {name: t for name, t in adapter.tensors["unet"].items() if "attn1" in name or "conv_out" in name}
    hostile = read_adapter(write_adapter(tmp_path, Adapter({"unet": some}, {"unet": wide})))
    monkeypatch.setattr("delora_diffusion.method.inject._new_adapter", None)
    before = list(pipe.unet.state_dict())
    with pytest.raises(ValueError, match=r"UNet2DConditionModel: \d+ missing"):
        load_delora_weights(pipe, hostile)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel: \d+ missing"):
        DeloraModel.from_pretrained(pipe.unet, hostile)
    assert list(pipe.unet.state_dict()) == before


# ---- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, said",
    [
        ('{"unet": ' * 20_000, "cannot be read"),
        ('{"unet": {"r": 2, "delora_lambda": 1' + "0" * 400 + "}}", "a number of hundreds of digits"),
        ('{"unet": {"r": 2, "rank_pattern": {"' + "(" * 3000 + '": 2}}}', "is not a regular expression"),
        ('{"unet": {"r": 2, "target_modules": [[]]}}', "it must be a list of names"),
        ('{"../../x": {"r": 2}}', "'../../x' cannot be the name of a component"),
        ('{"/etc": {"r": 2}}', "'/etc' cannot be the name of a component"),
        ('{"unet": {"r": 2, "exclude_modules": "' + "a|" * 600_000 + '"}}', "characters, and 1,000,000 are allowed"),
    ],
    ids=["deep", "large", "pattern", "kind", "path", "absolute path", "long"],
)
@pytest.mark.parametrize("form", ["native", "peft"])
def test_hostile_configurations_are_file_errors(
    config: str, said: str, form: str, adapter: Adapter, tmp_path: Path
) -> None:
    if form == "native":
        path = write_adapter(tmp_path, adapter)
        with_header(path, lambda header: header["__metadata__"].update(delora_config=config))
        assert said in refusal(path) and str(path) in refusal(path)
        return
    folder = export_peft(adapter, tmp_path)["unet"]
    if "component" in said:
        name = next(iter(json.loads(config)))
        with_header(folder / "adapter_model.safetensors", lambda header: header["__metadata__"].update(component=name))
    else:
        inner = config if said == "cannot be read" else config.removeprefix('{"unet": ').removesuffix("}")
        (folder / "adapter_config.json").write_text('{"peft_type": "DELORA", ' + inner.removeprefix("{"))
    assert ("cannot read" if said == "cannot be read" else said) in refusal(folder)
    assert str(folder / "adapter_config.json") in refusal(folder)


def test_a_pattern_without_end_is_matched(pipe: Any, adapter: Adapter, tmp_path: Path) -> None:
    endless = {"(([a-z_0-9.]+)+)+-": 7, "(.*)*(.*)*(.*)*=": 9}
    config = dataclasses.replace(
        adapter.configs["unet"], rank_pattern=endless, exclude_modules=r"(([a-z]|[0-9]|[._a-z])*)*-"
    )
    read = read_adapter(write_adapter(tmp_path, dataclasses.replace(adapter, configs={"unet": config})))
    with pytest.raises(ValueError, match="fits none of the"):
        load_delora_weights(pipe, read)


def test_no_adapter_can_be_written_outside_its_folder(adapter: Adapter, tmp_path: Path) -> None:
    for name in ("../out", "/tmp/out", "a/b", "a\\b", "c:out", "unet.x", "..", "\0"):
        with pytest.raises(AdapterFileError, match="cannot be the name of a component"):
            Adapter({name: adapter.tensors["unet"]}, {name: adapter.configs["unet"]})
    export_peft(adapter, tmp_path / "good")
    shutil.copytree(tmp_path / "good" / "unet", tmp_path / "several" / "checkpoint-5")
    assert "holds several adapters, such as checkpoint-5; give the folder of one" in refusal(tmp_path / "several")
    assert read_adapter(tmp_path / "several" / "checkpoint-5").tensors.keys() == {"unet"}
    assert not (tmp_path / ADAPTER_NAME).exists()


def test_texts_of_a_file_cannot_steer_a_terminal(adapter: Adapter, tmp_path: Path) -> None:
    spoiled = dataclasses.replace(adapter, provenance={"instance_prompt": "\x1b[2J\x07\x9b31m\u202edog é"})
    table = as_table([inspect_adapter(read_adapter(write_adapter(tmp_path, spoiled)), "x")])
    assert all(c.isprintable() or c == "\n" for c in table) and r"\x1b[2J\x07\x9b31m\u202edog é" in table


@pytest.mark.parametrize("text", ["[1]", "3", "{", "[" * 100_000, '{"r": ' * 50_000], ids=lambda text: text[:7])
def test_a_configuration_that_is_none_is_told(text: str) -> None:
    with pytest.raises(DeloraConfigError, match="configuration is"):
        DeloraConfig.from_json(text)
