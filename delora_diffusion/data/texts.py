"""Texts that a language model is fine-tuned on: from files, folders and data sets to token ids.

It needs the extra `language` (datasets). A text ends with the end-of-text token, and that token is learned: a model
that never sees it learns never to stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeloraError, MissingExtraError

if TYPE_CHECKING:
    from datasets import Dataset

#: Endings of files, and what datasets calls their kind.
READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
TEXT_COLUMNS = ("text", "content", "sentence")
VALIDATION = ("validation", "valid", "val", "test")


class TextError(DeloraError):
    """Texts that cannot be used; the message says what was found and what to do."""


def read_texts(source: str | Path, *, column: str | None = None, keep: tuple[str, ...] = ()) -> dict[str, Dataset]:
    """{"train": ..., and "validation" where the data has one}, each with a column "text" and those of `keep`.

    Args:
        source: a file, a folder of files, a folder of `save_to_disk`, or a name on the Hub.
        column: which column holds the texts; found by its name, or as the only one of texts, if None. Conversations
            ("messages") are left as they are, for a tokenizer's template.

    Raises:
        MissingExtraError: the extra `language` is not installed.
        TextError: nothing there, files of several kinds, no texts, or several columns that could be them.
    """
    splits = _open(Path(source), str(source))
    if "train" not in splits:
        raise TextError(
            f"{source} has the splits {', '.join(splits)}, and none is called train; give that file itself"
        )
    found = {"train": splits["train"]}
    held_out = next((name for name in VALIDATION if name in splits), None)
    if held_out:
        found["validation"] = splits[held_out]
    chosen = column or _text_column(found["train"], str(source), keep)
    return {name: _only(dataset, chosen, keep, str(source)) for name, dataset in found.items()}


def _open(path: Path, name: str) -> Mapping[str, Any]:
    try:
        from datasets import Dataset, load_dataset, load_from_disk
    except ImportError as error:
        raise MissingExtraError(
            f'reading texts needs datasets ({error}): pip install "delora_diffusion[language]"'
        ) from error
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            kept = load_from_disk(str(path))
            return {"train": kept} if isinstance(kept, Dataset) else dict(kept)
        if path.exists():
            reader, files = _files(path)
            return dict(load_dataset(reader, data_files=files))
        return dict(load_dataset(name))
    except (OSError, ValueError, RuntimeError) as error:  # datasets wraps what its readers raise in these
        if isinstance(error, TextError):
            raise
        cause = error.__cause__ or error
        raise TextError(f"cannot read texts from {name}: {str(cause).splitlines()[0]}") from error


def _files(path: Path) -> tuple[str, dict[str, list[str]]]:
    """datasets' name for a kind of file, and the files of each split, which a file is named after."""
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS) if path.is_dir() else [path]
    kinds = {p.suffix.lower() for p in files}
    if not kinds <= READERS.keys() or len({READERS[kind] for kind in kinds}) != 1:
        found = ", ".join(sorted(kinds)) or "none"
        raise TextError(f"{path}: files of texts end in {', '.join(READERS)}, all of one kind; found {found}")
    splits: dict[str, list[str]] = {}
    for file in files:
        held_out = len(files) > 1 and file.stem.lower() in VALIDATION
        splits.setdefault("validation" if held_out else "train", []).append(str(file))
    return READERS[kinds.pop()], splits


def _text_column(dataset: Dataset, source: str, keep: tuple[str, ...]) -> str:
    if "messages" in dataset.column_names:
        return "messages"
    named = [name for name in TEXT_COLUMNS if name in dataset.column_names]
    kinds = {name: getattr(feature, "dtype", "") for name, feature in dataset.features.items() if name not in keep}
    texts = named[:1] or [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if len(texts) != 1:
        raise TextError(
            f"{source} has the columns {', '.join(dataset.column_names)}, and it is not clear which holds the texts; "
            f"call it text"
        )
    return texts[0]


def _only(dataset: Dataset, column: str, keep: tuple[str, ...], source: str) -> Dataset:
    if missing := [name for name in (column, *keep) if name not in dataset.column_names]:
        raise TextError(f"{source} has no column {missing[0]!r}, only {', '.join(dataset.column_names)}")
    dataset = dataset.select_columns([column, *keep])
    dataset = dataset if column == "text" else dataset.rename_column(column, "text")
    filled = dataset.filter(lambda row: bool(row["text"].strip() if isinstance(row["text"], str) else row["text"]))
    if not len(filled):
        raise TextError(f"{source} holds no text; each line, or the column {column!r} of each row, is one")
    return filled


def validation_split(parts: Mapping[str, Dataset], size: int, *, seed: int) -> tuple[Dataset, Dataset | None]:
    """What is trained on, and `size` texts of the data's own validation split, or split off, for validation.

    Raises:
        TextError: as many texts are asked for validation as there are.
    """
    if not size:
        return parts["train"], None
    if "validation" in parts:
        own = parts["validation"].shuffle(seed=seed)
        return parts["train"], own.select(range(min(size, len(own))))
    if size >= len(parts["train"]):
        raise TextError(
            f"val_set_size is {size}, and there are {len(parts['train'])} texts; give fewer, or 0 for no validation"
        )
    split = parts["train"].train_test_split(test_size=size, seed=seed)
    return split["train"], split["test"]


def tokenized(dataset: Dataset, tokenizer: Any, *, length: int, classes: Sequence[Any] = ()) -> Dataset:
    """Token ids of at most `length`. The ids are what is learned, the end of the text included; with `classes`, which
    of them the column "label" holds.

    Conversations are put into words by the tokenizer's chat template.
    """

    def of(row: Mapping[str, Any]) -> dict[str, Any]:
        text, plain = row["text"], isinstance(row["text"], str)
        if not plain:  # a template writes the special tokens itself
            text = tokenizer.apply_chat_template(text, tokenize=False)
        ids = tokenizer(text, truncation=True, max_length=length, add_special_tokens=plain)["input_ids"]
        if classes:
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": classes.index(row["label"])}
        if len(ids) < length and ids[-1:] != [tokenizer.eos_token_id] and tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}

    return dataset.map(of, remove_columns=dataset.column_names)
