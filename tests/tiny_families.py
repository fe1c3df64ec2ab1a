"""Tiny random pipelines of every family, with the real classes, and a denoiser whose output is not zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from . import tiny

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}"
    "{% else %}{{ m.content[0].text }}{% endif %}{% endfor %}"
)


def word_tokenizer() -> tf.PreTrainedTokenizerFast:
    """A tokenizer of single letters, with a chat template, that makes no network request."""
    words = ["<pad>", "</s>", "<unk>", *map(chr, range(32, 127)), "\n"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT,
        model_max_length=1024,
    )  # fmt: skip


def clip(tokens: Any, size: int = 16, *, projected: bool = False) -> Any:
    config = tf.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=size, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id, projection_dim=size,
    )  # fmt: skip
    return (tf.CLIPTextModelWithProjection if projected else tf.CLIPTextModel)(config)


def t5(size: int = 16) -> Any:
    config = tf.T5Config(
        vocab_size=128, d_model=size, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return tf.T5EncoderModel(config)


def decoder(config: type, model: type, layers: int = 3, **settings: Any) -> Any:
    return model(config(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, **settings,
    ))  # fmt: skip


def kl(kind: Any = d.AutoencoderKL, *, levels: int = 2, **settings: Any) -> Any:
    """A VAE whose latents have 2^(levels - 1) times fewer pixels to the side."""
    return kind(
        block_out_channels=(8,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=4, norm_num_groups=4, sample_size=16,
        layers_per_block=1, **settings,
    )  # fmt: skip


def flow(**settings: Any) -> Any:
    return d.FlowMatchEulerDiscreteScheduler(**settings)


# ---- one pipeline for each kind of model ----------------------------------------------------------


def stable_diffusion(folder: Path) -> Any:
    return tiny.stable_diffusion(folder)


def sdxl(folder: Path) -> Any:
    tokens = tiny.tokenizer(folder)
    unet = d.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=40, attention_head_dim=2, norm_num_groups=4, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=24 + 6 * 4, use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    return d.StableDiffusionXLPipeline(
        kl(), clip(tokens), clip(tokens, 24, projected=True), tokens, tokens, unet,
        d.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                 timestep_spacing="leading"),
        add_watermarker=False,
    )  # fmt: skip


def sd3(folder: Path) -> Any:
    tokens = tiny.tokenizer(folder)
    transformer = d.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=8, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip
    return d.StableDiffusion3Pipeline(
        transformer, flow(shift=3.0), kl(shift_factor=0.06), clip(tokens, projected=True), tokens,
        clip(tokens, projected=True), tokens, t5(48), word_tokenizer(),
    )  # fmt: skip


def flux(folder: Path, *, guidance_embeds: bool = True) -> Any:
    tokens = tiny.tokenizer(folder)
    transformer = d.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return d.FluxPipeline(
        flow(use_dynamic_shifting=guidance_embeds), kl(shift_factor=0.1), clip(tokens), tokens, t5(),
        word_tokenizer(), transformer,
    )  # fmt: skip


def flux_schnell(folder: Path) -> Any:
    return flux(folder, guidance_embeds=False)


def _flux2_parts(*, guidance_embeds: bool) -> dict[str, Any]:
    transformer = d.Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    vae = kl(d.AutoencoderKLFlux2)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    scheduler = flow(use_dynamic_shifting=True)
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler, "tokenizer": word_tokenizer()}


def flux2(folder: Path) -> Any:
    encoder = decoder(tf.MistralConfig, tf.MistralForCausalLM, layers=31)
    return d.Flux2Pipeline(text_encoder=encoder, **_flux2_parts(guidance_embeds=True))


def flux2_klein(folder: Path) -> Any:
    encoder = decoder(tf.Qwen3Config, tf.Qwen3ForCausalLM, layers=28)
    return d.Flux2KleinPipeline(text_encoder=encoder, **_flux2_parts(guidance_embeds=False))


def _pixart(**settings: Any) -> Any:
    return d.PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, caption_channels=16, norm_num_groups=4, **settings,
    )  # fmt: skip


def pixart_alpha(folder: Path) -> Any:
    transformer = _pixart(sample_size=128, use_additional_conditions=True)  # 128: the one that is told the size
    return d.PixArtAlphaPipeline(word_tokenizer(), t5(), kl(), transformer, d.DPMSolverMultistepScheduler())


def pixart_sigma(folder: Path) -> Any:
    transformer = _pixart(sample_size=8, use_additional_conditions=False)
    return d.PixArtSigmaPipeline(word_tokenizer(), t5(), kl(), transformer, d.DPMSolverMultistepScheduler())


def sana(folder: Path) -> Any:
    transformer = d.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8, timestep_scale=0.5,
    )  # fmt: skip
    blocks = (8, 8)
    vae = d.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=blocks, decoder_block_out_channels=blocks, encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = d.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
    )
    encoder = decoder(tf.Gemma2Config, tf.Gemma2Model, layers=1)
    return d.SanaPipeline(word_tokenizer(), encoder, vae, transformer, scheduler)


def lumina2(folder: Path) -> Any:
    transformer = d.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(300, 16, 16), cap_feat_dim=16,
    )  # fmt: skip
    encoder = decoder(tf.Gemma2Config, tf.Gemma2Model)
    return d.Lumina2Pipeline(transformer, flow(shift=6.0), kl(levels=4, shift_factor=0.1), encoder, word_tokenizer())


def qwen_image(folder: Path) -> Any:
    transformer = d.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    vae = d.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.1, 0.9, 2.0, 0.5],
    )  # fmt: skip
    text = {
        "vocab_size": 128, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1100,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    scheduler = flow(use_dynamic_shifting=True, shift_terminal=0.02)
    return d.QwenImagePipeline(scheduler, vae, encoder, word_tokenizer(), transformer)


def z_image(folder: Path) -> Any:
    transformer = d.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 2, 2], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    encoder = decoder(tf.Qwen3Config, tf.Qwen3Model)
    return d.ZImagePipeline(flow(shift=3.0), kl(shift_factor=0.1), encoder, word_tokenizer(), transformer)


#: A name for each kind of model, and what builds a pipeline of it. Every family needs at least one.
BUILDERS: dict[str, Callable[[Path], Any]] = {
    "sd": stable_diffusion,
    "sdxl": sdxl,
    "sd3.5": sd3,
    "flux.1-dev": flux,
    "flux.1-schnell": flux_schnell,
    "flux.2-dev": flux2,
    "flux.2-klein": flux2_klein,
    "pixart-alpha": pixart_alpha,
    "pixart-sigma": pixart_sigma,
    "sana": sana,
    "lumina2": lumina2,
    "qwen-image": qwen_image,
    "z-image": z_image,
}


def build(kind: str, folder: Path, *, seed: int = 0) -> Any:
    """A pipeline of this kind that gives other predictions for other inputs: nothing in the denoiser is zero."""
    torch.manual_seed(seed)
    pipe = BUILDERS[kind](folder)
    pipe.set_progress_bar_config(disable=True)
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    wake(denoiser)
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
            assert not any(p.is_meta for p in module.parameters()), name
    return pipe


@torch.no_grad()
def wake(denoiser: nn.Module) -> None:
    """Give every weight a size at which it matters: adaLN-zero's output layers and gates start at 0."""
    for name, parameter in denoiser.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif "norm" not in name or name.endswith("bias"):
            parameter.normal_(std=0.1)
