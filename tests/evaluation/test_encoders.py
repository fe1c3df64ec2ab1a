"""Encoders: preprocessing equals transformers', embeddings equal a direct call of the model, refusals explain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F
from transformers.models.bit import BitImageProcessorPil
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.vit import ViTImageProcessorPil

from delora_diffusion.evaluation.encoders import (
    KNOWN,
    EncoderError,
    ImageEncoder,
    embed_images,
    embed_texts,
    load_encoder,
)

POCKET = Path(__file__).parents[2] / "samples" / "pocket"
PHOTO = POCKET / "subjects" / "spotted_dog" / "00.jpg"
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "patch_size": 8, "image_size": 32}  # fmt: skip


def picture(width: int = 50, height: int = 37, *, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def saved(folder: Path, kind: str) -> tuple[Path, Any]:
    """A tiny random model of that type on disk."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL)
    model = getattr(transformers, KNOWN[kind][1])(config).eval()
    model.save_pretrained(folder)
    return folder, model


def settings(folder: Path, told: dict[str, Any]) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(told))


@pytest.mark.parametrize("kind", [kind for kind, (role, _) in KNOWN.items() if role == "dino"])
def test_a_dino_embedding_is_the_class_token_after_the_final_norm(tmp_path: Path, kind: str) -> None:
    folder, model = saved(tmp_path / kind, kind)
    encoder = load_encoder(folder, device="cpu")
    assert encoder.kind == "dino" and encoder.model.dtype is torch.float32
    images = [picture(), picture(20, 80, seed=1)]
    made = embed_images(encoder, images)
    x = torch.stack([encoder.processor(image) for image in images])
    assert x.shape == (2, 3, 32, 32)
    with torch.no_grad():
        hidden = model(pixel_values=x).last_hidden_state
    assert torch.allclose(made, F.normalize(hidden[:, 0], dim=-1), atol=1e-6)
    if kind != "vit":  # whose pooler is another layer
        with torch.no_grad():
            pooled = model(pixel_values=x).pooler_output
        assert torch.allclose(made, F.normalize(pooled, dim=-1), atol=1e-6)
    norm = model.layernorm if hasattr(model, "layernorm") else model.norm
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(pixel_values=x)
    assert torch.equal(seen[-1], hidden)


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        (ViTImageProcessorPil, {"size": {"height": 32, "width": 32}, "resample": 2}),
        (ViTImageProcessorPil, {"size": 32, "resample": 2, "feature_extractor_type": "ViTFeatureExtractor"}),
        (BitImageProcessorPil, {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32},
                                "do_center_crop": True, "resample": 3}),
        (CLIPImageProcessorPil, {"size": 32, "crop_size": 32, "do_center_crop": True, "resample": 3}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [(50, 37), (33, 90), (32, 32), (20, 31)])
def test_preprocessing_equals_transformers(
    tmp_path: Path, reference: Any, told: dict[str, Any], size: tuple[int, int]
) -> None:
    folder, _ = saved(tmp_path, "dinov2")
    normal = {"do_resize": True, "do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.1]}
    settings(folder, normal | told)
    encoder = load_encoder(folder, device="cpu")
    expected = reference.from_pretrained(folder)(picture(*size), return_tensors="pt").pixel_values[0]
    assert torch.allclose(encoder.processor(picture(*size)), expected, atol=1e-5)


def test_without_settings_the_model_s_own_size_is_used(tmp_path: Path) -> None:
    encoder = load_encoder(saved(tmp_path, "vit")[0], device="cpu")
    assert encoder.protocol["resize"] == [32, 32] and encoder.protocol["crop"] is None
    assert encoder.processor(picture()).shape == (3, 32, 32)


def test_modes_other_than_rgb_are_read(tmp_path: Path) -> None:
    encoder = load_encoder(saved(tmp_path, "vit")[0], device="cpu")
    grey = picture().convert("L")
    made = embed_images(encoder, [grey, grey.convert("RGB"), grey.convert("RGBA"), grey.convert("P")])
    assert torch.allclose(made[1:3], made[:1].expand(2, -1), atol=1e-5) and made.shape == (4, 16)


@pytest.fixture(scope="module")
def clip() -> ImageEncoder:
    return load_encoder(POCKET / "clip", device="cpu")


def test_clip_equals_transformers_own_scores(clip: ImageEncoder) -> None:
    photo, texts = Image.open(PHOTO), ["a dog on the grass", "a cat", ""]
    processor = transformers.CLIPProcessor.from_pretrained(POCKET / "clip")
    inputs = processor(text=texts, images=photo, return_tensors="pt", padding="max_length", max_length=24)
    with torch.inference_mode():
        expected = clip.model(**inputs)
    scores = embed_images(clip, [photo]) @ embed_texts(clip, texts).T
    logits = clip.model.logit_scale.exp() * scores
    assert torch.allclose(logits, expected.logits_per_image, atol=1e-4)
    with torch.inference_mode():
        seen = clip.model.get_image_features(pixel_values=inputs.pixel_values).pooler_output
        read = clip.model.get_text_features(inputs.input_ids, attention_mask=inputs.attention_mask).pooler_output
    assert torch.allclose(embed_images(clip, [photo]), F.normalize(seen, dim=-1), atol=1e-5)
    assert torch.allclose(embed_texts(clip, texts), F.normalize(read, dim=-1), atol=1e-5)


def test_rows_are_unit_and_do_not_depend_on_the_batch(clip: ImageEncoder) -> None:
    images = [picture(seed=number) for number in range(40)]
    together = embed_images(clip, images)
    assert together.shape == (40, 128) and together.device.type == "cpu"
    assert torch.allclose(together.norm(dim=-1), torch.ones(40), atol=1e-5)
    assert torch.allclose(together[35:36], embed_images(clip, images[35:36]), atol=1e-5)
    assert torch.equal(together, embed_images(clip, images))
    texts = embed_texts(clip, ["a cat"] * 33 + ["a dog on the beach"])
    assert torch.allclose(texts[-1:], embed_texts(clip, ["a dog on the beach"]), atol=1e-5)
    assert embed_images(clip, []).shape == embed_texts(clip, []).shape == (0, 128)


def test_the_pocket_vit_tells_a_subject_from_another() -> None:
    vit = load_encoder(POCKET / "vit", device="cpu")
    paths = [POCKET / "subjects" / name / f"0{n}.jpg" for name in ("spotted_dog", "striped_teddy") for n in (0, 4)]
    z = embed_images(vit, [Image.open(path) for path in paths])
    alike = z @ z.T
    assert min(alike[0, 1], alike[2, 3]) > alike[:2, 2:].max()


def test_the_protocol_says_what_the_numbers_depend_on(clip: ImageEncoder, tmp_path: Path) -> None:
    told = json.loads(json.dumps(clip.protocol))
    assert told["encoder"] == str(POCKET / "clip") and told["class"] == "CLIPModel"
    assert told["resize"] == 64 and told["resize_to"] == "shorter side" and told["crop"] == [64, 64]
    assert told["resample"] == "bicubic" and told["mean"] == told["std"] == [0.5] * 3
    one, other = load_encoder(saved(tmp_path / "a", "vit")[0], device="cpu"), tmp_path / "b"
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL), add_pooling_layer=False)
    model.save_pretrained(other)
    assert one.weights != load_encoder(other, device="cpu").weights


def test_an_image_encoder_without_text_says_so() -> None:
    vit = load_encoder(POCKET / "vit", device="cpu")
    with pytest.raises(EncoderError, match="ViTModel and reads no text; give a CLIP"):
        embed_texts(vit, ["a dog"])


def test_refuses_what_is_no_encoder(tmp_path: Path) -> None:
    for source in (POCKET / "base", tmp_path / "nothing", "no/such-encoder"):
        with pytest.raises(EncoderError, match="there is no encoder"):
            load_encoder(source, device="cpu")
    with pytest.raises(EncoderError, match="type 'clip_text_model', which is no encoder"):
        load_encoder(POCKET / "base" / "text_encoder", device="cpu")


def test_refuses_weights_that_do_not_fill_the_model(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "vit")
    other = transformers.ViTModel(transformers.ViTConfig(**SMALL | {"num_hidden_layers": 1}))
    other.save_pretrained(tmp_path / "less")
    (folder / "model.safetensors").write_bytes((tmp_path / "less" / "model.safetensors").read_bytes())
    with pytest.raises(EncoderError, match=r"lack \d+ tensors of a ViTModel"):
        load_encoder(folder, device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="cannot load ViTModel"):
        load_encoder(folder, device="cpu")


def test_refuses_a_size_the_model_has_no_positions_for(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "vit")
    settings(folder, {"size": 224})
    with pytest.raises(EncoderError, match="is a model for 32 x 32 pixels"):
        load_encoder(folder, device="cpu")
