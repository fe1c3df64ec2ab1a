"""The pocket CLIP: a small `CLIPModel` that tells which caption goes with which picture.

    python samples/pocket/clip.py --work WORK      # trains, then writes WORK/clip and WORK/text_encoder

Its text tower is the pipeline's text encoder, as in Stable Diffusion; as a whole it scores pictures against prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scenes import load_images, load_labels
from things import MARKS
from tokens import LENGTH, train_tokenizer
from torch import nn
from torch.nn import functional as F
from training import Plan, to_tensor, train
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer
from transformers.models.clip import CLIPImageProcessorPil
from world import COLOUR_NAMES, PLACE_NAMES, THING_NAMES, Labels, caption_of, scene, training_caption

WIDTH = 128
NUMBERS = {name: k for k, name in enumerate((*THING_NAMES, *PLACE_NAMES, *COLOUR_NAMES, *MARKS))}
PLACE_SLOT = torch.tensor([False, True, False, False])  # of thing, place, colour, marks: only the place may go unsaid
KINDS, VISION_KINDS = (0.25, 0.25, 0.15, 0.25, 0.1), (0.1, 0.15, 0.15, 0.5, 0.1)
BOTH = Plan(steps=6000, minutes=90, batch=96, ema_decay=0.998, save_every=100)
VISION = Plan(steps=20000, minutes=90, batch=96, muon_lr=0.01, adam_lr=1e-3, ema_decay=0.998, save_every=100)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Untrained, 1.9 M parameters; patches of 8 x 8 px."""
    tower = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4}
    text = tower | {
        "num_hidden_layers": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"num_hidden_layers": 6, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """int64 [n, LENGTH], padded and cut as the pipeline does it."""
    padded = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    ids: torch.Tensor = padded.input_ids
    return ids


def degrade(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [n, 3, h, w] with some blur and noise, so that generated pictures are judged by what they show."""
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    amount, noise = torch.rand(2, len(x), 1, 1, 1, generator=generator)
    return torch.lerp(x, blurred, amount) + 0.1 * noise * torch.randn(x.shape, generator=generator)


def contrast(model: nn.Module, ids: torch.Tensor, x: torch.Tensor, *, fits: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross entropy; pairs that fit by chance (bool [n, n], rows are images) are not counted."""
    others = ~torch.eye(len(x), dtype=torch.bool)
    logits = model(input_ids=ids, pixel_values=x).logits_per_image.masked_fill(fits & others, -1e4)
    target = torch.arange(len(x))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def place_of(labels: Labels) -> Hashable:
    """What the scenes of a group share: the place."""
    return labels.place


def thing_of(labels: Labels) -> Hashable:
    """The thing."""
    return labels.thing


def colour_of(labels: Labels) -> Hashable:
    """The colour word and the place; None without a colour word."""
    return labels.colour and (labels.colour, labels.place)


def mark_of(labels: Labels) -> Hashable:
    """The first mark; None without one."""
    return labels.marks[0] if labels.marks else None


def rows_by(labels: Sequence[Labels], key: Callable[[Labels], Hashable]) -> list[np.ndarray]:
    """The places of the labels of each group, those of the group None left out."""
    groups: dict[Hashable, list[int]] = {}
    for row, entry in enumerate(labels):
        groups.setdefault(key(entry), []).append(row)
    return [np.array(rows) for shared, rows in groups.items() if shared is not None]


def fit(
    model: CLIPModel, tokenizer: CLIPTokenizer, work: Path, *, plan: Plan, kinds: Sequence[float], name: str
) -> CLIPModel:
    """Train on scenes and captions, checkpoint in WORK/<name>.pt; returns the EMA model.

    Args:
        kinds: shares of the kinds of batches: any scenes; three places; six things; three pairs of colour and place,
            whose captions only the thing tells apart; six marks. Where most of what captions say is held still, no
            word can be left unread.
    """
    images, labels = load_images(work), load_labels(work)
    shared = ((3, place_of), (6, thing_of), (3, colour_of), (6, mark_of))
    groups = [(1, [np.arange(len(labels))]), *((few, rows_by(labels, key)) for few, key in shared)]

    def loss_of(model: nn.Module, rng: np.random.Generator, generator: torch.Generator) -> torch.Tensor:
        few, group = groups[int(rng.choice(len(groups), p=kinds))]
        chosen = rng.choice(len(group), few, replace=False)
        rows = np.concatenate([rng.choice(group[k], plan.batch // few) for k in chosen])
        captions, said = zip(*(training_caption(labels[k], rng) for k in rows), strict=True)
        shown = code([labels[k] for k in rows])[:, None]
        stated = code(said)[None]
        fits = ((shown == stated) | ((stated == -1) & PLACE_SLOT)).all(-1)
        x = degrade(to_tensor(images[rows]), generator).contiguous()
        return contrast(model, tokenize(tokenizer, list(captions)), x, fits=fits)

    averaged = train(model, loss_of, plan=plan, checkpoint=work / f"{name}.pt")
    assert isinstance(averaged, CLIPModel)
    return averaged


def train_clip(work: Path, *, minutes: float, vision_minutes: float) -> tuple[CLIPModel, CLIPTokenizer]:
    """Both towers, then the vision tower alone, which has more to learn.

    The text tower stays as it was after the first round, because the denoiser depends on it: it is saved by then.
    """
    tokenizer = train_tokenizer()
    model = fit(new_clip(tokenizer), tokenizer, work, plan=replace(BOTH, minutes=minutes), kinds=KINDS, name="clip")
    save_clip(model, tokenizer, work)
    model.train().requires_grad_(True)
    model.text_model.requires_grad_(False)
    plan = replace(VISION, minutes=vision_minutes)
    return fit(model, tokenizer, work, plan=plan, kinds=VISION_KINDS, name="clip_vision").eval(), tokenizer


def code(labels: Sequence[Labels]) -> torch.Tensor:
    """int64 [n, 4]: thing, place, colour and marks as numbers, -1 for what is not said."""

    def numbers(entry: Labels) -> tuple[int, ...]:
        words = sorted(NUMBERS[word] for mark in entry.marks for word in mark.split() if word in NUMBERS)
        marks = sum(word * 1000**k for k, word in enumerate(words)) if words else -1
        return (*(NUMBERS.get(name or "", -1) for name in (entry.thing, entry.place, entry.colour)), marks)

    return torch.tensor([numbers(entry) for entry in labels])


@torch.inference_mode()
def name_scenes(model: CLIPModel, tokenizer: CLIPTokenizer, x: torch.Tensor) -> list[tuple[str, str]]:
    """Zero-shot (thing, place) of pictures [n, 3, 64, 64] in -1..1.

    A thing is scored by the mean embedding of its captions in all places, a place by that of its captions with all
    things. The captions have no colour words, nor should the pictures have had.
    """
    image = F.normalize(model.visual_projection(model.vision_model(pixel_values=x).pooler_output), dim=-1)
    labels = [Labels(t, p) for t in THING_NAMES for p in PLACE_NAMES]
    grid = embed_captions(model, tokenizer, labels).view(len(THING_NAMES), len(PLACE_NAMES), -1)
    things = (image @ F.normalize(grid.mean(1), dim=-1).T).argmax(-1).tolist()
    places = (image @ F.normalize(grid.mean(0), dim=-1).T).argmax(-1).tolist()
    return [(THING_NAMES[t], PLACE_NAMES[p]) for t, p in zip(things, places, strict=True)]


def embed_captions(model: CLIPModel, tokenizer: CLIPTokenizer, labels: list[Labels]) -> torch.Tensor:
    """Unit text embeddings [n, WIDTH] of the captions of these labels."""
    ids = tokenize(tokenizer, [caption_of(entry, template="a photo of a {}") for entry in labels])
    parts = [model.text_model(input_ids=part).pooler_output for part in ids.split(256)]
    return F.normalize(model.text_projection(torch.cat(parts)), dim=-1)


@torch.inference_mode()
def name_looks(model: CLIPModel, tokenizer: CLIPTokenizer, x: torch.Tensor) -> list[tuple[str, str]]:
    """Zero-shot (thing, colour word) of recoloured pictures [n, 3, 64, 64] in -1..1, among all pairs of the two.

    A pair is scored by the mean embedding of its captions in all places.
    """
    image = F.normalize(model.visual_projection(model.vision_model(pixel_values=x).pooler_output), dim=-1)
    labels = [Labels(t, p, c) for t in THING_NAMES for c in COLOUR_NAMES for p in PLACE_NAMES]
    grid = embed_captions(model, tokenizer, labels).view(-1, len(PLACE_NAMES), WIDTH)
    best = (image @ F.normalize(grid.mean(1), dim=-1).T).argmax(-1).tolist()
    return [(THING_NAMES[k // len(COLOUR_NAMES)], COLOUR_NAMES[k % len(COLOUR_NAMES)]) for k in best]


def accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, *, count: int = 400) -> dict[str, float]:
    """Shares of unseen scenes whose thing, place and colour are named correctly.

    Things and places in natural colours; things and colours where there is a colour word, with and without marks.
    """
    scenes = [s for s in (scene(k, unseen=True) for k in range(8 * count)) if not s.labels.individual]
    plain = [s for s in scenes if not s.labels.colour and not s.labels.marks][:count]
    coloured = [s for s in scenes if s.labels.colour][:count]
    natural, looks = (
        name(model, tokenizer, to_tensor(np.stack([np.asarray(s.image) for s in some])).contiguous())
        for name, some in ((name_scenes, plain), (name_looks, coloured))
    )
    hits = {
        "thing": [s.labels.thing == thing for s, (thing, _) in zip(plain, natural, strict=True)],
        "place": [s.labels.place == place for s, (_, place) in zip(plain, natural, strict=True)],
        "recoloured thing": [s.labels.thing == thing for s, (thing, _) in zip(coloured, looks, strict=True)],
        "colour": [s.labels.colour == colour for s, (_, colour) in zip(coloured, looks, strict=True)],
    }
    return {name: sum(found) / len(found) for name, found in hits.items()}


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, work: Path) -> None:
    """Write WORK/clip (model and processor), WORK/text_encoder and WORK/tokenizer."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    model.save_pretrained(work / "clip")
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(work / "clip")
    encoder = CLIPTextModel(model.config.text_config)
    encoder.load_state_dict({k.removeprefix("text_model."): v for k, v in model.text_model.state_dict().items()})
    encoder.save_pretrained(work / "text_encoder")
    tokenizer.save_pretrained(work / "tokenizer")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=BOTH.minutes, help="of both towers, earlier runs included")
    parser.add_argument("--vision_minutes", type=float, default=VISION.minutes, help="of the vision tower alone")
    arguments = parser.parse_args()
    work = arguments.work
    clip, clip_tokenizer = train_clip(work, minutes=arguments.minutes, vision_minutes=arguments.vision_minutes)
    save_clip(clip, clip_tokenizer, work)
    print("clip, on unseen scenes:", accuracy(clip, clip_tokenizer))
