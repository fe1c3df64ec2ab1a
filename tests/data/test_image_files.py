"""Image files: which of a folder are read, and how each kind of picture becomes RGB."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from delora_diffusion.data.image_files import DataError, find_images, image_suffixes, left_out, load_image
from delora_diffusion.data.photos import instance_examples

from .. import tiny
from .test_photos import config, noise, saved

ORIENTATION = 0x0112


def pixels_of(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return tiny.as_array(image)


# ---- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: None, "does not exist; give the folder"),
        (lambda path: path.write_text("x"), "is a file; give the folder"),
        (lambda path: path.mkdir(), "has no images: it is empty; put"),
        (lambda path: (path / "sub").mkdir(parents=True), "has no images: it holds sub/ (a folder); put"),
        (
            lambda path: [path.mkdir(), (path / "notes.txt").touch(), (path / "clip.mp4").touch()],
            "has no images: it holds clip.mp4, notes.txt; put .",
        ),
        (lambda path: (path / "album.png").mkdir(parents=True), "has no images: it holds album.png/ (a folder)"),
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
    wanted = sorted([*(f"{i}{suffix}" for i, suffix in enumerate(image_suffixes())), "Z.PNG", "x.JPeG"])
    others = [".hidden.png", "a.txt", "metadata.jsonl", "moving.mp4", "Thumbs.db", "noname"]
    for name in (*wanted, *others):
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path, option="x")] == wanted
    assert left_out(tmp_path, find_images(tmp_path, option="x")) == ["a.txt", "metadata.jsonl", "moving.mp4", "noname"]


@pytest.mark.parametrize("suffix", ["gif", "jfif", "jp2", "tga", "ppm", "avif", "heic"])
def test_a_photo_is_read_in_every_format_there_is_a_reader_for(suffix: str, tmp_path: Path) -> None:
    if f".{suffix}" not in image_suffixes():
        pytest.skip(f"{suffix} is not read here")
    pixels = np.full((16, 24, 3), (200, 90, 30), np.uint8)
    kind = {"jfif": "JPEG"}.get(suffix)
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(pixels), **({"format": kind} if kind else {}))
    assert find_images(tmp_path, option="x") == [path]
    assert np.abs(pixels_of(path) - pixels).max() <= 6


def test_what_cannot_be_read_here_is_left_out_with_what_would_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("delora_diffusion.data.image_files.image_suffixes", lambda: (".png",))
    for name in ("a.heic", "b.AVIF", "c.png", "d.xyz"):
        (tmp_path / name).touch()
    assert left_out(tmp_path, find_images(tmp_path, option="x")) == [
        'a.heic (pip install "delora_diffusion[heic]" reads it)', "b.AVIF (Pillow 11.3 or newer reads it)", "d.xyz"
    ]  # fmt: skip


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


#: kind -> values that stand for 0, 1/4, 1/2, 3/4 and 1 of white, and the TIFF's sample format
DEEP = {
    "float of 0 to 1": np.linspace(0, 1, 5, dtype=np.float32),
    "float of 0 to 255": np.linspace(0, 255, 5, dtype=np.float32),
    "float of 0 to 65535": np.linspace(0, 65535, 5, dtype=np.float32),
    "32 bits": np.linspace(0, 2**31 - 1, 5).astype(np.int32),
    "16 bits in 32": np.linspace(0, 65535, 5).astype(np.int32),
    "8 bits in 32": np.linspace(0, 255, 5).astype(np.int32),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_tiffs_are_scaled_by_the_range_of_their_values(kind: str, tmp_path: Path) -> None:
    found = pixels_of(saved(tmp_path / "a.tif", Image.fromarray(DEEP[kind][None])))
    assert np.abs(found[0, :, 0] - np.linspace(0, 255, 5)).max() <= 1


def with_tag(path: Path, tag: int, before: int, after: int) -> Path:
    """A TIFF file with another value of a tag that is one short number."""
    data = bytearray(path.read_bytes())
    entry = data.index(struct.pack("<HHIH", tag, 3, 1, before))
    data[entry + 8 : entry + 10] = struct.pack("<H", after)
    path.write_bytes(data)
    return path


def test_unsigned_32_bits_and_white_as_zero_are_heeded(tmp_path: Path) -> None:
    values = Image.fromarray(np.array([[0, 2**31 - 1, -1]], np.int32))  # -1 holds the bits of 2^32 - 1
    plain = pixels_of(with_tag(saved(tmp_path / "a.tif", values), 339, 2, 1))
    assert np.abs(plain[0, :, 0] - [0, 127, 255]).max() <= 1
    grey = Image.fromarray(np.array([[0, 13107, 65535]], np.uint16))
    inverted = pixels_of(with_tag(saved(tmp_path / "b.tif", grey), 262, 1, 0))
    assert inverted[0, :, 0].tolist() == [255, 204, 0]


def test_highlights_of_a_float_picture_are_clipped_and_what_is_no_number_is_refused(tmp_path: Path) -> None:
    bright = np.array([[-0.5, 0.5, 1.7, 9.0]], np.float32)
    assert pixels_of(saved(tmp_path / "a.tif", Image.fromarray(bright)))[0, :, 0].tolist() == [0, 128, 255, 255]
    bright[0, 0] = np.nan
    with pytest.raises(DataError, match=r"a\.tif: it holds values that are no numbers"):
        load_image(saved(tmp_path / "a.tif", Image.fromarray(bright)))


def png(rows: np.ndarray, depth: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey PNG file with these chunks before its pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = rows.shape
    lines = b"".join(b"\0" + row.astype(">u2" if depth == 16 else np.uint8).tobytes() for row in rows)
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    parts = [header, *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_16_bit_grey_with_a_transparent_value_is_scaled_and_shown_on_white(tmp_path: Path) -> None:
    values = np.array([[0, 7, 13107, 32896, 65535]])
    (tmp_path / "a.png").write_bytes(png(values, 16, (b"tRNS", struct.pack(">H", 7))))
    assert pixels_of(tmp_path / "a.png")[0, :, 0].tolist() == [0, 255, 51, 128, 255]


@pytest.mark.parametrize("chunk", [b"tEXt", b"zTXt", b"iTXt"])
@pytest.mark.parametrize("kept", [True, False], ids=["sound", "truncated"])
def test_a_png_with_a_text_too_long_for_pillow_is_read(chunk: bytes, kept: bool, tmp_path: Path) -> None:
    text = b"parameters, " * 400_000
    data = {
        b"tEXt": b"parameters\0" + text, b"zTXt": b"parameters\0\0" + zlib.compress(text),
        b"iTXt": b"parameters\0\1\0\0\0" + zlib.compress(text),
    }[chunk]  # fmt: skip
    values = noise(bands=1)
    content = png(values, 8, (chunk, data))
    (tmp_path / "a.png").write_bytes(content if kept else content[:-40])
    if kept:
        assert np.array_equal(pixels_of(tmp_path / "a.png")[..., 0], values)
        return
    with pytest.raises(DataError, match=r"cannot read the image .*a\.png"):
        load_image(tmp_path / "a.png")


def test_cmyk_photos_have_the_colours_they_were_made_of(tmp_path: Path) -> None:
    for colour in ((255, 0, 0), (20, 160, 80), (250, 250, 250)):
        image = Image.new("RGB", (16, 16), colour).convert("CMYK")
        found = pixels_of(saved(tmp_path / "a.jpg", image, quality=95))
        assert np.abs(found - np.array(colour)).max() <= 4
    assert Image.open(tmp_path / "a.jpg").mode == "CMYK"


@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_of_a_moving_picture_the_first_frame_is_taken(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    lossless = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **lossless)
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
