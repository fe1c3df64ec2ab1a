"""Adapters on Linear layers that bitsandbytes or torchao have quantised, against the same layers unquantised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, StableDiffusionPipeline, TorchAoConfig
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers import TorchAoConfig as LanguageTorchAoConfig

from delora_diffusion import (
    DeloraConfig,
    DeloraModel,
    delora_state_dict,
    fuse_delora,
    inject_delora,
    load_delora_state_dict,
    load_delora_weights,
    load_pipeline,
    merge_delora,
    remove_delora,
    save_delora_weights,
    unfuse_delora,
)
from delora_diffusion.method.inject import delora_adapters
from delora_diffusion.method.merge import unmerge_delora
from delora_diffusion.method.weights import base_weight, column_norms, dequantise, is_quantised, weight_dtype

WIDE = 96


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, WIDE), nn.GELU(), nn.Linear(WIDE, 64, bias=False)).requires_grad_(False)


def with_layers(make: Callable[[nn.Linear], Any]) -> nn.Sequential:
    """The plain module with every Linear replaced by a quantised one of the same weights."""
    module = plain()
    for place in (0, 2):
        layer = make(module[place])  # type: ignore[arg-type]
        layer.load_state_dict(module[place].state_dict())
        module[place] = layer.to("cpu").requires_grad_(False)
    return module


def four_bits(kind: str) -> nn.Sequential:
    return with_layers(lambda x: bnb.nn.Linear4bit(x.in_features, x.out_features, x.bias is not None,
                                                   compute_dtype=torch.float32, quant_type=kind))  # fmt: skip


def eight_bits() -> nn.Sequential:
    return with_layers(lambda x: bnb.nn.Linear8bitLt(x.in_features, x.out_features, x.bias is not None,
                                                     has_fp16_weights=False))  # fmt: skip


def by_torchao(config: Any) -> nn.Sequential:
    module = plain()
    quantize_(module, config)
    return module


#: How to quantise, and how far a weight and the gradients may be off.
KINDS: dict[str, tuple[Callable[[], nn.Sequential], float, float]] = {
    "nf4": (lambda: four_bits("nf4"), 0.11, 0.97),
    "fp4": (lambda: four_bits("fp4"), 0.15, 0.95),
    "bitsandbytes int8": (eight_bits, 0.01, 0.99),
    "torchao int8": (lambda: by_torchao(Int8WeightOnlyConfig()), 0.01, 0.999),
    "torchao float8": (lambda: by_torchao(Float8WeightOnlyConfig()), 0.03, 0.99),
}
CONFIG = DeloraConfig(r=4, target_modules="all-linear", init_weights="kaiming")
every_kind = pytest.mark.parametrize("kind", KINDS)


def adapted(module: nn.Module) -> nn.Module:
    inject_delora(module, CONFIG, generator=torch.Generator().manual_seed(1))
    return module


def learn(module: nn.Module) -> tuple[Tensor, Tensor]:
    """The output for a fixed batch, and all gradients."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    y = module(x)
    y.square().mean().backward()
    found = [p.grad.flatten() for a in delora_adapters(module).values() for p in a.parameters() if p.grad is not None]
    return y.detach(), torch.cat(found)


@every_kind
def test_weight_norms_and_precision_are_read(kind: str) -> None:
    make, off, _ = KINDS[kind]
    for called in (False, True):  # bitsandbytes moves its scales at the first call
        module = make()
        if called:
            module(torch.randn(2, 64))
        for place in (0, 2):
            layer, exact = module[place], plain()[place].weight
            assert isinstance(layer, nn.Linear) and is_quantised(layer) and weight_dtype(layer) == torch.float32
            read = base_weight(layer)
            assert type(read) is Tensor and 0 < float((read - exact).norm() / exact.norm()) < off
            assert torch.equal(column_norms(layer), read.norm(dim=0))


@every_kind
def test_an_adapter_learns_saves_and_loads_on_the_same_and_on_the_plain_base(kind: str) -> None:
    make, _, least = KINDS[kind]
    module, whole = adapted(make()), adapted(plain())
    (y, gradients), (exact, expected) = learn(module), learn(whole)
    assert cosine_similarity(gradients, expected, dim=0) > least and not torch.equal(y, exact)
    saved = {name: t.clone() for name, t in delora_state_dict(module).items()}
    theirs = {name: t.clone() for name, t in delora_state_dict(whole).items()}
    for base, file in ((make(), saved), (make(), theirs), (plain(), saved)):
        inject_delora(base, DeloraConfig(r=4, target_modules="all-linear"))
        if kind == "fp4" and base[0].weight.is_floating_point():
            with pytest.raises(ValueError, match="another base"):  # it is told from NF4 only
                load_delora_state_dict(base, file)
            continue
        report = load_delora_state_dict(base, file)
        assert report.base_off is not None and (report.base_off > 0) == (is_quantised(base[0]) != (file is saved))
        assert all(torch.equal(tensor, file[name]) for name, tensor in delora_state_dict(base).items())
    fresh = make()
    inject_delora(fresh, CONFIG)
    load_delora_state_dict(fresh, saved)
    torch.testing.assert_close(learn(fresh)[0], y, rtol=0.02, atol=1e-3)


@every_kind
def test_another_base_is_told_in_both_directions(kind: str) -> None:
    make, *_ = KINDS[kind]
    other = plain()
    other[2].weight.data *= 1 + 0.2 * torch.rand(1, WIDE)
    for trained, base in ((adapted(other), make()), (adapted(make()), other)):
        file = delora_state_dict(trained)
        remove_delora(other) if base is other else None
        inject_delora(base, CONFIG)
        with pytest.raises(ValueError, match="trained on another base than this Sequential: the column norms of"):
            load_delora_state_dict(base, file)


@every_kind
@pytest.mark.parametrize("permanently", [False, True])
def test_a_merge_is_refused_or_dequantises(kind: str, permanently: bool) -> None:
    module = adapted(KINDS[kind][0]())
    x = torch.randn(3, 64)
    base = copy.deepcopy(module)
    remove_delora(base)
    with torch.no_grad():
        before = module(x)
        with pytest.raises(TypeError, match=r"0 is quantised, .* or pass dequantize=True"):
            merge_delora(module, permanently=permanently)
        torch.testing.assert_close(module(x), before)
        report = merge_delora(module, permanently=permanently, dequantize=True)
        assert report.layers == 2 and all(type(module[place]) is nn.Linear for place in (0, 2))
        close: dict[str, Any] = {"rtol": 0.02, "atol": 0.02}  # bitsandbytes rounds activations to 8 bits as well
        torch.testing.assert_close(module(x), before, **close)
        if not permanently:
            unmerge_delora(module)
            torch.testing.assert_close(module(x), before, **close)
            remove_delora(module)
            torch.testing.assert_close(module(x), base(x), **close)
        assert not [name for name in module.state_dict() if "delora" in name or "quant" in name]


def test_dequantised_layers_keep_adapters_precision_and_mode() -> None:
    module = adapted(four_bits("nf4")).eval()
    assert dequantise(module) == ["0", "2"] and not is_quantised(module[0]) and not module[0].training
    assert "delora" in module[0]._modules and delora_adapters(module)["0"] is module[0].delora["default"]
    assert not dequantise(module)


@pytest.mark.parametrize("nested", [True, False])
def test_what_avx512_has_packed_is_read_and_brought_back(nested: bool) -> None:
    """Such a processor packs at the first call without gradients; here it is done by hand."""
    module = four_bits("nf4")
    layer: Any = module[0]
    if not nested:
        layer.weight = bnb.nn.Params4bit(plain()[0].weight.data, quant_type="nf4", compress_statistics=False).to("cpu")
    exact = base_weight(layer)
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    layer.support_avx512bf16_for_cpu = True
    torch.testing.assert_close(base_weight(layer), exact, rtol=0.02, atol=1e-3)  # scales are rounded to bf16
    assert layer.weight.quant_state.packing_format_for_cpu, "reading changes nothing"
    adapted(module)
    assert not layer.support_avx512bf16_for_cpu and not layer.weight.quant_state.packing_format_for_cpu
    torch.testing.assert_close(base_weight(layer), exact, rtol=0.02, atol=1e-3)
    module.eval()
    x = torch.randn(2, 64)
    with torch.no_grad():
        module(x)
    x.requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    remove_delora(module)
    assert layer.support_avx512bf16_for_cpu


# ---- models and pipelines that somebody else quantised ---------------------------------------------

LANGUAGE: dict[str, Callable[[], Any]] = {
    "torchao": lambda: LanguageTorchAoConfig(Int8WeightOnlyConfig()),
    "4bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
}
TOKENS = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", LANGUAGE)
def test_a_quantised_language_model_learns_saves_loads_and_merges(kind: str, language: Path, tmp_path: Path) -> None:
    def opened() -> Any:
        return AutoModelForCausalLM.from_pretrained(language, quantization_config=LANGUAGE[kind](), dtype="float32")

    model = DeloraModel(opened(), DeloraConfig(r=2, delora_lambda=2.0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    before = model(TOKENS).logits.detach()
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    model.eval()
    after = model(TOKENS).logits.detach()
    assert not torch.allclose(before, after, atol=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    again = DeloraModel.from_pretrained(opened(), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(TOKENS).logits, after, rtol=0, atol=1e-3)
    on_plain = DeloraModel.from_pretrained(LlamaForCausalLM.from_pretrained(language), tmp_path / "adapter")
    torch.testing.assert_close(on_plain(TOKENS).logits, after, rtol=0, atol=0.1)
    with pytest.raises(TypeError, match="dequantize=True"):
        model.merge_and_unload()
    merged: Any = model.merge_and_unload(dequantize=True)
    torch.testing.assert_close(merged(TOKENS).logits, after, rtol=0, atol=0.02)
    merged.save_pretrained(tmp_path / "merged")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(reopened(TOKENS).logits, merged(TOKENS).logits)
    assert not any(is_quantised(part) for part in reopened.modules() if isinstance(part, nn.Linear))


def test_a_pipeline_that_the_user_quantised(base: Path, tmp_path: Path, capsys: Any) -> None:
    """Adapters act beside the weights, in the same places as on the plain base."""

    def opened() -> StableDiffusionPipeline:
        config = PipelineQuantizationConfig(quant_mapping={"unet": TorchAoConfig(Int8WeightOnlyConfig())})
        return StableDiffusionPipeline.from_pretrained(base, quantization_config=config, dtype=torch.float32)

    whole: Any = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    inject_delora(whole.unet, DeloraConfig(r=2, init_weights="kaiming", relative_lambda=0.5))
    save_delora_weights(tmp_path, whole)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 16)
    with torch.no_grad():
        expected = whole.unet(*inputs).sample
        pipe = opened()
        plainly = pipe.unet(*inputs).sample
        assert load_delora_weights(pipe, tmp_path).base_off == pytest.approx(0, abs=5e-3)
        found = pipe.unet(*inputs).sample
        assert (found - expected).norm() < 0.2 * (found - plainly).norm()
        with pytest.raises(TypeError, match=r"is quantised, .* or pass dequantize=True"):
            fuse_delora(pipe)
        torch.testing.assert_close(pipe.unet(*inputs).sample, found)
        fuse_delora(pipe, dequantize=True)
        torch.testing.assert_close(pipe.unet(*inputs).sample, found, rtol=1e-3, atol=1e-4)
        unfuse_delora(pipe)
        torch.testing.assert_close(pipe.unet(*inputs).sample, found, rtol=1e-3, atol=1e-4)
        config = PipelineQuantizationConfig(quant_mapping={"unet": TorchAoConfig(Int8WeightOnlyConfig())})
        loaded = load_pipeline(base, tmp_path, quantization_config=config)
        assert "unet is quantised: the adapters act beside its weights" in capsys.readouterr().out
        torch.testing.assert_close(loaded.unet(*inputs).sample, found)
