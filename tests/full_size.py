"""The denoisers of every family at full size, on the meta device: names and shapes without weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers as d
import torch

from delora_diffusion.families import FAMILIES
from delora_diffusion.method.config import DeloraConfig
from delora_diffusion.method.targets import excluding, target_layers

_SD3 = {
    "pos_embed_max_size": 384, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
    "attention_head_dim": 64, "in_channels": 16, "out_channels": 16,
}  # fmt: skip

#: Name, family, and a function that makes the denoiser, from the config.json of the model on the Hub.
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "Stable Diffusion 1.5": ("stable-diffusion", lambda: d.UNet2DConditionModel(cross_attention_dim=768)),
    "SDXL": ("sdxl", lambda: d.UNet2DConditionModel(
        block_out_channels=(320, 640, 1280), cross_attention_dim=2048, transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )),
    "SD3.5 medium": ("sd3", lambda: d.SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, dual_attention_layers=tuple(range(13)),
        **_SD3,
    )),
    "SD3.5 large": ("sd3", lambda: d.SD3Transformer2DModel(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, **_SD3
    )),
    "FLUX.1": ("flux.1", lambda: d.FluxTransformer2DModel(guidance_embeds=True)),
    "FLUX.2 dev": ("flux.2", d.Flux2Transformer2DModel),
    "FLUX.2 klein 4B": ("flux.2", lambda: d.Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    )),
    "PixArt-alpha, -Sigma": ("pixart", lambda: d.PixArtTransformer2DModel(caption_channels=4096)),
    "Sana 1.6B": ("sana", d.SanaTransformer2DModel),
    "Lumina-Image 2.0": ("lumina2", lambda: d.Lumina2Transformer2DModel(cap_feat_dim=2304)),
    "Qwen-Image": ("qwen-image", d.QwenImageTransformer2DModel),
    "Z-Image": ("z-image", d.ZImageTransformer2DModel),
}  # fmt: skip


@functools.cache
def denoiser(name: str) -> Any:
    """The denoiser of one of `MODELS`."""
    with torch.device("meta"):
        return MODELS[name][1]()


def adapted(name: str, targets: str) -> dict[str, torch.nn.Linear]:
    """The layers that the trainer adapts with these targets."""
    module = denoiser(name)
    family = next(family for family in FAMILIES if family.name == MODELS[name][0])
    exclude = excluding(None, family.dead_layers(family.denoiser, module))
    return target_layers(module, DeloraConfig(target_modules=targets, exclude_modules=exclude))


def parameters(layers: dict[str, torch.nn.Linear], rank: int = 16) -> int:
    """What is trained: A, B and lambda of each layer."""
    return sum(rank * (linear.in_features + linear.out_features) + 1 for linear in layers.values())


def table() -> str:
    """The table of adapted layers and trained parameters."""
    lines = [
        "| base | `attention` layers | parameters | `attention+ff` layers | parameters |",
        "|---|---|---|---|---|",
    ]
    for name in MODELS:
        cells = []
        for targets in ("attention", "attention+ff"):
            layers = adapted(name, targets)
            cells += [str(len(layers)), f"{parameters(layers) / 1e6:.1f} M"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
