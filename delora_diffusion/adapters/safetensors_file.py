"""Reading safetensors files that somebody else wrote: what is refused, and what it is said to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
_EVERY_UI = "ComfyUI, A1111 and Forge open it"
#: Parts of tensor names, what has them, and what opens that; the first that fits counts.
_KINDS = (
    (("lora_magnitude_vector", "dora_scale"), "it is a DoRA", "ComfyUI, A1111 and PEFT open it"),
    (("hada_w1", "hada_w2"), "it is a LoHa (LyCORIS)", _EVERY_UI),
    (("lokr_w1", "lokr_w2"), "it is a LoKr (LyCORIS)", _EVERY_UI),
    ((".oft_", "oft_blocks", "oft_diag"), "it is an OFT adapter", "ComfyUI, A1111 and PEFT open it"),
    ((".boft_",), "it is a BOFT adapter", "PEFT opens it"),
    ((".ia3_l", ".on_input"), "it is an IA3 adapter", "A1111 and PEFT open it"),
    (("base_model.model.",), "it is a PEFT adapter", "PeftModel.from_pretrained opens the folder it came in"),
    (("lora_unet_", "lora_te"), "it is a LoRA in kohya's names", f"{_EVERY_UI}, and so does pipe.load_lora_weights"),
    ((".lora_", "_lora.", ".lora."), "it is a LoRA in diffusers' names", "pipe.load_lora_weights opens it"),
    (("string_to_param", "emb_params"), "it is a textual inversion", "pipe.load_textual_inversion opens it"),
    (("model.diffusion_model.",), "it is a whole model", "StableDiffusionPipeline.from_single_file opens it"),
    (
        ("down_blocks.", "transformer_blocks."),
        "it is the weights of a denoiser",
        "its class's from_pretrained opens it",
    ),
)


class AdapterFileError(ValueError):
    """A file that holds no usable adapter; the message names it, says what was found and what to do."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and the text in its header.

    Raises:
        AdapterFileError: no safetensors file, a damaged or incomplete one, or values that are not finite.
    """
    if path.suffix != ".safetensors":
        convert = (
            ". This one is a pickle; if you trust it, convert it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)"
        )
        raise AdapterFileError(
            f"{path} is not a .safetensors file; other formats can carry code and are not read"
            f"{convert if path.suffix in _PICKLES else ''}"
        )
    try:
        if problem := _problem_at_start(path):
            raise AdapterFileError(f"cannot read {path}: {problem}")
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"cannot read {path}: {error}; it is damaged or incomplete, copy or train it again"
        ) from error
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise AdapterFileError(
            f"{path} holds {len(wrong)} tensors that are not finite ({', '.join(wrong[:3])}); it is of no use, "
            f"take an earlier checkpoint or train it again"
        )
    return tensors, header


def _problem_at_start(path: Path) -> str:
    """What is wrong with the length and the header's length, "" if nothing; read without trusting either."""
    with path.open("rb") as file:
        start = file.read(8)
    size, header = path.stat().st_size, int.from_bytes(start, "little")
    if start.startswith(b"version "):
        return "it is a Git LFS pointer, not the file itself; fetch it with git lfs pull"
    if len(start) == 8 and header > _HEADER_LIMIT and start[:2] in (b"PK", *(b"\x80" + bytes([n]) for n in range(6))):
        return "it is a pickle with another name; pickles can carry code and are not read"
    if len(start) == 8 and header > _HEADER_LIMIT:
        return f"its header is said to take {header:,} bytes, and {_HEADER_LIMIT:,} are allowed; it is damaged"
    if len(start) < 8 or size < 8 + header:
        return f"it is damaged or incomplete: {size:,} bytes of at least {8 + header:,}; copy or train it again"
    return ""


def described(names: Iterable[str], header: Mapping[str, str]) -> str:
    """What a file that is no native adapter is, and what opens it."""
    names = list(names)
    if any("delora_" in name for name in names):
        return "its tensors are DeLoRA's, but the header is missing; for a PEFT file give the folder it came in"
    for parts, kind, opener in _KINDS:
        if any(part in name for name in names for part in parts):
            rank = f" of rank {header['ss_network_dim']}" if "ss_network_dim" in header else ""
            return f"{kind}{rank}; {opener}"
    return f"it holds {len(names)} tensors such as {', '.join(names[:2]) or '(none)'}"
