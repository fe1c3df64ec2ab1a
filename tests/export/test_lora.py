"""Exported LoRAs in plain diffusers pipelines: the same images as the native adapter, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from delora_diffusion import (
    Adapter,
    AdapterFileError,
    DeloraConfig,
    ExportReport,
    LoraError,
    export_lora,
    inject_delora,
    load_delora_state_dict,
    load_delora_weights,
    set_adapters,
    set_delora_adapters,
    verify_lora,
    write_adapter,
)
from delora_diffusion.adapters.sources import collect
from delora_diffusion.export.lora_header import hashes
from delora_diffusion.run_folder import LORA_NAME

from .. import tiny, tiny_pipelines

DENOISER = {"sd": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}
ENCODERS = {"sd": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"],
            "sd3": ["text_encoder", "text_encoder_2"], "flux": ["text_encoder"]}  # fmt: skip
BUILD: dict[str, Callable[[Path], Any]] = {
    "sd": tiny.stable_diffusion, "sdxl": tiny_pipelines.stable_diffusion_xl,
    "sd3": tiny_pipelines.stable_diffusion_3, "flux": tiny_pipelines.flux,
}  # fmt: skip
Pipes = Callable[[str], Any]


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Pipes:
    """A fresh copy of the tiny pipeline of a family."""
    made: dict[str, Any] = {}

    def fresh(family: str) -> Any:
        if family not in made:
            made[family] = BUILD[family](tmp_path_factory.mktemp(family))
            made[family].set_progress_bar_config(disable=True)
        return clone(made[family])

    return fresh


def clone(pipe: Any) -> Any:
    parts = {
        name: copy.deepcopy(part) if isinstance(part, nn.Module) else part for name, part in pipe.components.items()
    }
    kept = {name: value for name, value in pipe.config.items() if name in ("requires_safety_checker",)}
    made = type(pipe)(**parts, **kept)
    made.set_progress_bar_config(disable=True)
    return made


def components(family: str) -> list[str]:
    return [DENOISER[family], *ENCODERS[family]]


def adapter_for(
    pipe: Any, *names: str, seed: int = 0, fields: dict[str, dict[str, Any]] | None = None, **common: Any
) -> Adapter:
    """A trained-looking adapter of components of the pipeline, which stays as it is."""
    modules = {name: copy.deepcopy(getattr(pipe, name)) for name in names}
    for number, (name, module) in enumerate(modules.items()):
        chosen = {"r": 2, "delora_lambda": 6.0, "init_weights": "kaiming"} | common | (fields or {}).get(name, {})
        generator = torch.Generator().manual_seed(10 * seed + number)
        inject_delora(module, DeloraConfig(**chosen), generator=generator)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return collect(modules, "default", provenance={"pipeline": type(pipe).__name__, "instance_prompt": "a sks dog",
                                                   "base_model": "some/base", "resolution": "512"})  # fmt: skip


def with_native(pipe: Any, *adapters: Adapter) -> Any:
    """The pipeline with adapters injected, whatever its family; called n0, n1, ..."""
    for number, adapter in enumerate(adapters):
        for component, tensors in adapter.tensors.items():
            module = getattr(pipe, component)
            inject_delora(module, adapter.configs[component], f"n{number}")
            load_delora_state_dict(module, tensors, f"n{number}")
    return pipe


def weigh(pipe: Any, adapter: Adapter, strength: float) -> None:
    for component in adapter.tensors:
        set_delora_adapters(getattr(pipe, component), "n0", strength)


def draw(pipe: Any, family: str) -> np.ndarray:
    """Pixels in [0, 1], (16, 16, 3)."""
    settings: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    generator = torch.Generator().manual_seed(3)
    if family == "flux":
        pooled = pipe.text_encoder(
            pipe.tokenizer(["ab"], return_tensors="pt", padding="max_length").input_ids
        ).pooler_output
        embeds = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(4))
        settings |= {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    else:
        settings |= {"prompt": "ab", "guidance_scale": 2.0}
    with torch.no_grad():
        image: np.ndarray = pipe(generator=generator, **settings).images[0]
    return image


def with_lora(pipe: Any, file: Path, strength: float = 1.0) -> Any:
    pipe.load_lora_weights(str(file), adapter_name="x")
    pipe.set_adapters("x", strength)
    return pipe


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        found: dict[str, str] = opened.metadata()
    return found


# ---- the same images in plain diffusers -------------------------------------------------------------

CASES = [*((family, "diffusers") for family in BUILD), ("sd", "kohya"), ("sdxl", "kohya")]


@pytest.mark.parametrize("family, format", CASES)
def test_the_file_draws_what_the_adapter_draws(family: str, format: str, pipes: Pipes, tmp_path: Path) -> None:
    base = pipes(family)
    adapter = adapter_for(base, *components(family))
    file = export_lora(adapter, tmp_path / "x.safetensors", format=format).path
    native, plain = with_native(pipes(family), adapter), with_lora(pipes(family), file)
    untouched = draw(base, family)
    for strength in (0.0, 0.5, 1.0):
        weigh(native, adapter, strength)
        plain.set_adapters("x", strength)
        expected = draw(native, family)
        assert np.abs(draw(plain, family) - expected).max() < 1e-5
        moved = np.abs(untouched - expected).max()
        assert moved == 0 if strength == 0 else moved > 1e-3


@pytest.mark.parametrize(
    "family, same_as", [("sd", "kohya"), ("sdxl", "kohya"), ("sd3", "diffusers"), ("flux", "diffusers")]
)
def test_comfyui_is_the_format_that_comfyui_reads(family: str, same_as: str, pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes(family), *components(family))
    found, expected = (load_file(export_lora(adapter, tmp_path / f"{format}.safetensors", format=format).path)
                       for format in ("comfyui", same_as))  # fmt: skip
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("init", ["zero", "residual", "paired"])
def test_every_init_is_exported_exactly(init: str, format: str, pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sd"), *components("sd"), init_weights=init)
    report = export_lora(adapter, tmp_path / "x.safetensors", format=format)
    assert report.rank == (4 if init == "residual" else 2)
    assert ("rank is 2r" in str(report)) == (init == "residual")
    expected = draw(with_native(pipes("sd"), adapter), "sd")
    assert np.abs(draw(with_lora(pipes("sd"), report.path), "sd") - expected).max() < 1e-5
    assert np.abs(draw(pipes("sd"), "sd") - expected).max() > 1e-3


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_all_linear_layers_reach_their_place(family: str, format: str, pipes: Pipes, tmp_path: Path) -> None:
    base = pipes(family)
    adapter = adapter_for(base, *components(family), target_modules="all-linear", delora_lambda=2.0)
    assert family == "sd" or any("add_embedding" in name for name in adapter.tensors["unet"])
    file = export_lora(adapter, tmp_path / "x.safetensors", format=format).path
    expected = draw(with_native(pipes(family), adapter), family)
    assert np.abs(draw(with_lora(pipes(family), file), family) - expected).max() < 1e-5


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_convolutions_are_a_locon(format: str, pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sd"), "unet", target_modules="attention+ff+conv", delora_lambda=2.0)
    report = export_lora(adapter, tmp_path / "x.safetensors", format=format)
    down = "unet.mid_block.resnets.0.conv1.lora_A.weight"
    if format == "kohya":
        down = "lora_unet_mid_block_resnets_0_conv1.lora_down.weight"
        assert json.loads(header_of(report.path)["ss_network_args"])["conv_dim"] == "2"
    tensors = load_file(report.path)
    assert tensors[down].shape == (2, 16, 3, 3)
    up = down.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
    assert tensors[up].shape == (16, 2, 1, 1)
    expected = draw(with_native(pipes("sd"), adapter), "sd")
    assert np.abs(draw(with_lora(pipes("sd"), report.path), "sd") - expected).max() < 1e-5
    assert np.abs(draw(pipes("sd"), "sd") - expected).max() > 1e-3
    found = verify_lora(report.path, adapter)
    assert found.largest_error < 1e-5 and not found.missing and not found.unexpected


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["q_proj", "v_proj"],
        ["fc1", "fc2"],
        ["fc2"],
        r".*layers\.1\.self_attn\.out_proj",
        ["mlp.fc1", "k_proj"],
    ],
    ids=str,
)
def test_a_text_encoder_adapted_in_part_is_completed_with_zeros(
    targets: Any, format: str, pipes: Pipes, tmp_path: Path
) -> None:
    adapter = adapter_for(pipes("sd"), "text_encoder", target_modules=targets, delora_lambda=20.0)
    report = export_lora(adapter, tmp_path / "x.safetensors", format=format)
    assert "are there as zeros" in str(report)
    names = [name for name in load_file(report.path) if name.endswith(("lora_A.weight", "lora_down.weight"))]
    for block in {name.split("self_attn")[0] for name in names if "self_attn" in name}:
        assert sum(name.startswith(f"{block}self_attn") for name in names) == 4
    expected = draw(with_native(pipes("sd"), adapter), "sd")
    assert np.abs(draw(with_lora(pipes("sd"), report.path), "sd") - expected).max() < 1e-5
    assert np.abs(draw(pipes("sd"), "sd") - expected).max() > 1e-4


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_ranks_that_differ_are_filled_up_to_one(format: str, pipes: Pipes, tmp_path: Path) -> None:
    fields = {"unet": {"r": 2, "rank_pattern": {"to_q": 5, "to_k": 1}}, "text_encoder": {"r": 3}}
    adapter = adapter_for(pipes("sd"), *components("sd"), fields=fields)
    report = export_lora(adapter, tmp_path / "x.safetensors", format=format)
    tensors = load_file(report.path)
    assert report.rank == 5 and "ranks 1, 2, 3, 5 are filled up to 5" in str(report)
    assert {t.shape[0] for name, t in tensors.items() if name.endswith(("lora_A.weight", "lora_down.weight"))} == {5}
    assert {float(t) for name, t in tensors.items() if name.endswith(".alpha")} <= {5.0}
    expected = draw(with_native(pipes("sd"), adapter), "sd")
    assert np.abs(draw(with_lora(pipes("sd"), report.path), "sd") - expected).max() < 1e-5


def test_the_update_is_the_dense_formula(pipes: Pipes, tmp_path: Path) -> None:
    """dW = (lambda / r) B diag(1 / (|a_i| |b_i|)) A diag(w), in fp64 and with a floored norm."""
    adapter = adapter_for(pipes("sd"), "unet")
    named = adapter.tensors["unet"]
    layer = next(name for name in named if name.endswith("delora_A")).removesuffix(".delora_A")
    named[f"{layer}.delora_A"][0] *= 1e-6  # under the floor
    A, B, lam, w = (named[f"{layer}.delora_{k}"].double() for k in ("A", "B", "lambda", "w_norm"))
    a, b = A.norm(dim=1).clamp(min=1e-4), B.norm(dim=0).clamp(min=1e-4)
    dense = (lam / 2) * (B / (a * b)) @ (A * w)
    tensors = load_file(export_lora(adapter, tmp_path / "x.safetensors").path)
    found = tensors[f"unet.{layer}.lora_B.weight"].double() @ tensors[f"unet.{layer}.lora_A.weight"].double()
    assert float((found - dense).norm() / dense.norm()) < 1e-6


def test_the_training_folder_loads_as_it_is(pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sd"), *components("sd"))
    write_adapter(tmp_path, adapter)
    assert export_lora(tmp_path, tmp_path).path == tmp_path / LORA_NAME
    plain, native = pipes("sd"), pipes("sd")
    plain.load_lora_weights(str(tmp_path))
    load_delora_weights(native, tmp_path)
    assert np.abs(draw(plain, "sd") - draw(native, "sd")).max() < 1e-5
    assert np.abs(draw(plain, "sd") - draw(pipes("sd"), "sd")).max() > 1e-3


# ---- fp16 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 1e-5], ids=["ordinary", "tiny"])
def test_fp16_keeps_every_layer_within_half_a_thousandth(strength: float, pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sd"), *components("sd"), delora_lambda=0.5)
    exact = load_file(export_lora(adapter, tmp_path / "a.safetensors", weights=strength).path)
    half = load_file(export_lora(adapter, tmp_path / "b.safetensors", weights=strength, dtype="fp16").path)
    assert {t.dtype for t in half.values()} == {torch.float16} and {t.dtype for t in exact.values()} == {torch.float32}
    for name in exact:
        if name.endswith("lora_A.weight"):
            up = name.replace("lora_A", "lora_B")
            wanted, found = exact[up] @ exact[name], half[up].float() @ half[name].float()
            assert float((found - wanted).norm() / wanted.norm()) < 5e-4


def test_fp16_keeps_what_is_left_of_updates_that_cancel(pipes: Pipes, tmp_path: Path) -> None:
    """A residual adapter after one small step: two large updates, whose difference is a thousandth of either."""
    adapter = adapter_for(pipes("sd"), *components("sd"), init_weights="residual", r=4)
    for named in adapter.tensors.values():
        for name in [name for name in named if name.endswith("_init")]:
            now = named[name.removesuffix("_init")]
            generator = torch.Generator().manual_seed(len(name))
            named[name] = now * (1 + 1e-3 * torch.randn(now.shape, generator=generator))
    report = verify_lora(export_lora(adapter, tmp_path / "x.safetensors", dtype="fp16").path, adapter)
    assert report.agrees(5e-4), report
    assert verify_lora(export_lora(adapter, tmp_path / "y.safetensors").path, adapter).agrees(1e-5)


# ---- sources ----------------------------------------------------------------------------------------


def test_every_source_gives_the_same_file(pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sd"), "unet")
    native = with_native(pipes("sd"), adapter)
    folder = write_adapter(tmp_path / "native", adapter).parent
    peft = tmp_path / "peft"
    peft.mkdir()
    values = {"peft_type": "DELORA", "r": 2, "delora_lambda": 6, "target_modules": "all-linear", "init_weights": False}
    (peft / "adapter_config.json").write_text(json.dumps(values))
    save_file(
        {f"base_model.model.{n}": t for n, t in adapter.tensors["unet"].items()}, peft / "adapter_model.safetensors"
    )
    sources: list[tuple[Any, dict[str, Any]]] = [
        (adapter, {}), (folder, {}), (str(folder / "delora_weights.safetensors"), {}), (peft, {"component": "unet"}),
        (native.unet, {"component": "unet", "adapter_name": "n0"}), ({"unet": native.unet}, {"adapter_name": "n0"}),
        (native, {"adapter_name": "n0"}), ([adapter], {}),
    ]  # fmt: skip
    expected = load_file(export_lora(adapter, tmp_path / "x.safetensors").path)
    for source, settings in sources:
        found = load_file(export_lora(source, tmp_path / "x.safetensors", overwrite=True, **settings).path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_live_adapter_is_exported_at_its_present_strength(pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sd"), "unet")
    pipe = pipes("sd")
    load_delora_weights(pipe, adapter, "dog")
    set_adapters(pipe, "dog", 0.5)
    live = load_file(export_lora(pipe, tmp_path / "a.safetensors", adapter_name="dog").path)
    half = load_file(export_lora(adapter, tmp_path / "b.safetensors", weights=0.5).path)
    assert all(torch.allclose(live[name], half[name], rtol=1e-6) for name in half)


def test_the_text_model_level_is_put_back(pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sd"), "text_encoder")
    plain = {n.removeprefix("text_model."): t for n, t in adapter.tensors["text_encoder"].items()}
    levelled = {f"text_model.{n}": t for n, t in plain.items()}
    for format, start in (("diffusers", "text_encoder.text_model.encoder."), ("kohya", "lora_te_text_model_encoder_")):
        for tensors in (plain, levelled):
            other = replace(adapter, tensors={"text_encoder": tensors})
            file = export_lora(other, tmp_path / "x.safetensors", format=format, overwrite=True).path
            assert all(name.startswith(start) for name in load_file(file))


# ---- sums of adapters ----------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_weighted_sum_is_exact_and_its_ranks_add(format: str, pipes: Pipes, tmp_path: Path) -> None:
    first = adapter_for(pipes("sd"), *components("sd"), seed=1, init_weights="residual")
    fields = {"r": 3, "target_modules": ["to_q", "to_v", "ff.net.2"], "delora_lambda": 3.0}
    second = adapter_for(pipes("sd"), "unet", seed=2, **fields)
    report = export_lora([first, second], tmp_path / "x.safetensors", format=format, weights=[0.7, -0.4])
    assert report.rank == 2 * 2 + 3
    native = with_native(pipes("sd"), first, second)
    set_delora_adapters(native.unet, ["n0", "n1"], [0.7, -0.4])
    set_delora_adapters(native.text_encoder, "n0", 0.7)
    expected = draw(native, "sd")
    assert np.abs(draw(with_lora(pipes("sd"), report.path), "sd") - expected).max() < 1e-5
    set_delora_adapters(native.unet, ["n0", "n1"], [0.7, 0.4])
    assert np.abs(draw(native, "sd") - expected).max() > 1e-3, "the weights matter"


def test_a_sum_compressed_to_a_rank_is_the_nearest_and_says_what_is_lost(pipes: Pipes, tmp_path: Path) -> None:
    adapters = [adapter_for(pipes("sd"), "unet", seed=seed) for seed in (1, 2)]
    exact = load_file(export_lora(adapters, tmp_path / "a.safetensors").path)
    report = export_lora(adapters, tmp_path / "b.safetensors", rank=3)
    short = load_file(report.path)
    assert report.rank == 3
    lost = size = 0.0
    shares = {}
    for name in exact:
        if name.endswith("lora_A.weight"):
            up = name.replace("lora_A", "lora_B")
            dense = exact[up].double() @ exact[name].double()
            tail = torch.linalg.svdvals(dense)[3:].square().sum()
            off = (short[up].double() @ short[name].double() - dense).square().sum()
            assert float(off) == pytest.approx(float(tail), rel=1e-3, abs=1e-9)
            lost, size = lost + float(tail), size + float(dense.square().sum())
            shares[name.removesuffix(".lora_A.weight")] = float(tail / dense.square().sum()) ** 0.5
    worst = max(shares, key=lambda name: shares[name])
    said = f"{(lost / size) ** 0.5:.2%} of the update is lost, at most {shares[worst]:.2%}, in {worst}"
    assert f"compressed to rank 3: {said}" in str(report)
    whole = export_lora(adapters, tmp_path / "c.safetensors", rank=4)
    assert "compressed to rank 4: 0.00%" in str(whole)
    assert all(torch.equal(t, exact[name]) for name, t in load_file(whole.path).items())


# ---- the header ---------------------------------------------------------------------------------


def test_the_header_says_what_user_interfaces_read(
    pipes: Pipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    adapter = adapter_for(pipes("sdxl"), *components("sdxl"))
    adapter.provenance["base_fingerprint"] = "abc"
    for format, made_for in (("diffusers", "diffusers"), ("kohya", "https://github.com/kohya-ss/sd-scripts")):
        file = export_lora(adapter, tmp_path / f"my_{format}.safetensors", format=format).path
        header = header_of(file)
        data = file.read_bytes()
        digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
        expected = {
            "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "2.0",
            "ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False", "ss_output_name": f"my_{format}",
            "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}", "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "modelspec.title": f"my_{format}",
            "modelspec.resolution": "512x512", "modelspec.trigger_phrase": "a sks dog",
            "ss_sd_model_name": "some/base", "delora.base_model": "some/base", "delora.base_fingerprint": "abc",
            "format": "pt", "modelspec.implementation": made_for, "modelspec.date": "2001-09-09T01:46:40Z",
            "trained_words": '["a sks dog"]', "ss_tag_frequency": json.dumps({f"my_{format}": {"a sks dog": 1}}),
        }  # fmt: skip
        assert {key: header[key] for key in expected} == expected
        assert "lora_adapter_metadata" not in header, "diffusers raises on it beside .alpha tensors"
    bare = export_lora(adapter, tmp_path / "bare.safetensors", metadata=False).path
    assert header_of(bare) == {"format": "pt"}
    named = export_lora(adapter, tmp_path / "named.safetensors", trigger="sks, dog").path
    assert header_of(named)["modelspec.trigger_phrase"] == "sks, dog"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    with pytest.raises(LoraError, match="seconds since 1970"):
        export_lora(adapter, tmp_path / "never.safetensors")
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    dated = header_of(export_lora(adapter, tmp_path / "dated.safetensors").path)["modelspec.date"]
    assert abs(datetime.fromisoformat(dated.replace("Z", "+00:00")).timestamp() - time.time()) < 600


def test_hashes_are_those_that_kohyas_tools_count(tmp_path: Path) -> None:
    tensors = {"lora_unet_x.lora_down.weight": torch.randn(300, 1024, generator=torch.Generator().manual_seed(0))}
    fields = {"ss_network_dim": "4", "modelspec.title": "x"}
    save_file(tensors, tmp_path / "as_kohya_does.safetensors", {"ss_network_dim": "4"})
    data = (tmp_path / "as_kohya_does.safetensors").read_bytes()
    assert len(data) > 0x110000
    found = hashes(tensors, fields)
    assert found["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert found["sshs_model_hash"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def test_a_sidecar_holds_words_and_strength_and_is_never_replaced(pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sdxl"), "unet")
    folder = write_adapter(tmp_path / "dog", adapter).parent
    (folder / "strengths.json").write_text('{"recommended": 0.75}')
    file = tmp_path / "dog.safetensors"
    report = export_lora(folder, file, format="kohya", sidecar=True)
    beside = file.with_suffix(".json")
    assert json.loads(beside.read_text()) == {
        "sd version": "SDXL", "activation text": "a sks dog", "preferred weight": 0.75,
    }  # fmt: skip
    assert str(beside) in str(report)
    beside.write_text("mine")
    assert "stays as it is" in str(export_lora(folder, file, format="kohya", sidecar=True, overwrite=True))
    assert beside.read_text() == "mine"
    assert not export_lora(folder, tmp_path / "alone.safetensors").path.with_suffix(".json").exists()


def test_text_encoders_can_be_left_out(pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("flux"), *components("flux"))
    report = export_lora(adapter, tmp_path / "x.safetensors", format="comfyui", text_encoders=False)
    assert set(report.layers) == {"transformer"}
    assert all(name.startswith("transformer.") for name in load_file(report.path))
    assert verify_lora(report.path, adapter, text_encoders=False).agrees(1e-6)
    assert verify_lora(report.path, adapter).missing
    with pytest.raises(LoraError, match="nothing is left without text encoders"):
        export_lora(adapter_for(pipes("flux"), "text_encoder"), tmp_path / "y.safetensors", text_encoders=False)


def test_a_family_that_is_not_known_is_not_guessed(pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sd"), "unet")
    header = header_of(export_lora(adapter, tmp_path / "a.safetensors").path)
    assert not {"ss_base_model_version", "ss_v2", "modelspec.architecture"} & header.keys()
    header = header_of(export_lora(adapter, tmp_path / "b.safetensors", architecture="sd2").path)
    assert header["ss_v2"] == "True" and header["ss_base_model_version"] == "sd_v2"


@pytest.mark.parametrize("family, format", CASES)
def test_tensor_names_hold_nothing_that_a_loader_misreads(
    family: str, format: str, pipes: Pipes, tmp_path: Path
) -> None:
    adapter = adapter_for(pipes(family), *components(family), init_weights="residual")
    names = list(load_file(export_lora(adapter, tmp_path / "x.safetensors", format=format).path))
    endings = (".lora_down.weight", ".lora_up.weight", ".alpha") if any(n.startswith("lora_") for n in names) else (
        ".lora_A.weight", ".lora_B.weight")  # fmt: skip
    assert all(name.endswith(endings) for name in names)
    assert not [name for name in names if "delora" in name or name.endswith((".w_norm", ".diff", ".diff_b"))]


# ---- what is refused --------------------------------------------------------------------------------


def refused(kind: type[Exception], call: Callable[[], ExportReport], folder: Path) -> str:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(kind) as error:
        call()
    assert sorted(path.name for path in folder.iterdir()) == before, "nothing is written"
    return str(error.value)


@pytest.mark.parametrize(
    "fields, part",
    [({"bias": "all"}, "bias"), ({"modules_to_save": ["conv_out"]}, "unet.conv_out.")],
    ids=["bias", "modules to save"],
)
def test_parameters_trained_in_full_are_refused_or_left_out_and_named(
    fields: dict[str, Any], part: str, pipes: Pipes, tmp_path: Path
) -> None:
    adapter = adapter_for(pipes("sd"), "unet", **fields)
    said = refused(LoraError, lambda: export_lora(adapter, tmp_path / "x.safetensors"), tmp_path)
    assert "a LoRA cannot hold" in said and part in said and "allow_partial" in said
    report = export_lora(adapter, tmp_path / "x.safetensors", allow_partial=True)
    assert any(note.startswith("left out: ") and part in note for note in report.notes)
    assert len(load_file(report.path)) == 2 * report.layers["unet"]


def test_text_encoders_that_no_loader_knows_are_refused(pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sd3"), "transformer")
    shapes = {"A": (2, 4), "B": (4, 2), "lambda": (1,), "w_norm": (4,)}
    t5 = {f"encoder.block.0.layer.0.SelfAttention.q.delora_{k}": torch.ones(shape) for k, shape in shapes.items()}
    both = replace(adapter, tensors={**adapter.tensors, "text_encoder_3": t5},
                   configs={**adapter.configs, "text_encoder_3": DeloraConfig()})  # fmt: skip
    said = refused(LoraError, lambda: export_lora(both, tmp_path / "x.safetensors"), tmp_path)
    assert "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q" in said
    assert export_lora(both, tmp_path / "x.safetensors", allow_partial=True).layers.keys() == {"transformer"}
    only = replace(adapter, tensors={"text_encoder_3": t5}, configs={"text_encoder_3": DeloraConfig()})
    said = refused(LoraError, lambda: export_lora(only, tmp_path / "y.safetensors", allow_partial=True), tmp_path)
    assert "nothing is left" in said


def without(adapter: Adapter, ending: str) -> Adapter:
    named = adapter.tensors["unet"]
    gone = next(name for name in named if name.endswith(ending))
    return replace(adapter, tensors={"unet": {n: t for n, t in named.items() if n != gone}})


def spoiled(adapter: Adapter, value: float) -> Adapter:
    named = dict(adapter.tensors["unet"])
    name = next(name for name in named if name.endswith("delora_lambda"))
    return replace(adapter, tensors={"unet": named | {name: torch.tensor([value])}})


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"format": "safetensors"}, "choose one of diffusers, kohya, comfyui"),
        ({"dtype": "bf16"}, "choose one of fp32, fp16"),
        ({"weights": [1.0, 2.0]}, "1 adapters but 2 weights"),
        ({"weights": float("nan")}, "must be finite"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"architecture": "sd4"}, "choose one of sd1, sd2"),
        ({"weights": 1e12, "dtype": "fp16"}, "does not fit into fp16"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(
    settings: dict[str, Any], said: str, pipes: Pipes, tmp_path: Path
) -> None:
    adapter = adapter_for(pipes("sd"), "unet")
    assert said in refused(LoraError, lambda: export_lora(adapter, tmp_path / "x.safetensors", **settings), tmp_path)


def test_adapters_that_are_incomplete_or_not_finite_are_refused(pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sd"), "unet")
    for other, said in ((without(adapter, "delora_B"), "lacks delora_B"), (spoiled(adapter, np.nan), "is not finite")):
        assert said in refused(
            AdapterFileError, lambda other=other: export_lora(other, tmp_path / "x.safetensors"), tmp_path
        )  # fmt: skip


def test_adapters_of_different_bases_are_not_added_up(pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sd"), "unet")
    for factor, fits in ((1.001, True), (1.02, False)):
        named = {n: t * factor if n.endswith("w_norm") else t for n, t in adapter.tensors["unet"].items()}
        other = replace(adapter, tensors={"unet": named})
        if fits:
            assert export_lora([adapter, other], tmp_path / "x.safetensors").rank == 4
        else:
            call = lambda: export_lora([adapter, other], tmp_path / "y.safetensors")  # noqa: B023, E731
            assert "trained on different bases" in refused(LoraError, call, tmp_path)


def test_what_a_module_is_for_must_be_said(pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sd"), "unet")
    bare = Adapter({"": adapter.tensors["unet"]}, {"": adapter.configs["unet"]})
    native = with_native(pipes("sd"), adapter)
    for source in (bare, native.unet):
        said = refused(LoraError, lambda source=source: export_lora(source, tmp_path / "x.safetensors"), tmp_path)
        assert "component unet" in said
    assert "nothing to export" in refused(LoraError, lambda: export_lora([], tmp_path / "x.safetensors"), tmp_path)


def test_a_file_that_is_there_is_replaced_only_when_asked_and_a_native_one_never(pipes: Pipes, tmp_path: Path) -> None:
    adapter = adapter_for(pipes("sd"), "unet")
    native = write_adapter(tmp_path, adapter)
    before = native.read_bytes()
    for overwrite in (False, True):
        said = refused(LoraError, lambda o=overwrite: export_lora(adapter, native, overwrite=o), tmp_path)
        assert "name of native adapters" in said and native.read_bytes() == before
    moved = native.rename(tmp_path / "mine.safetensors")
    assert "exists; give another name" in refused(LoraError, lambda: export_lora(moved, moved), tmp_path)
    assert "is a native adapter" in refused(LoraError, lambda: export_lora(moved, moved, overwrite=True), tmp_path)
    assert moved.read_bytes() == before
    file = export_lora(adapter, tmp_path / "x.safetensors").path
    assert export_lora(adapter, file, weights=0.5, overwrite=True).path == file
