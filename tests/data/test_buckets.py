"""Aspect-ratio buckets: their sizes, which one a photo gets, and that a batch of several shapes is trained rightly."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from delora_diffusion.base.denoiser import Denoiser
from delora_diffusion.data.buckets import LONGEST, bucket_sizes, largest_part, nearest_size
from delora_diffusion.data.config import DataConfig
from delora_diffusion.data.photos import describe_sizes, instance_examples
from delora_diffusion.families import Family, Setting
from delora_diffusion.options import OptionError
from delora_diffusion.training.loss import Pick, batch_loss, picks

from .. import tiny
from ..training.test_loss import CAPTION, World

SHAPES = {"portrait": (20, 31), "landscape": (31, 20), "square": (20, 20)}  # width, height


# ---- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution, step", [(512, 64), (768, 64), (1024, 64), (64, 8), (256, 32), (520, 64)])
def test_automatic_sizes_have_about_the_pixels_of_the_square(resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution, "auto")
    assert (resolution, resolution) in sizes and len(sizes) >= 5
    assert {size[::-1] for size in sizes} == set(sizes)
    for height, width in set(sizes) - {(resolution, resolution)}:
        assert height % step == width % step == 0
        assert 0.6 * resolution**2 < height * width <= resolution**2
        assert max(height, width) <= LONGEST * min(height, width)


def test_the_sizes_of_sd_and_sdxl_are_those_people_know() -> None:
    assert bucket_sizes(512, "auto") == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert {(832, 1216), (896, 1152), (1024, 1024)} <= set(bucket_sizes(1024, "auto"))


def test_without_buckets_there_is_the_square_and_named_sizes_are_taken_as_they_are() -> None:
    assert bucket_sizes(512, None) == [(512, 512)]
    assert bucket_sizes(512, "768,512; 512,768;512,768") == [(512, 768), (768, 512)]


@pytest.mark.parametrize(
    "asked, said",
    [
        ("512x768", "give auto, or sizes"),
        ("512,768,3", "give auto, or sizes"),
        ("512,768;", "give auto, or sizes"),
        ("Auto", "give auto, or sizes"),
        ("512,700", "has 512,700; height and width must be positive multiples of 8"),
        ("0,512", "has 0,512; height and width must be positive multiples of 8"),
    ],
)
def test_sizes_that_cannot_be_used_are_refused(asked: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=said):
        DataConfig(instance_data_dir=str(tmp_path), aspect_ratio_buckets=asked)


# ---- which one, and which part of the photo ---------------------------------------------------------


@pytest.mark.parametrize(
    "photo, size",
    [
        ((3000, 3000), (512, 512)), ((4000, 3000), (448, 576)), ((3000, 4000), (576, 448)), ((1920, 1080), (384, 640)),
        ((1080, 1920), (640, 384)), ((9000, 1000), (384, 640)), ((520, 512), (512, 512)),
    ],
)  # fmt: skip
def test_a_photo_gets_the_size_of_the_nearest_shape(photo: tuple[int, int], size: tuple[int, int]) -> None:
    assert nearest_size(*photo, bucket_sizes(512, "auto")) == size


def test_of_sizes_of_one_shape_the_largest_is_taken() -> None:
    assert nearest_size(30, 20, [(64, 96), (128, 192), (96, 64)]) == (128, 192)


@pytest.mark.parametrize("photo", [(4000, 3000), (3000, 4001), (999, 1000), (17, 640), (640, 17)])
@pytest.mark.parametrize("size", bucket_sizes(512, "auto"))
def test_the_part_is_as_large_as_can_be_and_not_distorted(photo: tuple[int, int], size: tuple[int, int]) -> None:
    width, height = largest_part(*photo, size)
    assert width == photo[0] or height == photo[1]
    assert width <= photo[0] and height <= photo[1]
    wanted = size[1] / size[0]
    assert (width - 0.5) / (height + 0.5) < wanted < (width + 0.5) / max(height - 0.5, 0.1), "within half a pixel"


def shaped_photos(folder: Path) -> Path:
    """A photo of each of `SHAPES`: noise."""
    folder.mkdir(parents=True)
    for number, (name, (width, height)) in enumerate(SHAPES.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def test_photos_are_cut_and_resized_to_their_own_sizes(tmp_path: Path) -> None:
    data = DataConfig(instance_data_dir=str(shaped_photos(tmp_path / "photos")), instance_prompt="x", resolution=16,
                      aspect_ratio_buckets="16,24;24,16;16,16")  # fmt: skip
    found = {e.path.stem: e for e in instance_examples(data, seed=0)}
    sizes = {name: e.views[0].size for name, e in found.items()}
    assert sizes == {"portrait": (24, 16), "landscape": (16, 24), "square": (16, 16)}
    for example in found.values():
        assert example.pixels(example.views[0]).shape == (3, *example.views[0].size)
    assert found["portrait"].views[0].box == (0, 0, 20, 30) and found["landscape"].views[0].box == (0, 0, 30, 20)
    told = describe_sizes(list(found.values()), data)
    assert "16 x 16: 1, 24 x 16: 1, 16 x 24: 1; at most 3% is cut off (portrait.png)" in told
    squares = replace(data, aspect_ratio_buckets=None)
    assert "35% is cut off (portrait.png); aspect_ratio_buckets auto" in describe_sizes(
        instance_examples(squares, seed=0), squares
    )


def test_random_crops_move_along_the_side_that_is_too_long(tmp_path: Path) -> None:
    tiny.photos(tmp_path, 1, size=(90, 20))
    data = DataConfig(
        instance_data_dir=str(tmp_path),
        instance_prompt="x",
        resolution=16,
        aspect_ratio_buckets="16,32",
        center_crop=False,
        num_crops=6,
    )
    (example,) = instance_examples(data, seed=0)
    assert len(set(example.views)) > 3
    for left, top, right, bottom in (view.box for view in example.views):
        assert (top, bottom) == (0, 20) and right - left == 40 and 0 <= left <= 50


# ---- a batch of several shapes ----------------------------------------------------------------------


class Heard:
    """What `predict` was told."""

    def __init__(self, family: Family) -> None:
        self.calls: list[tuple[torch.Size, Setting]] = []
        self._predict = family.predict
        self.family = replace(family, predict=self.predict)

    def predict(self, denoiser: Any, x_t: Any, t: Any, cond: Any, setting: Setting) -> Any:
        self.calls.append((x_t.shape, setting))
        return self._predict(denoiser, x_t, t, cond, setting)


@pytest.fixture
def world(tmp_path: Path) -> World:
    folder = shaped_photos(tmp_path / "photos")
    return World(tmp_path, prediction_type="epsilon", photos_in=folder, aspect_ratio_buckets="16,24;24,16;16,16")


def loss(world: World, batch: list[Pick], family: Family | None = None) -> Any:
    return batch_loss(
        batch, world.examples, Denoiser(world.pipe.unet, family or world.family), world.objective,
        total_weight=1.0, snr_gamma=5.0,
    )  # fmt: skip


def test_a_batch_of_several_shapes_costs_what_its_pictures_cost(world: World) -> None:
    batch = [place[0] for place in picks(replace(world.examples, preserved={}), seed=0, step=0, count=7)]
    assert len({p.view.size for p in batch}) == 3
    each = torch.stack([loss(world, [pick]) for pick in batch])
    torch.testing.assert_close(loss(world, batch), each.sum(), rtol=1e-5, atol=1e-7)
    assert each.min() > 0.01


def test_pictures_of_one_size_go_through_together_and_the_denoiser_is_told_it(world: World) -> None:
    heard = Heard(world.family)
    batch = [place[0] for place in picks(replace(world.examples, preserved={}), seed=0, step=0, count=6)]
    loss(world, batch, heard.family)
    assert len(heard.calls) == 3
    for shape, setting in heard.calls:
        assert shape[0] == 2 and (setting.height, setting.width) == (shape[2] * 2, shape[3] * 2)


def test_the_number_of_tokens_that_shifts_the_noise_is_that_of_the_picture(world: World) -> None:
    told = []

    class Noting:
        def __getattr__(self, name: str) -> Any:
            return getattr(world.objective, name)

        def sample_timestep(self, generator: torch.Generator, tokens: int) -> torch.Tensor:
            told.append(tokens)
            return world.objective.sample_timestep(generator, tokens)

    batch = [place[0] for place in picks(replace(world.examples, preserved={}), seed=0, step=0, count=3)]
    denoiser = Denoiser(world.pipe.unet, world.family)
    batch_loss(batch, world.examples, denoiser, Noting(), total_weight=1.0)  # type: ignore[arg-type]
    assert sorted(told) == [8 * 8, 8 * 12, 8 * 12]


def test_preserved_predictions_are_made_in_the_photos_own_shape(world: World) -> None:
    heard = Heard(world.family)
    whole = [p for place in picks(world.examples, seed=0, step=0, count=3) for p in place]
    loss(world, whole, heard.family)
    assert len(heard.calls) == 6 and {shape[0] for shape, _ in heard.calls} == {1, 2}
    assert math.isfinite(loss(world, whole).item()) and {p.example.caption for p in whole} > {CAPTION}
