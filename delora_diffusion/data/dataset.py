"""Photos from a data set of the Hub, or from a folder or file that the datasets library reads.

Rows are streamed: of one at a time the image's bytes are written, as they are, to a file called by their hash, unless
they are in a file already. What comes of it is what a folder of the same pictures gives.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..atomic import complete_file
from ..errors import MissingExtraError
from .captions import Captions
from .config import DataConfig
from .image_files import DataError, image_suffixes

log = logging.getLogger(__name__)
#: What reads a single file.
_READERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow", ".csv": "csv", ".json": "json",
            ".jsonl": "json"}  # fmt: skip
_THE_PROMPT = "the prompt"


def read_dataset(config: DataConfig) -> Captions:
    """The photos of a data set as files, with their captions, in its order.

    Raises:
        DataError: no such data set, part or column, a row without image or caption, or no rows at all.
        MissingExtraError: datasets is not installed; the message names the extra.
    """
    name = str(config.dataset_name)
    rows = _rows(config)
    image = _image_column(rows, config)
    column = config.caption_column
    if column is not None:
        _check_column(rows, column, option="caption_column", name=name)
    folder = _folder(config)
    texts: dict[Path, str] = {}
    sources: dict[Path, str] = {}
    seen: Counter[str] = Counter()
    for number, row in enumerate(rows.cast_column(image, _undecoded())):
        path = _file_of(row.get(image), folder, seen, where=f"{name} row {number}, column {image}")
        written = str(row.get(column) or "").strip() if column is not None else ""
        caption = written or config.instance_prompt
        if not caption:
            raise DataError(
                f"{name} row {number} has no caption; give caption_column, one of {_listed(rows)}, or instance_prompt "
                f"for all that have none"
            )
        texts[path] = caption
        sources[path] = f"column {column}" if written else _THE_PROMPT
    if not texts:
        raise DataError(f"{name} has no rows in its part {config.dataset_split}; give another dataset_split")
    captions = Captions(texts=texts, sources=sources, unused=[])
    log.info("%s, part %s: %d photos; %s", name, config.dataset_split, len(texts), captions)
    return captions


def _rows(config: DataConfig) -> Any:
    """The data set, streamed.

    Raises:
        DataError, MissingExtraError: as `read_dataset`.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError('dataset_name needs datasets: pip install "delora_diffusion[datasets]"') from error
    name = str(config.dataset_name)
    path, options = Path(name), {"name": config.dataset_config_name}
    try:
        if path.is_file():
            if path.suffix.lower() not in _READERS:
                raise ValueError(f"a file must end in one of {', '.join(_READERS)}")
            parts = datasets.load_dataset(_READERS[path.suffix.lower()], data_files=name, streaming=True)
        else:
            parts = datasets.load_dataset(name, streaming=True, **options)
    except Exception as error:  # the library's own, the Hub's, those of file systems
        raise DataError(
            f"cannot read dataset_name {name}: {str(error).strip().splitlines()[0]}; give a Hub id, a folder of "
            f"images, parquet or tar files, or one such file"
        ) from error
    if config.dataset_split not in parts:
        raise DataError(f"{name} has no part {config.dataset_split}; give dataset_split, one of {', '.join(parts)}")
    rows = parts[config.dataset_split]
    return rows if rows.features is not None else rows._resolve_features()


def _image_column(rows: Any, config: DataConfig) -> str:
    """The column of photos: the one that was asked for, `image`, or the only one of images.

    Raises:
        DataError: there is none of that name, or there are several.
    """
    if config.image_column is not None:
        _check_column(rows, config.image_column, option="image_column", name=str(config.dataset_name))
        return config.image_column
    images = [name for name, kind in rows.features.items() if type(kind).__name__ == "Image"]
    if "image" in rows.features or len(images) == 1:
        return "image" if "image" in rows.features else images[0]
    raise DataError(
        f"{config.dataset_name} has {len(images) or 'no'} columns of images, and none called image; give "
        f"image_column, one of {_listed(rows)}"
    )


def _check_column(rows: Any, column: str, *, option: str, name: str) -> None:
    if column not in rows.features:
        raise DataError(f"{name} has no column {column!r}; give {option}, one of {_listed(rows)}")


def _listed(rows: Any) -> str:
    return ", ".join(rows.features)


def _undecoded() -> Any:
    import datasets

    return datasets.Image(decode=False)


def _folder(config: DataConfig) -> Path:
    """Where images without a file of their own are kept."""
    if config.cache_dir:
        return Path(config.cache_dir) / "photos"
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "delora_photos"


def _file_of(value: Mapping[str, Any] | None, folder: Path, seen: Counter[str], *, where: str) -> Path:
    """The file of an image: the one it is in already, or one that is written.

    Args:
        seen: how often each content came before; a second one gets a file of its own, as it may have another caption.

    Raises:
        DataError: there is no image.
    """
    path, content = (value or {}).get("path"), (value or {}).get("bytes")
    if content is None and path and Path(path).is_file():
        return Path(path)
    if not content:
        raise DataError(f"{where}: there is no image; take the row out, or give image_column")
    digest = hashlib.sha256(content).hexdigest()[:32]
    file = folder / f"{digest}{f'-{seen[digest]}' if seen[digest] else ''}{_ending(content, path)}"
    seen[digest] += 1
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with complete_file(file) as aside:
            aside.write_bytes(content)
    return file


def _ending(content: bytes, path: str | None) -> str:
    """The ending of the image's name, or the usual one of its format."""
    ending = Path(path or "").suffix.lower()
    if ending in image_suffixes():
        return ending
    try:
        with Image.open(io.BytesIO(content)) as image:
            return {"JPEG": ".jpg", "TIFF": ".tif"}.get(str(image.format), f".{str(image.format).lower()}")
    except OSError:
        return ".png"  # whoever reads it says what is wrong
