"""Captions of the photos in a folder: texts beside them and lists of them, and what of it was not used."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .image_files import DataError

#: Endings of a text beside a photo (`a.txt` or `a.jpg.txt`), as trainers and captioning tools write them.
TEXTS = (".txt", ".caption", ".captions", ".cap", ".text", ".prompt")
#: Files that list captions by the names of photos.
LISTS = tuple(f"{stem}{ending}" for stem in ("metadata", "captions") for ending in (".jsonl", ".json", ".csv", ".tsv"))
THE_PROMPT = "the prompt"
_COLUMNS = ("text", "caption", "prompt")
_ROW = '{"file_name": ..., "text": ...}'


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Captions of photos.

    Attributes:
        texts: the caption of each photo.
        sources: for each photo, where it is from: "text files", the name of a list, `THE_PROMPT`.
        unused: captions that were written and are no photo's, each with the reason.
    """

    texts: dict[Path, str]
    sources: dict[Path, str]
    unused: list[str]

    def __str__(self) -> str:
        """How many captions there are from where."""
        counts = Counter(self.sources.values()).most_common()
        return "captions: " + ", ".join(f"{count} from {source}" for source, count in counts)


@dataclass(frozen=True)
class _Written:
    """A caption as somebody wrote it: for which file, its text, and where it stands."""

    name: str
    text: str
    place: str


@dataclass
class _Found:
    """What is found for the photos of a folder: from texts beside them, and from lists."""

    beside: dict[Path, _Written] = field(default_factory=dict)
    listed: dict[Path, _Written] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def is_caption_file(path: Path) -> bool:
    """Whether a file is called as captions are."""
    return path.suffix.lower() in TEXTS or path.name.lower() in LISTS


def read_captions(folder: Path, paths: Sequence[Path], *, default: str | None) -> Captions:
    """The caption of each photo of a folder: the text beside it, else its line in a list, else `default`.

    Names are taken as they are meant: in another case or Unicode form, with a folder in front, with the ending of
    another image format, as long as that is the name of one photo only.

    A list is metadata.jsonl with one {"file_name": ..., "text": ...} a line ("caption" and "prompt" do as well), the
    same as .csv or .tsv with these columns, or as .json: a list of such rows, or {name: text or row}.

    Raises:
        DataError: a photo without a caption, an empty one, two different ones, or a file that cannot be read.
    """
    found = _Found()
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in TEXTS and path.is_file() and path.name[0] != ".":
            photos = _photos_of(path.name, paths, texts=True)
            if photos:
                written = _Written(path.name, _read_text(path).strip(), path.name)
                _assign(written, photos, found.beside, found.unused)
            else:
                found.unused.append(f"{path.name} (no photo here is called {path.stem})")
        elif path.name.lower() in LISTS and path.is_file():
            for row in _read_list(path):
                _assign(row, _listed_photos(row.name, folder, paths), found.listed, found.unused)
    return _chosen(paths, found, default)


def _chosen(paths: Sequence[Path], found: _Found, default: str | None) -> Captions:
    texts, sources, unused = {}, {}, list(found.unused)
    for path in paths:
        beside, listed = found.beside.get(path), found.listed.get(path)
        written = beside or listed
        caption = written.text if written else default
        if not caption:
            state = f"{written.place} is empty" if written else "there is none"
            raise DataError(
                f"{path} has no caption: {state}; give instance_prompt, write {path.stem}.txt, or use metadata.jsonl"
            )
        if beside and listed and listed.text != beside.text:
            unused.append(f"{listed.place} ({beside.place} has another caption of {path.name}, which counts)")
        texts[path] = caption
        sources[path] = "text files" if beside else listed.place.partition(" ")[0] if listed else THE_PROMPT
    return Captions(texts=texts, sources=sources, unused=unused)


def _assign(written: _Written, photos: Sequence[Path], captions: dict[Path, _Written], unused: list[str]) -> None:
    """Note a caption for its photos.

    Raises:
        DataError: one of them has another caption already.
    """
    if not photos:
        unused.append(f"{written.place} (no photo here is called {written.name})")
    for photo in photos:
        before = captions.setdefault(photo, written)
        if before.text != written.text:
            raise DataError(
                f"{photo} has two captions: {before.text[:60]!r} in {before.place}, {written.text[:60]!r} in "
                f"{written.place}; keep one"
            )


def _photos_of(name: str, paths: Sequence[Path], *, texts: bool = False) -> list[Path]:
    """The photos that a name stands for: those of this very name, else of the same name spelled differently.

    Args:
        texts: it is the name of a text beside a photo, `a.txt` or `a.jpg.txt`; else that of the photo itself.
    """
    stem = PurePosixPath(name).stem
    for spelled in (str, _folded):
        exact = [path for path in paths if spelled(path.name) == spelled(stem if texts else name)]
        alike = [path for path in paths if spelled(path.stem) == spelled(stem)] if texts else []
        if found := exact or alike:
            return found if spelled is str or len({path.stem for path in found}) == 1 else []
    if texts:
        return []
    alike = [path for path in paths if _folded(path.stem) in (_folded(stem), _folded(name))]
    return alike if len(alike) == 1 else []


def _listed_photos(name: str, folder: Path, paths: Sequence[Path]) -> list[Path]:
    """The photos that a row of a list is about; none where it names a file of another folder."""
    if os.path.isfile(folder / name) and (folder / name).parent.resolve() != folder.resolve():
        return []
    return _photos_of(PurePosixPath(name.replace("\\", "/")).name, paths)


def _folded(name: str) -> str:
    """A name without what file systems and programs change: the case, the Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; save it as UTF-8 text") from error


def _read_list(path: Path) -> Iterator[_Written]:
    """The rows of a list of captions.

    Raises:
        DataError: it cannot be read, or one of them is none.
    """
    for place, row, shown in _rows(path, _read_text(path)):
        try:
            name = row["file_name"]
            text = next(row[key] for key in _COLUMNS if row.get(key) is not None)
            yield _Written(str(PurePosixPath(name)), text.strip(), place)
        except (KeyError, TypeError, AttributeError, StopIteration) as error:
            raise DataError(f"{path.parent / place} is not {_ROW}: {shown[:80]}") from error


def _rows(path: Path, content: str) -> Iterator[tuple[str, Any, str]]:
    """The rows of a list: where each stands, itself, and what to show of it if it is wrong."""
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from _rows_of_table(path, content)
        return
    if path.suffix.lower() == ".json" and (whole := _parsed(content)) is not None:
        rows = whole if isinstance(whole, list) else _rows_of_mapping(whole) if isinstance(whole, dict) else [whole]
        yield from ((f"{path.name} row {number}", row, json.dumps(row)) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines() would split inside of texts
        if line.strip():
            yield f"{path.name} line {number}", _parsed(line), line


def _rows_of_table(path: Path, content: str) -> Iterator[tuple[str, Any, str]]:
    header = content.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=max(",;\t", key=header.count))
    columns = set(reader.fieldnames or ())
    if "file_name" not in columns or not columns & set(_COLUMNS):
        raise DataError(f"{path} has the columns {header[:80]!r}; it needs file_name and text")
    try:
        for row in reader:
            shown = json.dumps(row, ensure_ascii=False)
            # a text with a comma and no quotes around it would lose what comes after
            yield f"{path.name} line {reader.line_num}", None if None in row else row, shown
    except csv.Error as error:
        raise DataError(f"cannot read {path} line {reader.line_num}: {error}; quote texts that need it") from error


def _rows_of_mapping(rows: dict[str, Any]) -> list[Any]:
    """{name: text}, {name: {"text": ...}} or one single row, as rows."""
    if "file_name" in rows:
        return [rows]
    return [{"file_name": name} | (row if isinstance(row, dict) else {"text": row}) for name, row in rows.items()]


def _parsed(text: str) -> Any:
    """JSON, or None for what is none: broken, nested too deep, or with a name twice in it."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found
