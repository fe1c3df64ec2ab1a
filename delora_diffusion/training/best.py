"""The best adapter of a run: previews measured, the best one's adapter kept, an end to waiting for a better one.

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

from ..atomic import complete_folder
from ..data.encode import fingerprint
from ..data.image_files import find_images
from ..evaluation.choose import best_preview
from ..evaluation.scorer import Scorer, load_scorer, preview_figures, with_photos
from ..options import options_with
from ..run_folder import RunFolder
from .config import ValidationConfig
from .log import PreviewResult, figures_by_step, read_log

log = logging.getLogger(__name__)
SUMMARY = "best.json"


@dataclass(frozen=True, kw_only=True)
class Best:
    """Measures the previews of one run, keeps the best adapter in `folder`/best, and says when it has seen enough.

    Attributes:
        prompts: the prompts of the previews, a row of images each.
        base: the base model's pictures for the unrelated prompts.
        folder: the run's, with its log.jsonl.
        protocol: names all that figures depend on besides the adapter; those of another are not compared.
        save: writes the adapter as it is now into a folder, given the step.
    """

    scorer: Scorer
    prompts: Sequence[str]
    base: Sequence[Image.Image]
    folder: Path
    protocol: str
    rule: str
    patience: int | None
    save: Callable[[Path, int], None]

    def measure(
        self, step: int, rows: Sequence[Sequence[Image.Image]], unrelated: Sequence[Image.Image]
    ) -> PreviewResult:
        """Measure the preview after `step` steps; keep the adapter if it is the best yet."""
        images = [image for row in rows for image in row]
        prompts = [prompt for prompt, row in zip(self.prompts, rows, strict=True) for _ in row]
        figures = preview_figures(self.scorer, images, prompts, unrelated=unrelated, base=self.base)
        if self.rule == "none":
            return PreviewResult(figures=figures, protocol=self.protocol)
        history = figures_by_step(read_log(RunFolder(self.folder).log), protocol=self.protocol)
        now = best_preview(history | {step: figures}, self.rule)
        if now is None:
            return PreviewResult(figures=figures, protocol=self.protocol)
        kept = now.step == step
        if kept:
            self._keep(step, figures, now.score)
        enough = self.patience is not None and now.since >= self.patience
        if enough:
            log.info("%d previews in a row were no better than step %d: training ends here", now.since, now.step)
        return PreviewResult(figures=figures, enough=enough, protocol=self.protocol, kept=kept)

    def _keep(self, step: int, figures: Mapping[str, float], score: float) -> None:
        summary = {"step": step, "rule": self.rule, "score": round(score, 6), **figures}
        with complete_folder(RunFolder(self.folder).best) as aside:
            self.save(aside, step)
            (aside / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def preview_scorer(config: ValidationConfig, photos: Sequence[Path]) -> Scorer | None:
    """The encoders that the options name, if any, on the CPU: the device is the training's, and they see few pictures.

    Args:
        photos: what the subject is taught from.

    Raises:
        EncoderError: one cannot be loaded, or is of the other kind.
        DataError: no photos in `validation_holdout_dir`, or one that cannot be read.
    """
    if not config.validation_dino and not config.validation_clip:
        return None
    folder = config.validation_holdout_dir
    holdout = find_images(Path(folder), option="validation_holdout_dir") if folder else []
    scorer = load_scorer(
        dino=config.validation_dino, clip=config.validation_clip, token=config.trigger_token, device="cpu"
    )
    return with_photos(scorer, photos, holdout)


def preview_protocol(scorer: Scorer, config: ValidationConfig) -> str:
    """A name for all that the figures of previews depend on besides the adapter: options, encoders and photos."""
    free = options_with(ValidationConfig, figures="free")
    drawn = {name: value for name, value in asdict(config).items() if name not in free}
    encoders = {kind: encoder.protocol | {"encoder": None} for kind, encoder in scorer.encoders.items()}
    photos = {
        f"{kind} {name}": [round(x, 4) for x in rows.mean(0).tolist()]
        for name, embedded in scorer.photos.items()
        for kind, rows in embedded.items()
    }
    return fingerprint(json.dumps([drawn, encoders, photos], sort_keys=True))[:8]


def read_best(folder: Path) -> dict[str, Any] | None:
    """What `best/` of a run holds: step, rule, score and figures; None if there is none, or none that can be read."""
    path = RunFolder(folder).best / SUMMARY
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {**summary, "step": int(summary["step"]), "rule": str(summary["rule"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
