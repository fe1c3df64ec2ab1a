"""Modules that are built unlike most: buffers that train, tied weights, layers that nobody calls, new heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from delora_diffusion import (
    Adapter,
    DeloraConfig,
    DeloraConfigError,
    DeloraModel,
    delora_disabled,
    delora_state_dict,
    export_peft,
    inject_delora,
    load_delora_state_dict,
    merge_delora,
    read_adapter,
    remove_delora,
    set_delora_adapters,
    write_adapter,
)
from delora_diffusion.errors import DeloraError
from delora_diffusion.method.inject import delora_config


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.batch, self.two = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.batch(self.one(x)))
        return y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.query, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.query(self.embedding(tokens)))
        return y


@pytest.fixture
def base() -> Normed:
    torch.manual_seed(0)
    return Normed().eval()


NORM = DeloraConfig(r=2, target_modules=["one"], modules_to_save=["batch"], init_weights="kaiming")


def trained(base: Normed, name: str = "default", *, seed: int = 0) -> Normed:
    """An adapter whose BatchNorm has seen other averages."""
    inject_delora(base, NORM, name, generator=torch.Generator().manual_seed(seed))
    base.train()
    with torch.no_grad():
        for number in range(3):
            base(3 * torch.randn(16, 4, generator=torch.Generator().manual_seed(seed + number)) + seed + 1)
        base.batch.weight.add_(0.5)
    return base.eval()


# ---- buffers of modules that are saved whole ------------------------------------------------------


def test_buffers_are_the_adapters_own(base: Normed, tmp_path: Path) -> None:
    x, plain = torch.randn(5, 4), copy.deepcopy(base)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    module = trained(base)
    expected = module(x)
    tensors = delora_state_dict(module)
    assert {
        f"batch.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    } <= set(tensors)
    assert int(tensors["batch.num_batches_tracked"]) == 3
    with delora_disabled(module):
        assert torch.equal(module(x), plain(x))
    assert torch.equal(module(x), expected), "its averages came back"
    write_adapter(tmp_path, Adapter({"unet": tensors}, {"unet": delora_config(module)}))
    found = read_adapter(tmp_path)
    inject_delora(plain, found.configs["unet"])
    load_delora_state_dict(plain, found.tensors["unet"])
    assert torch.equal(plain(x), expected)
    remove_delora(module)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items()), "the base, bit for bit"
    merge_delora(plain, permanently=True)
    assert torch.allclose(plain(x), expected, atol=1e-6) and int(plain.batch.num_batches_tracked) == 3


def test_buffers_follow_a_module_that_is_moved_and_change_with_the_adapter(base: Normed) -> None:
    x = torch.randn(5, 4)
    alone = {name: trained(copy.deepcopy(base), seed=seed)(x) for name, seed in (("a", 0), ("b", 7))}
    trained(base, "a")
    set_delora_adapters(base, [])
    trained(base, "b", seed=7)
    base.double()  # replaces buffers where it keeps parameters
    base.float()
    for name in ("a", "b", "a"):
        set_delora_adapters(base, name)
        assert torch.allclose(base(x), alone[name], atol=1e-6)
    base.double()
    assert delora_state_dict(base, "a")["batch.running_mean"].dtype == torch.float64
    other = copy.deepcopy(base)
    set_delora_adapters(other, "b")
    assert torch.allclose(other(x.double()).float(), alone["b"], atol=1e-5)


def test_peft_has_the_same_averages(base: Normed, tmp_path: Path) -> None:
    x, plain = torch.randn(5, 4), copy.deepcopy(base)
    module = trained(base)
    export_peft(Adapter({"": delora_state_dict(module)}, {"": delora_config(module)}), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    assert torch.allclose(theirs(x), module(x), atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = DeloraModel.from_pretrained(plain, tmp_path / "theirs").eval()
    assert torch.allclose(again(x), module(x), atol=1e-5)


def test_a_whole_number_in_a_parameters_place_is_refused(base: Normed) -> None:
    tensors = delora_state_dict(trained(base))
    with pytest.raises(DeloraError, match=r"batch.weight is torch.int64, not torch.float32; it is damaged"):
        load_delora_state_dict(base, tensors | {"batch.weight": tensors["batch.weight"].long()})


# ---- tied weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("permanently", [False, True])
def test_merging_into_a_tied_head_is_refused_and_changes_nothing(permanently: bool) -> None:
    module = Tied()
    inject_delora(module, DeloraConfig(r=2, target_modules=["head", "query"], init_weights="kaiming"))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(DeloraError, match=r"head shares its weight with embedding.weight, which merging would change"):
        merge_delora(module, permanently=permanently)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    expected = module(torch.arange(5))
    module.head.weight = nn.Parameter(module.head.weight.detach().clone())
    merge_delora(module, permanently=permanently)
    assert torch.allclose(module(torch.arange(5)), expected, atol=1e-5)
    assert torch.equal(module.embedding.weight, before["embedding.weight"])


def test_one_layer_that_is_used_twice_is_not_tied() -> None:
    layer = nn.Linear(4, 4)
    module = nn.Sequential(layer, nn.ReLU(), layer)
    inject_delora(module, DeloraConfig(r=2, target_modules="all-linear", init_weights="kaiming"))
    expected = module(torch.ones(1, 4))
    merge_delora(module)
    assert torch.allclose(module(torch.ones(1, 4)), expected, atol=1e-6)


# ---- layers that are never called, and heads that are new -----------------------------------------


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out_proj = nn.MultiheadAttention(4, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out_proj(self.attention(x, x, x)[0])
        return y


@pytest.mark.parametrize("targets", ["all-linear", "attention", "attention+ff", None])
def test_a_layer_that_is_never_called_is_left_out(targets: Any) -> None:
    module, x = Attending().eval(), torch.randn(3, 1, 4)
    assert inject_delora(module, DeloraConfig(r=2, target_modules=targets, init_weights="kaiming")) == ["out_proj"]
    acting = module(x)
    merge_delora(module)
    assert torch.allclose(module(x), acting, atol=1e-6)


@pytest.mark.parametrize("targets", [["out_proj"], ["attention.out_proj"], r"attention\.out_proj", ".*out_proj"])
def test_a_layer_that_is_never_called_is_refused_by_name(targets: Any) -> None:
    with pytest.raises(DeloraConfigError, match=r"'attention.out_proj', whose weight nn.MultiheadAttention reads"):
        inject_delora(Attending(), DeloraConfig(r=2, target_modules=targets))
    left = DeloraConfig(r=2, target_modules=["out_proj"], exclude_modules=["attention.out_proj"])
    assert inject_delora(Attending(), left) == ["out_proj"]


def test_all_linear_leaves_a_new_classifier_to_be_trained_in_full() -> None:
    small = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    model = BertForSequenceClassification(small)
    layers = inject_delora(model, DeloraConfig(r=2, target_modules="all-linear"))
    assert "classifier" not in layers and "bert.pooler.dense" in layers and len(layers) == 7
    remove_delora(model)
    inject_delora(model, DeloraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"]))
    assert model.classifier.weight.requires_grad
    plain = nn.ModuleDict({"classifier": nn.Linear(2, 2)})  # nobody says that it is new
    assert inject_delora(plain, DeloraConfig(r=2, target_modules="all-linear")) == ["classifier"]
