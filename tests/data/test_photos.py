"""Photos as examples: which crops are taken, what their pixels are, what names them, what is told of a folder."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from delora_diffusion.data.config import DataConfig
from delora_diffusion.data.image_files import DataError
from delora_diffusion.data.photos import Example, View, class_examples, describe_sizes, instance_examples

from .. import tiny

# ---- helpers -------------------------------------------------------------------------------------


def config(folder: Path, **fields: Any) -> DataConfig:
    defaults: dict[str, Any] = {"instance_prompt": "a photo", "resolution": 16}
    return DataConfig(instance_data_dir=str(folder), **defaults | fields)


def noise(size: tuple[int, int] = (12, 8), bands: int = 3, seed: int = 0) -> np.ndarray:
    """Random pixels (height, width, bands) for a picture of `size` (width, height)."""
    shape = (size[1], size[0]) + ((bands,) if bands > 1 else ())
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def folder_of(tmp_path: Path, **texts: str) -> Path:
    """One photo a.png, and text files beside it (`a_txt` is a.txt)."""
    saved(tmp_path / "photos" / "a.png", Image.fromarray(noise()))
    for name, text in texts.items():
        (tmp_path / "photos" / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return tmp_path / "photos"


def test_class_images_are_the_first_so_many_with_the_priors_weight(tmp_path: Path) -> None:
    tiny.photos(tmp_path / "dogs", 4)
    prior: dict[str, Any] = {
        "with_prior_preservation": True, "class_data_dir": str(tmp_path / "dogs"), "class_prompt": "a dog",
        "num_class_images": 3, "prior_loss_weight": 0.25,
    }  # fmt: skip
    examples = class_examples(config(tmp_path, **prior), seed=0)
    assert [e.path.name for e in examples] == ["00.png", "01.png", "02.png"]
    assert {(e.caption, e.weight) for e in examples} == {("a dog", 0.25)}
    assert class_examples(config(tmp_path), seed=0) == []
    with pytest.raises(DataError, match=r"class_data_dir .* does not exist"):
        class_examples(config(tmp_path, **prior | {"class_data_dir": str(tmp_path / "cats")}), seed=0)


# ---- what is told -------------------------------------------------------------------------------------


def test_what_of_a_folder_is_not_used_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path, b_txt="a stray caption")
    saved(folder / "sub" / "b.png", Image.fromarray(noise()))
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for name in ("clip.mp4", "Thumbs.db", ".DS_Store", "._a.png", "desktop.ini"):
        (folder / name).touch()
    with caplog.at_level(logging.INFO, logger="delora_diffusion"):
        instance_examples(config(folder), seed=0)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: 1 photos; captions: 1 from the prompt",
        f"{folder}: 3 left out: clip.mp4, gone.jpg (a link to nothing), sub/ (a folder)",
        f"{folder}: 1 captions not used: b.txt (no photo here is called b)",
    ]


def test_nothing_is_told_of_a_folder_that_is_used_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        instance_examples(config(folder_of(tmp_path, a_txt="a dog")), seed=0)
    assert not caplog.records


@pytest.mark.parametrize(("resolution", "told"), [(8, None), (16, "1 of 2 are smaller"), (32, "2 of 2 are smaller")])
def test_photos_that_are_enlarged_are_told(resolution: int, told: str | None, tmp_path: Path) -> None:
    saved(tmp_path / "tiny.png", Image.fromarray(noise((12, 8))))
    saved(tmp_path / "large.png", Image.fromarray(noise((20, 20))))
    data = config(tmp_path, resolution=resolution)
    text = describe_sizes(instance_examples(data, seed=0), data)
    assert f"tiny.png {resolution / 8:.1f} times" in text and told in text if told else "enlarged" not in text


# ---- views and pixels -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, box", [((24, 20), (2, 0, 22, 20)), ((20, 30), (0, 5, 20, 25)), ((16, 16), (0, 0, 16, 16))]
)
def test_the_centre_crop_is_the_largest_square_in_the_middle(
    size: tuple[int, int], box: tuple[int, ...], tmp_path: Path
) -> None:
    saved(tmp_path / "a.png", Image.fromarray(noise(size)))
    (example,) = instance_examples(config(tmp_path), seed=0)
    assert example.views == (View(box, False, (16, 16)),)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(90, 20), (20, 90)])
def test_random_crops_are_largest_squares_inside_the_photo_that_differ_with_the_seed(
    size: tuple[int, int], tmp_path: Path
) -> None:
    saved(tmp_path / "a.png", Image.fromarray(noise(size)))
    crops = config(tmp_path, center_crop=False, num_crops=6)
    ((first,), (again,), (other,)) = (instance_examples(crops, seed=seed) for seed in (0, 0, 1))
    assert first.views == again.views != other.views
    assert len(first.views) == 6 and len(set(first.views)) > 3
    for left, top, right, bottom in (view.box for view in first.views):
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        assert right - left == bottom - top == 20


def test_two_photos_are_not_cropped_at_the_same_places(tmp_path: Path) -> None:
    tiny.photos(tmp_path, 2, size=(200, 20))
    first, second = instance_examples(config(tmp_path, center_crop=False), seed=0)
    assert first.views != second.views


def test_a_square_photo_has_one_crop_only(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", Image.fromarray(noise((16, 16))))
    (example,) = instance_examples(config(tmp_path, center_crop=False, num_crops=5), seed=0)
    assert len(example.views) == 1


def test_with_random_flip_every_crop_is_there_both_ways(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", Image.fromarray(noise((60, 16))))
    crops = config(tmp_path, center_crop=False, num_crops=3, random_flip=True)
    (example,) = instance_examples(crops, seed=0)
    assert [view.flip for view in example.views] == [False, True] * 3
    assert [v.box for v in example.views[::2]] == [v.box for v in example.views[1::2]]


def test_pixels_are_the_box_scaled_to_minus_one_and_one(tmp_path: Path) -> None:
    pixels = noise((24, 20))
    pixels[0, 2], pixels[0, 3] = 0, 255
    saved(tmp_path / "a.png", Image.fromarray(pixels))
    (example,) = instance_examples(config(tmp_path, resolution=24), seed=0)
    found = example.pixels(replace(example.views[0], size=(20, 20)))  # as large as the crop: nothing is resampled
    expected = torch.from_numpy(pixels[:, 2:22].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert (found[:, 0, 0] == -1).all() and (found[:, 0, 1] == 1).all()


@pytest.mark.parametrize("size", [8, 16, 64])
def test_pixels_have_the_size_asked_for_and_stay_in_range(size: int, tmp_path: Path) -> None:
    saved(tmp_path / "a.png", Image.fromarray(noise((24, 20))))
    (example,) = instance_examples(config(tmp_path, resolution=size), seed=0)
    found = example.pixels(example.views[0])
    assert found.shape == (3, size, size) and -1 <= found.min() < -0.2 < 0.2 < found.max() <= 1


def test_a_photo_is_scaled_without_shifting_it(tmp_path: Path) -> None:
    """Mirroring before or after scaling makes no difference, so neither side is favoured."""
    saved(tmp_path / "a.png", Image.fromarray(noise((40, 40))))
    saved(tmp_path / "b.png", ImageOps.mirror(Image.fromarray(noise((40, 40)))))
    plain, mirrored = instance_examples(config(tmp_path), seed=0)
    assert torch.equal(plain.pixels(plain.views[0]).flip(-1), mirrored.pixels(mirrored.views[0]))


def test_a_flipped_view_is_the_mirrored_picture(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", Image.fromarray(noise((24, 20))))
    (example,) = instance_examples(config(tmp_path, random_flip=True), seed=0)
    plain, flipped = (example.pixels(view) for view in example.views)
    assert torch.equal(flipped, plain.flip(-1)) and not torch.equal(flipped, plain)


# ---- keys -----------------------------------------------------------------------------------------


def keys(folder: Path, **fields: Any) -> list[str]:
    examples = instance_examples(config(folder, **fields), seed=0)
    return [example.key(view) for example in examples for view in example.views]


def test_a_key_depends_on_the_content_not_on_the_name(tmp_path: Path) -> None:
    for name, seed in (("a.png", 0), ("b.png", 0), ("c.png", 1)):
        saved(tmp_path / name, Image.fromarray(noise(seed=seed)))
    first, copy, other = keys(tmp_path)
    assert first == copy != other
    saved(tmp_path / "a.png", Image.fromarray(noise(seed=2)))
    assert keys(tmp_path)[0] not in (first, other)


def test_a_key_depends_on_crop_flip_and_size(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", Image.fromarray(noise((60, 16))))
    found = keys(tmp_path, center_crop=False, num_crops=3, random_flip=True)
    assert len(set(found)) == 6
    assert not set(found) & set(keys(tmp_path, resolution=24, center_crop=False, num_crops=3, random_flip=True))


def test_the_caption_is_not_part_of_the_key_of_the_pixels() -> None:
    view = View((0, 0, 8, 8), False, (16, 16))
    first, second = (
        Example(path=Path("a.png"), caption=caption, weight=1.0, size=(8, 8), views=(view,), content="abc")
        for caption in ("a dog", "a cat")
    )
    assert first.key(view) == second.key(view)
