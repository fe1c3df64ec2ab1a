"""Encoding and its cache. Oracles: the VAE's posterior, what the pipeline decodes, encoding without a cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel

from delora_diffusion.data.config import DataConfig
from delora_diffusion.data.encode import Cache, cache_latents, cache_prompts, fingerprint
from delora_diffusion.data.image_files import DataError
from delora_diffusion.data.photos import Example, instance_examples
from delora_diffusion.families import family_of

from .. import tiny

SIZE = 16


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pipe = tiny.stable_diffusion(tmp_path_factory.mktemp("encode"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def vae(pipe: Any) -> Any:
    """A copy of the VAE that a test may change."""
    return copy.deepcopy(pipe.vae)


@pytest.fixture(params=["memory", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache" if request.param == "disk" else None)


def examples_in(folder: Path, **fields: Any) -> list[Example]:
    return instance_examples(
        DataConfig(instance_data_dir=str(folder), instance_prompt="x", **{"resolution": SIZE} | fields), seed=0
    )


def encoded(cache: Cache, vae: Any, examples: list[Example]) -> dict[str, dict[str, Tensor]]:
    return cache_latents(cache, vae, examples, identity=fingerprint(vae))


@torch.no_grad()
def direct(vae: Any, example: Example, view: Any) -> dict[str, Tensor]:
    """The scaled posterior of one view, as diffusers' training scripts compute it, without a cache."""
    posterior = vae.encode(example.pixels(view)[None]).latent_dist
    return {"mean": posterior.mean * vae.config.scaling_factor, "std": posterior.std * vae.config.scaling_factor}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def all_right(found: dict[str, dict[str, Tensor]], vae: Any, examples: list[Example]) -> bool:
    views = [(example, view) for example in examples for view in example.views]
    return all(equal(found[e.key(v)], direct(vae, e, v)) for e, v in views)


class Count:
    """Counts how often a module is called."""

    def __init__(self, module: nn.Module) -> None:
        self.calls = 0
        module.register_forward_hook(self)

    def __call__(self, *args: Any) -> None:
        self.calls += 1


# ---- latents --------------------------------------------------------------------------------------


def test_a_cached_posterior_is_the_vaes_own_scaled(pipe: Any, cache: Cache, photos: Path) -> None:
    examples = examples_in(photos, random_flip=True)
    found = encoded(cache, pipe.vae, examples)
    assert len(found) == 6 and all_right(found, pipe.vae, examples)
    for entry in found.values():
        assert entry["mean"].shape == entry["std"].shape == (1, 4, 8, 8)
        assert entry["mean"].dtype == entry["std"].dtype == torch.float32
        assert entry["std"].min() > 0 and not entry["mean"].requires_grad


def test_drawing_from_the_cached_posterior_is_diffusers_sample(pipe: Any, photos: Path) -> None:
    example = examples_in(photos)[0]
    entry = next(iter(encoded(Cache(), pipe.vae, [example]).values()))
    with torch.no_grad():
        posterior = pipe.vae.encode(example.pixels(example.views[0])[None]).latent_dist
        sample = posterior.sample(torch.Generator().manual_seed(3)) * pipe.vae.config.scaling_factor
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(entry["mean"] + entry["std"] * noise, sample, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_name_the_photo(value: float, vae: Any, photos: Path) -> None:
    with torch.no_grad():
        vae.quant_conv.bias[0] = value
    with pytest.raises(DataError) as refused:
        encoded(Cache(), vae, examples_in(photos))
    assert "not finite" in str(refused.value) and "00.png" in str(refused.value) and "fp32" in str(refused.value)


def test_nothing_that_is_not_finite_is_cached(vae: Any, photos: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        vae.quant_conv.bias[0] = float("nan")
    with pytest.raises(DataError):
        encoded(Cache(tmp_path / "cache"), vae, examples_in(photos))
    assert list((tmp_path / "cache").iterdir()) == []


# ---- pairs stay pairs -----------------------------------------------------------------------------


def test_pairs_survive_shuffling(pipe: Any, cache: Cache, photos: Path) -> None:
    examples = examples_in(photos, random_flip=True)
    encoded(cache, pipe.vae, examples)
    vae = copy.deepcopy(pipe.vae)
    count = Count(vae.encoder)
    found = encoded(cache, vae, examples[::-1])
    assert all_right(found, pipe.vae, examples) and count.calls == 0


def test_photos_of_the_same_name_in_two_folders_are_kept_apart(pipe: Any, cache: Cache, tmp_path: Path) -> None:
    for number in range(2):
        tiny.photos(tmp_path / str(number), 2, seed=number)
    both = [example for number in range(2) for example in examples_in(tmp_path / str(number))]
    assert len({example.path.name for example in both}) == 2
    found = encoded(cache, pipe.vae, both)
    assert len(found) == 4 and all_right(found, pipe.vae, both)


def test_the_same_photo_under_two_names_is_encoded_once(pipe: Any, cache: Cache, photos: Path) -> None:
    (photos / "copy.png").write_bytes((photos / "00.png").read_bytes())
    made: list[str] = []
    get = cache.get
    cache.get = lambda key, make: get(key, lambda: [made.append(key), make()][1])  # type: ignore[method-assign, func-returns-value, return-value]
    examples = examples_in(photos)
    found = encoded(cache, pipe.vae, examples)
    assert len(examples) == 4 and len(found) == len(made) == 3 and all_right(found, pipe.vae, examples)


def test_a_changed_photo_is_encoded_anew(pipe: Any, cache: Cache, photos: Path) -> None:
    before = encoded(cache, pipe.vae, examples_in(photos))
    Image.new("RGB", (24, 20), "red").save(photos / "01.png")
    examples = examples_in(photos)
    found = encoded(cache, pipe.vae, examples)
    assert all_right(found, pipe.vae, examples) and len(found.keys() & before.keys()) == 2


def test_other_crops_flips_and_sizes_are_encoded_anew(pipe: Any, cache: Cache, tmp_path: Path) -> None:
    tiny.photos(tmp_path / "photos", 2, size=(60, 20))
    for fields in ({}, {"random_flip": True}, {"center_crop": False, "num_crops": 2}):
        for size in (16, 24):
            examples = examples_in(tmp_path / "photos", resolution=size, **fields)
            assert all_right(encoded(cache, pipe.vae, examples), pipe.vae, examples)


def test_another_vae_is_not_served_the_latents_of_the_first(pipe: Any, vae: Any, cache: Cache, photos: Path) -> None:
    examples = examples_in(photos)
    first = encoded(cache, pipe.vae, examples)
    with torch.no_grad():
        vae.quant_conv.bias += 1.0
    found = encoded(cache, vae, examples)
    assert all_right(found, vae, examples) and not any(equal(found[key], first[key]) for key in found)


# ---- memory and disk ------------------------------------------------------------------------------


def test_from_disk_comes_bit_for_bit_what_memory_holds(pipe: Any, photos: Path, tmp_path: Path) -> None:
    examples = examples_in(photos, random_flip=True)
    kept = encoded(Cache(), pipe.vae, examples)
    encoded(Cache(tmp_path / "cache"), pipe.vae, examples)
    vae = copy.deepcopy(pipe.vae)
    count = Count(vae.encoder)
    read = encoded(Cache(tmp_path / "cache"), vae, examples)
    assert read.keys() == kept.keys() and all(equal(read[key], kept[key]) for key in kept)
    assert count.calls == 0 and len(list((tmp_path / "cache").iterdir())) == 6


@pytest.mark.parametrize(
    "spoil",
    [lambda data: b"", lambda data: data[:5], lambda data: data[:-1], lambda data: b"\xff" * len(data)],
    ids=["empty", "head only", "last byte missing", "other bytes"],
)
def test_a_corrupt_cache_file_is_made_again(spoil: Any, pipe: Any, photos: Path, tmp_path: Path) -> None:
    examples = examples_in(photos)
    encoded(Cache(tmp_path / "cache"), pipe.vae, examples)
    whole = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    for path, data in whole.items():
        path.write_bytes(spoil(data))
    assert all_right(encoded(Cache(tmp_path / "cache"), pipe.vae, examples), pipe.vae, examples)
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == whole


def test_tensors_that_are_views_or_need_a_gradient_can_be_cached(cache: Cache) -> None:
    parameter = nn.Parameter(torch.arange(12.0).reshape(3, 4))
    found = cache.get("key", lambda: {"a": parameter.T, "b": parameter[1:]})
    assert torch.equal(found["a"], parameter.T) and not found["a"].requires_grad
    with torch.no_grad():
        expected = {"a": parameter.T.clone(), "b": parameter[1:].clone()}
    again = Cache(cache.folder).get("key", lambda: expected)
    assert equal(again, expected)


# ---- prompts --------------------------------------------------------------------------------------


def prompts_of(cache: Cache, pipe: Any, prompts: list[str]) -> dict[str, dict[str, Tensor]]:
    identity = fingerprint(pipe.text_encoder, pipe.tokenizer.get_vocab())
    return cache_prompts(cache, pipe, family_of(pipe), prompts, identity=identity)


def test_each_prompt_has_its_own_conditioning_in_any_order(pipe: Any, cache: Cache) -> None:
    prompts = ["a dog", "a cat", "", "a dog", "a dog:"]
    with torch.no_grad():
        expected = {prompt: family_of(pipe).encode_prompt(pipe, [prompt]) for prompt in prompts}
    for order in (prompts, prompts[::-1]):
        found = prompts_of(cache, pipe, order)
        assert found.keys() == expected.keys() and all(equal(found[prompt], expected[prompt]) for prompt in found)
        assert not any(entry["prompt_embeds"].requires_grad for entry in found.values())


def test_another_text_encoder_is_not_served_the_embeddings_of_the_first(pipe: Any, cache: Cache) -> None:
    first = prompts_of(cache, pipe, ["a"])
    other = copy.copy(pipe)
    other.text_encoder = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        other.text_encoder.final_layer_norm.weight += 0.5
        expected = family_of(other).encode_prompt(other, ["a"])
    assert equal(prompts_of(cache, other, ["a"])["a"], expected) and not equal(first["a"], expected)


def test_prompts_come_from_disk_in_a_later_process(pipe: Any, tmp_path: Path) -> None:
    """Nothing that differs between two calls or two processes may be part of the key, such as a vocabulary's order."""
    first = prompts_of(Cache(tmp_path), pipe, ["a dog", "a cat"])
    other = copy.copy(pipe)
    other.text_encoder = copy.deepcopy(pipe.text_encoder)
    count = Count(other.text_encoder)
    found = prompts_of(Cache(tmp_path), other, ["a cat", "a dog"])
    assert count.calls == 0 and all(equal(found[prompt], first[prompt]) for prompt in first)


# ---- fingerprints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_fingerprint_changes_with_every_tensor(part: str, pipe: Any) -> None:
    module = copy.deepcopy(getattr(pipe, part))
    original = fingerprint(module)
    seen = {original}
    for tensor in module.state_dict().values():
        first = tensor.view(-1)[:1]
        kept = first.clone()
        first += 1
        seen.add(fingerprint(module))
        first.copy_(kept)
    assert len(seen) == 1 + len(module.state_dict()) and fingerprint(module) == original


def test_a_fingerprint_changes_with_the_config(pipe: Any, vae: Any) -> None:
    vae.register_to_config(scaling_factor=0.5)
    assert fingerprint(vae) != fingerprint(pipe.vae)
    encoder = copy.deepcopy(pipe.text_encoder)
    encoder.config.num_attention_heads = 4
    assert fingerprint(encoder) != fingerprint(pipe.text_encoder)


def test_a_fingerprint_changes_with_names_shapes_order_and_precision() -> None:
    linear = nn.Linear(4, 6, bias=False)
    nn.init.ones_(linear.weight)
    reshaped = nn.Linear(6, 4, bias=False)
    nn.init.ones_(reshaped.weight)
    prints = {
        fingerprint(linear), fingerprint(nn.Sequential(linear)), fingerprint(reshaped),
        fingerprint(linear, reshaped), fingerprint(reshaped, linear), fingerprint(copy.deepcopy(linear).half()),
    }  # fmt: skip
    assert len(prints) == 6, "ones are the same number in every precision; what is computed with them is not"


def test_a_fingerprint_names_plain_values_and_not_the_order_of_a_dict() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 2, "b": 1})
    assert fingerprint(["a", "b"]) != fingerprint(["b", "a"])


def test_a_fingerprint_is_the_same_after_loading_again(base: Path) -> None:
    first, second = (AutoencoderKL.from_pretrained(base, subfolder="vae") for _ in range(2))
    assert fingerprint(first) == fingerprint(second)
    first, second = (CLIPTextModel.from_pretrained(base / "text_encoder") for _ in range(2))
    assert fingerprint(first) == fingerprint(second)


def test_a_photo_that_changes_after_it_was_hashed_is_refused_and_not_cached(tmp_path: Path, vae: Any) -> None:
    paths = tiny.photos(tmp_path / "photos")
    examples, cache = examples_in(tmp_path / "photos"), Cache(tmp_path / "cache")
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(DataError, match=r"01.png has changed since this run first read it; start the run again"):
        encoded(cache, vae, examples)
    assert len(list((tmp_path / "cache").iterdir())) == 1 and not cache.memory, "what is on disk is not held as well"
