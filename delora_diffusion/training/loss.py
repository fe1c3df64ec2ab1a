"""Which examples a step is made of, and the loss on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..base.objective import Objective
from ..data.encode import Encoded
from ..data.photos import Example, View
from ..families import Conditioning, Family, Setting, placed, stack_conditioning
from ..method.inject import delora_disabled
from ..seeds import derived_seed


@dataclass(frozen=True)
class Examples:
    """What is trained on: photos of the subject, images of its class, and everything cached about them.

    `conditioning` holds the encoded captions; it is None while a text encoder is trained, and captions are then
    encoded at every step by `encode`. `preserved` holds prompts for which the base's own predictions are to be kept,
    as the base encodes them, and `preservation_weight` what they weigh in the loss. `guidance` is the scale that a
    guidance-distilled model is trained at.
    """

    instances: Sequence[Example]
    classes: Sequence[Example]
    latents: dict[str, Encoded]
    conditioning: dict[str, Conditioning] | None
    encode: Callable[[Sequence[str]], Conditioning]
    preserved: Mapping[str, Conditioning] = field(default_factory=dict)
    preservation_weight: float = 1.0
    guidance: float = 3.5


@dataclass(frozen=True)
class Pick:
    """One place of a batch: an example, the view of it, and the seed of its noise.

    With `preserved`, the target is what the base predicts for the example's caption, which is one of
    `Examples.preserved` and need not describe the image.
    """

    example: Example
    view: View
    seed: int
    preserved: bool = False


def picks(examples: Examples, *, seed: int, step: int, count: int) -> list[list[Pick]]:
    """The batch of an optimiser step, over all processes: `count` places, each a photo; with the prior, a class image;
    with base preservation, a photo under a preserved prompt. Photos come in a new random order in every pass."""
    kept = [replace(e, caption=c, weight=examples.preservation_weight)
            for e in examples.instances for c in examples.preserved]  # fmt: skip
    groups = (("instance", examples.instances), ("class", examples.classes), ("preserved", kept))
    return [
        [_pick(group, seed, step * count + place, kind) for kind, group in groups if group] for place in range(count)
    ]


def _pick(group: Sequence[Example], seed: int, position: int, kind: str) -> Pick:
    epoch, place = divmod(position, len(group))
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(derived_seed(seed, kind, epoch)))
    example = group[int(order[place])]
    own = derived_seed(seed, kind, "pick", position)
    return Pick(example, example.views[own % len(example.views)], own, preserved=kind == "preserved")


def batch_loss(
    batch: Sequence[Pick],
    examples: Examples,
    denoiser: nn.Module,
    family: Family,
    objective: Objective,
    *,
    total_weight: float,
    snr_gamma: float | None,
    device: torch.device,
) -> Tensor:
    """The part of a step's loss that falls on `batch`: sum_i weight_i |prediction_i - target_i|^2 / total_weight.

    Pictures of one size go through the denoiser together. The target of a preserved place is the prediction with all
    adapters disabled.

    Args:
        total_weight: summed example weights of the whole step, over all batches and processes.
    """
    sizes = dict.fromkeys(p.view.size for p in batch)
    losses = [
        _weighted_errors([p for p in batch if p.view.size == size], examples, denoiser, family, objective,
                         snr_gamma=snr_gamma, device=device).sum()
        for size in sizes
    ]  # fmt: skip
    return torch.stack(losses).sum() / total_weight


def _weighted_errors(
    batch: Sequence[Pick], examples: Examples, denoiser: nn.Module, family: Family, objective: Objective, *,
    snr_gamma: float | None, device: torch.device,
) -> Tensor:  # fmt: skip
    """weight_i |prediction_i - target_i|^2 (B,) of pictures of one size."""
    latents, noise, t = (
        torch.cat(parts)
        for parts in zip(*(_sampled(p, examples, objective, family.patch) for p in batch), strict=True)
    )
    x_t, target = objective.noised(latents, noise, t)
    captions = [p.example.caption for p in batch]
    if examples.conditioning is None:
        cond = examples.encode(captions)
    else:
        cond = stack_conditioning([examples.conditioning[caption] for caption in captions])
    setting = Setting(*batch[0].view.size, examples.guidance)
    prediction = _predicted(denoiser, family, x_t, t, cond, setting, device).float()
    target = target.to(device)
    if any(kept := [p.preserved for p in batch]):
        base_cond = stack_conditioning([examples.preserved[p.example.caption] for p in batch if p.preserved])
        with torch.no_grad(), delora_disabled(denoiser):
            target[kept] = _predicted(denoiser, family, x_t[kept], t[kept], base_cond, setting, device).float()
    weight = torch.tensor([p.example.weight for p in batch]) * objective.snr_weight(t, snr_gamma)
    return weight.to(device) * (prediction - target).square().flatten(1).mean(1)


def _predicted(
    denoiser: nn.Module, family: Family, x_t: Tensor, t: Tensor, cond: Conditioning, setting: Setting,
    device: torch.device,
) -> Tensor:  # fmt: skip
    dtype = next(p.dtype for p in denoiser.parameters() if p.is_floating_point())
    return family.predict(denoiser, x_t.to(device, dtype), t.to(device), placed(cond, device, dtype), setting)


def _sampled(pick: Pick, examples: Examples, objective: Objective, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents drawn from the posterior (1, C, h, w), noise (1, C, h, w) and timestep (1,) of one place."""
    generator = torch.Generator().manual_seed(pick.seed)
    posterior = examples.latents[pick.example.key(pick.view)]
    shape = posterior["mean"].shape
    latents = posterior["mean"] + posterior["std"] * torch.randn(shape, generator=generator)
    noise, tokens = torch.randn(shape, generator=generator), shape[-2] * shape[-1] // patch**2
    return latents, noise, objective.sample_timestep(generator, tokens)
