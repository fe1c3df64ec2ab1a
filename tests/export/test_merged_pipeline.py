"""`delora merge`: a plain pipeline folder with the native adapter's pictures, rounded once, complete or absent."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from delora_diffusion import (
    DeloraConfig,
    inject_delora,
    load_delora_state_dict,
    load_delora_weights,
    merge_delora,
    read_adapter,
    save_delora_weights,
    set_adapters,
)
from delora_diffusion.atomic import ASIDE
from delora_diffusion.cli import main
from delora_diffusion.export import merged_pipeline as merged
from delora_diffusion.export.config import MergingConfig
from delora_diffusion.export.merged_pipeline import QuantizedBaseError, merge_into_base, stored_dtypes
from delora_diffusion.method.inject import delora_adapters
from delora_diffusion.options import OptionError

from .. import tiny


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a dog", num_inference_steps=3, generator=generator, output_type="latent").images


def trained(base: Path, folder: Path, *components: str, seed: int, provenance: str = "") -> Path:
    """An adapter of which every parameter has moved, as a native file."""
    pipe = opened(base)
    modules = {name: getattr(pipe, name) for name in components}
    torch.manual_seed(seed)
    for module in modules.values():
        inject_delora(module, DeloraConfig(r=2, delora_lambda=2.0, bias="delora_only"))
        with torch.no_grad():
            for p in module.parameters():
                if p.requires_grad:
                    p += 0.3 * torch.randn_like(p)
    return save_delora_weights(folder, modules, provenance={"base_model": provenance} if provenance else None)


@pytest.fixture(scope="module")
def dog(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dog")
    return trained(base, folder, "unet", "text_encoder", seed=1, provenance=str(base))


@pytest.fixture(scope="module")
def style(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = opened(base)
    torch.manual_seed(2)
    inject_delora(pipe.unet, DeloraConfig(r=4, delora_lambda=3.0, init_weights="kaiming"))
    return save_delora_weights(tmp_path_factory.mktemp("style"), {"unet": pipe.unet})


def test_plain_diffusers_draws_what_the_native_adapters_draw(
    base: Path, dog: Path, style: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    reports = merge_into_base(
        MergingConfig(adapter=[str(dog), str(style)], weights=[0.8, -0.5], base=str(base), output=str(out))
    )
    native = opened(base)
    names = [load_delora_weights(native, source).adapter_name for source in (dog, style)]
    set_adapters(native, names, [0.8, -0.5])
    merged = opened(out)
    assert {name: report.layers for name, report in reports.items()} == {"unet": 32, "text_encoder": 8}
    assert not any("delora" in name for name in merged.unet.state_dict())
    torch.testing.assert_close(latents(merged), latents(native), rtol=0, atol=1e-4)
    assert float((latents(merged) - latents(opened(base))).abs().max()) > 0.05
    told = json.loads((out / "delora_merge.json").read_text())
    assert told["base"] == str(base)
    assert [(a["adapter"], a["weight"]) for a in told["adapters"]] == [(str(dog), 0.8), (str(style), -0.5)]
    assert told["components"]["unet"] == {"layers": 32, "rounding_loss": reports["unet"].rounding_loss}
    assert {p.name for p in out.iterdir()} == {p.name for p in base.iterdir()} | {"delora_merge.json"}


def test_a_merge_that_was_whole_when_it_was_killed_is_not_refused_and_another_is(
    base: Path, dog: Path, style: Path, tmp_path: Path
) -> None:
    asked = MergingConfig(adapter=[str(dog)], base=str(base), output=str(tmp_path / "merged"))
    half = tmp_path / ASIDE / "0123456789abcdef" / "new" / "merged"
    half.mkdir(parents=True)
    half.parent.parent.with_suffix(".lock").touch()
    first = merge_into_base(asked)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"], "what the killed one left is gone"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert merge_into_base(asked) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    for other in ({"adapter": [str(style)]}, {"weights": [0.5]}, {"dtype": "fp16"}):
        with pytest.raises(OptionError, match="exists already"):
            merge_into_base(dataclasses.replace(asked, **other))


@pytest.mark.parametrize("stored, dtype", [("fp32", "fp16"), ("fp32", "bf16"), ("fp16", "auto"), ("fp16", "fp32")])
def test_a_sum_in_fp32_is_rounded_once_and_the_loss_is_what_rounding_cost(
    stored: str, dtype: str, base: Path, dog: Path, tmp_path: Path
) -> None:
    here = base
    if stored == "fp16":
        here = tmp_path / "half"
        opened(base).to(torch.float16).save_pretrained(here)
        assert set(stored_dtypes(here).values()) == {torch.float16}
    reports = merge_into_base(
        MergingConfig(adapter=[str(dog)], base=str(here), output=str(tmp_path / "out"), dtype=dtype)
    )
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "auto": torch.float16}[dtype]
    found = stored_dtypes(tmp_path / "out")
    assert (found["unet"], found["text_encoder"]) == (kind, kind)
    vae = {("fp32", "fp16"): torch.float32, ("fp32", "bf16"): torch.bfloat16}.get((stored, dtype), kind)
    assert found["vae"] == vae
    merged, native = opened(tmp_path / "out"), opened(here)
    load_delora_weights(native, dog)
    lost = size = 0.0
    for name, adapter in delora_adapters(native.unet).items():
        down, up = adapter.factors()
        exact = torch.addmm(native.unet.get_submodule(name).weight, up, down).detach()
        assert torch.equal(merged.unet.get_submodule(name).weight, exact.to(kind).float())
        lost += float((exact.to(kind).float() - exact).square().sum())
        size += float((up @ down).square().sum())
    assert reports["unet"].rounding_loss == pytest.approx((lost / size) ** 0.5, rel=1e-3, abs=1e-9)
    assert (reports["unet"].rounding_loss == 0) == (kind == torch.float32)


def test_the_precision_of_a_file_is_that_of_most_of_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    small = {f"norm.{number}": torch.ones(4) for number in range(9)}
    file = tmp_path / "unet" / "model.safetensors"
    save_file({"big": torch.ones(64, 64, dtype=torch.float16), **small}, file)
    assert stored_dtypes(tmp_path) == {"unet": torch.float16}
    save_file({"big": torch.ones(64, 64, dtype=torch.uint8), **small}, file)  # quantised
    assert stored_dtypes(tmp_path) == {}


def test_a_base_that_the_adapter_names_is_found_and_a_missing_one_is_asked_for(
    dog: Path, style: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "--adapter", str(dog), "--output", str(tmp_path / "out")]) == 0
    assert "unet: 32 layers, 0 of the update lost to rounding" in capfd.readouterr().err
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert main(["merge", "--adapter", str(style), "--output", str(tmp_path / "other")]) == 1
    assert "do not name one base model; give --base" in capfd.readouterr().err
    assert main(["merge", "--adapter", str(dog), "--weights=2", "--output", str(tmp_path / "out")]) == 1
    assert "exists already and is not empty; give another name" in capfd.readouterr().err


@pytest.mark.parametrize(
    "values, message",
    [
        ({"adapter": []}, "nothing to merge; give --adapter"),
        ({"output": ""}, "output is missing"),
        ({"weights": [1.0, 2.0]}, "1 adapters but 2 weights"),
    ],
)
def test_options_that_cannot_be_meant(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MergingConfig(**({"adapter": ["a"], "output": "out"} | values))


def test_nothing_is_left_when_a_merge_or_the_writing_fails(
    base: Path, dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    config = MergingConfig(adapter=[str(dog)], base=str(base), output=str(out), dtype="fp16")
    with pytest.raises(ValueError, match="not finite in"):
        merge_into_base(
            MergingConfig(adapter=[str(dog)], weights=[1e9], base=str(base), output=str(out), dtype="fp16")
        )
    assert not list(tmp_path.iterdir())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        merge_into_base(config)
    assert not list(tmp_path.iterdir())


def test_another_base_is_refused_unless_told(dog: Path, tmp_path: Path) -> None:
    tiny.stable_diffusion(tmp_path / "parts", seed=9).save_pretrained(tmp_path / "other")
    where = {"adapter": [str(dog)], "base": str(tmp_path / "other"), "output": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="trained on another base"):
        merge_into_base(MergingConfig(**where))
    assert not (tmp_path / "out").exists()
    merge_into_base(MergingConfig(**where, check_base=False))
    assert (tmp_path / "out" / "unet").is_dir()


def test_what_says_that_it_is_quantised_is_refused_or_dequantised_first(
    base: Path, dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for bitsandbytes, which is not everywhere: dequantising moves every weight by 2 %."""
    pipe = opened(base)
    plain = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        for p in plain.parameters():
            p *= 1.02
    pipe.text_encoder.hf_quantizer = object()
    pipe.text_encoder.config.quantization_config = SimpleNamespace(quant_method="made_up")
    pipe.text_encoder.dequantize = lambda: plain
    expected = copy.deepcopy(plain)
    monkeypatch.setattr(merged, "_open", lambda *args: (pipe, {}))
    where = {"adapter": [str(dog)], "base": str(base), "output": str(tmp_path / "out")}
    with pytest.raises(QuantizedBaseError, match=r"text_encoder is quantised \(made_up\).*or --dequantize"):
        merge_into_base(MergingConfig(**where))
    assert not (tmp_path / "out").exists()
    merge_into_base(MergingConfig(dequantize=True, **where))
    inject_delora(expected, read_adapter(dog).configs["text_encoder"])
    load_delora_state_dict(expected, read_adapter(dog).tensors["text_encoder"], check_base=False)
    merge_delora(expected, permanently=True)
    found = opened(tmp_path / "out").text_encoder.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_weights_are_merged_into_only_when_dequantised(
    bits: str, base: Path, dog: Path, style: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, CLIPTextModel

    small = BitsAndBytesConfig(**{f"load_in_{bits}": True})
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder", quantization_config=small, dtype=torch.float32)
    here = tmp_path / "base"
    shutil.copytree(base, here, ignore=shutil.ignore_patterns("text_encoder"))
    encoder.save_pretrained(here / "text_encoder")
    where = {"base": str(here), "output": str(tmp_path / "out")}
    with pytest.raises(QuantizedBaseError, match=r"text_encoder is quantised \(.*give the unquantised base, or --deq"):
        merge_into_base(MergingConfig(adapter=[str(dog)], **where))
    assert not (tmp_path / "out").exists()
    merge_into_base(MergingConfig(adapter=[str(dog)], dequantize=True, **where))
    merged = opened(tmp_path / "out").text_encoder
    assert "quantization_config" not in json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    plain, native = CLIPTextModel.from_pretrained(here / "text_encoder").dequantize(), opened(base)
    load_delora_weights(native, dog)
    for name, adapter in delora_adapters(native.text_encoder).items():
        down, up = adapter.factors()
        exact = plain.get_submodule(name).weight + up @ down
        torch.testing.assert_close(merged.get_submodule(name).weight, exact, rtol=0, atol=1e-6)
    out = tmp_path / "unet only"  # the text encoder is none of this adapter's business, and stays as it is
    merge_into_base(MergingConfig(adapter=[str(style)], base=str(here), output=str(out)))
    assert "quantization_config" in json.loads((out / "text_encoder" / "config.json").read_text())


def test_a_permanent_merge_needs_little_more_memory_than_the_model() -> None:
    """12 layers of 8 MB: the originals, if they were kept, would be 96 MB."""
    code = """
import resource, torch
from torch import nn
from delora_diffusion import DeloraConfig, inject_delora, merge_delora
shapes = [(1024, 2048), (2048, 1024)] * 6
module = nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in shapes))
inject_delora(module, DeloraConfig(r=2, target_modules="all-linear", init_weights="kaiming"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_delora(module, permanently=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed goes back at once
    job = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(job.stdout) < 60
