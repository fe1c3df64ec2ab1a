"""The measures of DreamBooth's evaluation, as functions of unit embeddings (`encoders.py` makes those).

Rows have unit length, so an inner product is a cosine. Fidelity and prompt following: DreamBooth (arXiv 2208.12242,
section 4.1); drift: PEFT's image-generation benchmark. All results are fp32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..errors import DeloraError


class MetricError(DeloraError):
    """Embeddings that a measure is not defined for; the message says what was asked, what was found, what to do."""


def fidelity_scores(generated: Tensor, real: Tensor) -> Tensor:
    """How much each image looks like the subject: s_i = 1/m sum_j cos(g_i, r_j).

    With DINO embeddings this is DreamBench's DINO score, with CLIP's its CLIP-I.

    Args:
        generated: (n, d). real: (m, d).

    Returns:
        (n,) in -1 .. 1.
    """
    _some(generated=generated, real=real)
    return (generated.float() @ real.float().T).mean(-1)


def real_scores(real: Tensor) -> Tensor:
    """How much each photo looks like the others: s_i = 1/(m-1) sum_{j != i} cos(r_i, r_j), of (m, d).

    Returns:
        (m,); NaN for a single photo.
    """
    _some(real=real)
    cosines = (real.float() @ real.float().T).fill_diagonal_(0)
    return cosines.sum(-1) / (len(real) - 1)


def prompt_scores(images: Tensor, texts: Tensor) -> Tensor:
    """How much each image shows what its prompt says: s_i = cos(x_i, y_i), CLIP-T.

    Args:
        images: (n, d). texts: (n, d), the prompt of each image, without the subject's rare word.

    Returns:
        (n,) in -1 .. 1.
    """
    _paired(images=images, texts=texts)
    return (images.float() * texts.float()).sum(-1)


def drift_scores(base: Tensor, adapted: Tensor) -> Tensor:
    """How far each image has moved from the base model's for the same prompt and seed: (1 - cos(b_i, a_i)) / 2.

    Args:
        base: (n, d). adapted: (n, d), row for row the same prompt and seed.

    Returns:
        (n,) in 0 .. 1; 0 where the adapter changed nothing.
    """
    _paired(base=base, adapted=adapted)
    return (1 - (base.float() * adapted.float()).sum(-1)) / 2


def diversity_scores(groups: Sequence[Tensor]) -> Tensor:
    """How much the images of one prompt differ: mean of 1 - cos over their distinct pairs.

    Args:
        groups: one (k, d) for each prompt; k may differ.

    Returns:
        (number of prompts,) in 0 .. 2; NaN for a prompt with a single image.
    """
    return torch.stack([1 - _distinct_pairs(group).mean() for group in groups]) if groups else torch.empty(0)


def bootstrap(
    values: Tensor | Sequence[float],
    *,
    seed: int,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    rounds: int = 1000,
) -> tuple[float, float]:
    """Percentile interval of the mean under resampling (Efron 1979).

    Images of one prompt are alike, so resampling them one by one gives intervals that are too narrow: with `groups`
    whole groups are drawn with replacement (cluster bootstrap).

    Args:
        values: (n,) scores; NaN are left out.
        seed: of the generator; the interval is a function of it.
        groups: a group for each value, e.g. its prompt; None: every value by itself.
        level: share of the resampled means within the interval.
        rounds: number of resamples.

    Returns:
        (low, high); NaN if there is no value.
    """
    numbers = torch.as_tensor(values, dtype=torch.float64).flatten()
    names = list(range(len(numbers))) if groups is None else list(groups)
    if len(names) != len(numbers):
        raise MetricError(f"{len(names)} groups for {len(numbers)} values; give one for each")
    known = ~numbers.isnan()
    if not known.any():
        return float("nan"), float("nan")
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    member = torch.tensor([order[name] for name in names])[known]
    sums = torch.zeros(len(order), dtype=torch.float64).index_add_(0, member, numbers[known])
    counts = torch.bincount(member, minlength=len(order))
    sums, counts = sums[counts > 0], counts[counts > 0]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(sums), (rounds, len(sums)), generator=generator)
    means = sums[drawn].sum(-1) / counts[drawn].sum(-1)
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def _distinct_pairs(rows: Tensor) -> Tensor:
    """Cosines of the pairs i < j, (k (k - 1) / 2,)."""
    i, j = torch.triu_indices(len(rows), len(rows), offset=1)
    return (rows.float()[i] * rows.float()[j]).sum(-1)


def _some(**embeddings: Tensor) -> None:
    for name, rows in embeddings.items():
        if rows.ndim != 2 or not len(rows):
            raise MetricError(f"{name} has the shape {tuple(rows.shape)}; it must hold one embedding a row, and one")
    if len({rows.shape[-1] for rows in embeddings.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(rows.shape)}" for name, rows in embeddings.items())
        raise MetricError(f"embeddings of different widths: {shapes}; embed both with one encoder")


def _paired(**embeddings: Tensor) -> None:
    _some(**embeddings)
    if len({len(rows) for rows in embeddings.values()}) > 1:
        shapes = " and ".join(f"{len(rows)} {name}" for name, rows in embeddings.items())
        raise MetricError(f"{shapes} cannot be paired; give the same number of each, in the same order")
