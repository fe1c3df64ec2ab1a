"""The original layouts: what weights are called where a model was first published, which other programs read.

A table has a line for each kind of layer, ours on the left. `#` is a number; `[a|b|c]` are layers that are one there,
in this order; `~` marks a modulation whose scale and shift have changed places, where it has just these two. A line
is for weight and bias, unless it ends in one of the two. `diffusers`' own single-file loader reads them backwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SD3 = """
pos_embed.pos_embed = pos_embed
pos_embed.proj = x_embedder.proj
context_embedder = context_embedder
time_text_embed.timestep_embedder.linear_1 = t_embedder.mlp.0
time_text_embed.timestep_embedder.linear_2 = t_embedder.mlp.2
time_text_embed.text_embedder.linear_1 = y_embedder.mlp.0
time_text_embed.text_embedder.linear_2 = y_embedder.mlp.2
transformer_blocks.#.attn.[to_q|to_k|to_v] = joint_blocks.#.x_block.attn.qkv
transformer_blocks.#.attn2.[to_q|to_k|to_v] = joint_blocks.#.x_block.attn2.qkv
transformer_blocks.#.attn.[add_q_proj|add_k_proj|add_v_proj] = joint_blocks.#.context_block.attn.qkv
transformer_blocks.#.attn.norm_q = joint_blocks.#.x_block.attn.ln_q
transformer_blocks.#.attn.norm_k = joint_blocks.#.x_block.attn.ln_k
transformer_blocks.#.attn2.norm_q = joint_blocks.#.x_block.attn2.ln_q
transformer_blocks.#.attn2.norm_k = joint_blocks.#.x_block.attn2.ln_k
transformer_blocks.#.attn.norm_added_q = joint_blocks.#.context_block.attn.ln_q
transformer_blocks.#.attn.norm_added_k = joint_blocks.#.context_block.attn.ln_k
transformer_blocks.#.attn.to_out.0 = joint_blocks.#.x_block.attn.proj
transformer_blocks.#.attn2.to_out.0 = joint_blocks.#.x_block.attn2.proj
transformer_blocks.#.attn.to_add_out = joint_blocks.#.context_block.attn.proj
transformer_blocks.#.norm1.linear = joint_blocks.#.x_block.adaLN_modulation.1
~transformer_blocks.#.norm1_context.linear = joint_blocks.#.context_block.adaLN_modulation.1
transformer_blocks.#.ff.net.0.proj = joint_blocks.#.x_block.mlp.fc1
transformer_blocks.#.ff.net.2 = joint_blocks.#.x_block.mlp.fc2
transformer_blocks.#.ff_context.net.0.proj = joint_blocks.#.context_block.mlp.fc1
transformer_blocks.#.ff_context.net.2 = joint_blocks.#.context_block.mlp.fc2
~norm_out.linear = final_layer.adaLN_modulation.1
proj_out = final_layer.linear
"""
_DOUBLE_BLOCKS = """
x_embedder = img_in
context_embedder = txt_in
transformer_blocks.#.attn.[to_q|to_k|to_v] = double_blocks.#.img_attn.qkv
transformer_blocks.#.attn.[add_q_proj|add_k_proj|add_v_proj] = double_blocks.#.txt_attn.qkv
transformer_blocks.#.attn.norm_q.weight = double_blocks.#.img_attn.norm.query_norm.scale
transformer_blocks.#.attn.norm_k.weight = double_blocks.#.img_attn.norm.key_norm.scale
transformer_blocks.#.attn.norm_added_q.weight = double_blocks.#.txt_attn.norm.query_norm.scale
transformer_blocks.#.attn.norm_added_k.weight = double_blocks.#.txt_attn.norm.key_norm.scale
transformer_blocks.#.attn.to_out.0 = double_blocks.#.img_attn.proj
transformer_blocks.#.attn.to_add_out = double_blocks.#.txt_attn.proj
single_transformer_blocks.#.attn.norm_q.weight = single_blocks.#.norm.query_norm.scale
single_transformer_blocks.#.attn.norm_k.weight = single_blocks.#.norm.key_norm.scale
~norm_out.linear = final_layer.adaLN_modulation.1
proj_out = final_layer.linear
"""
_FLUX1 = f"""{_DOUBLE_BLOCKS}
time_text_embed.timestep_embedder.linear_1 = time_in.in_layer
time_text_embed.timestep_embedder.linear_2 = time_in.out_layer
time_text_embed.text_embedder.linear_1 = vector_in.in_layer
time_text_embed.text_embedder.linear_2 = vector_in.out_layer
time_text_embed.guidance_embedder.linear_1 = guidance_in.in_layer
time_text_embed.guidance_embedder.linear_2 = guidance_in.out_layer
transformer_blocks.#.norm1.linear = double_blocks.#.img_mod.lin
transformer_blocks.#.norm1_context.linear = double_blocks.#.txt_mod.lin
transformer_blocks.#.ff.net.0.proj = double_blocks.#.img_mlp.0
transformer_blocks.#.ff.net.2 = double_blocks.#.img_mlp.2
transformer_blocks.#.ff_context.net.0.proj = double_blocks.#.txt_mlp.0
transformer_blocks.#.ff_context.net.2 = double_blocks.#.txt_mlp.2
single_transformer_blocks.#.[attn.to_q|attn.to_k|attn.to_v|proj_mlp] = single_blocks.#.linear1
single_transformer_blocks.#.proj_out = single_blocks.#.linear2
single_transformer_blocks.#.norm.linear = single_blocks.#.modulation.lin
"""
_FLUX2 = f"""{_DOUBLE_BLOCKS}
time_guidance_embed.timestep_embedder.linear_1 = time_in.in_layer
time_guidance_embed.timestep_embedder.linear_2 = time_in.out_layer
time_guidance_embed.guidance_embedder.linear_1 = guidance_in.in_layer
time_guidance_embed.guidance_embedder.linear_2 = guidance_in.out_layer
double_stream_modulation_img.linear = double_stream_modulation_img.lin
double_stream_modulation_txt.linear = double_stream_modulation_txt.lin
single_stream_modulation.linear = single_stream_modulation.lin
transformer_blocks.#.ff.linear_in = double_blocks.#.img_mlp.0
transformer_blocks.#.ff.linear_out = double_blocks.#.img_mlp.2
transformer_blocks.#.ff_context.linear_in = double_blocks.#.txt_mlp.0
transformer_blocks.#.ff_context.linear_out = double_blocks.#.txt_mlp.2
single_transformer_blocks.#.attn.to_qkv_mlp_proj = single_blocks.#.linear1
single_transformer_blocks.#.attn.to_out = single_blocks.#.linear2
"""
_LUMINA2 = """
x_embedder = x_embedder
time_caption_embed.caption_embedder.# = cap_embedder.#
time_caption_embed.timestep_embedder.linear_1 = t_embedder.mlp.0
time_caption_embed.timestep_embedder.linear_2 = t_embedder.mlp.2
@.#.attn.[to_q|to_k|to_v] = @.#.attention.qkv
@.#.attn.to_out.0 = @.#.attention.out
@.#.attn.norm_q = @.#.attention.q_norm
@.#.attn.norm_k = @.#.attention.k_norm
@.#.feed_forward.linear_1 = @.#.feed_forward.w1
@.#.feed_forward.linear_2 = @.#.feed_forward.w2
@.#.feed_forward.linear_3 = @.#.feed_forward.w3
@.#.norm1.linear = @.#.adaLN_modulation.1
@.#.norm1.norm = @.#.attention_norm1
context_refiner.#.norm1 = context_refiner.#.attention_norm1
@.#.norm2 = @.#.attention_norm2
@.#.ffn_norm1 = @.#.ffn_norm1
@.#.ffn_norm2 = @.#.ffn_norm2
norm_out.linear_1 = final_layer.adaLN_modulation.1
norm_out.linear_2 = final_layer.linear
"""
_Z_IMAGE = """
all_x_embedder.2-1 = x_embedder
all_final_layer.2-1.linear = final_layer.linear
all_final_layer.2-1.adaLN_modulation.1 = final_layer.adaLN_modulation.1
cap_embedder.# = cap_embedder.#
t_embedder.mlp.# = t_embedder.mlp.#
x_pad_token = x_pad_token
cap_pad_token = cap_pad_token
@.#.attention.[to_q|to_k|to_v] = @.#.attention.qkv
@.#.attention.to_out.0 = @.#.attention.out
@.#.attention.norm_q = @.#.attention.q_norm
@.#.attention.norm_k = @.#.attention.k_norm
@.#.feed_forward.w# = @.#.feed_forward.w#
@.#.adaLN_modulation.0 = @.#.adaLN_modulation.0
@.#.attention_norm# = @.#.attention_norm#
@.#.ffn_norm# = @.#.ffn_norm#
"""
#: `@` in the two tables above.
_STACKS = "(layers|noise_refiner|context_refiner)"


@dataclass(frozen=True)
class Place:
    """Where a tensor is in an original file.

    Attributes:
        name: of the tensor there.
        part: which of the layers that are one there it is.
        parts: how many those are.
        swapped: its halves change places if it has as many rows as two of its columns.
    """

    name: str
    part: int = 0
    parts: int = 1
    swapped: bool = False


@dataclass(frozen=True)
class _Rule:
    pattern: re.Pattern[str]
    name: str
    parts: tuple[str, ...]
    swapped: bool


def _rules(table: str) -> tuple[_Rule, ...]:
    rules = []
    for line in filter(None, table.splitlines()):
        ours, theirs = line.split(" = ")
        swapped, ours = ours.startswith("~"), ours.removeprefix("~")
        fused = re.search(r"\[(.+)\]", ours)
        parts = tuple(fused.group(1).split("|")) if fused else ()
        pattern = re.escape(ours.replace(fused.group(0), "FUSED") if fused else ours).replace(r"\#", r"(\d+)")
        pattern = pattern.replace("@", _STACKS).replace("FUSED", f"({'|'.join(map(re.escape, parts))})")
        order = [number for number, mark in enumerate(re.findall(r"[#@\[]", ours), 1) if mark != "["]
        name = theirs
        for number in order:
            name = re.sub(r"[#@]", rf"\\{number}", name, count=1)
        rules.append(_Rule(re.compile(pattern), name, parts, swapped))
    return tuple(rules)


_QWEN = re.compile(
    r"(transformer_blocks\.\d+\.(attn|(img|txt)_(mlp|mod))|img_in|txt_in|txt_norm|time_text_embed|norm_out|proj_out)\."
)
#: architecture -> table; Qwen-Image's original names are diffusers'.
_TABLES = {
    name: _rules(table)
    for name, table in (
        ("sd3", _SD3), ("flux1", _FLUX1), ("flux2", _FLUX2), ("lumina2", _LUMINA2), ("z_image", _Z_IMAGE)
    )
}  # fmt: skip
#: Architectures whose transformer has an original layout that ComfyUI loads.
TRANSFORMERS = (*_TABLES, "qwen_image")


def transformer_place(architecture: str, key: str) -> Place | None:
    """Where a tensor of a transformer is in a file of the original layout; None for one that has no counterpart."""
    if architecture == "qwen_image":
        return Place(key) if _QWEN.match(key) else None
    for rule in _TABLES[architecture]:
        for path, leaf in ((key, ""), _split(key)):
            if (found := rule.pattern.fullmatch(path)) is not None:
                part = next((n for n, name in enumerate(rule.parts) if name in found.groups()), 0)
                return Place(found.expand(rule.name) + leaf, part, len(rule.parts) or 1, rule.swapped)
    return None


def swapped_halves(tensor: Tensor) -> Tensor:
    """(scale, shift) in rows as (shift, scale)."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _split(key: str) -> tuple[str, str]:
    path, dot, leaf = key.rpartition(".")
    return path, dot + leaf


# ---- Stable Diffusion 1, 2 and XL -----------------------------------------------------------------

_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE = {
    r"conv_norm_out": "norm_out", r"conv_shortcut": "nin_shortcut", r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2", r"mid_block\.attentions\.0": "mid.attn_1", r"\bgroup_norm\b": "norm",
    r"\bto_([qkv])\b": r"\1", r"\bto_out\.0\b": "proj_out", r"downsamplers\.0\.conv": "downsample.conv",
    r"upsamplers\.0\.conv": "upsample.conv", r"down_blocks": "down", r"up_blocks": "up", r"\bresnets\b": "block",
}  # fmt: skip
_OPEN_CLIP = {
    r"encoder\.layers": "transformer.resblocks", r"layer_norm1": "ln_1", r"layer_norm2": "ln_2",
    r"mlp\.fc1": "mlp.c_fc", r"mlp\.fc2": "mlp.c_proj", r"self_attn\.out_proj": "attn.out_proj",
    r"self_attn\.[qkv]_proj\.": "attn.in_proj_", r"final_layer_norm": "ln_final", r"embeddings\.token": "token",
    r"embeddings\.position_embedding\.weight": "positional_embedding",
    r"text_projection\.weight": "text_projection",
}  # fmt: skip


def _renamed(names: Mapping[str, str], key: str) -> str:
    for pattern, name in names.items():
        key = re.sub(pattern, name, key)
    return key


def unet_places(config: Mapping[str, Any]) -> Mapping[str, str]:
    """What stands for the beginning of a name, in a UNet of this configuration: ours -> the original's."""
    return dict(_UNET) | dict(_unet_blocks(config))


def _unet_blocks(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    count = len(config["down_block_types"])
    given = config["layers_per_block"]
    layers = [given] * count if isinstance(given, int) else list(given)
    place = 1  # input_blocks.0 is conv_in
    for block, number in enumerate(layers):
        for layer in range(number):
            yield f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{place}.0"
            yield f"down_blocks.{block}.attentions.{layer}", f"input_blocks.{place}.1"
            place += 1
        yield f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{place}.0.op"
        place += 1
    place = 0
    for block, number in enumerate(reversed(layers)):
        for layer in range(number + 1):
            yield f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{place + layer}.0"
            yield f"up_blocks.{block}.attentions.{layer}", f"output_blocks.{place + layer}.1"
        after = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        yield f"up_blocks.{block}.upsamplers.0.conv", f"output_blocks.{place + number}.{after}.conv"
        place += number + 1


def unet_name(key: str, places: Mapping[str, str]) -> str | None:
    """The original name of a tensor of a UNet, given `unet_places`; None for one that has no counterpart."""
    start = max((ours for ours in places if key.startswith(f"{ours}.")), key=len, default=None)
    if start is None:
        return None
    rest = key[len(start) + 1 :]
    if ".resnets." in f".{start}.":
        layer, leaf = _split(rest)
        if layer not in _RESNET:
            return None
        rest = _RESNET[layer] + leaf
    return f"{places[start]}.{rest}"


def vae_name(key: str, blocks: int) -> str:
    """The original name of a tensor of an AutoencoderKL with so many blocks: it counts those of the decoder down."""
    name = _renamed(_VAE, key)
    return re.sub(r"decoder\.up\.(\d+)", lambda found: f"decoder.up.{blocks - 1 - int(found[1])}", name)


def open_clip_place(key: str) -> Place:
    """Where a tensor of a CLIP text encoder is in OpenCLIP's layout, which SD 2 and the second of SDXL have."""
    attention = re.search(r"self_attn\.([qkv])_proj\.", key)
    name = _renamed(_OPEN_CLIP, key.removeprefix("text_model."))
    return Place(name, "qkv".index(attention[1]), 3) if attention else Place(name)
