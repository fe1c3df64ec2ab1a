"""Which examples a step is made of, and the loss on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..base.denoiser import Denoiser
from ..base.objective import Objective
from ..data.encode import Encoded
from ..data.photos import Example, View
from ..families import Conditioning, Setting, stack_conditioning
from ..method.inject import delora_disabled
from ..seeds import derived_seed


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
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
    kept = [
        replace(e, caption=c, weight=examples.preservation_weight)
        for e in examples.instances
        for c in examples.preserved
    ]
    groups = (("instance", examples.instances), ("class", examples.classes), ("preserved", kept))
    return [
        [_pick(group, seed, step * count + place, kind) for kind, group in groups if group] for place in range(count)
    ]


def _pick(group: Sequence[Example], seed: int, position: int, kind: str) -> Pick:
    epoch, place = divmod(position, len(group))
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(derived_seed(seed, kind, epoch)))
    example = group[order.tolist()[place]]
    pick_seed = derived_seed(seed, kind, "pick", position)
    return Pick(
        example=example,
        view=example.views[pick_seed % len(example.views)],
        seed=pick_seed,
        preserved=kind == "preserved",
    )


def batch_loss(
    batch: Sequence[Pick],
    examples: Examples,
    denoiser: Denoiser,
    objective: Objective,
    *,
    total_weight: float,
    snr_gamma: float | None = None,
) -> Tensor:
    """The part of a step's loss that falls on `batch`: sum_i weight_i |prediction_i - target_i|^2 / total_weight.

    Pictures of one size go through the denoiser together.

    Args:
        total_weight: summed example weights of the whole step, over all batches and processes.
    """
    sizes = dict.fromkeys(p.view.size for p in batch)
    losses = []
    for size in sizes:
        places = [p for p in batch if p.view.size == size]
        errors, t = _errors(places, examples, denoiser, objective)
        weight = torch.tensor([p.example.weight for p in places]) * objective.snr_weight(t, snr_gamma)
        losses.append((weight.to(errors.device) * errors).sum())
    return torch.stack(losses).sum() / total_weight


def _errors(
    batch: Sequence[Pick], examples: Examples, denoiser: Denoiser, objective: Objective
) -> tuple[Tensor, Tensor]:
    """The errors and timesteps (B,) of pictures of one size. The target of a preserved place is the prediction with
    all adapters disabled."""
    patch = denoiser.family.patch
    latents, noise, t = (
        torch.cat(parts) for parts in zip(*(_sampled(p, examples, objective, patch) for p in batch), strict=True)
    )
    x_t, target = objective.noised(latents, noise, t)
    captions, setting = [p.example.caption for p in batch], Setting(*batch[0].view.size, examples.guidance)
    if examples.conditioning is None:
        cond = examples.encode(captions)
    else:
        cond = stack_conditioning([examples.conditioning[caption] for caption in captions])
    if any(kept := [p.preserved for p in batch]):
        as_base = stack_conditioning([examples.preserved[p.example.caption] for p in batch if p.preserved])
        target = target.to(denoiser.device)
        with torch.no_grad(), delora_disabled(denoiser.module):
            target[kept] = denoiser(x_t[kept], t[kept], as_base, setting)
    return denoiser.errors(x_t, t, cond, setting, target), t


def _sampled(pick: Pick, examples: Examples, objective: Objective, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents drawn from the posterior (1, C, h, w), noise (1, C, h, w) and timestep (1,) of one place."""
    generator = torch.Generator().manual_seed(pick.seed)
    posterior = examples.latents[pick.example.key(pick.view)]
    shape = posterior["mean"].shape
    latents = posterior["mean"] + posterior["std"] * torch.randn(shape, generator=generator)
    noise, tokens = torch.randn(shape, generator=generator), shape[-2] * shape[-1] // patch**2
    return latents, noise, objective.sample_timestep(generator, tokens)
