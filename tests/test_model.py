"""`DeloraModel` beside PEFT's `PeftModel` on tiny Llama, BERT, T5 and UNet models: layers, files, outputs, verbs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.utils import TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING as PEFTS
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from delora_diffusion import AdapterFileError, DeloraConfig, DeloraConfigError, DeloraModel, save_delora_weights
from delora_diffusion.method.inject import delora_adapters
from delora_diffusion.method.targets import TARGETS, with_targets

TOKENS = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


def bert() -> nn.Module:
    return BertModel(
        BertConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip


def output(model: Any) -> Tensor:
    kind = getattr(model.config, "model_type", "unet")
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        if kind == "unet":
            return model(torch.randn(2, 4, 8, 8, generator=g), 5, torch.randn(2, 6, 16, generator=g)).sample
        if kind == "t5":
            return model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
        return model(input_ids=TOKENS)[0]


MAKERS = {"llama": llama, "bert": bert, "t5": t5, "unet": unet}
Maker = Callable[[], nn.Module]


@pytest.fixture(params=list(MAKERS))
def made(request: pytest.FixtureRequest) -> Maker:
    """Makes the same tiny random model again and again."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return MAKERS[request.param]().eval()

    return make


def shake(model: nn.Module) -> None:
    """As training leaves it: all that is trained has moved."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)


def wrapped(make: Maker, **config: Any) -> DeloraModel:
    model = DeloraModel(make(), DeloraConfig(r=4, delora_lambda=5.0, **config))
    shake(model)
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * max(1.0, float(theirs.abs().max())))


def moved(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-3


# ---- which layers --------------------------------------------------------------------------------


def test_the_table_is_pefts() -> None:
    assert PEFTS == TARGETS


def test_default_layers_are_pefts(made: Maker) -> None:
    if isinstance(made(), UNet2DConditionModel):
        config = peft.DeloraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    else:
        config = peft.DeloraConfig(r=4)
    theirs = peft.get_peft_model(made(), config)
    layers = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.delora.DeloraLayer)]
    assert list(delora_adapters(DeloraModel(made(), DeloraConfig(r=4)))) == [
        name.removeprefix("base_model.model.") for name in layers
    ]


def test_a_model_without_a_default_is_refused_and_given_targets_stay() -> None:
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(DeloraConfigError, match=r"no default for 'Sequential'; give names.*all-linear"):
        DeloraModel(plain, DeloraConfig())
    config = DeloraConfig(target_modules=["0"])
    assert with_targets(plain, config) is config


# ---- files, both ways ----------------------------------------------------------------------------


@pytest.mark.parametrize("init_weights", ["zero", "residual"])
def test_peft_opens_what_we_save(init_weights: str, made: Maker, tmp_path: Path) -> None:
    model = wrapped(made, init_weights=init_weights)
    assert model.save_pretrained(tmp_path) == [tmp_path]
    assert moved(output(model), output(made()))
    close(output(model), output(peft.PeftModel.from_pretrained(made(), str(tmp_path))))
    close(output(model), output(DeloraModel.from_pretrained(made(), tmp_path)))


def test_we_open_what_peft_saves(made: Maker, tmp_path: Path) -> None:
    targets = ["to_q", "to_v"] if isinstance(made(), UNet2DConditionModel) else None
    theirs = peft.get_peft_model(made(), peft.DeloraConfig(r=4, delora_lambda=5, target_modules=targets))
    shake(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = DeloraModel.from_pretrained(made(), tmp_path)
    assert moved(output(ours), output(made()))
    close(output(ours), output(theirs))
    close(output(ours.merge_and_unload()), output(theirs.merge_and_unload()))


def test_several_adapters_lie_where_peft_looks_for_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llama().eval()
    model = DeloraModel(copy.deepcopy(base), DeloraConfig(r=2))
    model.add_adapter("other", DeloraConfig(r=3, delora_lambda=2.0, bias="all"))
    for name in ("default", "other"):
        model.set_adapter(name)
        shake(model)
    assert model.save_pretrained(tmp_path) == [tmp_path, tmp_path / "other"]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    theirs.load_adapter(str(tmp_path / "other"), "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        theirs.set_adapter(name)
        close(output(model), output(theirs))
    assert model.save_pretrained(tmp_path / "one", selected_adapters=["other"]) == [tmp_path / "one" / "other"]
    assert not (tmp_path / "one" / "adapter_config.json").exists()


def test_a_native_file_of_several_components_gives_the_part_that_fits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    parts = {"unet": unet().eval(), "text_encoder": CLIPTextModel(text).eval()}
    bases = copy.deepcopy(parts)
    for module in parts.values():
        shake(DeloraModel(module, DeloraConfig(r=2)))
    save_delora_weights(tmp_path, parts)
    for name, module in parts.items():
        close(output(DeloraModel.from_pretrained(bases[name], tmp_path)), output(module))
    with pytest.raises(AdapterFileError, match="is for text_encoder, unet; a LlamaForCausalLM has layers of none"):
        DeloraModel.from_pretrained(llama(), tmp_path)


# ---- the verbs -----------------------------------------------------------------------------------


def test_it_is_called_and_generates_as_the_model_it_wraps() -> None:
    torch.manual_seed(0)
    base = llama().eval()
    wrapped = copy.deepcopy(base)
    model = DeloraModel(wrapped, DeloraConfig(r=2, delora_lambda=8.0))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **settings), base.generate(TOKENS, **settings))
    shake(model)
    assert moved(output(model), output(base))
    assert torch.equal(
        model.generate(TOKENS, **settings), copy.deepcopy(model).merge_and_unload().generate(TOKENS, **settings)
    )
    assert model.get_base_model() is wrapped and model.config is wrapped.config
    assert model.base_model is wrapped.model and isinstance(model, LlamaForCausalLM)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model.nonsense


def test_disabling_merging_and_unloading(made: Maker) -> None:
    base, model = output(made()), wrapped(made)
    adapted = output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), adapted)
    model.disable_adapters()
    assert torch.equal(output(model), base)
    model.enable_adapters()
    model.set_adapters("default", 0.5)
    half = output(model)
    model.set_adapters(["default"])
    assert torch.equal(output(model), adapted) and not torch.equal(half, adapted)
    assert model.merge_adapter().layers == len(delora_adapters(model))
    close(output(model), adapted)
    model.unmerge_adapter()
    assert torch.equal(output(model), adapted)
    assert torch.equal(output(copy.deepcopy(model).unload()), base)
    merged = model.merge_and_unload()
    assert type(merged) is type(made()) and merged.state_dict().keys() == made().state_dict().keys()
    close(output(merged), adapted)


def test_the_same_parameters_are_trained_as_in_peft(made: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    targets = ["to_q"] if isinstance(made(), UNet2DConditionModel) else None
    theirs = peft.get_peft_model(made(), peft.DeloraConfig(r=4, target_modules=targets))
    ours = DeloraModel(made(), DeloraConfig(r=4, target_modules=targets))
    capsys.readouterr()
    theirs.print_trainable_parameters()
    ours.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_only_active_adapters_are_trained_and_a_loaded_one_neither_acts_nor_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = bert().eval()
    model = DeloraModel(copy.deepcopy(base), DeloraConfig(r=2))
    shake(model)
    model.save_pretrained(tmp_path)
    adapted = output(model)
    assert len(model.load_adapter(tmp_path, "copy")) == 4
    assert model.active_adapters == ["default"] and torch.equal(output(model), adapted)

    def trained(name: str) -> set[bool]:
        return {p.requires_grad for a in delora_adapters(model, name).values() for p in a.parameters()}

    assert (trained("default"), trained("copy")) == ({True}, {False})
    model.set_adapter("copy")
    assert (trained("default"), trained("copy")) == ({False}, {True})
    close(output(model), adapted)
    model.delete_adapter("default")
    assert model.adapter_names == ["copy"] == list(model.delora_configs)
    frozen = DeloraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())
    free = DeloraModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert {n.rpartition(".")[2] for n, p in free.named_parameters() if p.requires_grad} == {
        "delora_A", "delora_B", "delora_lambda"
    }  # fmt: skip
    assert free.adapter_state_dict().keys() == frozen.adapter_state_dict().keys()


def test_a_load_that_fails_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DeloraModel(bert().eval(), DeloraConfig(r=2))
    shake(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    other = DeloraModel(bert().eval(), DeloraConfig(r=2, bias="all"))
    shake(other)
    before = output(other)
    with pytest.raises(ValueError, match="trained on another base"):
        other.load_adapter(tmp_path, "second")
    assert other.adapter_names == other.active_adapters == ["default"]
    assert torch.equal(output(other), before)
    fresh = bert().eval()
    with pytest.raises(ValueError, match="trained on another base"):
        DeloraModel.from_pretrained(fresh, tmp_path)
    assert not any("delora" in name for name in fresh.state_dict())
