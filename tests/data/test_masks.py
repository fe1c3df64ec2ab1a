"""Masks: what they leave out has no gradient, they are cut as their photos are, and wrong ones are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from delora_diffusion.base.denoiser import Denoiser
from delora_diffusion.data.config import DataConfig
from delora_diffusion.data.image_files import DataError
from delora_diffusion.data.photos import instance_examples
from delora_diffusion.training.loss import Examples, batch_loss, picks

from .. import tiny
from ..training.test_loss import World


def photo(folder: Path, size: tuple[int, int] = (24, 16), mask: Any = None, *, alpha: bool = False) -> Path:
    """A photo of noise, with a mask: white from the left up to a share of the width."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    white = np.zeros((size[1], size[0]), dtype=np.uint8)
    white[:, : int(size[0] * (mask or 0))] = 255
    if alpha:
        pixels = np.concatenate([pixels, white[..., None]], axis=2)
    elif mask is not None:
        Image.fromarray(white).save(folder / "a_mask.png")
    Image.fromarray(pixels).save(folder / "a.png")
    return folder


def config(folder: Path, **fields: Any) -> DataConfig:
    fields = {"resolution": 16, "instance_prompt": "a sks dog", "aspect_ratio_buckets": "16,24"} | fields
    return DataConfig(instance_data_dir=str(folder), **fields)


@pytest.mark.parametrize("alpha", [False, True], ids=["file", "alpha"])
def test_a_mask_is_cut_flipped_and_shrunk_as_its_photo(tmp_path: Path, alpha: bool) -> None:
    folder, masks = photo(tmp_path / "a", mask=0.5, alpha=alpha), "alpha" if alpha else "files"
    (example,) = instance_examples(config(folder, random_flip=True, masks=masks), seed=0)
    assert example.mask is not None
    plain, flipped = (example.mask.part(view.box, flip=view.flip, height=8, width=12)[0, 0] for view in example.views)
    assert plain[:, :6].eq(1).all() and plain[:, 6:].eq(0).all() and torch.equal(plain.flip(1), flipped)
    (square,) = instance_examples(config(folder, masks=masks, aspect_ratio_buckets=None), seed=0)
    assert square.mask is not None and square.views[0].box == (4, 0, 20, 16)
    assert square.mask.part(square.views[0].box, flip=False, height=1, width=4)[0, 0, 0].tolist() == [1, 1, 0, 0]
    (without,) = instance_examples(config(folder, masks="none"), seed=0)
    assert without.mask is None and without.key(without.views[0]) != example.key(example.views[0])


def test_what_is_masked_out_has_no_gradient(tmp_path: Path) -> None:
    """The gradient of the loss by the prediction, of which the target is a part: the noise of the masked places."""
    folder = photo(tmp_path / "photos", size=(16, 16), mask=0.5)
    world = World(tmp_path, prediction_type="epsilon", photos_in=folder)
    batch = [p for place in picks(replace(world.examples, preserved={}), seed=0, step=0, count=2) for p in place]
    seen: list[torch.Tensor] = []

    def predict(denoiser: Any, x_t: Any, *rest: Any) -> torch.Tensor:
        seen.append(torch.zeros_like(x_t).requires_grad_())
        return seen[-1]

    def gradient(examples: Examples) -> torch.Tensor:
        family = replace(world.family, predict=predict)
        batch_loss(batch, examples, Denoiser(world.pipe.unet, family), world.objective, total_weight=2.0).backward()
        assert seen[-1].grad is not None
        return seen[-1].grad

    masked = gradient(world.examples)
    assert masked.shape == (2, 4, 8, 8)
    assert masked[..., 4:].eq(0).all() and masked[..., :4].ne(0).all()
    partly = gradient(replace(world.examples, unmasked_weight=0.25))
    torch.testing.assert_close(partly[..., :4] * (0.5 + 0.125) / 0.5, masked[..., :4])
    assert partly[..., 4:].ne(0).all()
    open_latents = {key: {"mean": one["mean"], "std": one["std"]} for key, one in world.examples.latents.items()}
    torch.testing.assert_close(gradient(replace(world.examples, latents=open_latents))[..., :4], masked[..., :4] / 2)


def test_a_photo_with_a_mask_and_one_without_share_a_batch(tmp_path: Path) -> None:
    folder = photo(tmp_path / "photos", size=(16, 16), mask=0.5)
    tiny.photos(folder, 1, size=(16, 16))
    world = World(tmp_path, prediction_type="epsilon", photos_in=folder)
    batch = [p for place in picks(replace(world.examples, preserved={}), seed=0, step=0, count=2) for p in place]
    assert {p.example.mask is None for p in batch} == {True, False}
    denoiser = Denoiser(world.pipe.unet, world.family)
    together, *each = (
        batch_loss(part, world.examples, denoiser, world.objective, total_weight=1.0)
        for part in (batch, batch[:1], batch[1:])
    )
    torch.testing.assert_close(together, sum(each))


def test_wrong_masks_are_named(tmp_path: Path) -> None:
    folder = photo(tmp_path / "a", mask=0.5)
    Image.new("L", (24, 20), 255).save(folder / "a_mask.png")
    with pytest.raises(DataError, match=r"a_mask.png is 24 x 20 pixels, and a.png 24 x 16; make it anew"):
        instance_examples(config(folder), seed=0)
    with pytest.raises(DataError, match=r"a_mask.png is black all over, so that nothing of a.png would count"):
        instance_examples(config(photo(folder, mask=0.0)), seed=0)
    with pytest.raises(DataError, match=r"a.png is transparent all over"):
        instance_examples(config(photo(tmp_path / "b", alpha=True), masks="alpha"), seed=0)
    with pytest.raises(DataError, match=r"the crop of .*a.png leaves nothing of what its mask shows"):
        instance_examples(config(photo(tmp_path / "c", mask=0.1), aspect_ratio_buckets=None), seed=0)


def test_a_mask_is_no_photo_and_one_that_is_not_used_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = photo(tmp_path / "a", mask=0.5)
    caplog.set_level("INFO")
    assert len(instance_examples(config(folder), seed=0)) == 1
    assert "1 photos, 1 masks" in caplog.text and "left out" not in caplog.text
    instance_examples(config(folder, masks="none"), seed=0)
    assert "1 left out: a_mask.png" in caplog.text
    (folder / "a.png").unlink()
    assert [e.path.name for e in instance_examples(config(folder), seed=0)] == ["a_mask.png"], "no photo, no mask"
