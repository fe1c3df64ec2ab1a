"""What a layer is called in a LoRA file: diffusers' names, kohya's names, and the names each program looks up.

A layer is known by its component in a diffusers pipeline (`unet`, `transformer`, `text_encoder`, ...) and its path
there (`down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import DeloraError
from ..families import FAMILIES, Architecture, family_named, pipeline_names

FORMATS = ("diffusers", "kohya", "comfyui")
DENOISERS = ("unet", "transformer")
_ATTENTION = tuple(f"self_attn.{kind}_proj" for kind in ("q", "k", "v", "out"))
_CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
#: Paths whose name in kohya's files is that of the original checkpoint; diffusers' loader misreads the plain ones.
_ORIGINAL = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
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
    """Whose names `format` stands for: "diffusers" or "kohya".

    Raises:
        LoraError: an unknown format, or kohya's names for a transformer.
    """
    if format not in FORMATS:
        raise LoraError(f"format is {format!r}; choose one of {', '.join(FORMATS)}")
    transformer = "transformer" in components or (architecture is not None and architecture.denoiser == "transformer")
    if format == "kohya" and transformer:
        raise LoraError(
            "kohya's names are for UNets (Stable Diffusion 1, 2, XL), and this adapter is for a transformer; export "
            "it with format comfyui or diffusers, which ComfyUI and diffusers read"
        )
    return "diffusers" if format == "diffusers" or transformer else "kohya"


def canonical(component: str, layer: str) -> str:
    """The path that LoRA files use: with the `text_model.` level, which transformers 5.6 took out of CLIPTextModel."""
    return f"text_model.{layer}" if component not in DENOISERS and layer.startswith("encoder.layers.") else layer


def unreadable(component: str, layer: str) -> bool:
    """Whether no LoRA loader has a name for this layer: other components, and text encoders that are not CLIP."""
    if component in DENOISERS:
        return False
    known = component in ("text_encoder", "text_encoder_2")
    path = canonical(component, layer)
    return not known or not (_CLIP_LAYER.fullmatch(path) or path == "text_projection")


def lora_name(style: str, component: str, layer: str, architecture: Architecture | None) -> str:
    """What a layer is called in a file, without the ending of the tensor.

    Raises:
        LoraError: a component that kohya's names do not know in this architecture.
    """
    path = canonical(component, layer)
    if style == "diffusers":
        return f"{component}.{path}"
    prefixes = {"unet": "lora_unet", **(architecture.encoders if architecture else {"text_encoder": "lora_te"})}
    if component not in prefixes:
        family = architecture.name if architecture else "Stable Diffusion 1"
        raise LoraError(f"the adapter is for {component!r}, which {family} lacks; say the architecture it is for")
    return f"{prefixes[component]}_{_ORIGINAL.get(path, path.replace('.', '_'))}"


def tensor_endings(style: str) -> tuple[str, str]:
    """Endings of the names of down and up."""
    return (".lora_A.weight", ".lora_B.weight") if style == "diffusers" else (".lora_down.weight", ".lora_up.weight")


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


def looked_up(program: str, component: str, layer: str, architecture: Architecture | None = None) -> set[str]:
    """The names under which "comfyui" (Forge has the same tables) or "a1111" looks for a layer's LoRA.

    Sources: ComfyUI comfy/lora.py and comfy/utils.py, A1111 extensions-builtin/Lora/networks.py.

    Args:
        architecture: whose denoiser it is; None counts what they find in any.
    """
    path = canonical(component, layer)
    flat = path.replace(".", "_")
    if component in DENOISERS:
        asked = ARCHITECTURES.values() if architecture is None else (architecture,)
        found = any(re.fullmatch(a.found, path) for a in asked if a.denoiser == component and a.found)
        if component == "transformer":
            return {f"transformer.{path}"} if program == "comfyui" and found else set()
        names = {f"lora_unet_{_ORIGINAL.get(path, flat)}"} if found else set()
        if program == "comfyui" and names:  # diffusers' names as they were in 2023, with the attention's processor
            old = re.sub(r"to_out\.0$", "to_out", path.replace(".to_", ".processor.to_"))
            names |= {f"lora_unet_{flat}", f"unet.{old}"}
        return names
    if unreadable(component, layer):
        return set()
    if path == "text_projection":
        return {"lora_te2_text_projection"} if component == "text_encoder_2" else set()
    prefixes = {"text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}[component]
    return {f"{prefix}_{flat}" for prefix in prefixes} | ({f"{component}.{path}"} if program == "comfyui" else set())
