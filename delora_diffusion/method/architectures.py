"""Which layers to adapt in a transformers model when nobody says: by `config.model_type`, the choice PEFT makes.

Only model types whose layers are `nn.Linear` are listed (those of GPT-2 and BTLM are Conv1D).
"""

from __future__ import annotations

import dataclasses

from torch import nn

from .config import ATTENTION, DeloraConfig, DeloraConfigError
from .targets import adaptable, is_target

_MODEL_TYPES: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 "
    "qwen3",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("q", "v"): "t5 mt5",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("query_key_value",): "bloom gpt_neox falcon chatglm RefinedWeb RefinedWebModel",
    ("qkv_proj",): "codegen",
    ("Wqkv",): "mpt",
    ("c_attn",): "gpt_bigcode",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}
#: {model type: names of the layers, or one regular expression}
TARGETS: dict[str, str | list[str]] = {
    name: list(layers) for layers, names in _MODEL_TYPES.items() for name in names.split()
} | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}


def with_targets(module: nn.Module, config: DeloraConfig) -> DeloraConfig:
    """`config` with `target_modules` filled in for `module`, if it names none.

    Raises:
        DeloraConfigError: a model type that is not listed, without layers of the usual attention names.
    """
    if config.target_modules is not None:
        return config
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if kind in TARGETS:
        return dataclasses.replace(config, target_modules=TARGETS[kind])
    if not any(is_target(config, name, child, module) for name, child in adaptable(module)):
        raise DeloraConfigError(
            f"target_modules is not given, and there is no default for {kind or type(module).__name__!r}; "
            f'give names of Linear layers, or "all-linear"'
        )
    return dataclasses.replace(config, target_modules=ATTENTION)
