"""Single files of the original layouts. Oracles: diffusers' own loader and converters, and ComfyUI's and A1111's rules
for telling what a checkpoint is, as data."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from delora_diffusion import DeloraConfig, LoraError, inject_delora, load_pipeline, save_delora_weights
from delora_diffusion.base.checks import BaseModelError
from delora_diffusion.base.prediction import Prediction, marked, predict
from delora_diffusion.cli import main as delora
from delora_diffusion.export.single_file import Entry, single_file_entries, write_single_file
from delora_diffusion.families.original import transformer_place
from delora_diffusion.options import OptionError

from .. import full_size
from ..tiny_families import build

#: What ComfyUI 0.8.0 (comfy/model_detection.py, comfy/supported_models.py) and A1111 1.10.1 (modules/
#: sd_models_config.py, sd_models_types) look for in a file, and what they must not find.
RECOGNISED = {
    "sd": (
        "model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    ),
    "sdxl": (
        "model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.1.model.ln_final.weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
        "conditioner.embedders.1.model.text_projection", "first_stage_model.post_quant_conv.weight",
    ),
    "sd3.5": ("joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight", "pos_embed"),
    "flux.1-dev": (
        "double_blocks.0.img_attn.norm.key_norm.scale", "guidance_in.in_layer.weight", "img_in.weight",
        "single_blocks.0.linear1.weight",
    ),
    "flux.2-klein": ("double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.norm.key_norm.scale"),
    "qwen-image": ("txt_norm.weight", "transformer_blocks.0.attn.norm_added_q.weight"),
    "z-image": ("cap_embedder.1.weight", "layers.0.attention.qkv.weight", "cap_pad_token"),
    "lumina2": ("cap_embedder.1.weight", "layers.0.attention.qkv.weight", "final_layer.linear.weight"),
}  # fmt: skip
CONVERTERS = {
    "sd3.5": "convert_sd3_transformer_checkpoint_to_diffusers",
    "flux.1-dev": "convert_flux_transformer_checkpoint_to_diffusers",
    "flux.2-klein": "convert_flux2_transformer_checkpoint_to_diffusers",
    "z-image": "convert_z_image_transformer_checkpoint_to_diffusers",
    "lumina2": "convert_lumina2_to_diffusers",
}


def written(pipe: Any, file: Path) -> dict[str, Tensor]:
    write_single_file(file, single_file_entries(pipe), {"format": "pt"})
    return load_file(file)


def converter(kind: str, transformer: Any) -> Any:
    """diffusers' converter; the widths that it takes for granted are those of the tiny model."""
    source = inspect.getsource(getattr(single_file_utils, CONVERTERS[kind]))
    if kind == "flux.1-dev":
        source = source.replace("3072", str(transformer.x_embedder.out_features))
    if kind == "lumina2":
        layer = transformer.layers[0].attn
        source = source.replace("2304", str(layer.to_q.out_features)).replace("768", str(layer.to_k.out_features))
    space = dict(vars(single_file_utils))
    exec(source, space)
    return space[CONVERTERS[kind]]


@pytest.mark.parametrize("kind", CONVERTERS)
def test_diffusers_converts_a_transformers_file_back(kind: str, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path)
    tensors = written(pipe, tmp_path / "x.safetensors")
    assert set(RECOGNISED[kind]) <= tensors.keys()
    back, wanted = converter(kind, pipe.transformer)(tensors), pipe.transformer.state_dict()
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in wanted.items())


def test_a_modulation_changes_its_halves_and_the_file_is_as_safetensors_writes_it(tmp_path: Path) -> None:
    entries = {
        "odd": Entry({0: torch.arange(3, dtype=torch.bfloat16)}), "empty": Entry({0: torch.zeros(0)}),
        "two": Entry({1: torch.ones(1, 2), 0: torch.zeros(2, 2)}), "half": Entry({0: torch.ones(1).half()}),
    }  # fmt: skip
    write_single_file(tmp_path / "x.safetensors", entries, {"format": "pt", "note": "ü"})
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], entry.tensor()) for name, entry in entries.items()) and len(found) == 4
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "ü"}


@pytest.mark.parametrize(
    "model, name",
    [("SD3.5 large", "sd3"), ("FLUX.1", "flux1"), ("FLUX.2 dev", "flux2"), ("Lumina-Image 2.0", "lumina2"),
     ("Z-Image", "z_image")],
)  # fmt: skip
def test_every_tensor_of_a_full_size_transformer_has_one_place(model: str, name: str) -> None:
    places = [transformer_place(name, key) for key in full_size.denoiser(model).state_dict()]
    assert all(places)
    assert len({(place.name, place.part) for place in places if place}) == len(places)


# ---- whole pipelines, merged ----------------------------------------------------------------------


def adapter_of(pipe: Any, folder: Path, *names: str) -> Path:
    modules: dict[str, nn.Module] = {name: copy.deepcopy(getattr(pipe, name)) for name in names}
    for module in modules.values():
        config = DeloraConfig(r=2, relative_lambda=0.5, init_weights="kaiming")
        inject_delora(module, config, generator=torch.Generator().manual_seed(1))
    told = {"pipeline": type(pipe).__name__, "base_model": str(folder / "base")}
    return save_delora_weights(folder / "adapter", modules, provenance=told)


def pixels(pipe: Any) -> np.ndarray:
    made = pipe(
        "a dog", num_inference_steps=2, height=16, width=16, output_type="np", guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return np.asarray(made.images)


@pytest.mark.parametrize("kind, names", [("sd", ["unet", "text_encoder"]), ("sdxl", ["unet", "text_encoder_2"])])
def test_a_merged_file_opens_in_diffusers_with_equal_pictures(kind: str, names: list[str], tmp_path: Path) -> None:
    pipe = build(kind, tmp_path / "parts")
    pipe.save_pretrained(tmp_path / "base")
    adapter = adapter_of(pipe, tmp_path, *names)
    merged = tmp_path / "merged.safetensors"
    assert delora(["merge", f"--adapter={adapter}", "--single_file", f"--output={merged}"]) == 0
    tensors = load_file(merged)
    assert set(RECOGNISED[kind]) <= tensors.keys()
    opened = type(pipe).from_single_file(str(merged), config=str(tmp_path / "base"), **(
        {"safety_checker": None, "feature_extractor": None} if kind == "sd" else {}))  # fmt: skip
    fused = load_pipeline(tmp_path / "base", adapter)
    for one in (opened, fused, pipe):
        one.set_progress_bar_config(disable=True)
    assert np.array_equal(pixels(opened), pixels(fused)) and not np.array_equal(pixels(opened), pixels(pipe))
    with safe_open(merged, framework="pt") as file:
        record = json.loads(file.metadata()["delora.merge"])
    assert record["base"] == str(tmp_path / "base") and set(record["components"]) == set(names)


def test_openclips_layout_is_that_of_stable_diffusion_2(tmp_path: Path) -> None:
    pipe = build("sd", tmp_path / "parts")
    pipe.text_encoder.config.hidden_act = "gelu"
    pipe.save_pretrained(tmp_path / "base")
    written(pipe, tmp_path / "x.safetensors")
    opened = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "x.safetensors"), config=str(tmp_path / "base"), safety_checker=None, feature_extractor=None
    )
    state = opened.text_encoder.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in pipe.text_encoder.state_dict().items())


def test_what_a_single_file_cannot_hold_is_said_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(kind: str, *names: str, change: Any = lambda pipe: None) -> str:
        folder = tmp_path / f"{kind}{len(names)}{len(list(tmp_path.iterdir()))}"
        pipe = build(kind, folder / "parts")
        change(pipe)
        pipe.save_pretrained(folder / "base")
        adapter = adapter_of(pipe, folder, *names)
        output = folder / "merged.safetensors"
        assert delora(["merge", f"--adapter={adapter}", "--single_file", f"--output={output}"]) == 1
        assert not output.exists() and not list(folder.glob(".merged*"))
        return capsys.readouterr().err

    assert "sana has no single file that other programs load" in refused("sana", "transformer")
    said = refused("sd3.5", "transformer", "text_encoder")
    assert "holds the transformer, and the adapter also changes text_encoder" in said

    def new_tensor(pipe: Any) -> None:
        pipe.unet.add_module("made_up", nn.Linear(2, 2))

    with pytest.raises(LoraError, match=r"no counterpart for 2 tensors of this UNet2DConditionModel \(made_up.weight"):
        pipe = build("sd", tmp_path / "made_up")
        new_tensor(pipe)
        single_file_entries(pipe)
    pipe.vae = None
    with pytest.raises(LoraError, match="the base has no vae"):
        single_file_entries(pipe)


@pytest.mark.parametrize("output, flag", [("folder", ["--single_file"]), ("x.safetensors", [])])
def test_the_name_of_the_output_says_what_it_is(output: str, flag: list[str], tmp_path: Path) -> None:
    from delora_diffusion.export.config import MergingConfig

    with pytest.raises(OptionError, match="goes with single_file"):
        MergingConfig(adapter=["a"], output=output, single_file=bool(flag))


def test_writing_needs_little_more_memory_than_the_model(tmp_path: Path) -> None:
    """Parts are joined when their turn comes: nothing is held twice but the largest tensor."""
    import tracemalloc

    entries = {f"x{number}": Entry({0: torch.zeros(2, 4096), 1: torch.zeros(2, 4096)}) for number in range(64)}
    tracemalloc.start()  # numpy's and Python's bytes; torch's own are seen to be single by `tensor`
    write_single_file(tmp_path / "x.safetensors", entries, {})
    assert tracemalloc.get_traced_memory()[1] < 8 * 4 * 4096 * 4
    tracemalloc.stop()


# ---- what a base predicts ---------------------------------------------------------------------------


def test_the_marks_of_a_v_prediction_file_are_written_and_read(tmp_path: Path) -> None:
    from delora_diffusion.base.config import ModelConfig
    from delora_diffusion.base.load import load_base

    pipe = build("sdxl", tmp_path / "parts")
    pipe.save_pretrained(tmp_path / "config")  # says epsilon, as the Hub's does for such a file
    predict(pipe, Prediction("v_prediction", True))
    tensors = written(pipe, tmp_path / "noob.safetensors")
    assert tensors["v_pred"].numel() == tensors["ztsnr"].numel() == 0
    asked = {
        "pretrained_model_name_or_path": str(tmp_path / "noob.safetensors"),
        "single_file_config": str(tmp_path / "config"),
    }
    found = load_base(ModelConfig(**asked), precision="no").scheduler
    assert found.config.prediction_type == "v_prediction" and found.config.rescale_betas_zero_snr
    assert found.config.timestep_spacing == "trailing" and found.alphas_cumprod[-1] < 1e-6
    told = ModelConfig(**asked, prediction_type="epsilon", rescale_betas_zero_snr=False)
    otherwise = load_base(told, precision="no").scheduler
    assert otherwise.config.prediction_type == "epsilon" and not otherwise.config.rescale_betas_zero_snr


def test_a_scheduler_that_cannot_be_told_says_so() -> None:
    from types import SimpleNamespace

    pipe: Any = SimpleNamespace(scheduler=diffusers.PNDMScheduler())
    predict(pipe, Prediction())
    assert type(pipe.scheduler) is diffusers.PNDMScheduler
    predict(pipe, Prediction("v_prediction"))
    assert type(pipe.scheduler) is diffusers.PNDMScheduler and pipe.scheduler.config.prediction_type == "v_prediction"
    predict(pipe, Prediction(zero_snr=True))
    assert pipe.scheduler.config.rescale_betas_zero_snr and pipe.scheduler.config.prediction_type == "v_prediction"
    flow: Any = SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(BaseModelError, match="prediction_type is for diffusion with a noise schedule"):
        predict(flow, Prediction("v_prediction"))
    assert marked(["v_pred"]) == Prediction("v_prediction") and marked(["a", "ztsnr"]) == Prediction()
    with pytest.raises(BaseModelError, match="EDM's noise schedule"):
        marked(["v_pred", "edm_vpred.sigma_max"])
