"""The scorer: encoders in memory, and the figures of previews and of tables that they give."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.image_files import load_image
from ..data.prompts import has_token, without_token
from ..reports.table import Figure, Row
from .encoders import BATCH, EncoderError, ImageEncoder, embed_images, embed_texts, load_encoder
from .images import Batch, Photos
from .metrics import bootstrap
from .scores import HOLDOUT, METRIC, METRICS, TRAINING, Distance, Embedded, Scores, Seen

LEVEL, ROUNDS, SEED = 0.95, 1000, 0  # of the bootstrap


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Encoders in memory, and the photos as they see them.

    Attributes:
        encoders: by column: "dino", "clip".
        token: the subject's rare word.
        photos: of the subject, by set.
        captions: of the held-out photos.
    """

    encoders: dict[str, ImageEncoder]
    token: str
    lpips: Distance | None = None
    photos: Mapping[str, Embedded] = field(default_factory=dict)
    captions: Sequence[str] = ()

    @property
    def main(self) -> str:
        """The encoder of drift and diversity."""
        return "dino" if "dino" in self.encoders else "clip"

    def embed(self, images: Sequence[Image.Image]) -> Embedded:
        """Images in memory, as the encoders see them."""
        return {kind: embed_images(encoder, images) for kind, encoder in self.encoders.items()}

    def embed_files(self, paths: Iterable[Path]) -> dict[str, dict[Path, Tensor]]:
        """{encoder: {file: unit embedding (d,)}}, each file seen once, `BATCH` of them in memory together."""
        unique = list(dict.fromkeys(paths))
        rows: dict[str, dict[Path, Tensor]] = {kind: {} for kind in self.encoders}
        for first in range(0, len(unique), BATCH):
            part = unique[first : first + BATCH]
            for kind, embedded in self.embed([load_image(path) for path in part]).items():
                rows[kind].update(zip(part, embedded, strict=True))
        return rows

    def scores(self, images: Embedded, prompts: Sequence[str | None], **more: Any) -> dict[str, Scores]:
        """The scores of every metric that these images have what it takes for; `more` are fields of `Seen`."""
        texts = None
        if "clip" in self.encoders and None not in prompts:
            said = [without_token(str(prompt), self.token) for prompt in prompts]
            unique = list(dict.fromkeys(said))
            rows = dict(zip(unique, embed_texts(self.encoders["clip"], unique), strict=True)) if unique else {}
            texts = torch.stack([rows[text] for text in said]) if said else None
        seen = Seen(
            images=images,
            prompts=prompts,
            photos=self.photos,
            main=self.main,
            texts=texts,
            captions=self.captions,
            lpips=self.lpips,
            **more,
        )
        found = {metric.name: metric.scores(seen) for metric in METRICS}
        return {name: scores for name, scores in found.items() if scores is not None}


def load_scorer(
    *, dino: str | None, clip: str | None, token: str, device: str | torch.device, lpips: bool = False
) -> Scorer:
    """Load the encoders that are named.

    Raises:
        EncoderError: one cannot be loaded, is of the other kind, or lpips is not installed.
    """
    distance = _lpips(device) if lpips else None
    encoders = {}
    for kind, source in (("dino", dino), ("clip", clip)):
        if source:
            encoders[kind] = load_encoder(source, device=device)
            if encoders[kind].kind != kind:
                raise EncoderError(
                    f"{source} is a {type(encoders[kind].model).__name__}, given as {kind}; give it as "
                    f"{encoders[kind].kind}"
                )
    return Scorer(encoders=encoders, token=token, lpips=distance)


def content_hash(paths: Iterable[Path]) -> str:
    """Hash of the files' bytes, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


# ---- previews: means -----------------------------------------------------------------------------


def with_photos(scorer: Scorer, real: Sequence[Path], holdout: Sequence[Path] = ()) -> Scorer:
    """The scorer with the photos that the subject is taught from, and those that are kept from training."""
    sets = {TRAINING: real, **({HOLDOUT: holdout} if holdout else {})}
    return replace(scorer, photos={name: scorer.embed([load_image(p) for p in paths]) for name, paths in sets.items()})


def preview_figures(
    scorer: Scorer,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    unrelated: Sequence[Image.Image],
    base: Sequence[Image.Image],
) -> dict[str, float]:
    """The means of the metrics that previews are measured by, each rounded to six digits.

    Args:
        images: pictures drawn. prompts: the prompt of each; pictures whose prompt has no rare word are not of the
            subject, and not measured.
        unrelated: pictures for unrelated prompts. base: the base model's for the same prompts and seeds; may be none.
    """
    asked = [place for place, prompt in enumerate(prompts) if has_token(prompt, scorer.token)]
    pairs = None
    if unrelated:
        before, after = (embed_images(scorer.encoders[scorer.main], drawn) for drawn in (base, unrelated))
        pairs = before, after, [None] * len(after)
    embedded = scorer.embed([images[place] for place in asked])
    return _means(scorer.scores(embedded, [prompts[place] for place in asked], pairs=pairs))


def photo_figures(scorer: Scorer, captions: Sequence[str]) -> dict[str, float]:
    """What the photos the subject is taught from score themselves, to read the figures of previews by: against one
    another, against the held-out ones, and with their captions, read without the rare word.

    Args:
        captions: the caption of each photo.
    """
    return _means(scorer.scores(scorer.photos[TRAINING], captions, itself=TRAINING))


def _means(scores: Mapping[str, Scores]) -> dict[str, float]:
    of_previews = {name: values for name, (values, _) in scores.items() if METRIC[name].panel is not None}
    return {name: round(float(values.mean()), 6) + 0.0 for name, values in of_previews.items()}  # + 0.0: no -0.0


# ---- tables: means with intervals ----------------------------------------------------------------


def measure(scorer: Scorer, batches: Sequence[Batch], *, real: Photos, holdout: Photos | None) -> list[Row]:
    """The table: what the photos themselves score, then a row for each batch. Every file is seen once.

    Args:
        real: the photos that the subject was taught from.
        holdout: photos of it that training never saw, if there are any.
    """
    photos = {TRAINING: real} if holdout is None else {TRAINING: real, HOLDOUT: holdout}
    paths = [path for some in photos.values() for path in some.paths]
    for batch in batches:
        paths += [picture.path for picture in [*batch.pictures, *(p for pair in batch.pairs for p in pair)]]
    rows = scorer.embed_files(paths)

    def seen(files: Sequence[Path]) -> Embedded:
        return {kind: torch.stack([found[path] for path in files]) for kind, found in rows.items()}

    captions = [holdout.captions.get(path, "") for path in holdout.paths] if holdout and holdout.captions else []
    scorer = replace(scorer, photos={name: seen(some.paths) for name, some in photos.items()}, captions=captions)
    table = []
    for name, some in photos.items():
        prompts: list[str | None] = [some.captions.get(path) for path in some.paths]
        scores = scorer.scores(seen(some.paths), prompts, itself=name)
        table.append(
            Row(name=f"{name or 'training'} photos", strength=None, images=len(some.paths), figures=_figures(scores))
        )
    for batch in batches:
        files = [picture.path for picture in batch.pictures]
        pairs = None
        if batch.pairs:
            before, after = (seen([pair[side].path for pair in batch.pairs])[scorer.main] for side in (0, 1))
            pairs = before, after, [pair[0].prompt for pair in batch.pairs]

        def opened(places: Sequence[int], files: Sequence[Path] = files) -> list[Image.Image]:
            return [load_image(files[place]) for place in places]

        prompts = [picture.prompt for picture in batch.pictures]
        scores = scorer.scores(seen(files), prompts, pairs=pairs, pictures=opened)
        table.append(Row(name=batch.name, strength=batch.strength, images=len(files), figures=_figures(scores)))
    return table


def _figures(scores: Mapping[str, Scores]) -> dict[str, Figure]:
    """Means and intervals; whole prompts are resampled, or single scores where there are fewer than two prompts."""
    figures = {}
    for name, (values, prompts) in scores.items():
        groups = prompts if prompts is not None and len(set(prompts)) > 1 else None
        low, high = bootstrap(values, seed=SEED, groups=groups, level=LEVEL, rounds=ROUNDS)
        figures[name] = Figure(value=float(values.mean()), low=low, high=high, count=len(values))
    return figures


def protocol_of(scorer: Scorer, *, real: Photos, holdout: Photos | None) -> dict[str, Any]:
    """All that the numbers depend on besides the images."""
    kind = scorer.main.upper()
    protocol: dict[str, Any] = {f"{name.upper()} encoder": e.protocol for name, e in scorer.encoders.items()}
    likeness = " and ".join({"dino": "DINO", "clip": "CLIP-I"}[name] for name in scorer.encoders)
    protocol[likeness] = "mean cosine of every generated image with every photo"
    if "clip" in scorer.encoders:
        protocol["CLIP-T"] = f"mean cosine of an image with its own prompt, read without {scorer.token!r}"
    protocol |= {
        "drift": f"mean of (1 - cos) / 2 of the base's and the adapted image, {kind}; same unrelated prompt and seed",
        "diversity": f"mean of 1 - cos over the pairs of images of one prompt, {kind}; mean over prompts",
        "intervals": f"{LEVEL:.0%} bootstrap of the mean, {ROUNDS} rounds, seed {SEED}, whole prompts are drawn "
        "(single images where there are fewer than two prompts); the photos are fixed",
        "measured with": {name: version(name) for name in ("torch", "transformers", "pillow")},
        "training photos": _described(real),
    }
    if scorer.lpips:
        protocol["LPIPS diversity"] = "mean LPIPS (AlexNet, v0.1) over the pairs of images of one prompt"
    if holdout:
        protocol["held-out photos"] = _described(holdout)
        if holdout.captions:
            protocol["DINO, same caption"] = "mean cosine of an image with the held-out photo captioned by its prompt"
    return protocol


def _described(photos: Photos) -> dict[str, Any]:
    where = str(photos.paths[0].parent)
    return {"folder": where, "count": len(photos.paths), "sha256": content_hash(photos.paths)}


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
