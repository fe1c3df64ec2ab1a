"""Which examples a step is made of, and the loss on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
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
    guidance-distilled model is trained at. `caption_dropout` is the share of places without a caption, and
    `unmasked_weight` what counts of what a mask leaves out.
    """

    instances: Sequence[Example]
    classes: Sequence[Example]
    latents: Mapping[str, Encoded]
    conditioning: Mapping[str, Conditioning] | None
    encode: Callable[[Sequence[str]], Conditioning]
    preserved: Mapping[str, Conditioning] = field(default_factory=dict)
    preservation_weight: float = 1.0
    guidance: float = 3.5
    caption_dropout: float = 0.0
    unmasked_weight: float = 0.0

    @cached_property
    def rings(self) -> dict[str, list[Example]]:
        """What a place of a batch is taken from, each example as often as it comes in a pass."""
        kept = [
            replace(e, caption=str(e.class_prompt), orders=(), mask=None, weight=self.preservation_weight)
            for e in self.instances
            if e.class_prompt in self.preserved
        ]
        groups: dict[str, Sequence[Example]] = {"instance": self.instances, "class": self.classes, "preserved": kept}
        return {kind: [e for e in group for _ in range(e.repeats)] for kind, group in groups.items()}


@dataclass(frozen=True, kw_only=True)
class Pick:
    """One place of a batch: an example, the view of it, its caption, and the seed of its noise.

    With `preserved`, the target is what the base predicts for the caption, which is one of `Examples.preserved` and
    need not describe the image.
    """

    example: Example
    view: View
    caption: str
    seed: int
    preserved: bool = False


def picks(examples: Examples, *, seed: int, step: int, count: int) -> list[list[Pick]]:
    """The batch of an optimiser step, over all processes: `count` places, each a photo; with the prior, a class image;
    with base preservation, a photo under a preserved prompt. Photos come in a new random order in every pass."""
    return [
        [_pick(examples, kind, seed, step * count + place) for kind, ring in examples.rings.items() if ring]
        for place in range(count)
    ]


def _pick(examples: Examples, kind: str, seed: int, position: int) -> Pick:
    ring = examples.rings[kind]
    epoch, place = divmod(position, len(ring))
    example = ring[int(_order(len(ring), derived_seed(seed, kind, epoch))[place])]
    pick_seed = derived_seed(seed, kind, "pick", position)
    dropout = 0.0 if kind == "preserved" else examples.caption_dropout
    return Pick(
        example=example,
        view=example.views[pick_seed % len(example.views)],
        caption=_caption(example, derived_seed(seed, kind, "caption", position), dropout),
        seed=pick_seed,
        preserved=kind == "preserved",
    )


@lru_cache(maxsize=8)
def _order(count: int, seed: int) -> np.ndarray:
    """The order of a pass, kept for as long as it lasts."""
    order: np.ndarray = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    return order


def _caption(example: Example, seed: int, dropout: float) -> str:
    """One of the example's captions, or, for a share of seeds, none."""
    if dropout and torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() < dropout:
        return ""
    return example.captions[seed % len(example.captions)]


def batch_loss(
    batch: Sequence[Pick],
    examples: Examples,
    denoiser: Denoiser,
    objective: Objective,
    *,
    total_weight: float,
    snr_gamma: float | None = None,
    passes: tuple[int, int] = (0, 0),
) -> Tensor:
    """The part of a step's loss that falls on `batch`: sum_i weight_i |prediction_i - target_i|^2 / total_weight.

    Pictures of one size go through the denoiser together.

    Args:
        total_weight: summed example weights of the whole step, over all batches and processes.
        passes: how many forward passes to run at least, of the adapted model and of the base: as `passes_of` counts
            them. Further ones are of one picture and add nothing to the loss.
    """
    sizes = dict.fromkeys(p.view.size for p in batch)
    losses = []
    for size in sizes:
        places = [p for p in batch if p.view.size == size]
        errors, t = _errors(places, examples, denoiser, objective)
        weight = torch.tensor([p.example.weight for p in places]) * objective.snr_weight(t, snr_gamma)
        losses.append((weight.to(errors.device) * errors).sum())
    adapted, of_base = passes_of(batch)
    for _ in range(adapted, passes[0]):
        losses.append(_errors(batch[:1], examples, denoiser, objective)[0].sum() * 0)
    for _ in range(of_base, passes[1]):
        with torch.no_grad():
            _errors(batch[:1], examples, denoiser, objective)
    return torch.stack(losses).sum() / total_weight


def passes_of(batch: Sequence[Pick]) -> tuple[int, int]:
    """How many forward passes a batch takes: of the adapted model, and of the base for what is preserved."""
    return len({p.view.size for p in batch}), len({p.view.size for p in batch if p.preserved})


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
    captions, setting = [p.caption for p in batch], Setting(*batch[0].view.size, examples.guidance)
    if examples.conditioning is None:
        cond = examples.encode(captions)
    else:
        cond = stack_conditioning([examples.conditioning[caption] for caption in captions])
    if any(kept := [p.preserved for p in batch]):
        as_base = stack_conditioning([examples.preserved[p.caption] for p in batch if p.preserved])
        target = target.to(denoiser.device)
        with torch.no_grad(), delora_disabled(denoiser.module):
            target[kept] = denoiser(x_t[kept], t[kept], as_base, setting)
    return denoiser.errors(x_t, t, cond, setting, target, mask=_mask(batch, examples)), t


def _mask(batch: Sequence[Pick], examples: Examples) -> Tensor | None:
    """What each place of the latents weighs (B, 1, h, w); None where nothing is masked."""
    if all(p.example.mask is None for p in batch):
        return None
    cached = [examples.latents[p.example.key(p.view)] for p in batch]
    masks = [one["mask"] if "mask" in one else torch.ones_like(one["mean"][:, :1]) for one in cached]
    least = examples.unmasked_weight
    return least + (1 - least) * torch.cat(masks)


def _sampled(pick: Pick, examples: Examples, objective: Objective, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents drawn from the posterior (1, C, h, w), noise (1, C, h, w) and timestep (1,) of one place."""
    generator = torch.Generator().manual_seed(pick.seed)
    posterior = examples.latents[pick.example.key(pick.view)]
    shape = posterior["mean"].shape
    latents = posterior["mean"] + posterior["std"] * torch.randn(shape, generator=generator)
    noise, tokens = torch.randn(shape, generator=generator), shape[-2] * shape[-1] // patch**2
    return latents, noise, objective.sample_timestep(generator, tokens)
