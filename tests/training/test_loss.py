"""The loss of a batch: weights, and targets that are the base's own predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from delora_diffusion import DeloraConfig, inject_delora
from delora_diffusion.base.denoiser import Denoiser
from delora_diffusion.base.objective import objective_of
from delora_diffusion.data.config import DataConfig
from delora_diffusion.data.encode import Cache, cache_latents, cache_prompts, fingerprint
from delora_diffusion.data.photos import instance_examples
from delora_diffusion.families import Conditioning, Setting, family_of
from delora_diffusion.method.inject import delora_disabled
from delora_diffusion.training.loss import Examples, Pick, batch_loss, picks

from ..tiny import photos, stable_diffusion

CAPTION, CLASS = "a sks dog", "a dog"


class World:
    """A tiny pipeline with a random adapter, and examples with one preserved prompt."""

    def __init__(
        self, folder: Path, *, prediction_type: str, photos_in: Path | None = None, **fields: Any
    ) -> None:  # fmt: skip
        self.pipe = stable_diffusion(folder, prediction_type=prediction_type)
        self.family, self.objective = family_of(self.pipe), objective_of(self.pipe.scheduler)
        if photos_in is None:
            photos(folder / "photos")
        data = DataConfig(
            instance_data_dir=str(photos_in or folder / "photos"), instance_prompt=CAPTION, resolution=16,
            with_base_preservation=True, class_prompt=CLASS, **fields,
        )  # fmt: skip
        instances = instance_examples(data, seed=0)
        latents = cache_latents(Cache(), self.pipe.vae, instances, identity=fingerprint(self.pipe.vae))
        cond = cache_prompts(Cache(), self.pipe, self.family, [CAPTION, CLASS], identity="")
        self.examples = Examples(
            instances=instances,
            classes=[],
            latents=latents,
            conditioning=cond,
            encode=self.encode,
            preserved={CLASS: cond[CLASS]},
            preservation_weight=0.5,
        )
        generator = torch.Generator().manual_seed(1)
        inject_delora(
            self.pipe.unet, DeloraConfig(r=2, delora_lambda=3.0, init_weights="kaiming"), generator=generator
        )

    def encode(self, texts: list[str]) -> Conditioning:
        return self.family.encode_prompt(self.pipe, texts)

    def loss(self, batch: list[Pick]) -> Tensor:
        return batch_loss(
            batch, self.examples, Denoiser(self.pipe.unet, self.family), self.objective, total_weight=1.0,
        )  # fmt: skip


@pytest.fixture(params=["epsilon", "v_prediction", "sample"])
def world(tmp_path: Path, request: pytest.FixtureRequest) -> World:
    return World(tmp_path, prediction_type=request.param)


def test_with_base_preservation_every_place_holds_a_photo_and_one_under_the_preserved_prompt(world: World) -> None:
    whole = picks(world.examples, seed=3, step=2, count=4)
    assert [[(p.preserved, p.example.caption, p.example.weight) for p in place] for place in whole] == [
        [(False, CAPTION, 1.0), (True, CLASS, 0.5)]
    ] * 4
    assert len({p.seed for place in whole for p in place}) == 8


def test_preservation_changes_nothing_in_which_photos_are_seen(world: World) -> None:
    plain = picks(replace(world.examples, preserved={}), seed=3, step=2, count=4)
    assert [place[:1] for place in picks(world.examples, seed=3, step=2, count=4)] == plain


def test_the_target_of_a_preserved_place_is_what_the_base_predicts(world: World) -> None:
    (photo, kept), *_ = picks(world.examples, seed=0, step=0, count=1)
    generator = torch.Generator().manual_seed(kept.seed)
    posterior = world.examples.latents[kept.example.key(kept.view)]
    latents = posterior["mean"] + posterior["std"] * torch.randn(posterior["mean"].shape, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    t = world.objective.sample_timestep(generator)
    x_t, _ = world.objective.noised(latents, noise, t)
    cond = world.encode([CLASS])
    adapted = world.family.predict(world.pipe.unet, x_t, t, cond, Setting(16, 16))
    with delora_disabled(world.pipe.unet):
        base = world.family.predict(world.pipe.unet, x_t, t, cond, Setting(16, 16))
    expected = 0.5 * (adapted - base).square().mean()
    assert expected > 1e-4  # the adapter does something
    torch.testing.assert_close(world.loss([kept]), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(world.loss([photo, kept]), world.loss([photo]) + expected, rtol=1e-4, atol=1e-7)


def test_a_preserved_place_teaches_an_adapter_that_does_nothing_nothing(world: World) -> None:
    for layer in world.pipe.unet.modules():
        if hasattr(layer, "delora_lambda"):
            layer.delora_lambda.data.zero_()
    (_, kept), *_ = picks(world.examples, seed=0, step=0, count=1)
    assert world.loss([kept]).item() == 0.0


def test_a_batch_in_parts_has_the_gradient_of_the_whole_to_a_millionth(world: World) -> None:
    """What processes that share a batch, and accumulated batches, add up."""
    batch = [pick for place in picks(world.examples, seed=3, step=0, count=4) for pick in place]
    trained = [p for p in world.pipe.unet.parameters() if p.requires_grad]

    def gradient(*parts: list[Pick]) -> Tensor:
        world.pipe.unet.zero_grad()
        for part in parts:
            world.loss(part).backward()
        return torch.cat([p.grad.flatten() for p in trained if p.grad is not None])

    whole = gradient(batch)
    for split in ((batch[:4], batch[4:]), tuple([pick] for pick in batch)):
        assert torch.linalg.vector_norm(gradient(*split) - whole) < 1e-6 * torch.linalg.vector_norm(whole)


def test_gradients_reach_the_adapters_through_preserved_places(world: World) -> None:
    (_, kept), *_ = picks(world.examples, seed=0, step=0, count=1)
    world.loss([kept]).backward()
    gradients = [p.grad for p in world.pipe.unet.parameters() if p.requires_grad]
    assert gradients and all(g is not None and bool(g.any()) for g in gradients)
