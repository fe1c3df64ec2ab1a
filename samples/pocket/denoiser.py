"""The pocket denoiser: a `UNet2DConditionModel` on 8 x 8 latents of 32 channels, told by text what to draw.

    python samples/pocket/denoiser.py --work WORK      # trains on WORK's scenes, vae and text_encoder; resumes

It predicts the velocity v (Salimans and Ho 2022) under a cosine noise schedule: small latents hold few redundant
numbers, so the noise may rise early, and with v the last step, which is pure noise, is well defined.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from autoencoder import LATENTS, encode
from clip import WIDTH, tokenize
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from scenes import load_images, load_labels
from torch import nn
from torch.nn import functional as F
from training import Plan, fast_autocast, train
from transformers import CLIPTextModel, CLIPTokenizer
from world import training_caption

UNTOLD = 0.1  # share of empty captions, for classifier-free guidance
PLAN = Plan(steps=6000, minutes=75, batch=64, ema_decay=0.998, save_every=200, report_every=20)


def new_denoiser() -> UNet2DConditionModel:
    """Untrained, 11 M parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENTS,
        out_channels=LATENTS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(128, 192),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads, despite its name
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)


def new_scheduler() -> DDIMScheduler:
    """The noise schedule of training, and the sampler of the pipeline."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def load_latents(work: Path) -> torch.Tensor:
    """Scaled mean latents of all scenes, float16 [n, 32, 8, 8], computed once."""
    path = work / "latents.pt"
    if not path.exists():
        images, vae = load_images(work), AutoencoderKL.from_pretrained(work / "vae")
        vae.to(memory_format=torch.channels_last)
        parts = [encode(vae, images[k : k + 2000]).half() for k in range(0, len(images), 2000)]
        torch.save(torch.cat(parts) * vae.config.scaling_factor, path)
    latents: torch.Tensor = torch.load(path, weights_only=True)
    return latents


def train_denoiser(work: Path, *, plan: Plan = PLAN) -> UNet2DConditionModel:
    """Train on latents and freshly worded captions; returns the EMA model."""
    latents, labels = load_latents(work), load_labels(work)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(work / "text_encoder").eval().requires_grad_(False)
    scheduler = new_scheduler()

    def loss_of(model: nn.Module, rng: np.random.Generator, generator: torch.Generator) -> torch.Tensor:
        rows = rng.integers(0, len(latents), plan.batch)
        captions = ["" if rng.random() < UNTOLD else training_caption(labels[k], rng)[0] for k in rows]
        text = encoder(input_ids=tokenize(tokenizer, captions)).last_hidden_state
        x = latents[torch.from_numpy(rows)].float().contiguous(memory_format=torch.channels_last)
        noise = torch.randn(x.shape, generator=generator)
        t = spread_timesteps(plan.batch, generator)
        noisy, v = scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)
        with fast_autocast():
            predicted = model(noisy, t, text).sample
        return F.mse_loss(predicted.float(), v)

    model = train(new_denoiser(), loss_of, plan=plan, checkpoint=work / "unet.pt")
    assert isinstance(model, UNet2DConditionModel)
    return model


def spread_timesteps(batch: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [batch], uniform in 0..999 and one from each of `batch` equal intervals, which makes the loss steadier."""
    return ((torch.arange(batch) + torch.rand(batch, generator=generator)) * (1000 / batch)).long()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=PLAN.steps)
    parser.add_argument("--minutes", type=float, default=PLAN.minutes, help="of training, earlier runs included")
    arguments = parser.parse_args()
    limits = {"steps": arguments.steps, "minutes": arguments.minutes}
    train_denoiser(arguments.work, plan=Plan(**(vars(PLAN) | limits)))
