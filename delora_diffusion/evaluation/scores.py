"""The metrics: from images as encoders see them, against photos, prompts and the base, to scores.

To add one: its formula in `metrics.py`, and an entry in `METRICS`. Tables, plots, the log and the card follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..reports.table import Metric
from .metrics import diversity_scores, drift_scores, fidelity_scores, prompt_scores, real_scores

TRAINING, HOLDOUT = "", "held-out"  # the sets of photos
Distance = Callable[[Sequence[Image.Image]], float]
#: {encoder: unit embeddings (n, d), a row for each image}
Embedded = Mapping[str, Tensor]
#: A score for each image or prompt, and the prompts they are of, by which they are resampled; None: each by itself.
Scores = tuple[Tensor, Sequence[str | None] | None]


# ---- what is seen --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Images, and what they are held against, as the encoders see them.

    Attributes:
        prompts: of each image; None where it is not known.
        photos: of the subject, by set.
        main: the encoder of drift and diversity.
        itself: the set of photos that the images are, if they are one.
        texts: (n, d) of the prompts without the rare word; None without a CLIP, or where a prompt is not known.
        captions: of the held-out photos, where they have some.
        pairs: what the base and what the adapter drew for the same unrelated prompts and seeds, and these prompts.
        pictures: opens the images of these places.
        lpips: of the pictures of one prompt.
    """

    images: Embedded
    prompts: Sequence[str | None]
    photos: Mapping[str, Embedded]
    main: str
    itself: str | None = None
    texts: Tensor | None = None
    captions: Sequence[str] = ()
    pairs: tuple[Tensor, Tensor, Sequence[str | None]] | None = None
    pictures: Callable[[Sequence[int]], list[Image.Image]] | None = None
    lpips: Distance | None = None

    def by_prompt(self) -> list[list[int]]:
        """Places of the images of each prompt that has two or more."""
        groups: dict[str, list[int]] = {}
        for place, prompt in enumerate(self.prompts):
            if prompt is not None:
                groups.setdefault(prompt, []).append(place)
        return [group for group in groups.values() if len(group) > 1]


def _likeness(encoder: str, photos: str) -> Callable[[Seen], Scores | None]:
    def scores(seen: Seen) -> Scores | None:
        if encoder not in seen.images or photos not in seen.photos:
            return None
        rows = seen.images[encoder]
        if seen.itself == photos:
            return (real_scores(rows), None) if len(rows) > 1 else None
        prompts = seen.prompts if seen.itself is None else None
        return fidelity_scores(rows, seen.photos[photos][encoder]), prompts

    return scores


def _paired(seen: Seen) -> Scores | None:
    """Likeness of each image to the photos whose caption is its prompt: PEFT's benchmark pairs them so."""
    if "dino" not in seen.images or seen.itself is not None:
        return None
    scores, prompts = [], []
    for row, prompt in zip(seen.images["dino"], seen.prompts, strict=True):
        alike = [place for place, caption in enumerate(seen.captions) if caption == prompt]
        if alike:
            scores.append(fidelity_scores(row[None], seen.photos[HOLDOUT]["dino"][alike]))
            prompts.append(prompt)
    return (torch.cat(scores), prompts) if scores else None


def _prompt_following(seen: Seen) -> Scores | None:
    return None if seen.texts is None else (prompt_scores(seen.images["clip"], seen.texts), seen.prompts)


def _drift(seen: Seen) -> Scores | None:
    return None if seen.pairs is None else (drift_scores(*seen.pairs[:2]), seen.pairs[2])


def _diversity(seen: Seen) -> Scores | None:
    groups = [] if seen.itself is not None else seen.by_prompt()
    return (diversity_scores([seen.images[seen.main][group] for group in groups]), None) if groups else None


def _lpips_diversity(seen: Seen) -> Scores | None:
    groups = [] if seen.itself is not None else seen.by_prompt()
    if not groups or seen.lpips is None or seen.pictures is None:
        return None
    return torch.tensor([seen.lpips(seen.pictures(group)) for group in groups]), None


_TO_PHOTOS = "DINO, CLIP-I: likeness to the photos, up to 1"
METRICS = (
    Metric(name="dino", title="DINO", meaning=_TO_PHOTOS, panel="fidelity", scores=_likeness("dino", TRAINING)),
    Metric(
        name="dino_holdout", title="DINO, held-out", meaning=_TO_PHOTOS, panel="fidelity", brief=False,
        scores=_likeness("dino", HOLDOUT),
    ),
    Metric(
        name="dino_paired", title="DINO, same caption", meaning="likeness to the photo with the prompt as its caption",
        scores=_paired,
    ),
    Metric(name="clip_i", title="CLIP-I", meaning=_TO_PHOTOS, panel="fidelity", scores=_likeness("clip", TRAINING)),
    Metric(
        name="clip_i_holdout", title="CLIP-I, held-out", meaning=_TO_PHOTOS, panel="fidelity", brief=False,
        scores=_likeness("clip", HOLDOUT),
    ),
    Metric(
        name="clip_t", title="CLIP-T", meaning="CLIP-T: likeness to the prompt, to compare rows by",
        panel="prompt following", scores=_prompt_following,
    ),
    Metric(
        name="drift", title="drift", meaning="drift: how far pictures of other things have changed, 0 is not at all",
        panel="drift", higher_is_better=False, scores=_drift,
    ),
    Metric(
        name="diversity", title="diversity", meaning="diversity: how much pictures of one prompt differ",
        scores=_diversity,
    ),
    Metric(
        name="lpips", title="LPIPS diversity", meaning="the same, by LPIPS",
        scores=_lpips_diversity,
    ),
)  # fmt: skip
METRIC = {metric.name: metric for metric in METRICS}
