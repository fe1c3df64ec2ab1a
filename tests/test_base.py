"""Loading a base: refusals that say what to do, and the precision each family is drawn in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from delora_diffusion.base import BaseModelError, half_precision, load_base
from delora_diffusion.config import ModelConfig
from delora_diffusion.families import FamilyError

from .tiny_families import build


@pytest.mark.parametrize(("kind", "half"), [("sdxl", "fp16"), ("lumina2", "bf16"), ("z-image", "bf16")])
def test_a_base_is_loaded_in_its_familys_half_precision_with_an_fp32_vae(kind: str, half: str, tmp_path: Path) -> None:
    build(kind, tmp_path / "parts").save_pretrained(tmp_path / "base")
    assert half_precision(str(tmp_path / "base")) == half
    pipe = load_base(ModelConfig(str(tmp_path / "base"), base_dtype=half), precision="no")
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    assert denoiser.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[half] and pipe.vae.dtype == torch.float32
    assert not any(p.requires_grad for p in denoiser.parameters())


def test_a_base_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline", "_diffusers_version": "0.42.1"}')
    with pytest.raises(FamilyError, match="KolorsPipeline is of no supported family; supported pipelines are Stable"):
        half_precision(str(tmp_path))


def test_a_missing_component_is_named(tmp_path: Path) -> None:
    build("sd", tmp_path / "parts").save_pretrained(tmp_path / "base")
    for file in (tmp_path / "base" / "vae").iterdir():
        file.unlink()
    with pytest.raises(BaseModelError, match="cannot load the base model") as refused:
        load_base(ModelConfig(str(tmp_path / "base")), precision="no")
    assert "vae" in str(refused.value)


def test_a_single_file_is_refused_with_the_way_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(BaseModelError, match="is a single file; a base is a folder in diffusers' layout: load"):
        load_base(ModelConfig(str(tmp_path / "model.safetensors")), precision="no")


def test_a_gated_model_names_the_page_and_the_login(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **settings: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr(DiffusionPipeline, "load_config", refuse)
    with pytest.raises(BaseModelError) as refused:
        load_base(ModelConfig("black-forest-labs/FLUX.1-dev"), precision="no")
    assert "https://huggingface.co/black-forest-labs/FLUX.1-dev" in str(refused.value)
    assert "hf auth login" in str(refused.value)
