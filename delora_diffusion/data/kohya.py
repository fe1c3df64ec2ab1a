"""kohya's ways to say what is trained on, as our options: folders called by repeats, and the TOML of a data set."""

from __future__ import annotations

import difflib
import importlib
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..options import OptionError

log = logging.getLogger(__name__)
_NUMBERED = re.compile(r"(\d+)_(.+)")
_SUBSET = ("image_dir", "num_repeats", "class_tokens", "is_reg")
#: Settings that are options here under another name.
_RENAMED = {"batch_size": "train_batch_size", "flip_aug": "random_flip", "shuffle_caption": "shuffle_caption",
            "keep_tokens": "keep_tokens", "caption_dropout_rate": "caption_dropout"}  # fmt: skip
#: Of these one value says what is done here anyway, or what another option does.
_SPECIAL = ("resolution", "enable_bucket", "random_crop", "alpha_mask")
_WITHOUT_EFFECT = {
    "buckets follow from resolution": "min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale",
    "captions are found under every usual ending": "caption_extension",
    "everything is encoded once": "cache_latents cache_latents_to_disk cache_text_encoder_outputs skip_cache_check",
}
#: Settings of which nothing can come unless they have this value.
_REFUSED = {
    "color_aug": False, "face_crop_aug_range": None, "caption_prefix": None, "caption_suffix": None,
    "caption_separator": ",", "keep_tokens_separator": None, "secondary_separator": None, "enable_wildcard": False,
    "caption_dropout_every_n_epochs": 0, "caption_tag_dropout_rate": 0.0, "token_warmup_min": 1,
    "token_warmup_step": 0, "conditioning_data_dir": None, "metadata_file": None, "network_multiplier": 1.0,
}  # fmt: skip


def concepts_in(train: str, regularisation: str | None = None) -> dict[str, Any]:
    """The options that kohya's folders stand for: a concept for each `10_sks dog`, with its repeats and caption.

    Args:
        train: the folder that holds these; or one with `img`, and perhaps `reg`, in it.
        regularisation: the same of images of classes.

    Raises:
        OptionError: no such folder, or nothing in it that is called by repeats.
    """
    subjects, classes = Path(train).expanduser(), Path(regularisation).expanduser() if regularisation else None
    if not list(_numbered(subjects)) and list(_numbered(subjects / "img")):
        classes = classes or (subjects / "reg" if list(_numbered(subjects / "reg")) else None)
        subjects = subjects / "img"
    concepts: dict[str, dict[str, str]] = {}
    for option, folder, role in (("train_data_dir", subjects, "subject"), ("reg_data_dir", classes, "class")):
        found = list(_numbered(folder)) if folder else []
        if folder is not None and not found:
            state = "does not exist" if not folder.is_dir() else "holds no folder called by repeats"
            raise OptionError(
                f"{option} {folder} {state}; photos lie in folders such as {folder / '10_sks dog'} (or give "
                f"the folder with the photos themselves as instance_data_dir)"
            )
        for repeats, prompt, path in found:
            name = prompt if prompt not in concepts else path.name
            shown = {"folder": str(path), "prompt": prompt, "repeats": repeats}
            concepts[name if name not in concepts else str(path)] = shown | ({"role": role} if role == "class" else {})
    return {"concepts": concepts}


def _numbered(folder: Path | None) -> Iterator[tuple[str, str, Path]]:
    """Repeats, caption and path of the folders that are called by these."""
    for path in sorted(folder.iterdir()) if folder and folder.is_dir() else ():
        if path.is_dir() and (match := _NUMBERED.fullmatch(path.name)):
            yield match[1], match[2].strip(), path


def options_of_toml(file: str) -> dict[str, Any]:
    """The options that kohya's TOML of a data set stands for.

    Raises:
        OptionError: it cannot be read, a key that is not known, settings that differ between its parts, or one of
            which nothing can come here.
    """
    settings: dict[str, Any] = {}
    concepts: dict[str, dict[str, str]] = {}
    whole = _read(file)
    _check_keys(whole, ("general", "datasets"), file)
    for dataset in whole.get("datasets") or []:
        for subset in dataset.get("subsets") or []:
            given = {**whole.get("general", {}), **dataset, **subset}
            del given["subsets"]
            _check_keys(given, (*_SUBSET, *_settings()), file)
            _add(settings, {key: value for key, value in given.items() if key not in _SUBSET}, file)
            concept = _concept(given, file)
            name = concept.get("prompt") or Path(concept["folder"]).name
            concepts[name if name not in concepts else concept["folder"]] = concept
    if not concepts:
        raise OptionError(f"{file} names no photos; it needs [[datasets]], [[datasets.subsets]] and an image_dir")
    return _options(settings, file) | {"concepts": concepts}


def _read(file: str) -> dict[str, Any]:
    try:
        tomllib = importlib.import_module("tomllib")
    except ImportError:  # Python 3.10
        tomllib = importlib.import_module("tomli")
    try:
        content: dict[str, Any] = tomllib.loads(Path(file).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read dataset_config {file}: {error}") from error
    return content


def _settings() -> tuple[str, ...]:
    ignored = [name for names in _WITHOUT_EFFECT.values() for name in names.split()]
    return (*_RENAMED, *_SPECIAL, *ignored, *_REFUSED)


def _check_keys(given: Mapping[str, Any], known: tuple[str, ...], file: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise OptionError(f"{file}: unknown key {key!r}{hint}")


def _add(settings: dict[str, Any], more: Mapping[str, Any], file: str) -> None:
    for key, value in more.items():
        if settings.setdefault(key, value) != value:
            raise OptionError(
                f"{file}: {key} is {settings[key]!r} in one part and {value!r} in another; here it is one for all"
            )
        if key in _REFUSED and value != _REFUSED[key]:
            raise OptionError(f"{file}: {key} {value!r} is not offered here; take it out")


def _concept(subset: Mapping[str, Any], file: str) -> dict[str, str]:
    if not subset.get("image_dir"):
        raise OptionError(f"{file}: a subset has no image_dir; give the folder with its photos")
    values = {"folder": str(subset["image_dir"]), "repeats": str(subset.get("num_repeats", 1))}
    if subset.get("class_tokens"):
        values["prompt"] = str(subset["class_tokens"])
    return values | ({"role": "class"} if subset.get("is_reg") else {})


def _options(settings: Mapping[str, Any], file: str) -> dict[str, Any]:
    options = {ours: settings[theirs] for theirs, ours in _RENAMED.items() if theirs in settings}
    for reason, names in _WITHOUT_EFFECT.items():
        if given := [name for name in names.split() if name in settings]:
            log.info("%s: %s without effect, %s", file, ", ".join(given), reason)
    size = settings.get("resolution", 512)
    width, height = size if isinstance(size, list) else (size, size)
    options["resolution"] = width if width == height else 8 * round(math.sqrt(width * height) / 8)
    if settings.get("enable_bucket"):
        options["aspect_ratio_buckets"] = "auto"
    elif width != height:
        options["aspect_ratio_buckets"] = f"{height},{width}"
    if settings.get("random_crop"):
        options["center_crop"] = False
    if settings.get("alpha_mask"):
        options["masks"] = "alpha"
    return options
