"""Tiny random pipelines of further families, with real classes, for what is loaded into diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from . import tiny


def text_config(tokens: Any) -> CLIPTextConfig:
    """Two layers, 16 wide, projected to 16."""
    return CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id, projection_dim=16,
    )  # fmt: skip


def vae(channels: int) -> AutoencoderKL:
    """Halves the side."""
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, shift_factor=0.1,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4, sample_size=16,
    )  # fmt: skip


def stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    """Two CLIP encoders, added conditioning, two transformer layers in the inner block; draws 16 x 16 pixels."""
    pipe = tiny.stable_diffusion(folder)
    torch.manual_seed(1)
    config = text_config(pipe.tokenizer)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=[1, 2], norm_num_groups=4, transformer_layers_per_block=[1, 2],
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=pipe.vae, text_encoder=CLIPTextModel(config), text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=pipe.tokenizer, tokenizer_2=pipe.tokenizer, unet=unet, scheduler=pipe.scheduler,
        add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3(folder: Path) -> StableDiffusion3Pipeline:
    """Two CLIP encoders and no T5; draws 16 x 16 pixels."""
    tokens = tiny.tokenizer(folder / "made")
    torch.manual_seed(2)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(text_config(tokens)) for _ in range(2)]
    _stir(transformer)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(4), text_encoder=encoders[0],
        tokenizer=tokens, text_encoder_2=encoders[1], tokenizer_2=tokens, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def flux(folder: Path) -> FluxPipeline:
    """One CLIP encoder and no T5: prompts are given as embeddings; draws 16 x 16 pixels."""
    tokens = tiny.tokenizer(folder / "made")
    torch.manual_seed(3)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    _stir(transformer)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(4), text_encoder=CLIPTextModel(text_config(tokens)),
        tokenizer=tokens, text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


def _stir(transformer: torch.nn.Module) -> None:
    """Heads and modulations that start at zero would hide every change."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
