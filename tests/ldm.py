"""Stable Diffusion and SDXL pipelines written as one file, by the names of the original (LDM) implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "text_model.encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn", "text_model.final_layer_norm": "ln_final",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
}  # fmt: skip


def _unet_name(name: str, unet: Any) -> str:
    if (module := name.rpartition(".")[0]) in _UNET:
        return _UNET[module] + name[len(module) :]
    place, per, parts = "", unet.config.layers_per_block, name.split(".")
    if parts[0] == "mid_block":
        place, rest = f"middle_block.{2 * int(parts[2]) if parts[1] == 'resnets' else 1}", parts[3:]
    else:
        block, kind, number, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        if parts[0] == "down_blocks":
            first = 1 + block * (per + 1)
            place = f"input_blocks.{first + (per if kind == 'downsamplers' else number)}"
            place += ".1" if kind == "attentions" else ".0"
            rest = ["op", *rest[1:]] if kind == "downsamplers" else rest
        else:
            attends = "Cross" in unet.config.up_block_types[block]
            place = f"output_blocks.{block * (per + 1) + (per if kind == 'upsamplers' else number)}"
            place += {"resnets": ".0", "attentions": ".1", "upsamplers": ".2" if attends else ".1"}[kind]
        if kind == "resnets":
            parts[1] = "resnets"
    if parts[1] == "resnets":
        rest = [_UNET_RESNET[rest[0]], *rest[1:]]
    return ".".join([place, *rest])


def _vae_name(name: str, blocks: int) -> str:
    for new, old in (("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"),
                     ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
                     ("downsamplers.0.conv", "downsample.conv"), ("upsamplers.0.conv", "upsample.conv")):  # fmt: skip
        name = name.replace(new, old)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        layer = name.split("attn_1.")[1].rpartition(".")[0]
        name = name.replace(layer, _VAE_ATTENTION[layer])
    for number in range(blocks):
        name = name.replace(f"down_blocks.{number}", f"down.{number}")
        name = name.replace(f"up_blocks.{number}", f"up.{blocks - 1 - number}")
    return name.replace("resnets", "block")


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        for new, old in _OPEN_CLIP.items():
            name = name.replace(new, old)
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif ".q_proj." in name:
            others = [state[n] for n in state if _same_place(n, name, "k_proj")] + [
                state[n] for n in state if _same_place(n, name, "v_proj")
            ]
            found[name.replace("q_proj.", "in_proj_")] = torch.cat([tensor, *others])
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[name] = tensor
    return found


def _same_place(new: str, old: str, projection: str) -> bool:
    for a, b in _OPEN_CLIP.items():
        new = new.replace(a, b)
    return new == old.replace("q_proj", projection)


def _hugging_face_clip(encoder: Any) -> dict[str, Tensor]:
    return {f"text_model.{n.removeprefix('text_model.')}": t for n, t in encoder.state_dict().items()}


def save_as_one_file(pipe: Any, path: Path, *, dtype: torch.dtype = torch.float32, vae: bool = True) -> Path:
    """Write the weights of a pipeline in the original layout."""
    blocks = len(pipe.vae.config.block_out_channels)
    parts = {"model.diffusion_model.": {_unet_name(n, pipe.unet): t for n, t in pipe.unet.state_dict().items()}}
    if vae:
        found = {_vae_name(n, blocks): t for n, t in pipe.vae.state_dict().items()}
        parts["first_stage_model."] = {
            n: t[:, :, None, None] if "attn_1" in n and t.dim() == 2 else t for n, t in found.items()
        }
    if hasattr(pipe, "text_encoder_2"):
        parts["conditioner.embedders.0.transformer."] = _hugging_face_clip(pipe.text_encoder)
        parts["conditioner.embedders.1.model."] = _open_clip(pipe.text_encoder_2.state_dict())
    else:
        parts["cond_stage_model.transformer."] = _hugging_face_clip(pipe.text_encoder)
    tensors = {
        prefix + n: t.detach().to(dtype).contiguous().clone() for prefix, p in parts.items() for n, t in p.items()
    }
    save_file(tensors, path)
    return path
