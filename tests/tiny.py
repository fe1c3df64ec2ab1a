"""Tiny random models with the real classes: what the tests train and load. Nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

torch.set_num_threads(1)


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows single letters only, 16 tokens long."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def stable_diffusion(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of 0.1 M parameters that draws 16 x 16 pixels."""
    torch.manual_seed(seed)
    tokens = tokenizer(folder / "made")
    text = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              prediction_type=prediction_type, set_alpha_to_one=False, steps_offset=1)  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokens, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def photos(folder: Path, count: int = 3, *, size: tuple[int, int] = (24, 20), seed: int = 0) -> list[Path]:
    """Different noisy gradients as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        base = np.linspace(0, 200, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
        pixels = np.clip(base + random.normal(0, 30, base.shape) + 10 * number, 0, 255).astype(np.uint8)
        paths.append(folder / f"{number:02d}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def as_array(image: Any) -> np.ndarray:
    """Pixels as int, so that differences do not wrap."""
    return np.asarray(image).astype(int)
