"""`delora export` and `delora verify`: agreement is seen, and every kind of disagreement as well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from delora_diffusion import (
    AdapterFileError,
    DeloraConfig,
    LoraError,
    export_lora,
    export_peft,
    verify_lora,
    write_adapter,
)
from delora_diffusion.adapters.adapter import Adapter
from delora_diffusion.cli import main

from .. import tiny, tiny_pipelines
from .test_lora import adapter_for

BOTH = ("unet", "text_encoder")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("verify"))


@pytest.fixture(scope="module")
def adapter(pipe: Any) -> Adapter:
    return adapter_for(pipe, *BOTH)


@pytest.mark.parametrize(
    "format, found",
    [
        ("diffusers", {"diffusers": 40, "comfyui": 8, "forge": 0, "a1111": 0}),
        ("kohya", {"diffusers": 40, "comfyui": 40, "forge": 40, "a1111": 40}),
    ],
)
def test_an_export_agrees_and_each_loader_is_counted(
    format: str, found: dict[str, int], adapter: Adapter, tmp_path: Path
) -> None:
    assert sum(name.endswith("delora_A") for named in adapter.tensors.values() for name in named) == 40
    file = export_lora(adapter, tmp_path / "x.safetensors", format=format).path
    report = verify_lora(file, adapter)
    assert report.layers == 40 and report.largest_error < 1e-6 and report.agrees(1e-6)
    assert report.loaders == found, "diffusers' names lose the UNet's 32 attention layers in ComfyUI, all in A1111"
    assert f"{found['a1111']}/40 layers found by A1111 1.10.1" in str(report)
    assert ("Forge of June 2025: drops the file whole: 64 of its tensors" in str(report)) == (format == "diffusers")


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_the_zeros_that_complete_a_text_encoder_are_not_unexpected(format: str, pipe: Any, tmp_path: Path) -> None:
    adapter = adapter_for(pipe, "text_encoder", target_modules=["q_proj"])
    made = export_lora(adapter, tmp_path / "x.safetensors", format=format)
    assert "attention projections without an adapter are there as zeros" in str(made)
    report = verify_lora(made.path, adapter)
    assert report.layers == 2 and report.unexpected == () and report.agrees(1e-6)


def test_a_layer_that_should_do_nothing_and_does_something_is_seen(adapter: Adapter, tmp_path: Path) -> None:
    file = export_lora(adapter, tmp_path / "x.safetensors").path
    report = verify_lora(file, adapter, weights=0.0)
    assert report.largest_error == float("inf") and not report.agrees(1e9)
    assert verify_lora(
        export_lora(adapter, tmp_path / "y.safetensors", weights=0.0).path, adapter, weights=0.0
    ).agrees(0)


def test_a_transformer_is_found_by_comfyui_under_diffusers_names(tmp_path: Path) -> None:
    pipe = tiny_pipelines.stable_diffusion_3(tmp_path / "parts")
    adapter = adapter_for(pipe, "transformer", "text_encoder", "text_encoder_2")
    report = verify_lora(export_lora(adapter, tmp_path / "x.safetensors", format="comfyui").path, adapter)
    assert report.loaders == {"diffusers": report.layers, "comfyui": report.layers, "forge": 0, "a1111": 0}
    assert "Forge of June 2025: no engine for sd3" in str(report)


@pytest.mark.parametrize("settings", [{"dtype": "fp16"}, {"rank": 1}, {"weights": 0.5}], ids=str)
def test_what_differs_is_measured(settings: dict[str, Any], adapter: Adapter, tmp_path: Path) -> None:
    file = export_lora(adapter, tmp_path / "x.safetensors", **settings).path
    report = verify_lora(file, adapter)
    tensors = load_file(file)
    exact = load_file(export_lora(adapter, tmp_path / "exact.safetensors").path)
    errors = []
    for name in (name for name in exact if name.endswith("lora_A.weight")):
        up = name.replace("lora_A", "lora_B")
        wanted = exact[up].double() @ exact[name].double()
        errors.append(float((tensors[up].double() @ tensors[name].double() - wanted).norm() / wanted.norm()))
    assert report.largest_error == pytest.approx(max(errors), rel=1e-3)
    assert not report.agrees(max(errors) * 0.9) and report.agrees(max(errors) * 1.1)


def changed(file: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{LAYER}.lora_A.weight"], tensors[f"{LAYER}.lora_B.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors |= {"unet.conv_in.lora_A.weight": torch.ones(2, 3), "unet.conv_in.lora_B.weight": torch.ones(3, 2)}


def alpha(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.alpha"] = torch.tensor(1.0)


@pytest.mark.parametrize(
    "change, said",
    [(drop, f"1 missing: {LAYER}"), (add, "1 unexpected: unet.conv_in"), (alpha, f"5.00e-01, in {LAYER}")],
)
def test_a_changed_file_does_not_agree(
    change: Callable[[dict[str, Tensor]], None], said: str, adapter: Adapter, tmp_path: Path
) -> None:
    file = changed(export_lora(adapter, tmp_path / "x.safetensors").path, change)
    report = verify_lora(file, adapter)
    assert not report.agrees(1e-3) and said in str(report)


def test_a_half_of_a_pair_and_other_files_are_refused(adapter: Adapter, tmp_path: Path) -> None:
    file = export_lora(adapter, tmp_path / "x.safetensors").path
    changed(file, lambda tensors: drop_one(tensors))
    with pytest.raises(LoraError, match="the file is incomplete"):
        verify_lora(file, adapter)
    with pytest.raises(LoraError, match="is no LoRA: its tensors are DeLoRA's"):
        verify_lora(write_adapter(tmp_path, adapter), adapter)
    with pytest.raises(AdapterFileError, match="cannot read"):
        verify_lora(tmp_path / "nothing.safetensors", adapter)


def drop_one(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{LAYER}.lora_B.weight"]


# ---- PEFT's folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["zero", "residual", "paired"])
def test_pefts_folders_agree_with_the_adapter_in_every_layer(init: str, pipe: Any, tmp_path: Path) -> None:
    adapter = adapter_for(pipe, *BOTH, init_weights=init)
    export_peft(adapter, tmp_path)
    report = verify_lora(tmp_path, adapter)
    assert report.layers == 40 and report.agrees(1e-6) and report.loaders == {"peft": 40}
    assert "40/40 layers found by PEFT" in str(report)
    one = verify_lora(tmp_path / "unet", adapter)
    assert len(one.missing) == 8 and "8 missing: text_encoder." in str(one) and not one.agrees(1)
    lora = export_lora(tmp_path, tmp_path / "x.safetensors").path
    assert verify_lora(lora, adapter).agrees(1e-6), "native, PEFT and LoRA are one"


def test_a_changed_peft_folder_does_not_agree(adapter: Adapter, tmp_path: Path) -> None:
    export_peft(adapter, tmp_path)
    settings, file = (tmp_path / "unet" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps(values | {"target_modules": [LAYER.removeprefix("unet.")]}))
    assert verify_lora(tmp_path, adapter).loaders == {"peft": 9}, "PEFT would leave the other 31 out"
    tensors = load_file(file)
    tensors[f"base_model.model.{LAYER.removeprefix('unet.')}.delora_lambda"] *= 1.5
    save_file(tensors, file)
    report = verify_lora(tmp_path, adapter)
    assert not report.agrees(1e-3) and f"5.00e-01, in {LAYER}" in str(report)


def test_layers_that_no_lora_can_hold_are_compared_in_peft(adapter: Adapter, tmp_path: Path) -> None:
    shapes = {"A": (2, 4), "B": (4, 2), "lambda": (1,), "w_norm": (4,)}
    t5 = {f"encoder.block.0.layer.0.SelfAttention.q.delora_{k}": torch.ones(shape) for k, shape in shapes.items()}
    both = Adapter({**adapter.tensors, "text_encoder_3": t5}, {**adapter.configs, "text_encoder_3": DeloraConfig(r=2)})
    export_peft(both, tmp_path)
    assert verify_lora(tmp_path, both).layers == 41 and verify_lora(tmp_path, both).agrees(1e-6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match="cannot read"):
        verify_lora(tmp_path / "empty", both)


# ---- on the command line -----------------------------------------------------------------------------


def test_export_and_verify_on_the_command_line(
    adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my_dog"
    made = folder / "my_dog_comfyui.safetensors"
    write_adapter(folder, adapter)

    def run(*words: object, code: int = 0) -> str:
        assert main([str(word) for word in words]) == code
        return capsys.readouterr().err

    said = run("export", "--adapter", folder, "--format", "comfyui", "--lora_dtype", "fp16")
    assert made.is_file() and f"{made}: rank 2, 8 layers of text_encoder, 32 layers of unet, kohya names" in said
    assert "40/40 layers found by ComfyUI 0.19.3" in run("verify", "--adapter", folder, "--file", made)
    said = run("verify", "--adapter", folder, "--file", made, "--tolerance", "1e-9", code=1)
    assert f"{made} is not {folder}" in said
    assert "exists; give another name" in run("export", "--adapter", folder, "--format", "comfyui", code=1)
    run("export", "--adapter", folder)
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    assert "say where to: output" in run("export", "--adapter", "some/where", "--format", "kohya", code=1)


def test_a_sum_on_the_command_line(
    adapter: Adapter, pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(write_adapter(tmp_path / "a", adapter).parent)]
    folders += [str(write_adapter(tmp_path / "b", adapter_for(pipe, "unet", seed=4)).parent)]
    sources = ["--adapter", *folders, "--weights", "1", "0.5"]
    exact, short = str(tmp_path / "exact.safetensors"), str(tmp_path / "short.safetensors")
    assert main(["export", *sources, "--output", exact]) == 0 and main(["verify", *sources, "--file", exact]) == 0
    assert main(["export", *sources, "--output", short, "--rank", "2"]) == 0
    assert "of the update is lost" in capsys.readouterr().err
    assert main(["verify", *sources, "--file", short]) == 1
    with pytest.raises(SystemExit):
        main(["export", "--adapter", *folders, "--weights", "1", "2", "3", "--output", exact])
