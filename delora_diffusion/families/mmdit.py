"""SD3, FLUX.1, FLUX.2 and Qwen-Image: transformers in which text and image tokens attend to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from .family import Architecture, Conditioning, Family, Setting, call_defaults, encoder_device, refuse_negative, zeros

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SD3_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_FLUX_ENCODERS = ("text_encoder", "text_encoder_2")


def _blank_pooled(tokens: int) -> Callable[[Any], Conditioning]:
    """Prompts of SD3 and FLUX.1: embeddings of so many tokens, and a pooled one."""
    return lambda denoiser: {
        "prompt_embeds": zeros(tokens, denoiser.config.joint_attention_dim),
        "pooled_prompt_embeds": zeros(denoiser.config.pooled_projection_dim),
    }


def _packed(x: Tensor) -> Tensor:
    """(B, C, H, W) as tokens (B, HW / 4, 4C): one for each 2 x 2 square."""
    return _tokens(pixel_unshuffle(x, 2))


def _unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_packed` for an x of the size of `like` (B, C, H, W)."""
    return pixel_shuffle(_grid(tokens, like.shape[2] // 2, like.shape[3] // 2), 2)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _grid(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], height, width)


def _coordinates(*sizes: int, like: Tensor) -> Tensor:
    """Every place of a grid of these sizes, one row of coordinates each, the last dimension fastest."""
    return torch.cartesian_prod(*(torch.arange(size, device=like.device) for size in sizes))


def _guidance(denoiser: Any, setting: Setting, like: Tensor) -> Tensor | None:
    if not denoiser.config.guidance_embeds:
        return None
    return torch.full([len(like)], setting.guidance, device=like.device, dtype=torch.float32)


# ---- Stable Diffusion 3 and 3.5 -------------------------------------------------------------------


def _encode_sd3(pipe: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    embeds, _, pooled, _ = pipe.encode_prompt(
        list(prompts), None, None, device=encoder_device(pipe, _SD3_ENCODERS), do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _negative_sd3(pipe: DiffusionPipeline, prompt: str | None) -> Conditioning:
    return _encode_sd3(pipe, [prompt or ""])


def _predict_sd3(denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, setting: Setting) -> Tensor:
    prediction: Tensor = denoiser(
        hidden_states=x_t,
        timestep=t,
        encoder_hidden_states=cond["prompt_embeds"],
        pooled_projections=cond["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
    return prediction


#: Parts of the regexes of layers that ComfyUI has names for.
_JOINT = r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
_FF = r"ff(_context)?\.net\.(0\.proj|2)"
_TIME = r"proj_out|norm_out\.linear|time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]"
#: It has FLUX.1 and FLUX.2 in one table.
_FLUX_FOUND = (
    rf"{_JOINT}|norm1(_context)?\.linear|{_FF}|ff(_context)?\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_qkv_mlp_proj|to_out)|norm\.linear|proj_mlp|proj_out)"
    rf"|x_embedder|context_embedder|{_TIME}"
)
STABLE_DIFFUSION_3 = Family(
    name="sd3",
    pipelines=("StableDiffusion3Pipeline",),
    related=(
        "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline", "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline", "StableDiffusion3PAGPipeline",
        "StableDiffusion3PAGImg2ImgPipeline",
    ),
    denoiser="transformer",
    text_encoders=_SD3_ENCODERS,
    encode_prompt=_encode_sd3,
    encode_negative=_negative_sd3,
    blank=_blank_pooled(77 + 256),
    predict=_predict_sd3,
    sampling=lambda pipe: {"guidance_scale": 4.5, "num_inference_steps": 28},
    architectures=(
        Architecture(
            name="sd3", denoiser="transformer", 
            encoders={"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"},
            model_spec="stable-diffusion-3", base_version="sd3",
            found=rf"{_JOINT}|attn2\.(to_[qkv]|to_out\.0)|norm1(_context)?\.linear|{_FF})|context_embedder|{_TIME}",
        ),
    ),
    flow_samplers=("euler", "heun", "dpm++", "unipc"),
    patch=2,
    optional=("text_encoder_3",),
    # what the text tokens become in the last block is thrown away; only their keys and values count
    dead={"transformer": (r"transformer_blocks\.{last}\.attn\.add_q_proj",)},
)  # fmt: skip


# ---- FLUX.1 ---------------------------------------------------------------------------------------


def _flux_tokens(pipe: DiffusionPipeline) -> int:
    """Tokens of T5, padding included: dev was trained with 512, schnell, which hears no guidance, with 256."""
    transformer = pipe.transformer
    return 512 if transformer is None or transformer.config.guidance_embeds else 256


def _encode_flux(pipe: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    embeds, pooled, _ = pipe.encode_prompt(
        list(prompts), device=encoder_device(pipe, _FLUX_ENCODERS), max_sequence_length=_flux_tokens(pipe)
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _predict_flux(denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, setting: Setting) -> Tensor:
    embeds = cond["prompt_embeds"]
    height, width = x_t.shape[2] // 2, x_t.shape[3] // 2
    prediction = denoiser(
        hidden_states=_packed(x_t),
        timestep=t.to(x_t.dtype) / 1000,
        guidance=_guidance(denoiser, setting, x_t),
        pooled_projections=cond["pooled_prompt_embeds"],
        encoder_hidden_states=embeds,
        txt_ids=_coordinates(1, 1, 1, like=x_t).to(x_t.dtype).repeat(embeds[0].shape[0], 1),
        img_ids=_coordinates(1, height, width, like=x_t).to(x_t.dtype),
        return_dict=False,
    )[0]
    return _unpacked(prediction, x_t)


FLUX = Family(
    name="flux.1",
    pipelines=("FluxPipeline",),
    related=(
        "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline", "FluxKontextPipeline",
        "FluxKontextInpaintPipeline", "FluxControlPipeline", "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline", "FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline", "VisualClozePipeline", "VisualClozeGenerationPipeline",
    ),
    denoiser="transformer",
    text_encoders=_FLUX_ENCODERS,
    encode_prompt=_encode_flux,
    encode_negative=refuse_negative,
    blank=_blank_pooled(512),
    predict=_predict_flux,
    sampling=lambda pipe: (
        {"guidance_scale": 3.5, "num_inference_steps": 28}
        if pipe.transformer.config.guidance_embeds  # dev; schnell is made for four steps
        else {"guidance_scale": 0.0, "num_inference_steps": 4, "max_sequence_length": _flux_tokens(pipe)}
    ),
    architectures=(
        Architecture(
            name="flux1", denoiser="transformer", 
            encoders={"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}, model_spec="flux-1-dev",
            base_version="flux1", found=_FLUX_FOUND,
        ),
    ),
    flow_samplers=("euler", "unipc"),
    patch=2,
)  # fmt: skip


# ---- FLUX.2 ---------------------------------------------------------------------------------------


def _encode_flux2(pipe: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    embeds, _ = pipe.encode_prompt(list(prompts), device=encoder_device(pipe, ("text_encoder",)))
    return {"prompt_embeds": embeds}


def _negative_flux2(pipe: DiffusionPipeline, prompt: str | None) -> Conditioning | None:
    """klein's pipeline guides against an empty prompt; dev's, which is guidance-distilled, against none."""
    refuse_negative(pipe, prompt)
    return _encode_flux2(pipe, [""]) if "Klein" in type(pipe).__name__ else None


def _predict_flux2(denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, setting: Setting) -> Tensor:
    embeds, (height, width) = cond["prompt_embeds"], x_t.shape[2:]
    prediction = denoiser(
        hidden_states=_tokens(x_t),
        timestep=t.to(x_t.dtype) / 1000,
        guidance=_guidance(denoiser, setting, x_t),
        encoder_hidden_states=embeds,
        txt_ids=_coordinates(1, 1, 1, embeds[0].shape[0], like=x_t).expand(len(x_t), -1, -1),
        img_ids=_coordinates(1, height, width, 1, like=x_t).expand(len(x_t), -1, -1),
        return_dict=False,
    )[0]
    return _grid(prediction, height, width)


FLUX2 = Family(
    name="flux.2",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    related=("Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"),
    denoiser="transformer",
    text_encoders=("text_encoder",),
    encode_prompt=_encode_flux2,
    encode_negative=_negative_flux2,
    blank=lambda denoiser: {"prompt_embeds": zeros(512, denoiser.config.joint_attention_dim)},
    predict=_predict_flux2,
    sampling=lambda pipe: (
        {"guidance_scale": 1.0, "num_inference_steps": 4}
        if pipe.config.get("is_distilled")
        else {"guidance_scale": 4.0, "num_inference_steps": 50}
    ),
    architectures=(Architecture(name="flux2", denoiser="transformer", found=_FLUX_FOUND),),
    flow_samplers=("euler", "dpm++", "unipc"),
    trains_text=False,
)


# ---- Qwen-Image -----------------------------------------------------------------------------------


def _encode_qwen(pipe: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    embeds, mask = pipe.encode_prompt(
        list(prompts), device=encoder_device(pipe, ("text_encoder",)), **call_defaults(pipe, "max_sequence_length")
    )
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}


def _negative_qwen(pipe: DiffusionPipeline, prompt: str | None) -> Conditioning:
    """The pipeline guides only against a negative prompt that is given; a space is what its authors give."""
    return _encode_qwen(pipe, [prompt or " "])


def _blank_qwen(denoiser: Any) -> Conditioning:
    """Prompts are as long as they are; this is a long one."""
    embeds = zeros(128, denoiser.config.joint_attention_dim)
    return {"prompt_embeds": embeds, "prompt_embeds_mask": zeros(128).long() + 1}


def _predict_qwen(denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, setting: Setting) -> Tensor:
    mask: Any = cond["prompt_embeds_mask"]
    prediction = denoiser(
        hidden_states=_packed(x_t),
        timestep=t.to(x_t.dtype) / 1000,
        guidance=_guidance(denoiser, setting, x_t),
        encoder_hidden_states_mask=None if mask.all() else mask,
        encoder_hidden_states=cond["prompt_embeds"],
        img_shapes=[[(1, x_t.shape[2] // 2, x_t.shape[3] // 2)]] * len(x_t),
        return_dict=False,
    )[0]
    return _unpacked(prediction, x_t)


QWEN_IMAGE = Family(
    name="qwen-image",
    pipelines=("QwenImagePipeline",),
    related=(
        "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline",
        "QwenImageEditInpaintPipeline", "QwenImageControlNetPipeline", "QwenImageControlNetInpaintPipeline",
        "QwenImageLayeredPipeline",
    ),
    denoiser="transformer",
    text_encoders=("text_encoder",),
    encode_prompt=_encode_qwen,
    encode_negative=_negative_qwen,
    blank=_blank_qwen,
    predict=_predict_qwen,
    sampling=lambda pipe: {"guidance_scale": 4.0, "num_inference_steps": 50},
    architectures=(
        Architecture(
            name="qwen_image", denoiser="transformer", model_spec="Qwen-Image", base_version="qwen_image",
            found=rf"{_JOINT}|(img|txt)_mlp\.net\.(0\.proj|2)|(img|txt)_mod\.1)|img_in|txt_in|{_TIME}",
        ),
    ),
    guidance="true_cfg_scale",
    flow_samplers=("euler", "unipc"),
    patch=2,
    trains_text=False,
    dead={
        "transformer": (
            r"transformer_blocks\.{last}\.attn\.(?:add_q_proj|to_add_out)", r"transformer_blocks\.{last}\.txt_mlp\..*",
        )
    },
)  # fmt: skip
