"""Between a VAE's own latents and those the denoiser sees, whatever the VAE: scale, shift, statistics, arrangement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

_Number = Tensor | float


def normalise(vae: Any, z: Tensor) -> Tensor:
    """Latents (B, C, H, W) as the denoiser sees them, (z - mean) / std * scale, from the VAE's own z.

    FLUX.2's VAE has each 2 x 2 square of z stacked into channels first, and statistics of those (its `bn`);
    Qwen-Image's has a dimension for frames (B, C, 1, H, W), of which there is one.
    """
    mean, std, scale = _statistics(vae)
    return (_arranged(vae, z) - mean) / std * scale


def denormalise(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `normalise`: what the VAE decodes."""
    mean, std, scale = _statistics(vae)
    z = latents * std / scale + mean
    if _batch_norm(vae) is not None:
        z = pixel_shuffle(z, 2)
    return z.unsqueeze(2) if _has_frames(vae) else z


@torch.no_grad()
def posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the normalised latents of pixels (B, 3, h, w) in -1 .. 1, in fp32.

    The deviation of an autoencoder without noise (Sana's) is 0.
    """
    pixels = pixels.to(vae.device, vae.dtype)
    encoded = vae.encode(pixels.unsqueeze(2) if _has_frames(vae) else pixels)
    spread = getattr(encoded, "latent_dist", None)
    mean = encoded.latent if spread is None else spread.mean
    std = torch.zeros_like(mean) if spread is None else spread.std
    _, channel_std, scale = _statistics(vae)
    return normalise(vae, mean).float(), (_arranged(vae, std) / channel_std * scale).float()


def _arranged(vae: Any, z: Tensor) -> Tensor:
    z = z.squeeze(2) if _has_frames(vae) else z
    return z if _batch_norm(vae) is None else pixel_unshuffle(z, 2)


def _statistics(vae: Any) -> tuple[_Number, _Number, float]:
    """Mean and standard deviation, of each channel (1, C, 1, 1) or of all, and scale."""
    config, norm = vae.config, _batch_norm(vae)
    if norm is not None:
        return _channels(norm.running_mean), _channels((norm.running_var + config.batch_norm_eps).sqrt()), 1.0
    scale = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        place = {"device": vae.device, "dtype": vae.dtype}
        mean, std = (torch.tensor(config[name], **place) for name in ("latents_mean", "latents_std"))
        return _channels(mean), _channels(std), scale
    return config.get("shift_factor") or 0.0, 1.0, scale


def _channels(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1)


def _batch_norm(vae: Any) -> Any:
    return getattr(vae, "bn", None)


def _has_frames(vae: Any) -> bool:
    return "temperal_downsample" in vae.config  # diffusers' spelling
