"""The pocket base model: its folders load offline and work, its world keeps its promises."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPProcessor, ViTModel

POCKET = Path(__file__).parents[1] / "samples" / "pocket"
sys.path.insert(0, str(POCKET))

import world  # noqa: E402
from places import PLACES  # noqa: E402
from subjects import SUBJECTS  # noqa: E402
from things import COLOURS, THINGS, font_path  # noqa: E402


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(POCKET / "base", dtype=torch.float32, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_base_generates_pictures_that_depend_on_the_prompt(pipeline: StableDiffusionPipeline) -> None:
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    prompts = ["a cat on the moon", "a cat on a yellow background"]
    images = pipeline(prompts, num_inference_steps=6, guidance_scale=3.0, generator=seeds, output_type="np").images
    assert images.shape == (2, 64, 64, 3)
    assert np.isfinite(images).all()
    assert images.std((1, 2)).max() > 0.1
    night, yellow = images[0, :8].mean((0, 1)), images[1, :8].mean((0, 1))  # the upper edge is all place
    assert night.max() < 0.3
    assert yellow[:2].min() > 0.6 > yellow[2]


def test_tokenizer_fits_the_text_encoder_and_takes_any_text(pipeline: StableDiffusionPipeline) -> None:
    tokenizer, limit = pipeline.tokenizer, pipeline.text_encoder.config.max_position_embeddings
    assert tokenizer.model_max_length == limit
    for text in ("a sks dog with the Eiffel Tower in the background", "Zürich? 日本, xkcd 42!", ""):
        ids = tokenizer(text, padding="max_length", truncation=True).input_ids
        assert len(ids) == limit
        assert max(ids) < pipeline.text_encoder.config.vocab_size
    assert "dog" in tokenizer.decode(tokenizer("a sks dog on the beach").input_ids, skip_special_tokens=True)


def test_clip_names_what_its_own_base_model_would_draw() -> None:
    clip = CLIPModel.from_pretrained(POCKET / "clip", dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(POCKET / "clip")
    photo = Image.open(POCKET / "subjects" / "mantel_clock" / "04.jpg")
    texts = ["a clock on a blue background", "a cat on a red background", "a banana on the moon"]
    inputs = processor(text=texts, images=photo, return_tensors="pt", padding="max_length")
    with torch.inference_mode():
        scores = clip(**inputs).logits_per_image[0]
    assert scores.argmax() == 0


def test_vit_tells_a_subject_from_another() -> None:
    vit = ViTModel.from_pretrained(POCKET / "vit", add_pooling_layer=False, dtype=torch.float32).eval()
    names = ("spotted_dog", "striped_teddy", "mantel_clock")
    paths = [POCKET / "subjects" / name / f"{k:02}.jpg" for name in names for k in (0, 4)]
    photos = np.stack([np.asarray(Image.open(path).convert("RGB").resize((64, 64))) for path in paths])
    pixels = torch.from_numpy(photos).permute(0, 3, 1, 2)
    with torch.inference_mode():
        z = torch.nn.functional.normalize(vit(pixel_values=pixels / 127.5 - 1).last_hidden_state[:, 0], dim=-1)
    nearest = (z @ z.T).fill_diagonal_(-1).argmax(-1)
    assert (nearest // 2 == torch.arange(6) // 2).all()


def test_weights_are_small_enough_to_keep_in_the_repository() -> None:
    weights = sorted(POCKET.rglob("*.safetensors"))
    assert {path.relative_to(POCKET).parts[0] for path in weights} == {"base", "clip", "vit"}
    assert sum(path.stat().st_size for path in weights) <= 40e6


@pytest.mark.parametrize("name", ["spotted_dog", "striped_teddy", "mantel_clock"])
def test_subject_has_enough_photos_and_prompts_elsewhere(name: str) -> None:
    photos = sorted((POCKET / "subjects" / name).glob("*.jpg"))
    assert len(photos) >= 4
    assert all(min(Image.open(photo).size) >= 256 for photo in photos)
    prompts = (POCKET / "prompts" / f"{name}.txt").read_text().splitlines()
    assert len(set(prompts)) >= 8


@pytest.mark.parametrize("name", SUBJECTS)
def test_held_out_photos_show_places_that_training_did_not(name: str) -> None:
    subject, folder = SUBJECTS[name], POCKET / "holdout" / name
    assert not set(subject.held_out) & set(subject.places)
    captions = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in captions] == sorted(path.name for path in folder.glob("*.jpg"))
    assert [row["text"] for row in captions] == [f"a sks {subject.word} {place}" for place in subject.held_out]
    assert {row["text"] for row in captions} <= set((POCKET / "prompts" / f"{name}.txt").read_text().splitlines())


def test_world_is_large_and_partly_held_out() -> None:
    assert len(THINGS) >= 60
    assert len(PLACES) >= 16
    assert len(COLOURS) >= 6
    unseen = sum(world.held_out(thing, place) for thing in THINGS for place in PLACES)
    assert 0.05 < unseen / (len(THINGS) * len(PLACES)) < 0.15


def test_training_labels_never_show_a_held_out_pair() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        labels = world.random_labels(rng)
        assert not world.held_out(labels.thing, labels.place)
    assert all(world.held_out(x.thing, x.place) for x in (world.random_labels(rng, unseen=True) for _ in range(50)))


def test_captions_have_the_right_article_and_say_what_is_shown() -> None:
    labels = world.Labels("apple", "on the beach")
    assert world.caption_of(labels) == "an apple on the beach"
    assert world.caption_of(labels, word="sks") == "a sks apple on the beach"
    orange = world.Labels("cat", None, "orange")
    assert world.caption_of(orange, template="a photo of a {}") == "a photo of an orange cat"


def test_scenes_are_a_function_of_the_seed() -> None:
    try:
        font_path()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    first, again, other = world.scene(5), world.scene(5), world.scene(6)
    assert first.image.size == (64, 64)
    assert first.caption == again.caption
    assert first.image.tobytes() == again.image.tobytes() != other.image.tobytes()
    assert not world.held_out(first.labels.thing, first.labels.place)
    assert world.held_out(*(getattr(world.scene(5, unseen=True).labels, field) for field in ("thing", "place")))
