"""What a layer is called in a LoRA file: diffusers' names and kohya's. What each program looks up is in `clients`.

A layer is known by its component in a diffusers pipeline (`unet`, `transformer`, `text_encoder`, ...) and its path
there (`down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import DeloraError
from ..families import FAMILIES, Architecture, family_named, pipeline_names

FORMATS = ("diffusers", "kohya", "comfyui", "original")
DENOISERS = ("unet", "transformer")
_ATTENTION = tuple(f"self_attn.{kind}_proj" for kind in ("q", "k", "v", "out"))
_T5_LAYER = re.compile(r"encoder\.block\.\d+\.layer\.(0\.SelfAttention\.[qkvo]|1\.DenseReluDense\.(wi|wi_0|wi_1|wo))")
_CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
#: Paths whose name in kohya's files is that of the original checkpoint; diffusers' loader misreads the plain ones.
ORIGINAL_PATHS = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
#: What LoRA files know, of all families, by the name it is asked for.
ARCHITECTURES = {a.name: a for family in FAMILIES for a in family.architectures}


class LoraError(DeloraError):
    """An adapter that cannot be written as the LoRA asked for; the message says why and what to do."""


def architecture_of(
    widths: Mapping[str, Mapping[str, int]], *, pipeline: str = "", prediction_type: str = ""
) -> Architecture | None:
    """The family of an adapter, as far as its file tells; None where it does not.

    Args:
        widths: for each component, the input features of its adapted layers by path.
        pipeline: class of the pipeline it was trained in, "" if not known.
        prediction_type: the scheduler's, "" if not known.
    """
    known = family_named(pipeline).architectures if pipeline in pipeline_names() else ()
    if len(known) == 1:
        return known[0]
    unet = widths.get("unet", {})
    cross = {width for layer, width in unet.items() if layer.endswith(("attn2.to_k", "attn2.to_v"))}
    if cross == {2048} or ("text_encoder_2" in widths and "transformer" not in widths):
        return ARCHITECTURES["sdxl"]
    if cross == {1024}:
        return ARCHITECTURES["sd2_v" if prediction_type == "v_prediction" else "sd2"]
    return ARCHITECTURES["sd1"] if cross == {768} else None


def style_of(format: str, components: set[str], architecture: Architecture | None) -> str:
    """Whose names `format` stands for: "diffusers", "kohya" or "original".

    Raises:
        LoraError: an unknown format, kohya's names for a transformer, or original ones for a UNet.
    """
    if format not in FORMATS:
        raise LoraError(f"format is {format!r}; choose one of {', '.join(FORMATS)}")
    transformer = "transformer" in components or (architecture is not None and architecture.denoiser == "transformer")
    if format == "kohya" and transformer:
        raise LoraError(
            "kohya's names are for UNets (Stable Diffusion 1, 2, XL), and this adapter is for a transformer; export "
            "it with format comfyui or diffusers, which ComfyUI and diffusers read"
        )
    if format == "original" and not transformer:
        raise LoraError("original names are for transformers; export a UNet's adapter with format kohya")
    if format == "original" or (format == "comfyui" and architecture is not None and architecture.name == "lumina2"):
        return "original"  # ComfyUI splits Lumina's projections in the wrong places
    return "diffusers" if format == "diffusers" or transformer else "kohya"


def canonical(component: str, layer: str) -> str:
    """The path that LoRA files use: with the `text_model.` level, which transformers 5.6 took out of CLIPTextModel."""
    return f"text_model.{layer}" if component not in DENOISERS and layer.startswith("encoder.layers.") else layer


def is_clip(component: str, path: str) -> bool:
    """Whether this is a layer of a CLIP text encoder that LoRA files know."""
    known = component in ("text_encoder", "text_encoder_2")
    projection = component == "text_encoder_2" and path == "text_projection"
    return projection or (known and _CLIP_LAYER.fullmatch(path) is not None)


def is_t5(component: str, path: str) -> bool:
    """Whether this is a layer of a T5 text encoder."""
    return component not in DENOISERS and _T5_LAYER.fullmatch(path) is not None


def unreadable(
    component: str, layer: str, *, format: str = "diffusers", architecture: Architecture | None = None
) -> bool:
    """Whether a file of this format has no name for a layer that anything reads.

    T5's are ComfyUI's and Forge's alone, and only where the architecture says which encoder it is.
    """
    if component in DENOISERS:
        return False
    path = canonical(component, layer)
    t5 = format == "comfyui" and architecture is not None and component in architecture.encoders
    return not (is_clip(component, path) or (t5 and is_t5(component, path)))


def lora_name(style: str, component: str, layer: str, architecture: Architecture | None) -> str:
    """What a layer is called in a file, without the ending of the tensor.

    Raises:
        LoraError: a component that kohya's names do not know in this architecture.
    """
    path = canonical(component, layer)
    if style == "original" and component == "transformer":
        return f"diffusion_model.{path}"
    if style != "kohya" and not (architecture is not None and is_t5(component, path)):
        return f"{component}.{path}"
    prefixes = {"unet": "lora_unet", **(architecture.encoders if architecture else {"text_encoder": "lora_te"})}
    if component not in prefixes:
        family = architecture.name if architecture else "Stable Diffusion 1"
        raise LoraError(f"the adapter is for {component!r}, which {family} lacks; say the architecture it is for")
    return f"{prefixes[component]}_{ORIGINAL_PATHS.get(path, path.replace('.', '_'))}"


def tensor_endings(style: str) -> tuple[str, str]:
    """Endings of the names of down and up."""
    return (".lora_down.weight", ".lora_up.weight") if style == "kohya" else (".lora_A.weight", ".lora_B.weight")


def missing_attention(component: str, layers: Mapping[str, object]) -> list[tuple[str, str]]:
    """Attention projections that a text encoder's LoRA must have beside `layers`, each with one of its neighbours.

    diffusers infers the kind of a text encoder's file from its attention: kohya's names fail without all four
    projections, its own without any.
    """
    if component in DENOISERS:
        return []
    blocks: dict[str, str] = {}
    for layer in layers:
        if match := re.match(r"(.*encoder\.layers\.\d+\.)(self_attn|mlp)\.", layer):
            blocks.setdefault(match.group(1), layer)
    return [
        (block + name, near) for block, near in blocks.items() for name in _ATTENTION if block + name not in layers
    ]
