"""What an adapter is worth while it is trained: previews measured, the best adapter kept, an end to waiting.

Which adapter is the best, and how long there has been none better, follow from the log alone, so a resumed run goes
on with both.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from .config import ValidationConfig
from .data import find_images, load_image
from .encode import fingerprint
from .encoders import EncoderError, ImageEncoder, embed_images, embed_texts, load_encoder
from .files import complete_folder
from .journal import Look, figures_by_step, read_log
from .metrics import drift, fidelity, prompt_following, real_against_real
from .prompts import has_token, without_token

log = logging.getLogger(__name__)
#: Encoder -> the name of its likeness.
LIKENESS = {"dino": "dino", "clip": "clip_i"}
#: Likenesses in the order in which a rule takes the first there is: photos that training never saw before those it
#: did, which reward copying, and DINO, which tells one dog from another, before CLIP, which hardly does.
FIDELITY = ("dino_holdout", "dino", "clip_i_holdout", "clip_i")
#: What drift costs in "balanced": 2 drift = 1 - cos(base's picture, adapter's), so that a picture of the subject may
#: come nearer to the photos by no less cosine than other pictures go away from the base model's.
DRIFT_WEIGHT = 2.0
SUMMARY = "best.json"
#: Options of previews that say what is done with figures, or where encoders and components are, not how figures come
#: about.
_AFTERWARDS = ("validation_steps", "keep_best", "patience", "strength_sheet", "validation_dino", "validation_clip",
               "validation_holdout_dir", "enable_model_cpu_offload")  # fmt: skip


# ---- figures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gauge:
    """Encoders in memory, and the photos as they see them."""

    encoders: dict[str, ImageEncoder]  # "dino", "clip"
    photos: dict[str, Tensor]  # likeness -> (m, d)
    token: str

    @property
    def main(self) -> str:
        """The encoder of drift."""
        return "dino" if "dino" in self.encoders else "clip"


def load_gauge(
    photos: Sequence[Path], *, dino: str | None, clip: str | None, holdout: str | None = None, token: str
) -> Gauge:
    """Load the encoders that are named, on the CPU: the device is the training's, and they see few pictures.

    Args:
        photos: what the subject is taught from.
        holdout: folder with photos of it that are kept from training.
        token: the subject's rare word.

    Raises:
        EncoderError: one cannot be loaded, or is of the other kind.
        DataError: no photos in `holdout`, or one that cannot be read.
    """
    sets = {
        "": list(photos),
        **({"_holdout": find_images(Path(holdout), option="validation_holdout_dir")} if holdout else {}),
    }
    encoders, embedded = {}, {}
    for kind, source in (("dino", dino), ("clip", clip)):
        if source:
            encoders[kind] = load_encoder(source, device="cpu")
            if encoders[kind].kind != kind:
                raise EncoderError(f"{source} is a {type(encoders[kind].model).__name__}, given as {kind}; give it as "
                                   f"{encoders[kind].kind}")  # fmt: skip
            for suffix, paths in sets.items():
                embedded[LIKENESS[kind] + suffix] = embed_images(encoders[kind], [load_image(path) for path in paths])
    return Gauge(encoders, embedded, token)


def figures_of(
    gauge: Gauge, images: Sequence[Image.Image], prompts: Sequence[str], *,
    unrelated: Sequence[Image.Image], base: Sequence[Image.Image],
) -> dict[str, float]:  # fmt: skip
    """Likeness to each set of photos, prompt following, and drift, each rounded to six digits.

    Args:
        images: pictures drawn. prompts: the prompt of each; pictures whose prompt has no rare word are not of the
            subject, and not measured.
        unrelated: pictures for unrelated prompts. base: the base model's for the same prompts and seeds; may be none.
    """
    figures = {}
    asked = [place for place, prompt in enumerate(prompts) if has_token(prompt, gauge.token)]
    images, prompts = [images[place] for place in asked], [prompts[place] for place in asked]
    for kind, encoder in gauge.encoders.items():
        seen = embed_images(encoder, images)
        for suffix in ("", "_holdout"):
            if (name := LIKENESS[kind] + suffix) in gauge.photos:
                figures[name] = fidelity(seen, gauge.photos[name])
        if kind == "clip":
            texts = embed_texts(encoder, [without_token(prompt, gauge.token) for prompt in prompts])
            figures["clip_t"] = prompt_following(seen, texts)
    if unrelated:
        main = gauge.encoders[gauge.main]
        figures["drift"] = drift(embed_images(main, base), embed_images(main, unrelated))
    return _rounded(figures)


def figures_of_photos(gauge: Gauge, captions: Sequence[str]) -> dict[str, float]:
    """What the photos the subject is taught from score themselves, to read the figures of previews by: against one
    another, against the held-out ones, and with their captions, read without the rare word.

    Args:
        captions: the caption of each photo.
    """
    figures = {}
    for kind, encoder in gauge.encoders.items():
        name = LIKENESS[kind]
        mine = gauge.photos[name]
        if len(mine) > 1:
            figures[name] = real_against_real(mine)
        if (held_out := f"{name}_holdout") in gauge.photos:
            figures[held_out] = fidelity(mine, gauge.photos[held_out])
        if kind == "clip":
            texts = embed_texts(encoder, [without_token(caption, gauge.token) for caption in captions])
            figures["clip_t"] = prompt_following(mine, texts)
    return _rounded(figures)


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) + 0.0 for name, value in figures.items()}  # + 0.0: no -0.0


def fidelity_of(figures: Mapping[str, float]) -> float:
    """The likeness that rules go by: the first of `FIDELITY` that was measured."""
    return next(figures[name] for name in FIDELITY if name in figures)


# ---- the best ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """The best preview so far, and how many have been looked at since."""

    step: int
    score: float
    since: int


def score_of(figures: Mapping[str, float], rule: str) -> float:
    """What `keep_best` goes by, the higher the better: fidelity, or fidelity - 2 drift ("balanced")."""
    return fidelity_of(figures) - (DRIFT_WEIGHT * figures["drift"] if rule == "balanced" else 0.0)


def standing(history: Mapping[int, Mapping[str, float]], rule: str) -> Standing | None:
    """The best preview of {step: figures}, the earliest of equals; None before the first of a trained adapter."""
    scores = {step: score_of(figures, rule) for step, figures in sorted(history.items()) if step > 0}
    if not scores:
        return None
    best = max(scores, key=lambda step: (scores[step], -step))
    return Standing(best, scores[best], sum(step > best for step in scores))


@dataclass(frozen=True)
class Watch:
    """Looks at previews of one run, keeps the best adapter in `folder`/best, and says when it has seen enough.

    Attributes:
        prompts: the prompts of the previews, a row of images each.
        base: the base model's pictures for the unrelated prompts.
        folder: the run's, with its log.jsonl.
        protocol: names all that figures depend on besides the adapter; those of another are not compared.
        save: writes the adapter as it is now into a folder, given the step.
    """

    gauge: Gauge
    prompts: Sequence[str]
    base: Sequence[Image.Image]
    folder: Path
    protocol: str
    rule: str
    patience: int | None
    save: Callable[[Path, int], None]

    def look(self, step: int, rows: Sequence[Sequence[Image.Image]], unrelated: Sequence[Image.Image]) -> Look:
        """Measure the preview after `step` steps; keep the adapter if it is the best yet."""
        images = [image for row in rows for image in row]
        prompts = [prompt for prompt, row in zip(self.prompts, rows, strict=True) for _ in row]
        figures = figures_of(self.gauge, images, prompts, unrelated=unrelated, base=self.base)
        if self.rule == "none":
            return Look(figures, protocol=self.protocol)
        history = figures_by_step(read_log(self.folder / "log.jsonl"), protocol=self.protocol)
        now = standing(history | {step: figures}, self.rule)
        if now is None:
            return Look(figures, protocol=self.protocol)
        kept = now.step == step
        if kept:
            self._keep(step, figures, now.score)
        enough = self.patience is not None and now.since >= self.patience
        if enough:
            log.info("%d previews in a row were no better than step %d: training ends here", now.since, now.step)
        return Look(figures, enough, self.protocol, kept)

    def _keep(self, step: int, figures: Mapping[str, float], score: float) -> None:
        told = {"step": step, "rule": self.rule, "score": round(score, 6), **figures}
        with complete_folder(self.folder / "best") as aside:
            self.save(aside, step)
            (aside / SUMMARY).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def protocol_of(gauge: Gauge, config: ValidationConfig) -> str:
    """A name for all that the figures of previews depend on besides the adapter: options, encoders and photos."""
    drawn = {name: value for name, value in asdict(config).items() if name not in _AFTERWARDS}
    encoders = {kind: encoder.protocol | {"encoder": None} for kind, encoder in gauge.encoders.items()}
    photos = {name: [round(x, 4) for x in rows.mean(0).tolist()] for name, rows in gauge.photos.items()}
    return fingerprint(json.dumps([drawn, encoders, photos], sort_keys=True))[:8]


def read_best(folder: Path) -> dict[str, Any] | None:
    """What `best/` of a run holds: step, rule, score and figures; None if there is none."""
    path = folder / "best" / SUMMARY
    told: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return told
