"""Stable Diffusion 1 and 2, and SDXL: UNets that attend to CLIP's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .family import Architecture, Conditioning, Family, Setting, encoder_device, zeros

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_XL_ENCODERS = ("text_encoder", "text_encoder_2")


def _encode_sd(pipe: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    embeds, _ = pipe.encode_prompt(list(prompts), encoder_device(pipe, ("text_encoder",)), 1, False)
    return {"prompt_embeds": embeds}


def _negative_sd(pipe: DiffusionPipeline, prompt: str | None) -> Conditioning:
    return _encode_sd(pipe, [prompt or ""])


def _predict_sd(denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, setting: Setting) -> Tensor:
    prediction: Tensor = denoiser(x_t, t, encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0]
    return prediction


def _encode_xl(pipe: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    device = encoder_device(pipe, _XL_ENCODERS)
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _negative_xl(pipe: DiffusionPipeline, prompt: str | None) -> Conditioning:
    """Without a negative prompt SDXL's pipeline uses zeros, not the encoding of an empty text."""
    _, embeds, _, pooled = pipe.encode_prompt("", device=encoder_device(pipe, _XL_ENCODERS), negative_prompt=prompt)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _blank_xl(denoiser: Any) -> Conditioning:
    config = denoiser.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {"prompt_embeds": zeros(77, config.cross_attention_dim), "pooled_prompt_embeds": zeros(pooled)}


def _predict_xl(denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, setting: Setting) -> Tensor:
    size = [setting.height, setting.width]
    time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=x_t.dtype, device=x_t.device).repeat(len(x_t), 1)
    prediction: Tensor = denoiser(
        x_t,
        t,
        encoder_hidden_states=cond["prompt_embeds"],
        added_cond_kwargs={"text_embeds": cond["pooled_prompt_embeds"], "time_ids": time_ids},
        return_dict=False,
    )[0]
    return prediction


#: Of the middle block, checkpointing leaves out the first part.
_BLOCKS = (
    r"((down_blocks|up_blocks)\.\d+\.resnets\.\d+|mid_block\.resnets\.[1-9]\d*"
    r"|((down_blocks|up_blocks)\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+)"
)
#: Linear and convolutional layers of these UNets in the tables of ComfyUI and A1111.
_FOUND = (
    r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))|resnets\.\d+\.(time_emb_proj|conv1|conv2|conv_shortcut)"
    r"|(down|up)samplers\.0\.conv)|(time|add)_embedding\.linear_[12]|conv_in|conv_out"
)


def _unet(name: str, model_spec: str, base_version: str) -> Architecture:
    two = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    return Architecture(
        name=name,
        denoiser="unet",
        encoders=two if name == "sdxl" else {"text_encoder": "lora_te"},
        model_spec=model_spec,
        base_version=base_version,
        found=_FOUND,
    )


STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    pipelines=("StableDiffusionPipeline",),
    related=(
        "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionDepth2ImgPipeline", "LEditsPPPipelineStableDiffusion", "StableDiffusionAdapterPipeline",
        "StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline", "StableDiffusionPAGPipeline", "StableDiffusionPAGImg2ImgPipeline",
        "StableDiffusionPAGInpaintPipeline", "StableDiffusionControlNetPAGPipeline",
        "StableDiffusionControlNetPAGInpaintPipeline", "StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline",
        "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline",
    ),
    denoiser="unet",
    text_encoders=("text_encoder",),
    encode_prompt=_encode_sd,
    encode_negative=_negative_sd,
    blank=lambda denoiser: {"prompt_embeds": zeros(77, denoiser.config.cross_attention_dim)},
    predict=_predict_sd,
    sampling=lambda pipe: {"guidance_scale": 7.5, "num_inference_steps": 25},
    architectures=(
        _unet("sd1", "stable-diffusion-v1", "sd_v1"),
        _unet("sd2", "stable-diffusion-v2-512", "sd_v2"),
        _unet("sd2_v", "stable-diffusion-v2-768-v", "sd_v2_v"),
    ),
    half="fp16",
    blocks=_BLOCKS,
)  # fmt: skip
STABLE_DIFFUSION_XL = Family(
    name="sdxl",
    pipelines=("StableDiffusionXLPipeline",),
    related=(
        "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLInstructPix2PixPipeline", "LEditsPPPipelineStableDiffusionXL",
        "StableDiffusionXLAdapterPipeline", "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline", "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline", "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline", "StableDiffusionXLPAGPipeline",
        "StableDiffusionXLPAGImg2ImgPipeline", "StableDiffusionXLPAGInpaintPipeline",
        "StableDiffusionXLControlNetPAGPipeline", "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    ),
    denoiser="unet",
    text_encoders=_XL_ENCODERS,
    encode_prompt=_encode_xl,
    encode_negative=_negative_xl,
    blank=_blank_xl,
    predict=_predict_xl,
    sampling=lambda pipe: {"guidance_scale": 5.0, "num_inference_steps": 30},
    architectures=(_unet("sdxl", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),),
    half="fp16",
    blocks=_BLOCKS,
    # the second encoder gives the pooled embedding; of the first, the layer before the last is read, and no more
    dead={"text_encoder": (r"(?:text_model\.)?encoder\.layers\.{last}\..*",)},
)  # fmt: skip
