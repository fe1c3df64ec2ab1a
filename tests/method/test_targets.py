"""`DeloraConfig` and the layers it names. The oracle for matching is PEFT: both adapt the same module."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from delora_diffusion import DeloraConfig, inject_delora
from delora_diffusion.method.inject import delora_adapters


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# ---- modules to match in -------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.norm = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4)
        self.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout()])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Block(), Block()])


class Blocks(nn.Module):
    """Numbered blocks twice over, numbers inside numbers, and names that are suffixes or beginnings of others."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Block() for _ in range(3)])
        self.up = nn.ModuleList([Block() for _ in range(11)])
        self.mid = nn.ModuleDict({"stage": Block(), "layers": nn.ModuleList([Experts(), Experts()])})
        self.to_q, self.not_to_q, self.conv_out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(4, 4, 1)
        self.conv_in = nn.Conv2d(4, 4, 1, groups=2)


def unet() -> nn.Module:
    model: nn.Module = UNet2DConditionModel(
        block_out_channels=(4, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=2,
        sample_size=8,
    )
    return model


def clip() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
    model: nn.Module = CLIPTextModel(CLIPTextConfig(vocab_size=16, max_position_embeddings=8, **sizes))
    return model


def llama() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=16, max_position_embeddings=8, **sizes))
    return model


# ---- matching, against PEFT ----------------------------------------------------------------------


def adapted_by_us(module: nn.Module, fields: dict[str, Any]) -> dict[str, tuple[int, float]]:
    inject_delora(module, DeloraConfig(**fields))
    return {name: (a.rank, a.delora_lambda.item()) for name, a in delora_adapters(module).items()}


def adapted_by_peft(module: nn.Module, fields: dict[str, Any]) -> dict[str, tuple[int, float]]:
    model = peft.get_peft_model(module, peft.DeloraConfig(**fields)).base_model.model
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "delora_lambda")}
    return {name: (m.r["default"], m.delora_lambda["default"].item()) for name, m in layers.items()}


def trained_by_us(module: nn.Module) -> set[str]:
    return {n.replace("delora.adapters.default.", "") for n, p in module.named_parameters() if p.requires_grad}


def trained_by_peft(module: nn.Module) -> set[str]:
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    for inserted in (".base_layer", ".modules_to_save.default"):
        names = {name.replace(inserted, "") for name in names}
    return {name.removesuffix(".default") for name in names}


MATCHING: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "suffixes": (Blocks, {"target_modules": ["to_q", "to_out.0"]}),
    "exact names": (Blocks, {"target_modules": ["down.1.to_q", "not_to_q"]}),
    "regex": (Blocks, {"target_modules": r"(down|mid)\..*to_[qk]"}),
    "a regex matches whole names": (Blocks, {"target_modules": r"up\.1.*\.to_q|to_q|not_to"}),
    "all-linear": (Blocks, {"target_modules": "all-linear"}),
    "all-linear unet": (unet, {"target_modules": "all-linear"}),
    "all-linear clip": (clip, {"target_modules": "all-linear"}),
    "all-linear llama, not its head": (llama, {"target_modules": "all-linear"}),
    "unet suffixes": (unet, {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]}),
    "exclude suffixes": (Blocks, {"target_modules": ["to_q", "to_k"], "exclude_modules": ["mid.stage.to_q", "to_k"]}),
    "exclude regex": (unet, {"target_modules": "all-linear", "exclude_modules": r".*(time|ff).*"}),
    "rank_pattern": (
        Blocks,
        {"target_modules": ["to_q", "to_k"], "rank_pattern": {"to_k": 3, r"up\.\d\.to_q": 5, "to_q": 7}},
    ),
    "lambda_pattern": (clip, {"target_modules": ["q_proj", "fc1"], "lambda_pattern": {".*0.*q_proj": 2.5, "fc1": 4}}),
    "one layer": (Blocks, {"target_modules": ["to_k"], "layers_to_transform": 1}),
    "layers of any container": (Blocks, {"target_modules": ["to_k", "to_out.0"], "layers_to_transform": [0, 10]}),
    "layers of a named container": (
        Blocks,
        {"target_modules": ["to_k"], "layers_to_transform": [1, 2], "layers_pattern": "up"},
    ),
    "layers of several containers": (
        Blocks,
        {"target_modules": ["to_k"], "layers_to_transform": [1], "layers_pattern": ["down", "experts"]},
    ),
    "clip layers": (clip, {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"}),
    "an exact name ignores layers_to_transform": (
        Blocks,
        {"target_modules": ["down.0.to_q", "to_k"], "layers_to_transform": [1]},
    ),
    "no layers_to_transform means all": (Blocks, {"target_modules": ["to_q"], "layers_to_transform": []}),
    "modules_to_save are not adapted": (
        Blocks,
        {"target_modules": ["to_q", "to_k"], "modules_to_save": ["mid.stage", "conv_out"]},
    ),
    "bias of the adapted layers": (Blocks, {"target_modules": ["to_q", "to_k"], "bias": "delora_only"}),
    "all biases": (Blocks, {"target_modules": ["to_k"], "bias": "all", "modules_to_save": ["norm"]}),
}


@pytest.mark.parametrize("build, fields", MATCHING.values(), ids=MATCHING.keys())
def test_same_layers_ranks_lambdas_and_trained_parameters_as_peft(
    build: Callable[[], nn.Module], fields: dict[str, Any]
) -> None:
    ours, theirs = build(), build()
    fields = {"r": 2, "delora_lambda": 6.0} | fields
    expected = adapted_by_peft(theirs, copy.deepcopy(fields))
    assert expected
    assert adapted_by_us(ours, fields) == expected
    assert trained_by_us(ours) == trained_by_peft(theirs)


@pytest.mark.parametrize("build, ends, count", [(unet, "to_q to_k to_v to_out.0", 32), (clip, "q k v out", 12)])
def test_default_targets_are_the_attention_projections(build: Callable[[], nn.Module], ends: str, count: int) -> None:
    names = inject_delora(build(), DeloraConfig(r=2))
    assert len(names) == count
    assert {n for n in names if any(n.endswith((end, f"{end}_proj")) for end in ends.split())} == set(names)


def test_a_second_adapter_matches_the_same_layers_as_the_first() -> None:
    module = Blocks()
    config = DeloraConfig(r=2, target_modules="all-linear", modules_to_save=["norm"])
    assert inject_delora(module, config, "a") == inject_delora(module, config, "b")


# ---- refusals ------------------------------------------------------------------------------------

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "rank of 'r' is 0; it must be a whole number of at least 1"),
    ({"r": True}, "rank of 'r' is True"),
    ({"r": 2.0}, "rank of 'r' is 2.0"),
    ({"rank_pattern": {"to_q": -1}}, "rank of 'to_q' is -1"),
    ({"r": 3, "init_weights": "paired"}, "rank of 'r' is 3; init_weights='paired' needs an even rank"),
    ({"rank_pattern": {"to_q": 5}, "init_weights": "paired"}, "rank of 'to_q' is 5.*even"),
    ({"delora_lambda": -1.0}, "lambda of 'delora_lambda' is -1.0; it must be a finite number of at least 0"),
    ({"delora_lambda": float("nan")}, "lambda of 'delora_lambda' is nan"),
    ({"delora_lambda": "15"}, "lambda of 'delora_lambda' is '15'"),
    ({"lambda_pattern": {"to_q": float("inf")}}, "lambda of 'to_q' is inf"),
    ({"module_dropout": 1.0}, "module_dropout is 1.0; it must be at least 0 and below 1"),
    ({"module_dropout": -0.1}, "module_dropout is -0.1"),
    ({"module_dropout": "0.1"}, "module_dropout is '0.1'"),
    ({"bias": "lora_only"}, "bias is 'lora_only'; choose one of none, all, delora_only"),
    ({"init_weights": "gaussian"}, "init_weights is 'gaussian'; choose one of zero, residual, paired, kaiming"),
    ({"target_modules": []}, "target_modules is empty; name at least one layer"),
    ({"modules_to_save": "norm"}, r"modules_to_save is 'norm'; .* list"),
    ({"modules_to_save": ["("]}, r"'\(' is not a regular expression"),
    ({"layers_to_transform": 0, "target_modules": ["to_q"], "layers_pattern": "("}, r"'\(' is not a regular"),
    ({"target_modules": "(to_q"}, r"'\(to_q' is not a regular expression"),
    ({"exclude_modules": "*"}, r"'\*' is not a regular expression"),
    ({"rank_pattern": {"[": 2}}, r"'\[' is not a regular expression"),
    ({"lambda_pattern": {"[": 2}}, r"'\[' is not a regular expression"),
    ({"layers_pattern": "up", "target_modules": ["to_q"]}, "layers_pattern is given without layers_to_transform"),
    ({"layers_to_transform": 1, "target_modules": "to_q"}, "layers_to_transform needs target_modules as a list"),
]


@pytest.mark.parametrize("fields, message", BAD_FIELDS, ids=[str(fields) for fields, _ in BAD_FIELDS])
def test_a_field_that_cannot_be_meant_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeloraConfig(**fields)


BAD_TARGETS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing matched": (
        {"target_modules": ["to_v"]},
        r"target_modules \['to_v'\] matched none of the layers of Blocks; its Linear layers end in: 0, not_to_q, to_k",
    ),
    "everything excluded": ({"target_modules": ["to_q"], "exclude_modules": ["to_q"]}, "matched none"),
    "no such layer index": ({"target_modules": ["to_k"], "layers_to_transform": 99}, "matched none"),
    "groups": (
        {"target_modules": ["to_q", "conv_in"]},
        "'conv_in', a Conv2d in 2 groups, .*; DeLoRA adapts nn.Linear, ",
    ),
    "a container": ({"target_modules": ["stage"]}, "'mid.stage', a Block"),
    "a norm, by regex": ({"target_modules": r".*norm"}, "'down.0.norm', a LayerNorm"),
    "a rank that fits nothing": (
        {"target_modules": ["to_q"], "rank_pattern": {"to_k": 4}},
        "rank_pattern 'to_k' fits none of the 20 adapted layers, e.g. 'down.0.to_q'",
    ),
    "a lambda that fits nothing": (
        {"target_modules": ["to_q"], "lambda_pattern": {"q": 4}},
        "lambda_pattern 'q' fits none",
    ),
    "nothing to save": (
        {"target_modules": ["to_q"], "modules_to_save": ["classifier"]},
        "modules_to_save 'classifier' matches no module with parameters in Blocks",
    ),
}


@pytest.mark.parametrize("fields, message", BAD_TARGETS.values(), ids=BAD_TARGETS.keys())
def test_targets_that_cannot_be_adapted_are_refused_and_the_module_stays_as_it_was(
    fields: dict[str, Any], message: str
) -> None:
    module = Blocks()
    names = list(dict(module.named_modules()))
    with pytest.raises(ValueError, match=message):
        inject_delora(module, DeloraConfig(**fields))
    assert list(dict(module.named_modules())) == names
    assert all(p.requires_grad for p in module.parameters())
    assert not hasattr(module, "_delora")


@pytest.mark.parametrize("name", ["", "a.b", "keys", "parameters"])
def test_an_adapter_name_that_torch_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name an adapter"):
        inject_delora(Blocks(), DeloraConfig(r=2), name)


def test_an_adapter_name_that_is_taken_is_refused() -> None:
    module = Blocks()
    inject_delora(module, DeloraConfig(r=2), "dog")
    with pytest.raises(ValueError, match="Blocks has an adapter 'dog' already; remove it or choose another name"):
        inject_delora(module, DeloraConfig(r=2), "dog")


# ---- JSON ----------------------------------------------------------------------------------------

FULL = DeloraConfig(
    r=4,
    delora_lambda=2.5,
    target_modules=["to_q"],
    exclude_modules=r".*\.3\..*",
    rank_pattern={"to_q": 6},
    lambda_pattern={"to_q": 0.5},
    layers_to_transform=[1, 2],
    layers_pattern=["up"],
    module_dropout=0.1,
    bias="delora_only",
    modules_to_save=["conv_out"],
    init_weights="paired",
    relative_lambda=0.2,
    task_type="SEQ_CLS",
    inference_mode=True,
    revision="main",
)


def test_the_round_trip_config_sets_every_field() -> None:
    assert all(getattr(FULL, f.name) != getattr(DeloraConfig(), f.name) for f in dataclasses.fields(FULL))


@pytest.mark.parametrize("config", [DeloraConfig(), FULL])
def test_json_round_trip(config: DeloraConfig) -> None:
    assert DeloraConfig.from_json(config.to_json()) == config
    assert DeloraConfig.from_dict(config.to_dict()) == config


def test_fields_and_defaults_are_pefts() -> None:
    ours = (
        "init_weights",
        "relative_lambda",
    )  # named choices, where PEFT has true and false; and a lambda that follows
    shared = {key: value for key, value in FULL.to_dict().items() if key not in ours}
    peft.DeloraConfig(**shared)
    defaults = peft.DeloraConfig().to_dict()
    assert {key: defaults[key] or None for key in shared} == {
        key: getattr(DeloraConfig(), key) or None for key in shared
    }


@pytest.mark.parametrize(
    "key, hint",
    [("rnak_pattern", "did you mean 'rank_pattern'"), ("lambda", "delora_lambda"), ("zzz", "known are r,")],
)
def test_an_unknown_key_is_refused_with_a_suggestion(key: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"unknown DeloraConfig field '{key}'.*{hint}"):
        DeloraConfig.from_dict({key: 1})
