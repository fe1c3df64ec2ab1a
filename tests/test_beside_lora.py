"""A DeLoRA and a diffusers LoRA in one pipeline, and several adapters. Oracle: both as native adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from delora_diffusion import (
    Adapter,
    delete_adapters,
    export_lora,
    fuse_delora,
    get_active_adapters,
    get_fused_adapters,
    get_list_adapters,
    load_delora_weights,
    save_delora_weights,
    set_adapters,
    set_adapters_to_device,
    unfuse_delora,
    unload_delora_weights,
)
from delora_diffusion.adapters.read import read_adapter
from delora_diffusion.adapters.sources import collect
from delora_diffusion.errors import DeloraError
from delora_diffusion.method.config import DeloraConfig
from delora_diffusion.method.inject import delora_adapters
from delora_diffusion.method.targets import target_layers
from delora_diffusion.method.wrapped import plain

from .export.test_lora import BUILD, DENOISER, adapter_for, clone, components, draw

FAMILIES = ("sd", "sdxl", "sd3", "flux")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = {family: BUILD[family](tmp_path_factory.mktemp(family)) for family in FAMILIES}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def near(first: np.ndarray, second: np.ndarray) -> bool:
    return bool(np.abs(first - second).max() < 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_act_in_either_order_and_either_is_unloaded_alone(
    family: str, bases: dict[str, Any], tmp_path: Path
) -> None:
    base = bases[family]
    parts = components(family)[:2]
    dog, style = (adapter_for(base, *parts, seed=seed) for seed in (1, 2))
    file = export_lora(style, tmp_path / "style.safetensors").path
    both = clone(base)
    load_delora_weights(both, dog, "dog")
    only_dog = draw(both, family)
    load_delora_weights(both, style, "style")
    only_style = draw(both, family)
    set_adapters(both, ["dog", "style"])
    expected, nothing = draw(both, family), draw(base, family)
    assert not near(only_dog, expected) and not near(only_style, expected) and not near(nothing, only_dog)
    every = DeloraConfig(target_modules="all-linear")
    names = list(target_layers(getattr(base, DENOISER[family]), every))
    for first in ("lora", "delora"):
        pipe = clone(base)
        if first == "lora":
            pipe.load_lora_weights(str(file))
        load_delora_weights(pipe, dog, "dog")
        if first == "delora":
            pipe.load_lora_weights(str(file))
        assert near(draw(pipe, family), expected), first
        assert list(target_layers(getattr(pipe, DENOISER[family]), every)) == names
        kept = collect({part: getattr(pipe, part) for part in parts}, "dog")
        assert all(
            torch.equal(kept.tensors[part][name], tensor)
            for part in parts
            for name, tensor in dog.tensors[part].items()
        )
        fuse_delora(pipe)
        assert near(draw(pipe, family), expected), first
        unfuse_delora(pipe)
        if first == "lora":
            pipe.unload_lora_weights()
            assert near(draw(pipe, family), only_dog)
            unload_delora_weights(pipe)
        else:
            unload_delora_weights(pipe)
            assert near(draw(pipe, family), only_style)
            pipe.unload_lora_weights()
        assert np.array_equal(draw(pipe, family), nothing), first
        for part in parts:
            wanted, found = getattr(base, part).state_dict(), getattr(pipe, part).state_dict()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_the_name_of_a_wrapped_layer_is_its_own() -> None:
    module = nn.ModuleDict({"to_q": nn.Linear(2, 2), "own": nn.ModuleDict({"base_layer": nn.Linear(2, 2)})})
    wrapped = peft.get_peft_model(module, peft.LoraConfig(r=1, target_modules=["to_q"])).base_model.model
    assert plain(wrapped, "to_q.base_layer.weight") == "to_q.weight"
    assert plain(wrapped, "own.base_layer.weight") == "own.base_layer.weight"


# ---- several adapters ------------------------------------------------------------------------------


@pytest.fixture
def two(bases: dict[str, Any]) -> tuple[Any, Adapter, Adapter]:
    pipe = clone(bases["sd"])
    dog, style = adapter_for(pipe, "unet", "text_encoder", seed=1), adapter_for(pipe, "unet", seed=2)
    load_delora_weights(pipe, dog, "dog")
    load_delora_weights(pipe, style, "style")
    return pipe, dog, style


def test_what_is_loaded_and_fused_is_told_by_component(two: tuple[Any, Adapter, Adapter]) -> None:
    pipe, *_ = two
    assert get_list_adapters(pipe) == {"unet": ["dog", "style"], "text_encoder": ["dog"]}
    assert get_fused_adapters(pipe) == {}
    set_adapters(pipe, ["dog", "style"], [1.0, 0.5])
    expected = draw(pipe, "sd")
    fuse_delora(pipe, components="unet")
    assert get_fused_adapters(pipe) == {"unet": ["dog", "style"]} and near(draw(pipe, "sd"), expected)
    fuse_delora(pipe, "dog", components=["text_encoder"])
    assert get_fused_adapters(pipe)["text_encoder"] == ["dog"]
    unfuse_delora(pipe, components="unet")
    assert get_fused_adapters(pipe) == {"text_encoder": ["dog"]} and near(draw(pipe, "sd"), expected)
    with pytest.raises(DeloraError, match="vae has no adapter; those that have are unet, text_encoder"):
        fuse_delora(pipe, components="vae")


def test_an_adapter_is_swapped_in_place(two: tuple[Any, Adapter, Adapter], tmp_path: Path) -> None:
    pipe, dog, _ = two
    other = adapter_for(pipe_without(pipe), "unet", "text_encoder", seed=7)
    fresh = pipe_without(pipe)
    load_delora_weights(fresh, other, "dog")
    set_adapters(fresh, "dog", 0.5)
    set_adapters(pipe, "dog", 0.5)
    before = {id(adapter) for adapter in delora_adapters(pipe.unet, "dog").values()}
    report = load_delora_weights(pipe, other, "dog", hotswap=True)
    assert report.layers == {"unet": 32, "text_encoder": 8}
    assert {id(adapter) for adapter in delora_adapters(pipe.unet, "dog").values()} == before
    assert np.array_equal(draw(pipe, "sd"), draw(fresh, "sd")), "at the strength it had"
    saved = read_adapter(save_delora_weights(tmp_path, pipe, "dog"))
    assert saved.configs["unet"].delora_lambda == other.configs["unet"].delora_lambda
    now = draw(pipe, "sd")
    wrong = Adapter({**dog.tensors}, {**dog.configs})
    wrong.tensors["text_encoder"] = adapter_for(pipe_without(pipe), "text_encoder", r=4).tensors["text_encoder"]
    with pytest.raises(DeloraError, match=r"of another shape.*layers and ranks must be the same"):
        load_delora_weights(pipe, wrong, "dog", hotswap=True)
    assert np.array_equal(draw(pipe, "sd"), now), "neither component is changed"
    with pytest.raises(DeloraError, match="'style' is in unet, and the new one is for unet, text_encoder"):
        load_delora_weights(pipe, other, "style", hotswap=True)
    with pytest.raises(DeloraError, match="no adapter is called 'cat'"):
        load_delora_weights(pipe, other, "cat", hotswap=True)
    fuse_delora(pipe)
    with pytest.raises(DeloraError, match="'dog' is fused in unet, text_encoder; unfuse_delora first"):
        load_delora_weights(pipe, other, "dog", hotswap=True)


def pipe_without(pipe: Any) -> Any:
    other = clone(pipe)
    unload_delora_weights(other)
    return other


def test_what_does_not_act_may_wait_elsewhere(two: tuple[Any, Adapter, Adapter]) -> None:
    pipe, *_ = two
    assert get_active_adapters(pipe) == ["style"]
    expected = draw(pipe, "sd")
    set_adapters_to_device(pipe, "dog", "meta")  # any other device: this one has no values to compute with
    places: set[str] = {p.device.type for p in nn.ModuleList(delora_adapters(pipe.unet, "dog").values()).parameters()}
    assert places == {"meta"} and np.array_equal(draw(pipe, "sd"), expected)
    with pytest.raises(DeloraError, match="'style' acts"):
        set_adapters_to_device(pipe, "style", "cpu")
    delete_adapters(pipe, "dog")
    assert np.array_equal(draw(pipe, "sd"), expected)
