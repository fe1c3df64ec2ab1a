"""Data sets, in every form that datasets reads: the same examples as a folder of the same pictures."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from delora_diffusion.data.config import DataConfig
from delora_diffusion.data.image_files import DataError
from delora_diffusion.data.photos import Example, instance_examples

from .. import tiny

datasets = pytest.importorskip("datasets")
CAPTIONS = ["a sks dog on grass", "a sks dog", "a sks dog asleep"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos with captions in metadata.jsonl: a folder of ours, and an imagefolder."""
    paths = tiny.photos(tmp_path / "photos")
    rows = [{"file_name": path.name, "text": text} for path, text in zip(paths, CAPTIONS, strict=True)]
    (tmp_path / "photos" / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path / "photos"


def parquet(folder: Path, to: Path) -> Path:
    contents = [path.read_bytes() for path in sorted(folder.glob("*.png"))]
    values = {"picture": [{"bytes": content, "path": None} for content in contents], "text": CAPTIONS}
    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(values, features=features).to_parquet(str(to / "set.parquet"))
    return to / "set.parquet"


def webdataset(folder: Path, to: Path) -> Path:
    with tarfile.open(to / "set.tar", "w") as tar:
        for path, text in zip(sorted(folder.glob("*.png")), CAPTIONS, strict=True):
            (to / f"{path.stem}.txt").write_text(text)
            tar.add(path, path.name)
            tar.add(to / f"{path.stem}.txt", f"{path.stem}.txt")
    return to / "set.tar"


def config(**fields: Any) -> DataConfig:
    return DataConfig(resolution=16, **fields)


def told(examples: list[Example]) -> list[Any]:
    return [(e.content, e.caption, e.weight, e.size, [e.key(view) for view in e.views]) for e in examples]


def test_an_imagefolder_parquet_and_webdataset_give_the_examples_of_the_folder(folder: Path, tmp_path: Path) -> None:
    expected = told(instance_examples(config(instance_data_dir=str(folder)), seed=0))
    cache = {"cache_dir": str(tmp_path / "cache")}
    only = tmp_path / "parquets"
    only.mkdir()
    shutil.copy(parquet(folder, tmp_path), only)
    for name, column, kept in (
        (folder, "text", 0), (tmp_path / "set.parquet", "text", 3), (only, "text", 3),
        (webdataset(folder, tmp_path), "txt", 3),
    ):  # fmt: skip
        found = instance_examples(config(dataset_name=str(name), caption_column=column, **cache), seed=0)
        assert told(found) == expected, name
        assert len(list((tmp_path / "cache").glob("photos/*"))) == kept, "files are used where they are"
    again = config(dataset_name=str(only), image_column="picture", instance_prompt="a dog", repeats=2, **cache)
    assert [(e.caption, e.repeats) for e in instance_examples(again, seed=0)] == [("a dog", 2)] * 3
    assert len(list((tmp_path / "cache").glob("photos/*"))) == 3, "content is kept once"


def test_masks_in_an_imagefolder_are_masks(folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    shutil.copy(folder / "01.png", folder / "01_mask.png")
    found = instance_examples(config(dataset_name=str(folder), instance_prompt="a dog"), seed=0)
    assert told(found) == told(
        instance_examples(config(instance_data_dir=str(folder), instance_prompt="a dog"), seed=0)
    )
    assert [(e.path.name, e.mask is not None) for e in found] == [
        ("00.png", False), ("01.png", True), ("02.png", False)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"image_column": "img"}, "has no column 'img'; give image_column, one of picture, text"),
        ({"caption_column": "caption"}, "has no column 'caption'; give caption_column, one of picture, text"),
        ({"image_column": "text"}, "column text: there is no image"),
        ({"dataset_split": "test"}, "has no part test; give dataset_split, one of train"),
        ({}, "row 0 has no caption; give caption_column, one of picture, text, or instance_prompt"),
    ],
)
def test_what_a_data_set_does_not_have_is_named(
    folder: Path, tmp_path: Path, fields: dict[str, str], said: str
) -> None:
    name = str(parquet(folder, tmp_path))
    with pytest.raises(DataError, match=said):
        instance_examples(config(dataset_name=name, cache_dir=str(tmp_path / "cache"), **fields), seed=0)


def test_a_set_without_images_or_rows_and_none_at_all_are_refused(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a dog"}\n')
    with pytest.raises(DataError, match="has no columns of images, and none called image; give image_column"):
        instance_examples(config(dataset_name=str(tmp_path / "texts.jsonl"), instance_prompt="x"), seed=0)
    with pytest.raises(DataError, match=r"cannot read dataset_name .*set.txt: a file must end in one of .parquet"):
        (tmp_path / "set.txt").write_text("x")
        instance_examples(config(dataset_name=str(tmp_path / "set.txt")), seed=0)
    with pytest.raises(DataError, match="cannot read dataset_name nobody/nothing: "):
        instance_examples(config(dataset_name="nobody/nothing"), seed=0)
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": []}, features=features).to_parquet(str(tmp_path / "none.parquet"))
    with pytest.raises(DataError, match=r"none.parquet.* (has no rows|cannot read)"):
        instance_examples(config(dataset_name=str(tmp_path / "none.parquet"), instance_prompt="x"), seed=0)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "delora_diffusion\[datasets\]"'):
        instance_examples(config(dataset_name="nobody/nothing"), seed=0)
