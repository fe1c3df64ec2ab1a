"""safetensors files: written, always to the same bytes; read, whoever wrote them, or refused and called by name; the
checksum of ours."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DeloraError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: Kinds of numbers that a file for adapters can hold; whole ones among parameters that were trained in full.
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
_CHECKSUM = "checksum"
_LONGEST_NAME, _MOST_DIMENSIONS = 500, 8
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


class AdapterFileError(DeloraError):
    """A file that holds no usable adapter; the message names it, says what was found and what to do."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and the text in its header.

    Raises:
        AdapterFileError: no safetensors file, a damaged or incomplete one, numbers of a kind that no adapter is made
            of, or values that are not finite.
    """
    with _opened(path) as file:
        names = list(file.keys())
        kinds = {name: file.get_slice(name).get_dtype() for name in names}
        if other := [name for name in names if kinds[name] not in _DTYPES]:
            raise AdapterFileError(
                f"{path}: {other[0]} is stored as {kinds[other[0]]}, of which no adapter is made; it is damaged, or "
                f"was quantised: take the original"
            )
        if deep := [name for name in names if len(file.get_slice(name).get_shape()) > _MOST_DIMENSIONS]:
            raise AdapterFileError(f"{path}: {deep[0]} has more than {_MOST_DIMENSIONS} dimensions; it is damaged")
        tensors = {name: file.get_tensor(name) for name in names}
        header = file.metadata() or {}
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise AdapterFileError(
            f"{path} holds {len(wrong)} tensors that are not finite ({', '.join(wrong[:3])}); it is of no use, "
            f"take an earlier checkpoint or train it again"
        )
    return tensors, header


def read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """The names of a safetensors file's tensors and the text in its header, without reading any tensor.

    Raises:
        AdapterFileError: no safetensors file, or a damaged or incomplete one.
    """
    with _opened(path) as file:
        return list(file.keys()), file.metadata() or {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
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
            if long := [name for name in file.keys() if len(name) > _LONGEST_NAME]:  # noqa: SIM118
                raise AdapterFileError(f"{path}: a tensor's name has {len(long[0]):,} characters; it is damaged")
            yield file
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"cannot read {path}: {error}; it is damaged or incomplete, copy or train it again"
        ) from error


def with_checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, str]:
    """The text of a header, and a checksum of it and of the tensors that will stand below it."""
    rest = {name: text for name, text in header.items() if name != _CHECKSUM}
    return {**rest, _CHECKSUM: _digest(tensors, rest)}


def check_sum(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str], *, needed: bool) -> None:
    """Take the checksum out of the `header` of a file that was read, and refuse a file that is not as it was written.

    Args:
        needed: refuse a file without a checksum as well.
    """
    if (needed or _CHECKSUM in header) and header.pop(_CHECKSUM, None) != _digest(tensors, header):
        raise AdapterFileError(
            f"{path} is not as it was written: its checksum does not fit; it is damaged or was changed, copy or train "
            f"it again"
        )


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of the text in a header, and of each tensor's name, kind, shape and bytes."""
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(json.dumps([name, str(tensor.dtype), list(tensors[name].shape)]).encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file: of the same tensors and header always the same bytes.

    The library itself puts the entries of a header into another order every time.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(header) if header else None)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    if not header:
        return
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


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
