"""Contact sheets: where the pictures are, that labels are drawn, and that nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from delora_diffusion.sampling.contact_sheet import LARGEST, contact_sheet
from delora_diffusion.sampling.fonts import _font_for, font_for

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (100, 100)) -> Image.Image:
    return Image.new("RGB", size, colour)


def where(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels of a colour."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(axis=-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def ink(sheet: Image.Image, box: tuple[int, int, int, int]) -> int:
    """Pixels in `box` that are not white."""
    return int((np.asarray(sheet.crop(box)) != 255).any(axis=-1).sum())


def test_pictures_stand_on_a_grid_in_order_at_their_own_size() -> None:
    sheet = contact_sheet([[plain(RED), plain(GREEN)], [plain(BLUE), None]])
    red, green, blue = (where(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert [(r - l, b - t) for l, t, r, b in (red, green, blue)] == [(100, 100)] * 3
    assert red[1] == green[1] < blue[1] and red[0] == blue[0] < green[0]
    gap = green[0] - red[2]
    assert gap == blue[1] - red[3] > 0
    assert sheet.size == (200 + 3 * gap, 200 + 3 * gap) and sheet.mode == "RGB"
    assert ink(sheet, (0, 0, *sheet.size)) == 3 * 100 * 100, "pictures and nothing else"


@pytest.mark.parametrize("lengths", [(1, 3), (3, 1), (0, 2)])
def test_rows_may_differ_in_length(lengths: tuple[int, int]) -> None:
    sheet = contact_sheet([[plain(RED)] * lengths[0], [plain(BLUE)] * lengths[1]])
    full = contact_sheet([[plain(RED)] * max(lengths)] * 2)
    assert sheet.size == full.size
    assert ink(sheet, (0, 0, *sheet.size)) == sum(lengths) * 100 * 100


@pytest.mark.parametrize("cell, size", [(None, (200, 50)), (160, (40, 10)), (128, (512, 256))])
def test_pictures_are_fitted_into_the_cell_and_keep_their_proportions(cell: int | None, size: tuple[int, int]) -> None:
    sheet = contact_sheet([[plain(RED, size)]], cell=cell)
    left, top, right, bottom = where(sheet, RED)
    side = cell or max(size)
    assert right - left == side and bottom - top == round(side * size[1] / size[0])
    assert abs((top + bottom) / 2 - sheet.height / 2) <= 1, "in the middle of the cell"


def test_labels_are_drawn_left_of_their_row_and_above_their_column() -> None:
    rows = [[plain(RED), plain(GREEN)], [plain(BLUE), plain(BLUE)]]
    sheet = contact_sheet(rows, row_labels=["one", "two"], column_labels=["first", "second"])
    red, green, blue = (where(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert ink(sheet, (0, red[1], red[0], red[3])) > 20, "row label one"
    assert ink(sheet, (0, blue[1], blue[0], blue[3])) > 20, "row label two"
    assert ink(sheet, (red[0], 0, red[2], red[1])) > 20, "column label first"
    assert ink(sheet, (green[0], 0, green[2], green[1])) > 20, "column label second"
    assert ink(sheet, (0, 0, red[0], red[1])) == 0, "the corner is empty"


def test_another_label_gives_another_picture() -> None:
    first, second = (contact_sheet([[plain(RED)]], row_labels=[label]) for label in ("dog", "cat"))
    assert first.tobytes() != second.tobytes()


def test_a_missing_row_label_leaves_its_place_empty() -> None:
    sheet = contact_sheet([[plain(RED)], [plain(BLUE)]], row_labels=["one"])
    left, top, _, bottom = where(sheet, BLUE)
    assert ink(sheet, (0, top, left, bottom)) == 0


def test_a_long_column_label_is_wrapped_into_its_column() -> None:
    long = "a photo of a dog in the snow with a city in the background " * 2
    sheet = contact_sheet([[plain(RED), plain(GREEN)]], column_labels=[long, ""])
    red, green = where(sheet, RED), where(sheet, GREEN)
    assert ink(sheet, (green[0], 0, green[2], green[1])) == 0, "not over its neighbour"
    assert red[1] > 3 * 11, "several lines high"
    assert where(sheet, RED)[3] - red[1] == 100, "and not over its own picture"


def test_a_long_row_label_stays_left_of_the_pictures() -> None:
    sheet = contact_sheet([[plain(RED)]], row_labels=["a photo of a dog " * 4])
    left, top, right, bottom = where(sheet, RED)
    assert (right - left, bottom - top) == (100, 100) and left <= 100 + 2 * 6


def test_images_of_other_modes_are_drawn_as_rgb() -> None:
    sheet = contact_sheet([[Image.new("L", (100, 100), 128), Image.new("RGBA", (100, 100), (255, 0, 0, 255))]])
    assert (np.asarray(sheet) == 128).all(axis=-1).sum() == 100 * 100
    assert where(sheet, RED)[2] - where(sheet, RED)[0] == 100


def test_a_sheet_of_nothing_is_still_a_picture() -> None:
    assert min(contact_sheet([]).size) > 0 and min(contact_sheet([[None]]).size) >= 96


def test_a_sheet_of_very_many_pictures_stays_one_that_can_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LARGEST * 1.1 < Image.MAX_IMAGE_PIXELS  # type: ignore[operator]
    monkeypatch.setattr("delora_diffusion.sampling.contact_sheet.LARGEST", 100_000)
    sheet = contact_sheet([[plain(RED)] * 8] * 6)
    assert 80_000 <= sheet.width * sheet.height <= 110_000
    assert contact_sheet([[plain(RED)] * 2]).size == contact_sheet([[plain(RED)] * 2], cell=100).size


def test_a_label_in_another_script_is_drawn_with_a_font_that_has_it() -> None:
    for text in ("собака на снегу", "süße Hündin", "雪の中の犬", "a dog"):
        font = font_for(text, 17)
        if font is None:  # no such font on this system
            continue
        looks = {letter: bytes(font.getmask(letter)) for letter in set(text) - {" "}}
        assert len(set(looks.values())) == len(looks), "no two letters are the same box"
        labelled = contact_sheet([[plain(RED)]], row_labels=[text])
        assert labelled.tobytes() != contact_sheet([[plain(RED)]], row_labels=["row 1"]).tobytes()


def test_a_label_that_no_font_has_gives_way_to_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delora_diffusion.sampling.fonts._system_fonts", lambda: ())
    _font_for.cache_clear()
    try:
        named = contact_sheet([[plain(RED)]], row_labels=["雪の中の犬"], row_names=["image_0.png"])
        numbered = contact_sheet([[plain(RED)]], row_labels=["雪の中の犬"])
        assert named.tobytes() == contact_sheet([[plain(RED)]], row_labels=["image_0.png"]).tobytes()
        assert numbered.tobytes() == contact_sheet([[plain(RED)]], row_labels=["row 1"]).tobytes()
    finally:
        _font_for.cache_clear()
