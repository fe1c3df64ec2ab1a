"""The pocket autoencoder: 64 x 64 px pictures <-> 8 x 8 latents of 32 channels (an `AutoencoderKL`).

python samples/pocket/autoencoder.py --work WORK      # trains, then writes WORK/vae
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from scenes import load_images, load_instances
from torch import nn
from training import Plan, fast_autocast, to_tensor, train
from world import scene

LATENTS = 32  # channels; 16 do not hold 30 dB
KL_WEIGHT = 1e-4  # on the mean over latent numbers; enough to centre the latents
EDGE_WEIGHT = 0.5  # on the error of differences between neighbouring pixels: outlines, and marks of two pixels
PLAN = Plan(steps=8000, minutes=100, batch=16, muon_lr=0.01, adam_lr=1e-3, save_every=100)


def new_autoencoder() -> AutoencoderKL:
    """Untrained, 3.0 M parameters; no attention, so that it works at other sizes too."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 96, 128),
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def widened(start: Path) -> AutoencoderKL:
    """An autoencoder to go on from; if it has fewer latent channels, nothing is read of the others yet."""
    before, model = AutoencoderKL.from_pretrained(start, torch_dtype=torch.float32), new_autoencoder()
    few = before.config.latent_channels
    moments = [*range(few), *range(LATENTS, LATENTS + few)]  # means, then log variances
    grown = {
        "encoder.conv_out": (moments, None), "quant_conv": (moments, moments),
        "post_quant_conv": (range(few), range(few)), "decoder.conv_in": (None, range(few)),
    }  # fmt: skip
    state = model.state_dict()
    for name, value in before.state_dict().items():
        rows, columns = grown.get(name.rpartition(".")[0], (None, None))
        into = state[name]
        rows = list(rows or range(into.shape[0]))
        if value.dim() == 1 or columns is None:
            into[rows] = value
        else:
            into[rows] = 0  # nothing of the new channels in the old ones
            into[torch.tensor(rows)[:, None], torch.tensor(list(columns))[None]] = value
    model.load_state_dict(state)
    return model


def train_autoencoder(work: Path, *, start: Path | None = None, plan: Plan = PLAN) -> AutoencoderKL:
    """Fit reconstructions (squared and absolute error, and that of edges); returns the EMA model, its scale set.

    A quarter of each batch shows things with unusual colours and marks, so that such subjects come through too.

    Args:
        start: folder of an autoencoder to go on from.
    """
    images, marked = load_images(work), load_instances(work).reshape(-1, 64, 64, 3)
    few = plan.batch // 4

    def loss_of(model: nn.Module, rng: np.random.Generator, generator: torch.Generator) -> torch.Tensor:
        rows, others = rng.integers(0, len(images), plan.batch - few), rng.integers(0, len(marked), few)
        x = to_tensor(np.concatenate([images[rows], marked[others]]))
        with fast_autocast():
            posterior = model.encode(x).latent_dist
            decoded = model.decode(posterior.sample(generator)).sample.float()
        error = decoded - x
        edges = error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()
        pixels = error.square().mean() + 0.1 * error.abs().mean()
        return pixels + EDGE_WEIGHT * edges + KL_WEIGHT * posterior.kl().mean() / 1024

    before = (widened(start) if start else new_autoencoder()).train().to(memory_format=torch.channels_last)
    model = train(before, loss_of, plan=plan, checkpoint=work / "vae.pt")
    assert isinstance(model, AutoencoderKL)
    latents = encode(model, images[:2000])
    model.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    print(f"vae: latents of mean {latents.mean():.3f} and std {latents.std():.3f}")
    return model


@torch.inference_mode()
def encode(model: AutoencoderKL, images: np.ndarray, *, batch: int = 64) -> torch.Tensor:
    """uint8 [n, 64, 64, 3] -> mean latents [n, 16, 8, 8], unscaled, float32."""
    parts = [to_tensor(images[k : k + batch]) for k in range(0, len(images), batch)]
    with fast_autocast():  # exact enough for what is noised later
        return torch.cat([model.encode(x).latent_dist.mean.float() for x in parts])


@torch.inference_mode()
def psnr(model: AutoencoderKL, *, count: int = 256) -> float:
    """Mean peak signal-to-noise ratio in dB of reconstructions of scenes of held-out pairs."""
    x = to_tensor(np.stack([np.asarray(scene(k, unseen=True).image) for k in range(count)]))
    decoded = model.decode(model.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    mse = (decoded - x).square().mean((1, 2, 3)) / 4  # on a range of 1
    return float((-10 / math.log(10) * mse.log()).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="an autoencoder to go on from, e.g. samples/pocket/base/vae")
    parser.add_argument("--minutes", type=float, default=PLAN.minutes, help="of training, earlier runs included")
    arguments = parser.parse_args()
    work = arguments.work
    vae = train_autoencoder(work, start=arguments.start, plan=replace(PLAN, minutes=arguments.minutes))
    print(f"vae: PSNR on unseen scenes {psnr(vae):.2f} dB")
    vae.save_pretrained(work / "vae")
