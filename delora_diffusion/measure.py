"""Batches of images against photos: embed each image once, score, give every mean its interval."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .data import load_image
from .encoders import BATCH, EncoderError, ImageEncoder, embed_images, embed_texts, load_encoder
from .evaluation_config import MeasuringConfig
from .metrics import bootstrap, diversity_scores, drift_scores, fidelity_scores, prompt_scores, real_scores
from .pictures import Batch, Photos, by_prompt
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


def measure(judges: Judges, batches: Sequence[Batch], *, real: Photos, holdout: Photos | None) -> list[Row]:
    """The table: what the photos themselves score, then a row for each batch.

    Args:
        real: the photos that the subject was taught from.
        holdout: photos of it that training never saw, if there are any.
    """
    photos = {"": real} if holdout is None else {"": real, "_holdout": holdout}
    paths = [path for some in photos.values() for path in some.paths]
    for batch in batches:
        paths += [picture.path for picture in [*batch.pictures, *(p for pair in batch.pairs for p in pair)]]
    embedded = {kind: embed_files(encoder, paths) for kind, encoder in judges.encoders.items()}
    names = {"": "training photos", "_holdout": "held-out photos"}
    rows = [_photo_row(judges, names[suffix], own, photos, embedded) for suffix, own in photos.items()]
    return rows + [_batch_row(judges, batch, photos, embedded) for batch in batches]


def embed_files(encoder: ImageEncoder, paths: Iterable[Path]) -> dict[Path, Tensor]:
    """Unit embedding (d,) of each image file, `BATCH` of them in memory at once."""
    unique = list(dict.fromkeys(paths))
    rows: dict[Path, Tensor] = {}
    for first in range(0, len(unique), BATCH):
        part = unique[first : first + BATCH]
        rows.update(zip(part, embed_images(encoder, [load_image(path) for path in part]), strict=True))
    return rows


def protocol_of(judges: Judges, *, real: Photos, holdout: Photos | None) -> dict[str, Any]:
    """All that the numbers depend on besides the images."""
    kind = judges.main.upper()
    told: dict[str, Any] = {f"{name.upper()} encoder": encoder.protocol for name, encoder in judges.encoders.items()}
    likeness = " and ".join({"dino": "DINO", "clip": "CLIP-I"}[name] for name in judges.encoders)
    told[likeness] = "mean cosine of every generated image with every photo"
    if "clip" in judges.encoders:
        told["CLIP-T"] = f"mean cosine of an image with its own prompt, read without {judges.token!r}"
    told |= {
        "drift": f"mean of (1 - cos) / 2 of the base's and the adapted image, {kind}; same unrelated prompt and seed",
        "diversity": f"mean of 1 - cos over the pairs of images of one prompt, {kind}; mean over prompts",
        "intervals": f"{LEVEL:.0%} bootstrap of the mean, {ROUNDS} rounds, seed {SEED}, whole prompts are drawn "
        "(single images where there are fewer than two prompts); the photos are fixed",
        "measured with": {name: version(name) for name in ("torch", "transformers", "pillow")},
        "training photos": _told(real),
    }
    if judges.lpips:
        told["LPIPS diversity"] = "mean LPIPS (AlexNet, v0.1) over the pairs of images of one prompt"
    if holdout:
        told["held-out photos"] = _told(holdout)
        if holdout.captions:
            told["DINO, same caption"] = "mean cosine of an image with the held-out photo whose caption is its prompt"
    return told


def _told(photos: Photos) -> dict[str, Any]:
    where = str(photos.paths[0].parent)
    return {"folder": where, "count": len(photos.paths), "sha256": content_hash(photos.paths)}


def content_hash(paths: Iterable[Path]) -> str:
    """Hash of the files' bytes, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _photo_row(
    judges: Judges, name: str, own: Photos, photos: Mapping[str, Photos], embedded: Mapping[str, Embeddings]
) -> Row:
    """What photos score against each set of photos; against their own set, each without itself."""
    figures = {}
    for kind, rows in embedded.items():
        mine = _stack(rows, own.paths)
        for suffix, others in photos.items():
            if others is not own:
                figures[LIKENESS[kind] + suffix] = _figure(fidelity_scores(mine, _stack(rows, others.paths)))
            elif len(own.paths) > 1:
                figures[LIKENESS[kind] + suffix] = _figure(real_scores(mine))
    if own.captions:
        figures |= _prompt_figure(judges, own.paths, [own.captions[path] for path in own.paths], embedded)
    return Row(name, None, len(own.paths), figures)


def _batch_row(judges: Judges, batch: Batch, photos: Mapping[str, Photos], embedded: Mapping[str, Embeddings]) -> Row:
    paths = [picture.path for picture in batch.pictures]
    prompts = [picture.prompt for picture in batch.pictures]
    figures = {}
    for kind, rows in embedded.items():
        for suffix, real in photos.items():
            scores = fidelity_scores(_stack(rows, paths), _stack(rows, real.paths))
            figures[LIKENESS[kind] + suffix] = _figure(scores, prompts)
    if "dino" in embedded and "_holdout" in photos:
        figures |= _caption_figure(batch, photos["_holdout"], embedded["dino"])
    if None not in prompts:
        figures |= _prompt_figure(judges, paths, [str(prompt) for prompt in prompts], embedded)
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


def _prompt_figure(
    judges: Judges, paths: Sequence[Path], prompts: Sequence[str], embedded: Mapping[str, Embeddings]
) -> dict[str, Figure]:
    """CLIP-T, if there is a CLIP."""
    if "clip" not in embedded:
        return {}
    texts = [without_token(prompt, judges.token) for prompt in prompts]
    unique = list(dict.fromkeys(texts))
    said = dict(zip(unique, embed_texts(judges.encoders["clip"], unique), strict=True))
    scores = prompt_scores(_stack(embedded["clip"], paths), torch.stack([said[text] for text in texts]))
    return {"clip_t": _figure(scores, prompts)}


def _caption_figure(batch: Batch, holdout: Photos, rows: Embeddings) -> dict[str, Figure]:
    """Likeness of each image to the photos whose caption is its prompt: PEFT's benchmark pairs them so."""
    scores, prompts = [], []
    for picture in batch.pictures:
        alike = [path for path, caption in holdout.captions.items() if caption == picture.prompt]
        if alike:
            scores.append(fidelity_scores(rows[picture.path][None], _stack(rows, alike)))
            prompts.append(picture.prompt)
    return {"dino_paired": _figure(torch.cat(scores), prompts)} if scores else {}


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

        network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    except ImportError as error:
        raise EncoderError(
            '--lpips needs the extra lpips, which brings torchvision: pip install "delora_diffusion[lpips]"'
        ) from error
    except (OSError, RuntimeError) as error:  # no network; a torchvision built for another torch
        raise EncoderError(
            f"--lpips: {str(error).strip().splitlines()[0]}. It needs a torchvision that fits torch "
            f"{torch.__version__}, and AlexNet's weights, which torchvision downloads once into "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error
    import numpy as np

    @torch.no_grad()
    def distance(images: Sequence[Image.Image]) -> float:
        x = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        x = (x.float() / 127.5 - 1).to(device)
        i, j = torch.triu_indices(len(x), len(x), offset=1)
        return float(torch.stack([network(x[a : a + 1], x[b : b + 1]) for a, b in zip(i, j, strict=True)]).mean())

    return distance
