"""What the trainer will make of photos, before training: `delora check-data`, with the trainer's own options."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..atomic import complete_file
from ..base.config import ModelConfig
from ..base.load import listed_in
from ..base.single_file import is_single_file
from ..data.config import DataConfig
from ..data.image_files import DataError, is_image, load_image, read_photo
from ..data.photos import ENLARGED, Example, class_examples, instance_examples
from ..families import family_named
from ..options import option
from ..sampling.contact_sheet import contact_sheet
from .check import begin

log = logging.getLogger(__name__)
ALIKE = 4  # of 64 bits of two photos' outlines that may differ where they are nearly the same
MANY = 3000  # photos, beyond which only those of one outline are compared
SHOWN, COLUMNS, CELL = 120, 6, 224  # photos on the sheet, in a row, and pixels of each


@dataclass(frozen=True, kw_only=True)
class CheckDataConfig:
    """What is written."""

    sheet: str = option("check_data.png", "picture of the photos with their crops drawn in")


class OptionalModelConfig(ModelConfig):
    """The base model, for the length of captions; may be left out."""

    def __post_init__(self) -> None:
        """Nothing is needed of it."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A photo, and what is to be said of it.

    Attributes:
        tokens: how long its caption is, in words of the text encoder; None where that is not known.
        notes: what may be unwanted.
    """

    example: Example
    tokens: int | None
    notes: Sequence[str]

    def cells(self) -> list[str]:
        """Its row of the table."""
        example, view = self.example, self.example.views[0]
        (left, top, right, bottom), (width, height) = view.box, example.size
        lost = 1 - (right - left) * (bottom - top) / (width * height)
        repeats = f" x{example.repeats}" if example.repeats > 1 else ""
        return [
            f"{example.concept}{': ' if example.concept else ''}{example.path.name}{repeats}",
            f"{width} x {height}",
            f"{view.size[1]} x {view.size[0]}" + (f", {len(example.views)} views" if len(example.views) > 1 else ""),
            f"{lost:.0%}",
            "yes" if example.mask else "",
            example.caption if len(example.caption) <= 48 else f"{example.caption[:45]}...",
            example.source,
            "" if self.tokens is None else str(self.tokens),
            "; ".join(self.notes),
        ]


HEADS = ("photo", "size", "trained at", "cut off", "mask", "caption", "from", "tokens", "notes")


def check_data(config: CheckDataConfig, model: ModelConfig, data: DataConfig, *, seed: int, trigger: str) -> str:
    """Write the sheet; returns the table.

    Raises:
        DataError: what training would refuse, all photos that cannot be read among it.
    """
    try:
        examples = instance_examples(data, seed=seed, trigger=trigger) + class_examples(data, seed=seed, drawn=False)
    except DataError as error:
        raise DataError("; ".join(dict.fromkeys([str(error), *_unreadable(data)]))) from error
    length, limit = _tokens(model)
    twins = _nearly_the_same([example.path for example in examples])
    rows = []
    for example in examples:
        tokens = max(map(length, example.captions)) if limit else None
        notes = [*_notes(example, tokens, limit), *twins.get(example.path, ())]
        rows.append(Checked(example=example, tokens=tokens, notes=notes))
    with complete_file(Path(config.sheet)) as aside:
        _sheet([row.example for row in rows[:SHOWN]]).save(aside)
    log.info("sheet: %s%s", config.sheet, f", the first {SHOWN} of {len(rows)}" if len(rows) > SHOWN else "")
    return _table([list(HEADS), *(row.cells() for row in rows)])


def _notes(example: Example, tokens: int | None, limit: int) -> list[str]:
    view = example.views[0]
    times = view.size[0] / (view.box[3] - view.box[1])
    found = [f"too small: enlarged {times:.1f} times"] if times > ENLARGED else []
    if tokens is not None and tokens > limit:
        found.append(f"caption cut off: {limit} tokens are read")
    return found


def _unreadable(data: DataConfig) -> list[str]:
    """What is wrong with each photo that cannot be read; of data sets only what was met first is known."""
    said = []
    for concept in data.subjects if not data.dataset_name else []:
        folder = Path(concept.folder)
        for path in sorted(filter(is_image, folder.iterdir())) if folder.is_dir() else ():
            try:
                read_photo(path)
            except DataError as error:
                said.append(str(error))
    return said


def _tokens(model: ModelConfig) -> tuple[Callable[[str], int], int]:
    """How long a text is for the tokenizer that reads least, and how much that one reads; 0 without a base.

    Raises:
        BaseModelError, FamilyError: no base that can be trained with.
    """
    path = model.pretrained_model_name_or_path
    if not path or is_single_file(path):
        log.info("lengths of captions are not checked: give the base, as a folder or Hub id")
        return lambda text: 0, 0
    pipe = begin(model, family_named(listed_in(model)["_class_name"]), precision="no")
    tokenizers = [part for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None]
    plain: list[Any] = [getattr(part, "tokenizer", part) for part in tokenizers]
    least = min(plain, key=lambda tokenizer: int(tokenizer.model_max_length))
    return lambda text: len(least(text).input_ids), min(int(least.model_max_length), 100_000)


def _nearly_the_same(paths: Sequence[Path]) -> Mapping[Path, list[str]]:
    """For each photo that looks like an earlier one, the earlier one's name."""
    bits = np.array([_outline(path) for path in paths], dtype=bool)
    found: dict[Path, list[str]] = {}
    seen: dict[bytes, int] = {}
    for place, path in enumerate(paths):
        first: int | None = seen.setdefault(bits[place].tobytes(), place)
        if first == place and place and len(paths) <= MANY:
            differing = (bits[:place] != bits[place]).sum(1)
            first = int(differing.argmin()) if differing.min() <= ALIKE else None
        if first is not None and first < place:
            found[path] = [f"nearly the same as {paths[first].name}"]
    return found


def _outline(path: Path) -> Any:
    """64 bits of a photo that resizing and saving it again leave as they are: where it gets lighter to the right."""
    grey = np.asarray(load_image(path).convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return (grey[:, 1:] > grey[:, :-1] + 1).flatten()


def _sheet(examples: Sequence[Example]) -> Image.Image:
    """The photos with the crops that are trained on, and what their masks leave out in grey."""
    drawn = [_drawn(example) for example in examples]
    return contact_sheet([drawn[first : first + COLUMNS] for first in range(0, len(drawn), COLUMNS)], cell=CELL)


def _drawn(example: Example) -> Image.Image:
    image = load_image(example.path)
    scale = CELL / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    if example.mask is not None:
        whole = (0, 0, *example.size)
        kept = example.mask.part(whole, flip=False, height=height, width=width)[0, 0].mul(255).byte().numpy()
        faint = image.convert("L").point(lambda x: x // 3).convert("RGB")
        image = Image.composite(image, faint, Image.fromarray(kept))
    draw = ImageDraw.Draw(image)
    for box in dict.fromkeys(view.box for view in example.views):
        draw.rectangle([round(x * scale) - (k > 1) for k, x in enumerate(box)], outline="#ff2d55", width=2)
    draw.text((5, 3), example.path.name, fill="#ffffff", stroke_fill="#000000", stroke_width=2,
              font=ImageFont.load_default(size=13))  # fmt: skip
    return image


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns that something stands in, side by side."""
    kept = [k for k in range(len(rows[0])) if any(row[k] for row in rows[1:])]
    widths = {k: max(len(row[k]) for row in rows) for k in kept}
    return "\n".join("  ".join(row[k].ljust(widths[k]) for k in kept).rstrip() for row in rows)
