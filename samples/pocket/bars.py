"""Measures how good the pocket models are, prints it, and keeps it in bars.json with a contact sheet of samples.

    python samples/pocket/bars.py

Nothing here was seen in training: pictures show held-out pairs of thing and place. The yardstick for generated
pictures is the pocket CLIP's own accuracy on real renders of the same captions.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from autoencoder import psnr
from clip import name_scenes
from diffusers import StableDiffusionPipeline
from PIL import Image
from training import to_tensor
from transformers import CLIPModel, CLIPTokenizer, ViTModel
from vit import retrieval
from world import Labels, caption_of, contact_sheet, draw, random_labels

STEPS, GUIDANCE, BATCH = 25, 3.0, 8
Hits = list[tuple[bool, bool]]


def generate(
    pipeline: StableDiffusionPipeline, captions: list[str], *, steps: int, guidance: float
) -> list[Image.Image]:
    """One picture for each caption, seeded by its position."""
    images: list[Image.Image] = []
    for first in range(0, len(captions), BATCH):
        part = captions[first : first + BATCH]
        seeds = [torch.Generator().manual_seed(first + k) for k in range(len(part))]
        images += pipeline(part, num_inference_steps=steps, guidance_scale=guidance, generator=seeds).images
    return images


def hits(clip: CLIPModel, tokenizer: CLIPTokenizer, images: list[Image.Image], labels: list[Labels]) -> Hits:
    """Whether the CLIP names the thing, and the place, of every picture."""
    named = name_scenes(clip, tokenizer, to_tensor(np.stack([np.asarray(image) for image in images])).contiguous())
    return [(t == lab.thing, p == lab.place) for lab, (t, p) in zip(labels, named, strict=True)]


def shares(found: Hits) -> dict[str, float]:
    """Shares of hits: thing, place, both."""
    n = len(found)
    thing, place, both = sum(t for t, _ in found), sum(p for _, p in found), sum(t and p for t, p in found)
    return {"thing": thing / n, "place": place / n, "both": both / n}


def measure(folder: Path, *, count: int, steps: int, guidance: float) -> tuple[dict[str, object], list[Image.Image]]:
    """All figures, and the generated pictures."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "base", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    clip = CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    vit = ViTModel.from_pretrained(folder / "vit", add_pooling_layer=False, dtype=torch.float32).eval()

    rng = np.random.default_rng(7)
    labels = [replace(random_labels(rng, unseen=True), colour=None) for _ in range(count)]
    captions = [caption_of(entry) for entry in labels]
    clock = time.monotonic()
    made = generate(pipeline, captions, steps=steps, guidance=guidance)
    seconds = (time.monotonic() - clock) / count * BATCH
    drawn = [draw(entry, rng) for entry in labels]
    generated, real = (shares(hits(clip, tokenizer, images, labels)) for images in (made, drawn))
    figures: dict[str, object] = {
        "vae_psnr_db": round(psnr(pipeline.vae), 2),
        "pictures": count,
        "generated": generated,
        "real": real,
        "ratio": {name: round(generated[name] / real[name], 3) for name in real},
        "vit_retrieval": round(retrieval(vit), 3),
        "seconds_for_8": round(seconds, 1),
        "steps": steps,
        "guidance": guidance,
    }
    return figures, made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    arguments = parser.parse_args()
    result, pictures = measure(
        arguments.folder, count=arguments.count, steps=arguments.steps, guidance=arguments.guidance
    )
    print(json.dumps(result, indent=2))
    (arguments.folder / "bars.json").write_text(json.dumps(result, indent=2) + "\n")
    contact_sheet(pictures[:48]).save(arguments.folder / "contact_sheet.png", optimize=True)
