"""A base in one file. Oracle: the pipeline whose weights were written by the original implementation's names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from delora_diffusion import load_pipeline, read_adapter
from delora_diffusion.base.checks import BaseModelError
from delora_diffusion.base.config import ModelConfig
from delora_diffusion.base.load import half_precision, load_base
from delora_diffusion.base.single_file import single_file_dtype, single_file_index
from delora_diffusion.cli import main as delora
from delora_diffusion.sampling.generate import Prompts, generate

from .. import tiny
from ..ldm import save_as_one_file
from ..runs import load_script
from ..tiny_families import build


def configuration(pipe: Any, folder: Path) -> Path:
    """The folder of a pipeline without its weights."""
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


@pytest.fixture(params=["sd", "sdxl"])
def one_file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, Path]:
    """A pipeline, the file with its weights, and the folder with its configuration."""
    pipe = build(request.param, tmp_path / "parts")
    return pipe, save_as_one_file(pipe, tmp_path / "base.safetensors"), configuration(pipe, tmp_path / "configuration")


def test_the_base_is_the_pipeline_that_was_written(one_file: tuple[Any, Path, Path]) -> None:
    pipe, file, config = one_file
    found = load_base(
        ModelConfig(pretrained_model_name_or_path=str(file), single_file_config=str(config)), precision="no"
    )
    assert type(found) is type(pipe)
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            ours = getattr(found, name).state_dict()
            assert ours.keys() == module.state_dict().keys()
            assert all(torch.equal(ours[key], tensor) for key, tensor in module.state_dict().items()), name
    assert type(found.scheduler) is type(pipe.scheduler)
    assert torch.equal(found.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    assert not any(p.requires_grad for p in found.unet.parameters())
    asked: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2}
    ours, theirs = (generate(p, Prompts(texts=["a dog"]), [0], **asked)[0] for p in (found, pipe))
    assert np.array_equal(tiny.as_array(ours), tiny.as_array(theirs))


def test_a_half_precision_base_has_its_vae_in_full_precision(tmp_path: Path) -> None:
    pipe = build("sd", tmp_path / "parts")
    file, config = save_as_one_file(pipe, tmp_path / "base.safetensors"), configuration(pipe, tmp_path / "config")
    found = load_base(
        ModelConfig(pretrained_model_name_or_path=str(file), single_file_config=str(config), base_dtype="bf16"),
        precision="no",
    )
    assert found.unet.dtype == found.text_encoder.dtype == torch.bfloat16
    assert torch.equal(found.vae.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight), "not by way of bf16"
    assert half_precision(str(file), str(config)) == "fp16"
    halved = save_as_one_file(pipe, tmp_path / "halved.safetensors", dtype=torch.float16)
    assert single_file_dtype(str(halved)) == torch.float16 and single_file_dtype(str(file)) == torch.float32


def test_what_the_file_lacks_comes_from_the_configurations_folder(tmp_path: Path) -> None:
    pipe = build("sd", tmp_path / "parts")
    pipe.save_pretrained(tmp_path / "folder")
    file = save_as_one_file(pipe, tmp_path / "base.safetensors", vae=False)
    found = load_base(
        ModelConfig(pretrained_model_name_or_path=str(file), single_file_config=str(tmp_path / "folder")),
        precision="no",
    )
    assert torch.equal(found.vae.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight)


def test_it_is_trained_with_sampled_from_and_merged_into(photos: Path, tmp_path: Path) -> None:
    pipe = build("sd", tmp_path / "parts")
    file = save_as_one_file(pipe, tmp_path / "base.safetensors", dtype=torch.float16)
    config = configuration(pipe, tmp_path / "config")
    asked = [f"--single_file_config={config}"]
    options = [f"--pretrained_model_name_or_path={file}", f"--instance_data_dir={photos}", "--instance_prompt=a dog",
               "--resolution=16", "--rank=2", "--max_train_steps=2", f"--output_dir={tmp_path / 'out'}"]  # fmt: skip
    assert load_script().main([*options, *asked]) == 0
    adapter = tmp_path / "out"
    assert read_adapter(adapter).provenance["base_model"] == str(file)

    size = ["--height=16", "--width=16", "--num_inference_steps=2", "--device=cpu"]
    command = ["sample", f"--adapter={adapter}", "--prompts", "a dog", f"--output_dir={tmp_path / 'images'}", *size]
    assert delora([*command, *asked]) == 0
    (row,) = map(json.loads, (tmp_path / "images" / "manifest.jsonl").read_text().splitlines())
    assert row["single_file_config"] == str(config)

    merged = tmp_path / "merged"
    assert delora(["merge", f"--adapter={adapter}", f"--output={merged}", *asked]) == 0
    weights = load_file(merged / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}, "the file's own precision"
    fused = load_pipeline(file, adapter, single_file_config=str(config), dtype=torch.float16)
    opened = DiffusionPipeline.from_pretrained(merged, dtype=torch.float16)
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(opened.unet.state_dict()[key], fused.unet.state_dict()[key])
    assert not torch.equal(opened.unet.state_dict()[key], pipe.unet.state_dict()[key].half())


# ---- what cannot be opened ------------------------------------------------------------------------


def refusal(file: Path, config: Path | None = None) -> str:
    with pytest.raises(BaseModelError) as refused:
        load_base(
            ModelConfig(pretrained_model_name_or_path=str(file), single_file_config=str(config) if config else None),
            precision="no",
        )
    return str(refused.value)


def test_without_a_configuration_the_hubs_is_asked_for_by_what_is_in_the_file(tmp_path: Path) -> None:
    """Offline here: the message says which, and the way out."""
    shapes = {
        "v1-5": {"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
        "stable-diffusion-xl-base-1.0": {
            "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (8,)
        },
        "stable-diffusion-2-1": {
            "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (8, 1024)
        },
    }
    for known, tensors in shapes.items():
        file = tmp_path / f"{known}.safetensors"
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
        said = refusal(file)
        assert "is a single file; its configuration is to come from stab" in said and known in said
        assert "the Hub cannot be reached" in said and "--single_file_config" in said


def test_files_that_are_no_base_are_refused(tmp_path: Path) -> None:
    config = configuration(build("sd", tmp_path / "parts"), tmp_path / "config")
    broken, pickled, lora, other = (
        tmp_path / n for n in ("a.safetensors", "b.ckpt", "c.safetensors", "d.safetensors")
    )
    broken.write_bytes(b"x")
    pickled.write_bytes(b"x")
    save_file({"unet.down.lora_A.weight": torch.zeros(2, 2)}, lora)
    save_file({"layer.weight": torch.zeros(2, 2)}, other)
    assert "is not a .safetensors file that can be read" in refusal(broken, config)
    assert "is a .ckpt; a single-file base is a .safetensors file" in refusal(pickled, config)
    assert "is an adapter, not a base" in refusal(lora, config)
    assert f"cannot load the single-file base {other}" in refusal(other, config)


def test_a_configuration_of_another_kind_is_refused(tmp_path: Path) -> None:
    sd, xl = (build(kind, tmp_path / kind) for kind in ("sd", "sdxl"))
    file = save_as_one_file(sd, tmp_path / "base.safetensors")
    assert "cannot load the single-file base" in refusal(file, configuration(xl, tmp_path / "xl"))
    config = configuration(sd, tmp_path / "config")
    shutil.rmtree(config / "tokenizer")
    assert f"the base {config} has no tokenizer: there is no CLIPTokenizer in" in refusal(file, config)


@pytest.mark.parametrize(
    "key", ["model.diffusion_model.time_embed.0.weight", "final_layer_norm.bias", "conv_out.bias"]
)
def test_a_file_with_a_hole_is_refused(key: str, tmp_path: Path) -> None:
    """In the denoiser, the text encoder or the VAE."""
    pipe = build("sd", tmp_path / "parts")
    tensors = load_file(save_as_one_file(pipe, tmp_path / "base.safetensors"))
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(key)}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "holed.safetensors")
    said = refusal(tmp_path / "holed.safetensors", configuration(pipe, tmp_path / "config"))
    assert "holed.safetensors lacks weights of the model" in said and "--single_file_config" in said


def test_the_configurations_index_names_the_pipeline(one_file: tuple[Any, Path, Path]) -> None:
    pipe, file, config = one_file
    assert single_file_index(str(file), str(config))["_class_name"] == type(pipe).__name__
