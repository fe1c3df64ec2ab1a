"""Photos and captions: what a folder may hold, how each kind of picture is read, and which crops are taken."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from delora_diffusion.data.config import DataConfig
from delora_diffusion.data.photos import (
    IMAGE_SUFFIXES,
    DataError,
    Example,
    View,
    class_examples,
    find_images,
    instance_examples,
    load_image,
    read_captions,
)

from .. import tiny

ORIENTATION = 0x0112

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


def pixels_of(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return tiny.as_array(image)


def folder_of(tmp_path: Path, **texts: str) -> Path:
    """One photo a.png, and text files beside it (`a_txt` is a.txt)."""
    saved(tmp_path / "photos" / "a.png", Image.fromarray(noise()))
    for name, text in texts.items():
        (tmp_path / "photos" / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return tmp_path / "photos"


# ---- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: None, "does not exist; give the folder"),
        (lambda path: path.write_text("x"), "is a file; give the folder"),
        (lambda path: path.mkdir(), "has no images: it is empty; put"),
        (lambda path: (path / "sub").mkdir(parents=True), "has no images: it holds sub/; put"),
        (
            lambda path: [path.mkdir(), (path / "notes.txt").touch(), (path / "clip.gif").touch()],
            "has no images: it holds clip.gif, notes.txt; put .bmp, .jpeg, .jpg, .png, .tif, .tiff, .webp files",
        ),
        (lambda path: (path / "album.png").mkdir(parents=True), "has no images: it holds album.png/"),
        (lambda path: [path.mkdir(), (path / "._a.png").touch()], "has no images: it holds ._a.png"),
    ],
    ids=["missing", "file", "empty", "folders only", "other files only", "folder called .png", "hidden file"],
)
def test_a_folder_without_photos_is_refused_with_what_it_holds(make: Any, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    make(folder)
    with pytest.raises(DataError) as refused:
        instance_examples(config(folder), seed=0)
    assert f"instance_data_dir {folder} {said}" in str(refused.value)


def test_images_are_found_by_suffix_in_any_case_and_in_order_of_name(tmp_path: Path) -> None:
    wanted = sorted([*(f"{i}{suffix}" for i, suffix in enumerate(IMAGE_SUFFIXES)), "Z.PNG", "x.JPeG"])
    others = [".hidden.png", "a.txt", "metadata.jsonl", "moving.gif", "Thumbs.db", "raw.heic", "noname"]
    for name in (*wanted, *others):
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path, option="x")] == wanted


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


# ---- reading photos -------------------------------------------------------------------------------


def test_lossless_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    for suffix in ("png", "bmp", "tif"):
        path = saved(tmp_path / f"a.{suffix}", Image.fromarray(noise()))
        assert np.array_equal(pixels_of(path), noise())


#: orientation -> how a viewer must transform the stored pixels (height, width, bands), EXIF 2.32 table 6
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),  # clockwise by 90 degrees
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotated_photos_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = saved(tmp_path / "a.png", Image.fromarray(noise()), exif=exif)
    assert np.array_equal(pixels_of(path), UPRIGHT[orientation](noise()))
    (example,) = instance_examples(config(tmp_path), seed=0)
    width, height = load_image(path).size
    assert example.views[0].box == ((width - 8) // 2, (height - 8) // 2, (width + 8) // 2, (height + 8) // 2)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_shown_on_white(mode: str, tmp_path: Path) -> None:
    colour, alpha = noise(), noise(bands=1, seed=1)
    alpha[:, 0], alpha[:, 1] = 0, 255
    if mode == "P":  # one colour of the palette is transparent
        image = Image.fromarray(noise(bands=1) % 4, mode="P")
        image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 255, 90, 90, 90])
        path = saved(tmp_path / "a.png", image, transparency=2)
        palette = np.array([[10, 20, 30], [200, 100, 0], [255, 255, 255], [90, 90, 90]])
        assert np.array_equal(pixels_of(path), palette[noise(bands=1) % 4])
        return
    grey = mode == "LA"
    image = Image.fromarray(np.dstack([colour[..., :1] if grey else colour, alpha]), mode=mode)
    found = pixels_of(saved(tmp_path / "a.png", image))
    shown = colour[..., :1].repeat(3, axis=2) if grey else colour
    expected = (shown * (alpha[..., None] / 255.0)) + 255 - alpha[..., None]
    assert np.abs(found - expected).max() <= 1
    assert (found[:, 0] == 255).all() and np.array_equal(found[:, 1], shown[:, 1])


def test_rgb_with_a_transparent_colour_is_shown_on_white(tmp_path: Path) -> None:
    pixels = np.full((4, 4, 3), 50, np.uint8)
    pixels[0] = (1, 2, 3)
    path = saved(tmp_path / "a.png", Image.fromarray(pixels), transparency=(1, 2, 3))
    found = pixels_of(path)
    assert (found[0] == 255).all() and (found[1:] == 50).all()


def test_grayscale_becomes_three_equal_bands(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(noise(bands=1)))
    assert np.array_equal(pixels_of(path), noise(bands=1)[..., None].repeat(3, axis=2))
    bits = saved(tmp_path / "b.png", Image.fromarray(noise(bands=1) > 127))
    assert set(np.unique(pixels_of(bits))) == {0, 255}


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_pictures_are_scaled_not_clipped(suffix: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)
    found = pixels_of(saved(tmp_path / f"a.{suffix}", Image.fromarray(values)))
    assert np.abs(found - (values / 65535 * 255)[..., None]).max() <= 0.5 + 1e-9


def test_cmyk_photos_have_the_colours_they_were_made_of(tmp_path: Path) -> None:
    for colour in ((255, 0, 0), (20, 160, 80), (250, 250, 250)):
        image = Image.new("RGB", (16, 16), colour).convert("CMYK")
        found = pixels_of(saved(tmp_path / "a.jpg", image, quality=95))
        assert np.abs(found - np.array(colour)).max() <= 4
    assert Image.open(tmp_path / "a.jpg").mode == "CMYK"


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_of_a_moving_picture_the_first_frame_is_taken(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    path = saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], lossless=True)
    assert (pixels_of(path) == (255, 0, 0)).all()


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9])
def test_a_truncated_photo_is_named(suffix: str, share: float, tmp_path: Path) -> None:
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(noise((40, 30))))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError) as refused:
        instance_examples(config(tmp_path), seed=0)
    assert f"cannot read the image {path}: " in str(refused.value)
    assert "take it out of the folder" in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"just text", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_another_file_called_jpg_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the image .*a\.jpg"):
        instance_examples(config(tmp_path), seed=0)


@pytest.mark.parametrize("kind", [1, 2, 7], ids=["byte", "text", "undefined"])
def test_a_photo_whose_exif_pillow_cannot_write_again_is_named(kind: int, tmp_path: Path) -> None:
    """Turning a photo upright writes its EXIF anew; a resolution stored as text makes that a TypeError."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x011A] = 6, 1.5
    data = bytearray(saved(tmp_path / "a.jpg", Image.fromarray(noise()), exif=exif).read_bytes())
    entry = data.index(struct.pack(">HH", 0x011A, 5))
    data[entry : entry + 4] = struct.pack(">HH", 0x011A, kind)
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(DataError, match=r"cannot read the image .*a\.jpg"):
        load_image(tmp_path / "a.jpg")


# ---- captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, prompt, caption",
    [
        (
            {"a_txt": "from text\n", "metadata_jsonl": '{"file_name": "a.png", "text": "listed"}'},
            "prompt",
            "from text",
        ),
        ({"metadata_jsonl": '{"file_name": "a.png", "text": " listed "}'}, "prompt", "listed"),
        ({"metadata_jsonl": '\n{"file_name": "a.png", "caption": "listed"}\n\n'}, None, "listed"),
        ({"metadata_jsonl": '{"file_name": "a.png", "prompt": "listed"}'}, None, "listed"),
        ({"metadata_jsonl": '{"file_name": "b.png", "text": "another"}'}, "prompt", "prompt"),
        ({"b_txt": "another"}, "prompt", "prompt"),
        ({"a_txt": "\ufeffein Hund, süß"}, None, "ein Hund, süß"),
        ({"metadata_jsonl": '\ufeff{"file_name": "a.png", "text": "süß"}'}, None, "süß"),
    ],
)
def test_a_caption_is_the_text_beside_else_the_metadata_else_the_prompt(
    texts: dict[str, str], prompt: str | None, caption: str, tmp_path: Path
) -> None:
    (example,) = instance_examples(config(folder_of(tmp_path, **texts), instance_prompt=prompt), seed=0)
    assert example.caption == caption and example.weight == 1.0


@pytest.mark.parametrize(
    "texts, said",
    [
        ({}, "a.png has no caption: there is none; give instance_prompt, write a.txt, or use metadata.jsonl"),
        ({"a_txt": " \n"}, "a.png has no caption: a.txt is empty"),
        ({"metadata_jsonl": '{"file_name": "a.png", "text": ""}'}, "a.png has no caption"),
        ({"metadata_jsonl": '{"file_name": "a.png", "text": "x"}\n{"file_name'}, "metadata.jsonl line 2 is not"),
        ({"metadata_jsonl": '{"file": "a.png", "text": "x"}'}, "metadata.jsonl line 1 is not"),
        ({"metadata_jsonl": '{"file_name": "a.png"}'}, "metadata.jsonl line 1 is not"),
        ({"metadata_jsonl": '{"file_name": "a.png", "text": 3}'}, "metadata.jsonl line 1 is not"),
        ({"metadata_jsonl": '["a.png", "x"]'}, "metadata.jsonl line 1 is not"),
        ({"metadata_jsonl": '{"file_name": ["a.png"], "text": "x"}'}, "metadata.jsonl line 1 is not"),
    ],
)
def test_a_photo_without_a_usable_caption_is_named(texts: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        instance_examples(config(folder_of(tmp_path, **texts), instance_prompt=None), seed=0)
    assert said in str(refused.value)


def test_an_empty_text_file_is_not_overruled_by_the_prompt(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt is empty"):
        instance_examples(config(folder_of(tmp_path, a_txt=""), instance_prompt="prompt"), seed=0)


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_text_that_is_not_utf8_is_named(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / name).write_bytes("süß".encode("latin-1"))
    with pytest.raises(DataError, match=rf"cannot read .*{name}.*save it as UTF-8"):
        instance_examples(config(folder), seed=0)


def test_each_photo_has_its_own_caption(tmp_path: Path) -> None:
    paths = tiny.photos(tmp_path, 3)
    lines = [json.dumps({"file_name": path.name, "text": f"listed {path.stem}"}) for path in reversed(paths)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "01.txt").write_text("beside 01")
    captions = read_captions(tmp_path, paths, default="prompt")
    assert [captions[path] for path in paths] == ["listed 00", "beside 01", "listed 02"]


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
        Example(path=Path("a.png"), caption=caption, weight=1.0, views=(view,), content="abc")
        for caption in ("a dog", "a cat")
    )
    assert first.key(view) == second.key(view)
