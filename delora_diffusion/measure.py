"""Batches of images against photos: embed each image once, score, give every mean its interval."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .data import load_image
from .encoders import BATCH, EncoderError, ImageEncoder, embed_images, embed_texts, load_encoder
from .evaluation_config import MeasuringConfig
from .metrics import bootstrap, diversity_scores, drift_scores, fidelity_scores, prompt_scores, real_scores
from .pictures import Batch, by_prompt
from .prompts import without_token
from .report import Figure, Row

LEVEL, ROUNDS, SEED = 0.95, 1000, 0  # of the bootstrap
#: Encoder -> the column of its likeness scores.
LIKENESS = {"dino": "dino", "clip": "clip_i"}
Distance = Callable[[Sequence[Image.Image]], float]
Embeddings = Mapping[Path, Tensor]


@dataclass(frozen=True)
class Judges:
    """What images are judged with, in memory."""

    encoders: dict[str, ImageEncoder]  # by column: "dino", "clip"
    lpips: Distance | None
    token: str

    @property
    def main(self) -> str:
        """The encoder of drift and diversity."""
        return "dino" if "dino" in self.encoders else "clip"


def load_judges(config: MeasuringConfig, *, device: str | torch.device) -> Judges:
    """Load the encoders that `config` names.

    Raises:
        EncoderError: one cannot be loaded, is of the other kind, or lpips is not installed.
    """
    lpips = _lpips(device) if config.lpips else None
    encoders = {}
    for kind, source in (("dino", config.dino), ("clip", config.clip)):
        if source:
            encoders[kind] = load_encoder(source, device=device)
            if encoders[kind].kind != kind:
                raise EncoderError(
                    f"--{kind} {source} is a {type(encoders[kind].model).__name__}; give it as --{encoders[kind].kind}"
                )
    return Judges(encoders, lpips, config.trigger_token)


def measure(judges: Judges, batches: Sequence[Batch], *, real: Sequence[Path], holdout: Sequence[Path]) -> list[Row]:
    """The table: what the photos themselves score, then a row for each batch.

    Args:
        real: the photos that the subject was taught from.
        holdout: photos of it that training never saw; may be none.
    """
    drawn = [p.path for batch in batches for p in [*batch.pictures, *(p for pair in batch.pairs for p in pair)]]
    embedded = {
        kind: embed_files(encoder, [*real, *holdout, *drawn]) for kind, encoder in judges.encoders.items()
    }  # fmt: skip
    photos = {"": list(real), **({"_holdout": list(holdout)} if holdout else {})}
    rows = [_photo_row("training photos", photos[""], photos, embedded)]
    if holdout:
        rows.append(_photo_row("held-out photos", photos["_holdout"], photos, embedded))
    return rows + [_batch_row(judges, batch, photos, embedded) for batch in batches]


def embed_files(encoder: ImageEncoder, paths: Iterable[Path]) -> dict[Path, Tensor]:
    """Unit embedding (d,) of each image file, `BATCH` of them in memory at once."""
    unique = list(dict.fromkeys(paths))
    rows: dict[Path, Tensor] = {}
    for first in range(0, len(unique), BATCH):
        part = unique[first : first + BATCH]
        rows.update(zip(part, embed_images(encoder, [load_image(path) for path in part]), strict=True))
    return rows


def protocol_of(judges: Judges, *, real: Sequence[Path], holdout: Sequence[Path]) -> dict[str, Any]:
    """All that the numbers depend on besides the images."""
    kind = judges.main.upper()
    told: dict[str, Any] = {f"{name.upper()} encoder": encoder.protocol for name, encoder in judges.encoders.items()}
    told |= {
        "DINO, CLIP-I": "mean cosine of every generated image with every photo",
        "CLIP-T": f"mean cosine of an image with its own prompt, read without {judges.token!r}",
        "drift": f"mean of (1 - cos) / 2 of the base's and the adapted image, {kind}; same unrelated prompt and seed",
        "diversity": f"mean of 1 - cos over the pairs of images of one prompt, {kind}; mean over prompts",
        "intervals": f"{LEVEL:.0%} bootstrap of the mean, {ROUNDS} rounds, seed {SEED}, whole prompts are drawn "
        "(single images where there are fewer than two prompts); the photos are fixed",
        "training photos": {"folder": str(real[0].parent), "count": len(real), "sha256": content_hash(real)},
    }
    if judges.lpips:
        told["LPIPS diversity"] = "mean LPIPS (AlexNet, v0.1) over the pairs of images of one prompt"
    if holdout:
        where = str(holdout[0].parent)
        told["held-out photos"] = {"folder": where, "count": len(holdout), "sha256": content_hash(holdout)}
    return told


def content_hash(paths: Iterable[Path]) -> str:
    """Hash of the files' bytes, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _photo_row(
    name: str, own: Sequence[Path], photos: Mapping[str, Sequence[Path]], embedded: Mapping[str, Embeddings]
) -> Row:
    """What photos score against each set of photos; against their own set, each without itself."""
    figures = {}
    for kind, rows in embedded.items():
        mine = _stack(rows, own)
        for suffix, others in photos.items():
            if others is not own:
                figures[LIKENESS[kind] + suffix] = _figure(fidelity_scores(mine, _stack(rows, others)))
            elif len(own) > 1:
                figures[LIKENESS[kind] + suffix] = _figure(real_scores(mine))
    return Row(name, None, len(own), figures)


def _batch_row(
    judges: Judges, batch: Batch, photos: Mapping[str, Sequence[Path]], embedded: Mapping[str, Embeddings]
) -> Row:
    paths = [picture.path for picture in batch.pictures]
    prompts = [picture.prompt for picture in batch.pictures]
    figures = {}
    for kind, rows in embedded.items():
        for suffix, real in photos.items():
            scores = fidelity_scores(_stack(rows, paths), _stack(rows, real))
            figures[LIKENESS[kind] + suffix] = _figure(scores, prompts)
    if "clip" in embedded and None not in prompts:
        texts = [without_token(str(prompt), judges.token) for prompt in prompts]
        said = embed_texts(judges.encoders["clip"], list(dict.fromkeys(texts)))
        places = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        scores = prompt_scores(_stack(embedded["clip"], paths), said[[places[text] for text in texts]])
        figures["clip_t"] = _figure(scores, prompts)
    main = embedded[judges.main]
    if batch.pairs:
        base, adapted = (_stack(main, [pair[side].path for pair in batch.pairs]) for side in (0, 1))
        figures["drift"] = _figure(drift_scores(base, adapted), [pair[0].prompt for pair in batch.pairs])
    several = [group for group in by_prompt(batch.pictures) if len(group) > 1]
    if several:
        figures["diversity"] = _figure(diversity_scores([_stack(main, [p.path for p in group]) for group in several]))
    if several and judges.lpips:
        distances = [judges.lpips([load_image(picture.path) for picture in group]) for group in several]
        figures["lpips"] = _figure(torch.tensor(distances))
    return Row(batch.name, batch.strength, len(paths), figures)


def _figure(scores: Tensor, prompts: Sequence[str | None] | None = None) -> Figure:
    """Mean and interval; whole prompts are resampled, or single scores where there are fewer than two prompts."""
    groups = prompts if prompts is not None and len(set(prompts)) > 1 else None
    low, high = bootstrap(scores, seed=SEED, groups=groups, level=LEVEL, rounds=ROUNDS)
    return Figure(float(scores.mean()), low, high, len(scores))


def _stack(rows: Embeddings, paths: Sequence[Path]) -> Tensor:
    return torch.stack([rows[path] for path in paths])


def _lpips(device: str | torch.device) -> Distance:
    """Mean LPIPS over the distinct pairs of images of one size (Zhang et al. 2018, AlexNet)."""
    try:
        import lpips
    except ImportError as error:
        raise EncoderError('--lpips needs the extra lpips: pip install "delora_diffusion[lpips]"') from error
    import numpy as np

    network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()

    @torch.no_grad()
    def distance(images: Sequence[Image.Image]) -> float:
        x = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        x = (x.float() / 127.5 - 1).to(device)
        i, j = torch.triu_indices(len(x), len(x), offset=1)
        return float(torch.stack([network(x[a : a + 1], x[b : b + 1]) for a, b in zip(i, j, strict=True)]).mean())

    return distance
