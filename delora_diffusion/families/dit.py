"""PixArt, Sana, Lumina2 and Z-Image: transformers over image tokens that read the text of one language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .family import Architecture, Conditioning, Family, Setting, call_defaults, encoder_device, zeros

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# ---- PixArt-alpha and PixArt-Sigma ----------------------------------------------------------------


def _encode_masked(pipe: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    embeds, mask, _, _ = pipe.encode_prompt(list(prompts), False, **_settings(pipe))
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def _negative_masked(pipe: DiffusionPipeline, prompt: str | None) -> Conditioning:
    """As the pipeline makes it: Sana's and Lumina2's instructions are not put in front of a negative prompt."""
    _, _, embeds, mask = pipe.encode_prompt("", True, negative_prompt=prompt or "", **_settings(pipe))
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def _blank_masked(tokens: int, width: str) -> Callable[[Any], Conditioning]:
    """Embeddings of so many tokens, as wide as the denoiser's config says under this name, and a mask that is full."""
    return lambda denoiser: {
        "prompt_embeds": zeros(tokens, denoiser.config[width]),
        "prompt_attention_mask": zeros(tokens).long() + 1,
    }


def _settings(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What the pipelines of one family or another hand on from their call."""
    names = ("clean_caption", "complex_human_instruction")
    return {"device": encoder_device(pipe, ("text_encoder",))} | call_defaults(pipe, *names)


def _predict_pixart(denoiser: Any, x_t: Tensor, t: Tensor, cond: Conditioning, setting: Setting) -> Tensor:
    """The second half of the channels is the learned variance, which no sampler reads."""
    size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if denoiser.use_additional_conditions:
        size_and_ratio = torch.tensor([[setting.height, setting.width, setting.height / setting.width]]).to(x_t)
        size = {
            "resolution": size_and_ratio[:, :2].repeat(len(x_t), 1),
            "aspect_ratio": size_and_ratio[:, 2:].repeat(len(x_t), 1),
        }
    prediction: Tensor = denoiser(
        x_t,
        encoder_hidden_states=cond["prompt_embeds"],
        encoder_attention_mask=cond["prompt_attention_mask"],
        timestep=t,
        added_cond_kwargs=size,
        return_dict=False,
    )[0]
    return prediction[:, : x_t.shape[1]]


def _sampling_binned(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Pictures have the size that was asked for, as in training, instead of the nearest of a table."""
    return {"guidance_scale": 4.5, "num_inference_steps": 20, "use_resolution_binning": False}


PIXART = Family(
    name="pixart",
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    related=("PixArtSigmaPAGPipeline",),
    denoiser="transformer",
    text_encoders=("text_encoder",),
    encode_prompt=_encode_masked,
    encode_negative=_negative_masked,
    blank=_blank_masked(300, "caption_channels"),
    predict=_predict_pixart,
    sampling=_sampling_binned,
    architectures=(
        Architecture(
            name="pixart", denoiser="transformer", encoders={"text_encoder": "lora_te1"},
            # the ten layers outside of the blocks were seen to arrive in other places
            found=r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",
        ),
    ),
    patch=2,
)  # fmt: skip


# ---- Sana -----------------------------------------------------------------------------------------


def _predict_sana(denoiser: Any, x_t: Tensor, t: Tensor, cond: Conditioning, setting: Setting) -> Tensor:
    prediction: Tensor = denoiser(
        x_t,
        encoder_hidden_states=cond["prompt_embeds"],
        encoder_attention_mask=cond["prompt_attention_mask"],
        timestep=t * denoiser.config.timestep_scale,
        return_dict=False,
    )[0]
    return prediction[:, : x_t.shape[1]].float()


SANA = Family(
    name="sana",
    pipelines=("SanaPipeline",),
    related=("SanaControlNetPipeline", "SanaPAGPipeline", "SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
    denoiser="transformer",
    text_encoders=("text_encoder",),
    encode_prompt=_encode_masked,
    encode_negative=_negative_masked,
    blank=_blank_masked(300, "caption_channels"),
    predict=_predict_sana,
    sampling=_sampling_binned,
    architectures=(Architecture(name="sana", denoiser="transformer"),),
    flow_samplers=("euler", "heun", "dpm++", "unipc"),
    trains_text=False,
)


# ---- Lumina2 --------------------------------------------------------------------------------------


def _predict_lumina2(denoiser: Any, x_t: Tensor, t: Tensor, cond: Conditioning, setting: Setting) -> Tensor:
    """Lumina2 counts time from noise to image, and its velocity points that way too."""
    prediction: Tensor = denoiser(
        hidden_states=x_t,
        timestep=1 - t / 1000,
        encoder_hidden_states=cond["prompt_embeds"],
        encoder_attention_mask=cond["prompt_attention_mask"],
        return_dict=False,
    )[0]
    return -prediction


LUMINA2 = Family(
    name="lumina2",
    pipelines=("Lumina2Pipeline",),
    related=(),
    denoiser="transformer",
    text_encoders=("text_encoder",),
    encode_prompt=_encode_masked,
    encode_negative=_negative_masked,
    blank=_blank_masked(256, "cap_feat_dim"),
    predict=_predict_lumina2,
    sampling=lambda pipe: {"guidance_scale": 4.0, "num_inference_steps": 30},
    architectures=(Architecture(name="lumina2", denoiser="transformer", model_spec="lumina-2"),),
    flow_samplers=("euler", "unipc"),
    patch=2,
    blocks=r"layers\.\d+",
    trains_text=False,
)


# ---- Z-Image --------------------------------------------------------------------------------------


def _encode_z_image(pipe: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    embeds, _ = pipe.encode_prompt(list(prompts), encoder_device(pipe, ("text_encoder",)), False)
    return {"prompt_embeds": embeds}


def _negative_z_image(pipe: DiffusionPipeline, prompt: str | None) -> Conditioning:
    return _encode_z_image(pipe, [prompt or ""])


def _blank_z_image(denoiser: Any) -> Conditioning:
    """Prompts are as long as they are; this is a long one."""
    return {"prompt_embeds": [zeros(128, denoiser.config.cap_feat_dim)[0]]}


def _predict_z_image(denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, setting: Setting) -> Tensor:
    """Time and velocity as in Lumina2; images and prompts are lists, images with a dimension for frames."""
    predictions = denoiser(
        list(x_t.unsqueeze(2).unbind()), (1000 - t) / 1000, cond["prompt_embeds"], return_dict=False
    )[0]
    return -torch.stack([prediction.float() for prediction in predictions]).squeeze(2)


Z_IMAGE = Family(
    name="z-image",
    pipelines=("ZImagePipeline",),
    related=(
        "ZImageImg2ImgPipeline", "ZImageInpaintPipeline", "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline", "ZImageOmniPipeline",
    ),
    denoiser="transformer",
    text_encoders=("text_encoder",),
    encode_prompt=_encode_z_image,
    encode_negative=_negative_z_image,
    blank=_blank_z_image,
    predict=_predict_z_image,
    sampling=lambda pipe: {"guidance_scale": 5.0, "num_inference_steps": 50},
    architectures=(
        Architecture(
            name="z_image", denoiser="transformer", model_spec="Z-Image",
            found=r"(layers|context_refiner|noise_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]"
            r"|adaLN_modulation\.0)|all_x_embedder\.2-1|all_final_layer\.2-1\.(linear|adaLN_modulation\.1)"
            r"|cap_embedder\.1|t_embedder\.mlp\.[02]",
        ),
    ),
    patch=2,
    blocks=r"(noise_refiner|context_refiner|layers)\.\d+",
    trains_text=False,
)  # fmt: skip
