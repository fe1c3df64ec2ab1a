"""The manifest of a folder of samples: one JSON line for each image, with all that is needed to draw it again."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..atomic import complete_file

MANIFEST = "manifest.jsonl"
log = logging.getLogger(__name__)


def manifest_lines(path: Path) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """The lines of a manifest: number, text, what it says of an image; None if it is no line of `delora sample`."""
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would split inside of prompts
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield number, line, row if isinstance(row, dict) and isinstance(row["file"], str) else None
        except (ValueError, KeyError, RecursionError):
            yield number, line, None


def read_manifest(out: Path) -> dict[str, dict[str, Any]]:
    """What a folder's manifest says of each image, by file; nothing without one.

    A line that says nothing is told, and the manifest is copied aside, since the next one will be without it.
    """
    path, rows, broken = out / MANIFEST, {}, False
    for number, line, row in manifest_lines(path) if path.is_file() else ():
        if row is None:
            log.warning("%s line %d is no line of delora sample and is left out: %s", path, number, line[:80])
            broken = True
        else:
            rows[row["file"]] = row
    if broken:
        aside = path.with_suffix(".damaged.jsonl")
        shutil.copyfile(path, aside)
        log.warning("%s is kept as %s", path, aside.name)
    return rows


def write_manifest(out: Path, rows: Mapping[str, dict[str, Any]]) -> None:
    """One line for every image of `rows` that is there."""
    present = [json.dumps(row, ensure_ascii=False) for name, row in rows.items() if (out / name).is_file()]
    with complete_file(out / MANIFEST) as aside:
        aside.write_text("".join(f"{line}\n" for line in present), encoding="utf-8")
