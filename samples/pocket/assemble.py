"""Puts what was trained into the folders that are kept: a `StableDiffusionPipeline`, the CLIP and the ViT, in fp16.

    python samples/pocket/assemble.py --work WORK --out samples/pocket      # writes base, clip and vit

May be run at any time of the denoiser's training: it takes the averaged weights of the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from denoiser import new_denoiser, new_scheduler
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer, ViTModel
from transformers.models.vit import ViTImageProcessorPil


def pipeline_of(work: Path) -> StableDiffusionPipeline:
    """The pipeline with the denoiser's averaged weights, float32."""
    unet = new_denoiser()
    unet.load_state_dict(torch.load(work / "unet.pt", weights_only=True, mmap=True)["ema"])
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def put(aside: Path, place: Path) -> None:
    """Move a finished folder to its place, readable by all, without the paths it was made in; the old one goes."""
    for path in aside.rglob("*.*"):
        path.chmod(0o644)
        if path.suffix == ".json":
            path.write_text(re.sub(r'\n *"_name_or_path": "[^"]*",', "", path.read_text()))
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    aside.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def read_as_fp32(folder: Path) -> Path:
    """Say in a transformers folder that it is to be loaded in float32, though the file holds float16."""
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    return folder


def assemble(work: Path, *, out: Path) -> None:
    """Write `out`/base and, where they are trained, `out`/clip and `out`/vit."""
    aside = work / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    pipeline_of(work).to(dtype=torch.float16).save_pretrained(aside / "base", safe_serialization=True)
    read_as_fp32(aside / "base" / "text_encoder")
    put(aside / "base", out / "base")
    if (work / "clip").exists():
        CLIPModel.from_pretrained(work / "clip", dtype=torch.float16).save_pretrained(aside / "clip")
        CLIPProcessor.from_pretrained(work / "clip").save_pretrained(aside / "clip")
        put(read_as_fp32(aside / "clip"), out / "clip")
    if (work / "vit").exists():
        vit = ViTModel.from_pretrained(work / "vit", add_pooling_layer=False, dtype=torch.float16)
        vit.save_pretrained(aside / "vit")
        ViTImageProcessorPil.from_pretrained(work / "vit").save_pretrained(aside / "vit")
        put(read_as_fp32(aside / "vit"), out / "vit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    assemble(arguments.work, out=arguments.out)
