"""Adapters as PEFT's LoRA folders, for programs that know no DeLoRA: vLLM, llama.cpp's converter, PEFT before 0.18.

A LoRA holds the update exactly, of every kind of layer: A' = A diag(w), B' = B diag(lambda / (r |a_i| |b_i|)).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from torch import Tensor, nn

from ..adapters.adapter import Adapter, adapted, in_full, layer_tensors
from ..adapters.peft import CONFIG_NAME, PREFIX, WEIGHTS_NAME, exactly, saved_modules
from ..adapters.safetensors_file import write_tensors
from ..atomic import complete_file
from ..method.delora import factors_of


def write_peft_lora(folder: Path, adapter: Adapter, component: str, *, module: nn.Module) -> Path:
    """Write one component of an adapter as a LoRA; other files in `folder` stay.

    Args:
        module: what the adapter is for.
    """
    config, tensors = adapter.configs[component], adapter.tensors[component]
    named: dict[str, Tensor] = {}
    ranks = {}
    for layer in adapted(tensors):
        own = {leaf: tensor.detach().float().cpu() for leaf, tensor in layer_tensors(layer, tensors).items()}
        down, up = factors_of(own)
        ranks[layer] = len(down)
        embedding, kernel = isinstance(module.get_submodule(layer), nn.Embedding), own["delora_A"].shape[1:]
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        named[f"{PREFIX}{layer}.{first}"] = down.reshape(len(down), *kernel)
        named[f"{PREFIX}{layer}.{second}"] = up[:, :, None, None] if len(kernel) > 1 else up
    for name, tensor in in_full(tensors).items():
        owner, _, leaf = name.rpartition(".")
        named[f"{PREFIX}{owner}.base_layer.{leaf}" if owner in ranks else PREFIX + name] = tensor.detach().cpu()
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    others = {f"^{re.escape(layer)}": own for layer, own in ranks.items() if own != rank}
    fields = {
        "peft_type": "LORA", "task_type": config.task_type, "inference_mode": True, "revision": config.revision,
        "base_model_name_or_path": adapter.provenance.get("base_model") or None, "r": rank, "lora_alpha": rank,
        "rank_pattern": others, "alpha_pattern": others, "target_modules": exactly(ranks), "lora_dropout": 0.0,
        "bias": config.bias.replace("delora_only", "lora_only"),
        "modules_to_save": saved_modules(config, tensors) or None,
    }  # fmt: skip
    with complete_file(folder / WEIGHTS_NAME) as weights, complete_file(folder / CONFIG_NAME) as settings:
        write_tensors(weights, {name: tensor.contiguous() for name, tensor in named.items()}, {"format": "pt"})
        settings.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder
