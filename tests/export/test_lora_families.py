"""A native adapter of every family as a LoRA: the pipeline's own loader draws the same pictures at every strength."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from delora_diffusion import (
    DeloraConfig,
    export_lora,
    inject_delora,
    load_delora_weights,
    merge_delora,
    save_delora_weights,
    verify_lora,
)
from delora_diffusion.adapters.sources import collect
from delora_diffusion.export.lora_names import LoraError, style_of, unreadable
from delora_diffusion.export.single_file import single_file_entries
from delora_diffusion.families import family_of
from delora_diffusion.method.targets import target_layers
from delora_diffusion.pipeline import set_adapters

from ..tiny_families import BUILDERS, build

LOADED = [kind for kind in BUILDERS if not kind.startswith("pixart")]  # diffusers has no LoRA loader for PixArt


def pixels(pipe: Any) -> np.ndarray:
    """One picture (1, 32, 32, 3) in [0, 1], unrounded."""
    settings = {**family_of(pipe).sampling(pipe), "num_inference_steps": 2, "height": 32, "width": 32}
    with torch.no_grad():
        drawn = pipe(prompt=["a sks dog"], output_type="np", generator=[torch.Generator().manual_seed(0)], **settings)
    return np.asarray(drawn.images)


def adapted(pipe: Any, targets: str) -> dict[str, nn.Module]:
    """Every component that LoRA loaders know, with an adapter that looks trained."""
    family = family_of(pipe)
    modules = {name: getattr(pipe, name) for name in family.components()}
    for name, module in list(modules.items()):
        config = DeloraConfig(r=2, relative_lambda=0.5, init_weights="kaiming", target_modules=targets)
        if any(unreadable(name, layer) for layer in target_layers(module, config)):
            del modules[name]  # T5
        else:
            inject_delora(module, config, generator=torch.Generator().manual_seed(1))
    return modules


@pytest.mark.parametrize("targets", ["attention+ff", "all-linear"])
@pytest.mark.parametrize("kind", LOADED)
def test_diffusers_own_loader_draws_what_the_native_adapter_draws(kind: str, targets: str, tmp_path: Path) -> None:
    native = build(kind, tmp_path / "native")
    modules = adapted(build(kind, tmp_path / "trained"), targets)
    told = {"pipeline": type(native).__name__}
    file = save_delora_weights(tmp_path / "adapter", modules, provenance=told)
    format = "diffusers" if kind == "lumina2" else "comfyui"  # kohya's names for UNets; Lumina's original ones
    made = export_lora(file, tmp_path / "lora.safetensors", format=format)
    found = verify_lora(made.path, file).loaders
    assert found["diffusers"] == sum(made.layers.values()) > 15
    if targets == "attention+ff":
        assert found["comfyui"] == (0 if kind in ("sana", "lumina2") else found["diffusers"])
    lost = f"ComfyUI 0.19.3 finds {found['comfyui']} of {found['diffusers']} layers"
    assert (lost in str(made)) == (found["comfyui"] < found["diffusers"] and format == "comfyui")
    untouched = expected = pixels(native)
    load_delora_weights(native, file, "dog")
    ported = build(kind, tmp_path / "ported")
    ported.load_lora_weights(str(made.path), adapter_name="dog")
    for strength in (0.0, 0.5, 1.0):
        set_adapters(native, "dog", strength)
        ported.set_adapters("dog", strength)
        expected = pixels(native)
        assert np.abs(pixels(ported) - expected).max() < 1e-5, f"{kind} at {strength}"
        assert strength or np.array_equal(expected, untouched)
    assert np.abs(expected - untouched).max() > 5e-3, "the adapter does something"


def test_t5_goes_into_comfyuis_file_which_diffusers_still_reads(tmp_path: Path) -> None:
    native, ported = build("flux.1-dev", tmp_path / "native"), build("flux.1-dev", tmp_path / "ported")
    modules = {"transformer": native.transformer, "text_encoder_2": native.text_encoder_2}
    for number, (name, targets) in enumerate((("transformer", None), ("text_encoder_2", ["q", "v"]))):
        config = DeloraConfig(r=2, relative_lambda=0.5, init_weights="kaiming", target_modules=targets)
        inject_delora(modules[name], config, generator=torch.Generator().manual_seed(number))
    file = save_delora_weights(tmp_path, modules, provenance={"pipeline": "FluxPipeline"})
    report = export_lora(file, tmp_path / "x.safetensors", format="comfyui")
    found = verify_lora(report.path, file)
    assert found.agrees(1e-6) and found.loaders["comfyui"] == found.loaders["forge"] == found.layers
    assert found.loaders["diffusers"] == report.layers["transformer"], "T5 is left out there"
    with pytest.raises(LoraError, match="T5 goes into format comfyui"):
        export_lora(file, tmp_path / "y.safetensors")
    ported.load_lora_weights(str(report.path))
    set_adapters(native, "default", {"text_encoder_2": 0.0})
    assert np.abs(pixels(ported) - pixels(native)).max() < 1e-5


@pytest.mark.parametrize("targets", ["attention+ff", "all-linear"])
@pytest.mark.parametrize("kind", ["lumina2", "z-image", "flux.2-klein", "sd3.5"])
def test_original_names_hold_what_merging_does_to_the_original_layout(kind: str, targets: str, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path / "parts")
    before = {name: entry.tensor().clone() for name, entry in single_file_entries(pipe).items()}
    modules = {"transformer": pipe.transformer}
    config = DeloraConfig(r=2, relative_lambda=0.5, init_weights="kaiming", target_modules=targets)
    layers = inject_delora(pipe.transformer, config, generator=torch.Generator().manual_seed(1))
    file = save_delora_weights(tmp_path, modules, provenance={"pipeline": type(pipe).__name__})
    made = export_lora(file, tmp_path / "x.safetensors", format="original")
    merge_delora(pipe.transformer, permanently=True)
    tensors, changed = load_file(made.path), 0
    for name, entry in single_file_entries(pipe).items():
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        change = entry.tensor() - before[name]
        if f"{layer}.lora_B.weight" in tensors:
            found = tensors.pop(f"{layer}.lora_B.weight") @ tensors.pop(f"{layer}.lora_A.weight")
            torch.testing.assert_close(found, change, rtol=1e-4, atol=1e-6)
            changed += 1
        else:
            assert not change.any(), name
    assert not tensors and changed <= len(layers)
    report = verify_lora(made.path, file)
    assert report.agrees(1e-5) and report.layers == len(layers) == report.loaders["comfyui"]
    assert report.loaders["forge"] == 0 and "original names are for ComfyUI" in str(report)
    if kind == "lumina2":
        automatic = export_lora(file, tmp_path / "y.safetensors", format="comfyui")
        assert load_file(automatic.path).keys() == load_file(made.path).keys() and "finds" not in str(automatic)


def test_what_original_names_cannot_say_is_refused(tmp_path: Path) -> None:
    pipe = build("lumina2", tmp_path / "parts")

    def exported(*targets: str, format: str = "original", **told: str) -> Any:
        twin = copy.deepcopy(pipe.transformer)
        inject_delora(twin, DeloraConfig(r=2, init_weights="kaiming", target_modules=list(targets)))
        source = collect({"transformer": twin}, "default", provenance=told)
        return load_file(export_lora(source, tmp_path / f"{targets[0]}.safetensors", format=format).path)

    told = {"pipeline": "Lumina2Pipeline"}
    shape = exported("to_v", **told)["diffusion_model.layers.0.attention.qkv.lora_B.weight"].shape
    attention = pipe.transformer.layers[0].attn
    assert shape == (attention.to_q.out_features + 2 * attention.to_k.out_features, 2), "zeros for the others"
    with pytest.raises(LoraError, match="which does not tell the size of the others"):
        exported("to_q", **told)
    with pytest.raises(LoraError, match=r"an architecture that is not known \(say which\)"):
        exported("to_k")
    with pytest.raises(LoraError, match="original names are for transformers"):
        style_of("original", {"unet"}, None)


@pytest.mark.parametrize("kind", [kind for kind in BUILDERS if kind not in LOADED])
def test_families_without_a_loader_are_named_here(kind: str, tmp_path: Path) -> None:
    assert not hasattr(build(kind, tmp_path), "load_lora_weights")
