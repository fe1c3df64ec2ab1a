"""Folders of PEFT's that hold more than adapters of plain layers, both ways, with PEFT's outputs as the oracle."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from delora_diffusion import (
    DeloraConfig,
    DeloraConfigError,
    DeloraModel,
    delora_state_dict,
    get_peft_model,
    inject_delora,
)
from delora_diffusion.method.inject import delora_adapters

from .tiny_language import llama

IDS = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 4]])
BERT: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                        "num_attention_heads": 2}  # fmt: skip


class Names(nn.Module):
    """Layers that are called what PEFT and we call our own."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.modules_to_save, self.delora = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.delora(self.modules_to_save(self.base_layer(x))))


def resized() -> nn.Module:
    model = llama()
    model.resize_token_embeddings(36)
    return model


def classifier() -> nn.Module:
    return LlamaForSequenceClassification(LlamaConfig(**BERT, num_key_value_heads=1, pad_token_id=0, num_labels=3))


ALL_NAMES = ["base_layer", "modules_to_save", "delora"]
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "SEQ_CLS": (classifier, {"task_type": "SEQ_CLS"}, {}),
    "TOKEN_CLS": (lambda: BertForTokenClassification(BertConfig(**BERT)), {"task_type": "TOKEN_CLS"}, {}),
    "QUESTION_ANS": (lambda: BertForQuestionAnswering(BertConfig(**BERT)), {"task_type": "QUESTION_ANS"}, {}),
    "embeddings saved": (resized, {"task_type": "CAUSAL_LM"}, {"save_embedding_layers": True}),
    "embeddings trained": (llama, {"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "an adapted head": (llama, {"target_modules": ["q_proj", "lm_head"]}, {}),
    "an adapted head, biases": (lambda: llama(attention_bias=True), {"target_modules": ["q_proj", "lm_head"],
                                                                     "bias": "all"}, {}),
    "a tied head trained": (lambda: llama(tie_word_embeddings=True), {"modules_to_save": ["lm_head"]}, {}),
    "tied embeddings trained": (lambda: llama(tie_word_embeddings=True), {"modules_to_save": ["embed_tokens"]}, {}),
    "our own words": (lambda: nn.Sequential(Names()), {"target_modules": ALL_NAMES, "bias": "all",
                                                       "modules_to_save": ["head"]}, {}),
    "our own words saved": (lambda: nn.Sequential(Names()), {"target_modules": ["head"], "bias": "delora_only",
                                                             "modules_to_save": ALL_NAMES[1:]}, {}),
}  # fmt: skip


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name][0]().eval()


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        if not hasattr(model, "config") or isinstance(getattr(model, "config", None), dict):
            return model(torch.randn(2, 4, generator=torch.Generator().manual_seed(2)))
        return model(input_ids=IDS)[0]


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=generator)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_folders_open_both_ways_with_the_same_outputs(name: str, tmp_path: Path) -> None:
    _, fields, how = CASES[name]
    base = outputs(made(name))
    theirs = peft.get_peft_model(made(name), peft.DeloraConfig(r=2, delora_lambda=4, **fields)).eval()
    shake(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"), **how)
    opened = DeloraModel.from_pretrained(made(name), tmp_path / "theirs")
    close(outputs(opened), outputs(theirs))
    assert float((outputs(opened) - base).abs().max()) > 1e-3
    ours = get_peft_model(made(name), DeloraConfig(r=2, delora_lambda=4, **fields)).eval()
    if not how:
        assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    shake(ours)
    ours.save_pretrained(tmp_path / "ours")
    close(outputs(peft.PeftModel.from_pretrained(made(name), str(tmp_path / "ours")).eval()), outputs(ours))
    close(outputs(DeloraModel.from_pretrained(made(name), tmp_path / "ours")), outputs(ours))
    close(outputs(opened.unload()), base)


def test_the_head_of_a_new_task_is_trained_and_no_other() -> None:
    trained = {n for n, p in get_peft_model(classifier(), DeloraConfig(r=2, task_type="SEQ_CLS")).named_parameters()
               if p.requires_grad and "delora" not in n}  # fmt: skip
    assert trained == {"score.weight"}
    frozen = get_peft_model(llama(), DeloraConfig(r=2, inference_mode=True))
    assert frozen.get_nb_trainable_parameters()[0] == 0
    with pytest.raises(DeloraConfigError, match="task_type is 'SEQUENCE'; choose one of SEQ_CLS"):
        DeloraConfig(task_type="SEQUENCE")


def test_a_configuration_is_saved_read_by_both_and_takes_pefts_values(tmp_path: Path) -> None:
    config = DeloraConfig(r=4, init_weights=False, task_type=peft.TaskType.CAUSAL_LM, target_modules=["q_proj"])
    assert config.init_weights == "kaiming" and config.task_type == "CAUSAL_LM"
    config.save_pretrained(tmp_path)
    assert DeloraConfig.from_pretrained(tmp_path) == config
    assert DeloraConfig(init_weights=True) == DeloraConfig(init_weights="zero")
    peft.DeloraConfig(r=3, target_modules=["v_proj"], task_type="CAUSAL_LM").save_pretrained(str(tmp_path / "peft"))
    found = DeloraConfig.from_pretrained(tmp_path / "peft")
    assert (found.r, found.target_modules, found.init_weights) == (3, ["v_proj"], "zero")
    peft.LoraConfig().save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(DeloraConfigError, match="of the method LORA"):
        DeloraConfig.from_pretrained(tmp_path / "lora")


def test_the_state_of_adapters_is_told_as_peft_tells_it() -> None:
    ours, theirs = get_peft_model(llama(), DeloraConfig(r=2)), peft.get_peft_model(llama(), peft.DeloraConfig(r=2))
    theirs.add_adapter("other", peft.DeloraConfig(r=2))
    ours.add_adapter("other", DeloraConfig(r=2))
    ours.set_adapter("default")

    def compare() -> None:
        mine, other = ours.get_model_status(), theirs.get_model_status()
        for name in mine.__dataclass_fields__:
            if name not in ("trainable_params", "total_params"):
                assert getattr(mine, name) == getattr(other, name), name
        assert (mine.trainable_params, mine.total_params) == (other.trainable_params, other.total_params)

    compare()
    ours.merge_adapter()
    theirs.merge_adapter()
    compare()
    ours.unmerge_adapter()
    assert ours.active_adapter == "default" and ours.peft_config["other"].r == 2
    ours.delete_adapter("default")
    theirs.unmerge_adapter()
    theirs.delete_adapter("default")
    assert ours.active_adapters == theirs.active_adapters == ["other"]
    ours.set_requires_grad("other", False)
    assert ours.get_nb_trainable_parameters()[0] == 0


def test_where_a_model_goes_and_what_is_trained_of_it(tmp_path: Path) -> None:
    get_peft_model(llama(), DeloraConfig(r=2)).save_pretrained(tmp_path)
    meta = DeloraModel.from_pretrained(llama(), tmp_path, device_map={"": "meta"}, low_cpu_mem_usage=True)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    for several in ("auto", {"model": 0, "lm_head": 1}):
        with pytest.raises(ValueError, match="give it to the base's from_pretrained"):
            DeloraModel.from_pretrained(llama(), tmp_path, device_map=several)
    with pytest.raises(ValueError, match="of another shape"):
        DeloraModel.from_pretrained(llama(), tmp_path, config=DeloraConfig(r=3, target_modules=["q_proj", "v_proj"]))


def test_the_card_names_base_and_opener_and_keeps_what_was_written(tmp_path: Path) -> None:
    base = llama()
    base.name_or_path = "some/llama"
    model = get_peft_model(base, DeloraConfig(r=2, delora_lambda=4))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "some/llama" and card.data.library_name == "peft"
    assert "delora" in card.data.tags and card.data.pipeline_tag == "text-generation"
    (code,) = [part for part in card.text.split("```") if part.startswith("python\n")]
    compile(code.removeprefix("python\n"), "card", "exec")
    assert 'LlamaForCausalLM.from_pretrained("some/llama")' in code and "| default | 2 | 4 |" in card.text
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\nMy own words.\n")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.strip() == "My own words." and card.data.license == "mit"
    assert card.data.tags == ["mine", "delora"] and card.data.base_model == "some/llama"
    nameless = get_peft_model(nn.Sequential(nn.Linear(2, 2)), DeloraConfig(r=1, target_modules=["0"]))
    nameless.save_pretrained(tmp_path / "other")
    assert "...  # the Sequential that it was trained on" in (tmp_path / "other" / "README.md").read_text()


def test_layers_out_of_a_state_dict() -> None:
    first, second = llama(), llama()
    inject_delora(first, DeloraConfig(r=2, target_modules=["o_proj", "layers.0.mlp.up_proj"]))
    names = inject_delora(second, DeloraConfig(r=2), state_dict=delora_state_dict(first))
    assert names == list(delora_adapters(first)) and len(names) == 3


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["embed_tokens", "o_proj"], ["c_attn", "wte"]], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_a_lora_that_peft_opens_does_the_same(targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    base = (gpt2 if "wte" in targets else llama()).eval()
    fields = {"init_weights": "residual", "rank_pattern": {targets[0]: 3}, "bias": "delora_only"}
    model = get_peft_model(copy.deepcopy(base), DeloraConfig(r=2, target_modules=targets, **fields))
    shake(model)
    model.save_lora(tmp_path)
    close(outputs(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()), outputs(model))


def random_fields(seed: int) -> dict[str, Any]:
    """A configuration that both know, of fields that have little to do with each other."""
    g = random.Random(seed)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = g.sample(layers, g.randint(1, 4))
    fields: dict[str, Any] = {
        "r": g.randint(1, 5), "delora_lambda": g.choice([1, 4, 15]), "init_weights": g.random() < 0.5,
        "bias": g.choice(["none", "all", "delora_only"]), "target_modules": targets,
        "rank_pattern": {g.choice(targets): g.randint(1, 6)} if g.random() < 0.5 else {},
        "lambda_pattern": {rf"layers\.0\..*{targets[0]}": 2.5} if g.random() < 0.5 else {},
    }  # fmt: skip
    if g.random() < 0.3:
        fields["modules_to_save"] = g.sample(
            ["embed_tokens", "lm_head", "post_attention_layernorm", "input_layernorm"], 2
        )
    if g.random() < 0.3:
        fields |= {"layers_to_transform": [0], "layers_pattern": g.choice([None, "layers"])}
        fields["rank_pattern"] = fields["lambda_pattern"] = {}
    elif g.random() < 0.3:
        fields["target_modules"] = r".*\.(" + "|".join(targets) + ")"
    if g.random() < 0.3:
        fields["exclude_modules"] = ["layers.1.self_attn.k_proj", "layers.1.mlp.up_proj"]
    return fields


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.filterwarnings("ignore")
def test_random_configurations_both_ways(seed: int, tmp_path: Path) -> None:
    fields, base = random_fields(seed), llama(attention_bias=True, hidden_size=8, intermediate_size=12).eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.DeloraConfig(**fields)).eval()
    shake(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    opened = DeloraModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    close(outputs(opened), outputs(theirs))
    opened.save_pretrained(tmp_path / "ours")
    close(outputs(peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()), outputs(opened))
