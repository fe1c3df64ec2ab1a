"""Image encoders that judge pictures: any DINO-like ViT or CLIP, by folder or Hub id -> unit embeddings.

Preprocessing alone moves scores by 0.02, so it is done here, with Pillow, from the settings in the encoder's own
folder: the numbers do not depend on which image backend transformers finds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import DeloraError

#: model_type in config.json -> kind and class in transformers.
KNOWN = {
    "vit": ("dino", "ViTModel"),
    "dinov2": ("dino", "Dinov2Model"),
    "dinov2_with_registers": ("dino", "Dinov2WithRegistersModel"),
    "dinov3_vit": ("dino", "DINOv3ViTModel"),
    "clip": ("clip", "CLIPModel"),
}
#: Encoders with learned positions for one image size; the others take any multiple of their patch.
_ONE_SIZE = ("vit", "clip")
POOLING = {
    "dino": "class token of the last hidden state, after the final layer norm, scaled to unit length",
    "clip": "projected image embedding, scaled to unit length",
}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BATCH = 32


class EncoderError(DeloraError):
    """An encoder that cannot be used; the message says what was asked, what was found and what to do."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From a picture to the encoder's input: resize, crop the middle, scale to 0 .. 1, (x - mean) / std."""

    resize: int | tuple[int, int] | None  # px: the shorter side, or (height, width)
    crop: tuple[int, int] | None  # px: (height, width)
    resample: int  # Pillow's filter
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, height, width) of an image of any mode."""
        image = image.convert("RGB")
        if self.resize is not None:
            height, width = self._resized(image)
            image = image.resize((width, height), Image.Resampling(self.resample))
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # black where the image is smaller
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        if not isinstance(self.resize, int):
            assert self.resize is not None
            return self.resize
        short, long = sorted(image.size)
        sides = self.resize, int(self.resize * long / short)
        return sides if image.height <= image.width else (sides[1], sides[0])


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """An encoder in memory, with all that its numbers depend on."""

    model: Any
    processor: Preprocessing
    tokenizer: Any  # None for a DINO
    kind: str  # "dino" or "clip"
    source: str
    weights: str  # hash of the weights

    @property
    def protocol(self) -> dict[str, Any]:
        """Encoder, preprocessing and pooling in words and numbers; to be kept beside what was measured."""
        processor = self.processor
        return {
            "encoder": self.source,
            "class": type(self.model).__name__,
            "weights_sha256": self.weights,
            "resize": processor.resize if isinstance(processor.resize, int | None) else list(processor.resize),
            "resize_to": "shorter side" if isinstance(processor.resize, int) else "height and width",
            "crop": list(processor.crop) if processor.crop else None,
            "resample": Image.Resampling(processor.resample).name.lower(),
            "mean": list(processor.mean),
            "std": list(processor.std),
            "pooling": POOLING[self.kind],
        }


def load_encoder(source: str | Path, *, device: str | torch.device) -> ImageEncoder:
    """Load an encoder in fp32.

    Args:
        source: folder or Hub id of a ViTModel, Dinov2Model (with registers or without), DINOv3ViTModel or CLIPModel.

    Raises:
        EncoderError: nothing there, another kind of model, or weights that do not fill it.
    """
    import transformers

    config = _config_of(source)
    if config.model_type not in KNOWN:
        raise EncoderError(
            f"{source} holds a model of type {config.model_type!r}, which is no encoder for this; "
            f"known are {', '.join(KNOWN)}"
        )
    kind, name = KNOWN[config.model_type]
    unpooled = {"add_pooling_layer": False} if name == "ViTModel" else {}
    try:
        model, settings = getattr(transformers, name).from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **unpooled
        )
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise EncoderError(f"cannot load {name} from {source}: {str(error).strip().splitlines()[0]}") from error
    missing = sorted(settings["missing_keys"])
    if missing:
        raise EncoderError(
            f"the weights in {source} lack {len(missing)} tensors of a {name} ({missing[0]}, ...); "
            f"its embeddings would be random. Give a complete {name}"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source) if kind == "clip" else None
    processor = _preprocessing(source, config)
    _check_size(source, config, processor)
    model.requires_grad_(False).eval().to(device)
    return ImageEncoder(
        model=model, processor=processor, tokenizer=tokenizer, kind=kind, source=str(source), weights=_hash(model)
    )


@torch.no_grad()
def embed_images(encoder: ImageEncoder, images: Sequence[Image.Image]) -> Tensor:
    """Unit embeddings (n, d) of images of any size and mode; fp32 on the CPU."""
    rows = []
    for first in range(0, len(images), BATCH):
        x = torch.stack([encoder.processor(image) for image in images[first : first + BATCH]])
        x = x.to(encoder.model.device)
        if encoder.kind == "clip":
            pooled = encoder.model.vision_model(pixel_values=x).pooler_output
            rows.append(encoder.model.visual_projection(pooled))
        else:
            rows.append(encoder.model(pixel_values=x).last_hidden_state[:, 0])
    return _unit(rows, encoder)


@torch.no_grad()
def embed_texts(encoder: ImageEncoder, texts: Sequence[str]) -> Tensor:
    """Unit embeddings (n, d) of texts, each padded or cut to the length of CLIP's text tower; fp32 on the CPU.

    Raises:
        EncoderError: the encoder is no CLIP.
    """
    if encoder.kind != "clip":
        raise EncoderError(f"{encoder.source} is a {type(encoder.model).__name__} and reads no text; give a CLIP")
    length, rows = encoder.model.config.text_config.max_position_embeddings, []
    for first in range(0, len(texts), BATCH):
        ids = encoder.tokenizer(
            list(texts[first : first + BATCH]),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(encoder.model.device)
        pooled = encoder.model.text_model(input_ids=ids).pooler_output  # causal: padding after the end does not count
        rows.append(encoder.model.text_projection(pooled))
    return _unit(rows, encoder)


def _unit(rows: list[Tensor], encoder: ImageEncoder) -> Tensor:
    if not rows:
        config = encoder.model.config
        return torch.empty(0, config.projection_dim if encoder.kind == "clip" else config.hidden_size)
    return F.normalize(torch.cat(rows).float(), dim=-1).cpu()


def _config_of(source: str | Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        where = "in this folder" if Path(source).is_dir() else "neither as a folder nor on the Hub"
        raise EncoderError(
            f"there is no encoder {source}, {where}: {first} An encoder is a folder or Hub id with config.json and "
            f"model.safetensors of a model of type {', '.join(KNOWN)}"
        ) from error


def _preprocessing(source: str | Path, config: Any) -> Preprocessing:
    """From preprocessor_config.json (or processor_config.json); without one, resize to the model's image size."""
    from transformers.image_processing_base import ImageProcessingMixin

    vision = getattr(config, "vision_config", config)
    mean, std = _OPENAI if config.model_type == "clip" else _IMAGENET
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(str(source))
    except OSError:
        settings = {"size": vision.image_size}
    size = settings.get("size", vision.image_size) if settings.get("do_resize", True) else None
    crop = settings.get("crop_size", vision.image_size) if settings.get("do_center_crop") else None
    resize = _sides(size, shorter=crop is not None)
    if isinstance(resize, int) and crop is None:
        crop = resize  # pictures of one batch have one shape
    cropped = _sides(crop, shorter=False)
    normal = settings.get("do_normalize", True)
    return Preprocessing(
        resize=resize,
        crop=cropped if not isinstance(cropped, int) else (cropped, cropped),
        resample=settings.get("resample", Image.Resampling.BICUBIC),
        mean=tuple(settings.get("image_mean", mean)) if normal else (0.0,) * 3,
        std=tuple(settings.get("image_std", std)) if normal else (1.0,) * 3,
    )


def _sides(size: Any, *, shorter: bool) -> int | tuple[int, int] | None:
    """A size as the configs write it: {"shortest_edge": s}, {"height": h, "width": w}, or a number, which older files
    use for the shorter side where a crop follows, and for both sides elsewhere."""
    if isinstance(size, dict):
        return int(size["shortest_edge"]) if "shortest_edge" in size else (int(size["height"]), int(size["width"]))
    if size is None:
        return None
    return int(size) if shorter else (int(size), int(size))


def _check_size(source: str | Path, config: Any, processor: Preprocessing) -> None:
    side = getattr(config, "vision_config", config).image_size
    given = processor.crop or processor.resize
    if config.model_type in _ONE_SIZE and given not in (None, (side, side)):
        raise EncoderError(
            f"{source} is a model for {side} x {side} pixels, but its preprocessor_config.json makes "
            f"{given} (height, width); correct the one that is wrong"
        )


def _hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
