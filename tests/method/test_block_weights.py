"""Strengths by component and block: diffusers' `set_adapters` does the same by them. And nothing is compiled again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from delora_diffusion import (
    Adapter,
    DeloraConfig,
    delora_disabled,
    export_lora,
    get_active_adapters,
    inject_delora,
    load_delora_weights,
    merge_delora,
    remove_delora,
    set_adapters,
    unmerge_delora,
)
from delora_diffusion.method.block_weights import layer_weights
from delora_diffusion.method.inject import adapted_layers

from .. import tiny
from ..export.test_lora import adapter_for, clone, draw

LISTS = {"unet": {"down": {"block_0": [0.3]}, "mid": [0.2], "up": {"block_1": [0.1, 0.9]}}, "text_encoder": 0.4}
FORMS: dict[str, Any] = {
    "number": 0.3,
    "components": {"unet": 0.3, "text_encoder": 0.6},
    "one component": {"text_encoder": 0.0},
    "none": {"unet": None, "text_encoder": 0.2},
    "blocks": {"unet": {"down": 0.2, "mid": 0.5}},
    "block": {"unet": {"up": {"block_1": 0.1}}},
    "lists": LISTS,
    "one for all of a block": {"unet": {"up": {"block_1": [0.4]}}},
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def adapters(original: Any) -> list[Adapter]:
    return [adapter_for(original, "unet", "text_encoder", seed=1), adapter_for(original, "unet", seed=2)]


@pytest.fixture(scope="module")
def lora(original: Any, adapters: list[Adapter], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers' pipeline with the same adapters as LoRAs."""
    folder, pipe = tmp_path_factory.mktemp("lora"), clone(original)
    for name, adapter in zip("ab", adapters, strict=True):
        file = export_lora(adapter, folder / f"{name}.safetensors").path
        pipe.load_lora_weights(str(file), adapter_name=name)
    return pipe


@pytest.fixture
def pipe(original: Any, adapters: list[Adapter]) -> Any:
    made = clone(original)
    for name, adapter in zip("ab", adapters, strict=True):
        load_delora_weights(made, adapter, name)
    return made


@pytest.mark.parametrize("form", FORMS)
def test_a_form_means_what_it_means_in_diffusers(form: str, pipe: Any, lora: Any) -> None:
    lora.set_adapters("a", FORMS[form])
    set_adapters(pipe, "a", FORMS[form])
    expected = draw(lora, "sd")
    assert np.abs(draw(pipe, "sd") - expected).max() < 1e-5
    set_adapters(pipe, "a", 1.0)
    assert np.abs(draw(pipe, "sd") - expected).max() > 1e-4, "the form matters"


def test_each_of_several_adapters_has_its_own_form(pipe: Any, lora: Any) -> None:
    forms = [FORMS["lists"], {"unet": {"mid": 0.0, "down": 0.7}}]
    lora.set_adapters(["a", "b"], forms)
    set_adapters(pipe, ["a", "b"], forms)
    assert np.abs(draw(pipe, "sd") - draw(lora, "sd")).max() < 1e-5
    lora.set_adapters(["a", "b"], [{"unet": {"down": 0.3}}, {"unet": {"down": 0.3}}])
    set_adapters(pipe, ["a", "b"], {"unet": {"down": 0.3}})
    assert np.abs(draw(pipe, "sd") - draw(lora, "sd")).max() < 1e-5, "one form is for all of them"


def test_any_path_can_be_weighed_and_the_longest_counts(pipe: Any) -> None:
    weights = {"mid_block": 0.5, "mid_block.attentions.0.transformer_blocks.0.attn2": 0.25, "up": 0.0}
    block = "mid_block.attentions.0.transformer_blocks.0"
    layers = [f"{block}.attn1.to_q", "up_blocks.1.attentions.0.proj_in", f"{block}.attn2.to_q", "conv_in"]
    assert list(layer_weights(weights, pipe.unet, layers).values()) == [0.5, 0.0, 0.25, 1.0]
    assert set(layer_weights({"mid": 0.5}, pipe.unet, ["mid_block.resnets.1.time_emb_proj"]).values()) == {0.5}
    by_list = {"up": {"block_1": [0.1, 0.2]}}
    beside = ["up_blocks.1.resnets.1.time_emb_proj", "up_blocks.1.attentions.1.x", "up_blocks.10.attentions.1.x"]
    assert list(layer_weights(by_list, pipe.unet, beside).values()) == [0.2, 0.2, 1.0]


@pytest.mark.parametrize(
    "weights, said",
    [
        ({"vae": 0.5}, "no component 'vae' to weigh; there are unet, text_encoder"),
        ({"down": 0.5}, "no component 'down'"),
        ({"unet": {"block_1": 0.5}}, "no block 'block_1' in UNet2DConditionModel"),
        ({"unet": {"down": {"block_7": 0.5}}}, "no block 'down.block_7'"),
        ({"unet": {"up": {"block_1": [0.1, 0.2, 0.3]}}}, "has 2 attentions, but 3 weights are given"),
        ({"unet": {"up": {"block_0": [0.1, 0.2]}}}, "has 0 attentions"),
        ({"unet": {"mid": [0.1, 0.2]}}, "the weight of 'mid' is [0.1, 0.2]; it must be one number"),
        ({"unet": {"mid": float("inf")}}, "must be finite"),
        ({"unet": 0.5, "text_encoder": {"down": 1.0}}, "no block 'down' in CLIPTextModel"),
        ([{"unet": 0.5}, 1.0], "1 adapters but 2 weights"),
    ],
    ids=str,
)
def test_a_form_that_fits_nothing_is_refused_and_changes_nothing(weights: Any, said: str, pipe: Any) -> None:
    set_adapters(pipe, "a", 0.9)
    with pytest.raises(ValueError) as refused:
        set_adapters(pipe, "a", weights)
    assert said in str(refused.value)
    found = {float(layer["a"].delora_weight) for _, layer in adapted_layers(pipe.unet)}
    assert found == {float(torch.tensor(0.9))} and get_active_adapters(pipe) == ["a"]


# ---- compiled pipelines -------------------------------------------------------------------------------


def test_a_compiled_pipeline_follows_every_strength_without_compiling_again(
    original: Any, adapters: list[Adapter], tmp_path: Path
) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    plain, compiled = clone(original), clone(original)
    for pipe in (plain, compiled):
        load_delora_weights(pipe, adapters[0], "a")
    compiled.unet = torch.compile(compiled.unet, backend=counter)
    for weights in (1.0, 0.5, 0.0, -2.0, FORMS["lists"]):
        for pipe in (plain, compiled):
            set_adapters(pipe, "a", weights)
        assert torch.allclose(output(compiled), output(plain), atol=1e-5)
        assert (weights == 0.0) == torch.allclose(output(compiled), output(original), atol=1e-5)
    assert counter.frame_count == 1
    report = export_lora(compiled, tmp_path / "x.safetensors", adapter_name="a")
    assert report.layers == {"unet": 32, "text_encoder": 8}
    assert all("_orig_mod" not in name for name in load_file(report.path)), "the wrapper's name is in no layer's"


def test_a_compiled_module_notices_what_is_loaded_and_fused_afterwards() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    compiled = copy.deepcopy(plain)
    compiled.compile(backend=counter)
    x = torch.randn(3, 8)
    untouched = compiled(x)
    config = DeloraConfig(r=2, target_modules="all-linear", init_weights="kaiming")
    for module in (plain, compiled):
        inject_delora(module, config, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(compiled(x), plain(x), atol=1e-5) and not torch.allclose(compiled(x), untouched, atol=1e-2)
    with delora_disabled(compiled):
        assert torch.equal(compiled(x), untouched)
    merge_delora(compiled)
    assert torch.allclose(compiled(x), plain(x), atol=1e-4)
    unmerge_delora(compiled)
    remove_delora(compiled)
    assert torch.equal(compiled(x), untouched)


def output(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x_t, prompt = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 16, generator=generator)
    with torch.no_grad():
        found: torch.Tensor = pipe.unet(x_t, torch.tensor([7, 500]), encoder_hidden_states=prompt).sample
    return found
