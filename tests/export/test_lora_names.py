"""Names of layers in LoRA files, for the full-size models (on the meta device) and as diffusers' loader reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from delora_diffusion.export.clients import CLIENTS, found_by, looked_up
from delora_diffusion.export.lora_names import (
    ARCHITECTURES,
    LoraError,
    architecture_of,
    canonical,
    lora_name,
    missing_attention,
    style_of,
    unreadable,
)
from delora_diffusion.families import FAMILIES
from delora_diffusion.method.config import ATTENTION, DeloraConfig
from delora_diffusion.method.targets import target_layers

from .. import full_size

SD1, SD2, SDXL = ARCHITECTURES["sd1"], ARCHITECTURES["sd2"], ARCHITECTURES["sdxl"]


# ---- full-size models -----------------------------------------------------------------------------


def unet_sd1() -> nn.Module:
    return UNet2DConditionModel(cross_attention_dim=768)


def unet_sd2() -> nn.Module:
    return UNet2DConditionModel(
        cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
    )


def unet_sdxl() -> nn.Module:
    return UNet2DConditionModel(
        block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=[5, 10, 20],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10], use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def clip_l() -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))


def clip_h() -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23))


def clip_g() -> nn.Module:
    config = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, projection_dim=1280)
    return CLIPTextModelWithProjection(config)


@functools.cache
def linears(build: Callable[[], nn.Module], targets: str | None = None) -> dict[str, nn.Linear]:
    with torch.device("meta"):
        module = build()
    return target_layers(module, DeloraConfig(target_modules=targets or "all-linear"))


UNETS = [(unet_sd1, SD1, 128), (unet_sd2, SD2, 128), (unet_sdxl, SDXL, 560)]
ENCODERS = [
    (clip_l, SD1, "text_encoder", 72, "lora_te_"),
    (clip_h, SD2, "text_encoder", 138, "lora_te_"),
    (clip_l, SDXL, "text_encoder", 72, "lora_te1_"),
    (clip_g, SDXL, "text_encoder_2", 192, "lora_te2_"),
]


def through_diffusers(names: list[str], component: str) -> set[str]:
    """Paths at which diffusers' loader puts kohya-named layers of a component."""
    state: dict[str, Any] = {}
    for name in names:
        state |= {f"{name}.lora_down.weight": torch.ones(1, 1), f"{name}.lora_up.weight": torch.ones(1, 1)}
        state[f"{name}.alpha"] = torch.tensor(1.0)
    converted, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(state)
    assert len(alphas) == len(names)
    own = {k.removeprefix(f"{component}."): v for k, v in converted.items() if k.startswith(f"{component}.")}
    if component == "unet":
        peft = convert_unet_state_dict_to_peft(own)
    else:
        peft = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    return {key.removesuffix(".lora_A.weight") for key in peft if key.endswith(".lora_A.weight")}


@pytest.mark.parametrize("build, family, attentions", UNETS, ids=["sd1", "sd2", "sdxl"])
def test_kohya_names_of_a_full_size_unet_come_back_through_diffusers(
    build: Callable[[], nn.Module], family: Any, attentions: int
) -> None:
    layers = list(linears(build))
    assert len(linears(build, ATTENTION)) == attentions
    names = [lora_name("kohya", "unet", layer, family) for layer in layers]
    assert len(set(names)) == len(layers) and all("." not in name for name in names)
    assert through_diffusers(names, "unet") == set(layers)


@pytest.mark.parametrize("build, family, component, count, prefix", ENCODERS, ids=["l", "h", "xl-l", "xl-g"])
def test_kohya_names_of_a_full_size_text_encoder_come_back_through_diffusers(
    build: Callable[[], nn.Module], family: Any, component: str, count: int, prefix: str
) -> None:
    layers = [layer for layer in linears(build) if layer != "text_projection"]
    assert len(layers) == count
    names = [lora_name("kohya", component, layer, family) for layer in layers]
    assert f"{prefix}text_model_encoder_layers_0_self_attn_q_proj" in names
    assert f"{prefix}text_model_encoder_layers_{count // 6 - 1}_mlp_fc2" in names
    found = through_diffusers(names, component)
    assert found == {f"text_model.{layer.removeprefix('text_model.')}" for layer in layers}


def test_kohya_names_are_those_of_files_in_circulation() -> None:
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert lora_name("kohya", "unet", path, SD1) == (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    )
    assert lora_name("kohya", "unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", SD1) == (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"
    )
    assert lora_name("kohya", "unet", "add_embedding.linear_2", SDXL) == "lora_unet_label_emb_0_2"
    assert lora_name("kohya", "text_encoder_2", "text_model.encoder.layers.31.mlp.fc1", SDXL) == (
        "lora_te2_text_model_encoder_layers_31_mlp_fc1"
    )
    assert lora_name("kohya", "text_encoder", "encoder.layers.3.self_attn.v_proj", None) == (
        "lora_te_text_model_encoder_layers_3_self_attn_v_proj"
    )


def test_the_text_model_level_is_put_back_once() -> None:
    for layer in ("encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"):
        assert canonical("text_encoder", layer) == "text_model.encoder.layers.0.self_attn.q_proj"
    assert canonical("text_encoder_2", "text_projection") == "text_projection"
    assert canonical("transformer", "encoder.layers.0.to_q") == "encoder.layers.0.to_q"


# ---- what each program looks up --------------------------------------------------------------------


@pytest.mark.parametrize("build, family, attentions", UNETS, ids=["sd1", "sd2", "sdxl"])
def test_comfyui_and_a1111_find_every_kohya_name_but_lose_all_attention_of_diffusers_names(
    build: Callable[[], nn.Module], family: Any, attentions: int
) -> None:
    layers = list(dict.fromkeys([*linears(build), *linears(build, "attention+ff+conv")]))
    attention = list(linears(build, ATTENTION))
    for program in CLIENTS:
        assert all(lora_name("kohya", "unet", n, family) in looked_up(program, "unet", n) for n in layers)
        kohya = [lora_name("kohya", "unet", n, family) for n in layers]
        assert found_by(program, kohya, [("unet", n) for n in layers], family) == (len(layers), "")
    named = [n for n in attention if lora_name("diffusers", "unet", n, family) in looked_up("comfyui", "unet", n)]
    assert len(attention) == attentions and named == []
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out" in looked_up(
        "comfyui", "unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    )


@pytest.mark.parametrize("build, family, component, count, prefix", ENCODERS, ids=["l", "h", "xl-l", "xl-g"])
def test_comfyui_and_a1111_find_every_text_encoder_layer(
    build: Callable[[], nn.Module], family: Any, component: str, count: int, prefix: str
) -> None:
    for layer in (layer for layer in linears(build) if layer != "text_projection"):
        assert lora_name("kohya", component, layer, family) in looked_up("comfyui", component, layer)
        assert lora_name("kohya", component, layer, family) in looked_up("a1111", component, layer)
        assert lora_name("kohya", component, layer, family) in looked_up("forge", component, layer, family)
        assert lora_name("diffusers", component, layer, family) in looked_up("comfyui", component, layer)
        assert lora_name("diffusers", component, layer, family) not in looked_up("a1111", component, layer)


@pytest.mark.parametrize(
    "model, name",
    [
        ("SD3.5 medium", "sd3"), ("FLUX.1", "flux1"), ("FLUX.2 dev", "flux2"), ("FLUX.2 klein 4B", "flux2"),
        ("PixArt-alpha, -Sigma", "pixart"), ("Qwen-Image", "qwen_image"), ("Z-Image", "z_image"),
    ],
)  # fmt: skip
def test_comfyui_finds_every_layer_of_a_full_size_transformer_by_diffusers_names(model: str, name: str) -> None:
    layers = full_size.adapted(model, "attention+ff")
    assert len(layers) > len(full_size.adapted(model, "attention")) > 50
    for layer in layers:
        written = lora_name("diffusers", "transformer", layer, ARCHITECTURES[name])
        assert written == f"transformer.{layer}"
        assert written in looked_up("comfyui", "transformer", layer, ARCHITECTURES[name])
        assert written in looked_up("comfyui", "transformer", layer), "of a family that is not known"
        assert not looked_up("a1111", "transformer", layer, ARCHITECTURES[name])
        assert (written in looked_up("forge", "transformer", layer, ARCHITECTURES[name])) == (name == "flux1")


def test_a_program_says_why_it_finds_nothing() -> None:
    layers = [("transformer", layer) for layer in full_size.adapted("SD3.5 medium", "attention")]
    names = [lora_name("diffusers", *layer, ARCHITECTURES["sd3"]) for layer in layers]
    assert found_by("comfyui", names, layers, ARCHITECTURES["sd3"]) == (len(layers), "")
    for program in ("forge", "a1111"):
        assert found_by(program, names, layers, ARCHITECTURES["sd3"]) == (
            0, "no engine for sd3 that opens LoRA files",
        )  # fmt: skip
    mixed = [("unet", layer) for layer in linears(unet_sd1)]
    plain = [lora_name("diffusers", "unet", layer, SD1) for _, layer in mixed]
    count, why = found_by("forge", plain, mixed, SD1)
    assert count == 0 and why.startswith("drops the file whole: ") and found_by("a1111", plain, mixed, SD1) == (0, "")
    assert found_by("comfyui", plain, mixed, SD1)[0] == len(mixed) - 128


def test_t5_is_read_by_some_programs_under_the_number_of_its_encoder() -> None:
    layer = "encoder.block.3.layer.0.SelfAttention.q"
    flat = layer.replace(".", "_")
    for name, component, number in (
        ("flux1", "text_encoder_2", 2),
        ("sd3", "text_encoder_3", 3),
        ("pixart", "text_encoder", 1),
    ):
        family = ARCHITECTURES[name]
        assert lora_name("diffusers", component, layer, family) == f"lora_te{number}_{flat}"
        assert f"lora_te{number}_{flat}" in looked_up("comfyui", component, layer, family)
        assert not unreadable(component, layer, format="comfyui", architecture=family)
        assert unreadable(component, layer, format="diffusers", architecture=family)
        assert not looked_up("a1111", component, layer, family)
    assert unreadable("text_encoder_2", layer, format="comfyui"), "of a family that is not known"
    assert f"lora_te2_{flat}" in looked_up("forge", "text_encoder_2", layer, ARCHITECTURES["flux1"])


def test_the_projection_of_sdxls_second_encoder_is_lost_in_a1111_alone() -> None:
    found = {program: bool(looked_up(program, "text_encoder_2", "text_projection", SDXL)) for program in CLIENTS}
    assert found == {"comfyui": True, "forge": True, "a1111": False}


@pytest.mark.parametrize("model, name", [("Sana 1.6B", "sana"), ("Lumina-Image 2.0", "lumina2")])
def test_comfyui_finds_nothing_of_transformers_that_it_has_no_table_for(model: str, name: str) -> None:
    for layer in full_size.adapted(model, "attention+ff"):
        names = looked_up("comfyui", "transformer", layer, ARCHITECTURES[name])
        assert f"transformer.{layer}" not in names and bool(names) == (name == "lumina2"), "by original names"


@pytest.mark.parametrize(
    "name, layer",
    [
        ("qwen_image", "transformer_blocks.0.attn2.to_q"),
        ("sd3", "transformer_blocks.0.attn1.to_q"),
        ("flux1", "transformer_blocks.0.img_mlp.net.2"),
        ("z_image", "layers.0.attn.to_q"),
        ("pixart", "layers.0.attention.to_q"),
    ],
)
def test_the_table_is_that_of_the_family(name: str, layer: str) -> None:
    assert not looked_up("comfyui", "transformer", layer, ARCHITECTURES[name])


def test_a_layer_that_no_table_has_is_not_found() -> None:
    for program in ("comfyui", "a1111"):
        assert not looked_up(program, "unet", "made_up.to_q")
        assert not looked_up(program, "transformer", "made_up.to_q")
        assert not looked_up(program, "text_encoder", "encoder.block.0.layer.0.SelfAttention.q")
        assert not looked_up(program, "text_encoder", "text_projection")


# ---- families and formats ---------------------------------------------------------------------------

CROSS = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    "widths, told, name",
    [
        ({"unet": {CROSS: 768}}, {}, "sd1"),
        ({"unet": {CROSS: 1024}}, {}, "sd2"),
        ({"unet": {CROSS: 1024}}, {"prediction_type": "v_prediction"}, "sd2_v"),
        ({"unet": {CROSS: 2048}}, {}, "sdxl"),
        ({"unet": {CROSS: 16}, "text_encoder_2": {}}, {}, "sdxl"),
        ({"unet": {CROSS: 16}}, {}, None),
        ({"unet": {CROSS: 16}}, {"pipeline": "StableDiffusionXLPipeline"}, "sdxl"),
        ({"unet": {CROSS: 768}}, {"pipeline": "StableDiffusionPipeline"}, "sd1"),
        ({"transformer": {"x": 8}, "text_encoder_2": {}}, {}, None),
        ({"transformer": {"x": 8}}, {"pipeline": "StableDiffusion3Pipeline"}, "sd3"),
        ({"transformer": {"x": 8}}, {"pipeline": "FluxPipeline"}, "flux1"),
        ({"transformer": {"x": 8}}, {"pipeline": "Flux2KleinPipeline"}, "flux2"),
        ({"transformer": {"x": 8}}, {"pipeline": "HunyuanDiTPipeline"}, None),
        ({"text_encoder": {"x": 8}}, {}, None),
    ],
)
def test_the_family_follows_from_the_pipeline_or_from_shapes(widths: Any, told: Any, name: str | None) -> None:
    found = architecture_of(widths, **told)
    assert (found.name if found else None) == name


def test_a_family_of_transformers_is_one_architecture_by_all_its_pipelines() -> None:
    families = [family for family in FAMILIES if family.denoiser == "transformer"]
    names = []
    for family in families:
        found = [architecture_of({}, pipeline=name) for name in (*family.pipelines, *family.related)]
        assert {one.denoiser for one in found if one} == {"transformer"} and found.count(found[0]) == len(found)
        names.append(found[0].name if found[0] else "")
    assert len(set(names)) == len(families) >= 8


def test_comfyui_format_is_kohya_for_unets_and_diffusers_for_transformers() -> None:
    assert style_of("comfyui", {"unet", "text_encoder"}, None) == "kohya"
    assert style_of("comfyui", {"transformer", "text_encoder"}, None) == "diffusers"
    assert style_of("comfyui", {"text_encoder"}, ARCHITECTURES["sd3"]) == "diffusers"
    assert style_of("comfyui", {"text_encoder"}, None) == "kohya"
    assert style_of("diffusers", {"unet"}, SD1) == "diffusers"
    with pytest.raises(LoraError, match="comfyui or diffusers"):
        style_of("kohya", {"transformer"}, None)
    with pytest.raises(LoraError, match="choose one of diffusers, kohya, comfyui, original"):
        style_of("safetensors", {"unet"}, None)


def test_a_component_that_the_family_lacks_is_refused() -> None:
    with pytest.raises(LoraError, match="'text_encoder_2', which sd1 lacks"):
        lora_name("kohya", "text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", SD1)


def test_text_encoders_that_are_not_clip_are_unreadable() -> None:
    assert unreadable("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q")
    assert unreadable("text_encoder_3", "encoder.layers.0.self_attn.q_proj")
    assert unreadable("vae", "encoder.mid_block.attentions.0.to_q")
    assert not unreadable("text_encoder", "encoder.layers.0.self_attn.q_proj")
    assert not unreadable("text_encoder_2", "text_projection")
    assert not unreadable("transformer", "anything")


def test_missing_attention_is_listed_for_every_touched_layer_of_a_text_encoder() -> None:
    touched = dict.fromkeys(["encoder.layers.0.self_attn.q_proj", "encoder.layers.2.mlp.fc2"])
    found = dict(missing_attention("text_encoder", touched))
    assert sorted(found) == sorted(
        [f"encoder.layers.0.self_attn.{k}_proj" for k in ("k", "v", "out")]
        + [f"encoder.layers.2.self_attn.{k}_proj" for k in ("q", "k", "v", "out")]
    )
    assert found["encoder.layers.2.self_attn.q_proj"] == "encoder.layers.2.mlp.fc2"
    assert missing_attention("unet", touched) == []
