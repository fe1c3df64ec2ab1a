"""Generated images and what is known of each: folders and manifests -> batches that are judged together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.captions import THE_PROMPT, read_captions
from ..data.image_files import DataError, find_images
from ..data.photos import tell_unused
from ..data.prompts import has_token
from ..sampling.manifest import MANIFEST, manifest_lines

#: What two images differ in that are compared for drift; all else in their manifest lines must be equal.
_OF_THE_ADAPTER = ("file", "adapter", "adapter_hash", "strength")


@dataclass(frozen=True)
class Picture:
    """An image file, and its line in the manifest (empty for an image of unknown origin)."""

    path: Path
    settings: dict[str, Any]

    @property
    def prompt(self) -> str | None:
        return self.settings.get("prompt")

    @property
    def is_base(self) -> bool:
        """Whether it is known to be drawn by the base model alone."""
        settings = self.settings
        return "adapter" in settings and (settings["adapter"] is None or settings.get("strength") == 0)


@dataclass(frozen=True)
class Photos:
    """Real photos of the subject, and their captions where they have some."""

    paths: list[Path]
    captions: dict[Path, str]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The images of one adapter at one strength."""

    name: str
    strength: float | None
    pictures: list[Picture]  # of the subject
    pairs: list[tuple[Picture, Picture]]  # unrelated prompts: (base, adapted), drawn alike


def read_photos(folder: Path, *, option: str) -> Photos:
    """The photos of a folder, with captions if it has any, as for training.

    Raises:
        DataError: no folder, no photos, or captions for some of them only; the message names `option`.
    """
    paths = find_images(folder, option=option)
    captions = read_captions(folder, paths, default=THE_PROMPT)
    tell_unused(folder, paths, captions)
    captioned = set(captions.sources.values()) != {THE_PROMPT}
    return Photos(paths, read_captions(folder, paths, default=None).texts if captioned else {})


def read_pictures(source: Path) -> list[Picture]:
    """The images of a folder, or those that a manifest lists.

    Raises:
        DataError: nothing there, a manifest that cannot be read, or an image it lists that is missing.
    """
    manifest = source if source.suffix == ".jsonl" else source / MANIFEST
    if not manifest.is_file():
        if source.suffix == ".jsonl":
            raise DataError(f"images {source} does not exist; give a folder, or a manifest of `delora sample`")
        return [Picture(path, {}) for path in find_images(source, option="images")]
    pictures = []
    for number, line, settings in manifest_lines(manifest):
        if settings is None or "prompt" not in settings:
            raise DataError(f"{manifest} line {number} is no line of `delora sample`: {line[:80]}")
        path = manifest.parent / settings["file"]
        if not path.is_file():
            raise DataError(f"{manifest} line {number} lists {path.name}, which is missing; run `delora sample` again")
        pictures.append(Picture(path, settings))
    if not pictures:
        raise DataError(f"{manifest} is empty; run `delora sample` again")
    return pictures


def batches_of(pictures: Sequence[Picture], *, name: str, token: str) -> list[Batch]:
    """One batch for each adapter and strength, in the order of the images.

    Prompts with the rare word `token` are of the subject, all others are unrelated ones. Those are paired with the
    base model's image of the same prompt, seed and settings, where there is one.

    Raises:
        DataError: no prompt has the rare word.
    """
    bases: dict[str, Picture] = {}
    for picture in pictures:
        if picture.is_base and (picture.settings["adapter"] is None or _drawn(picture) not in bases):
            bases[_drawn(picture)] = picture  # rather the base by itself than an adapter at strength 0
    groups: dict[tuple[Any, ...], list[Picture]] = {}
    for picture in pictures:
        key = tuple(picture.settings.get(field) for field in ("adapter", "adapter_hash", "strength"))
        groups.setdefault(key, []).append(picture)
    batches = []
    for (adapter, content, strength), members in groups.items():
        unrelated = [p for p in members if p.prompt is not None and not has_token(p.prompt, token)]
        subject = [p for p in members if p.prompt is None or has_token(p.prompt, token)]
        pairs = [(bases[_drawn(p)], p) for p in unrelated if adapter is not None and _drawn(p) in bases]
        if subject:
            batches.append(
                Batch(name=_label(name, adapter, content, groups), strength=strength, pictures=subject, pairs=pairs)
            )
    if not batches:
        prompts = sorted({str(picture.prompt) for picture in pictures})
        raise DataError(
            f"no prompt of {name} has the rare word {token!r}: {prompts[0]!r}, ...; give the right --trigger_token"
        )
    return batches


def _drawn(picture: Picture) -> str:
    kept = {name: value for name, value in picture.settings.items() if name not in _OF_THE_ADAPTER}
    return json.dumps(kept, sort_keys=True)


def _label(name: str, adapter: str | None, content: str | None, groups: dict[tuple[Any, ...], Any]) -> str:
    """What the table calls a batch: as short as tells it from the others."""
    adapters = list(dict.fromkeys(key[:2] for key in groups if key[0] is not None))
    if adapter is None:
        return f"{name}, base" if adapters else name
    if len(adapters) < 2:
        return name
    same = sum(Path(other).name == Path(adapter).name for other, _ in adapters)
    return f"{name}, {Path(adapter).name}" + (f" ({str(content)[:6]})" if same > 1 else "")
