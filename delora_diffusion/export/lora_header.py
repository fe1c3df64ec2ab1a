"""What a LoRA file says of itself: kohya's `ss_` fields, ModelSpec 1.0.1 and our own, which begin with `delora.`.

Trigger words are where programs read them: in the header, and in a sidecar `NAME.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..atomic import complete_file
from ..families import Architecture
from ..run_folder import RunFolder
from .lora_names import LoraError


def lora_header(
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    rank: int,
    style: str,
    architecture: Architecture | None,
    provenance: Mapping[str, str],
    trigger: str | None,
) -> dict[str, str]:
    """Header fields; those that are not known are left out, never guessed.

    Args:
        name: the file's name without its ending.
        style: "kohya" or "diffusers", whose names the tensors have.
        provenance: of the adapter: base_model, base_fingerprint, resolution, ...
        trigger: words that call the subject up.
    """
    implementation = "https://github.com/kohya-ss/sd-scripts" if style == "kohya" else "diffusers"
    fields = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": implementation,
        "modelspec.title": name,
        "modelspec.date": _today(),
    }
    if architecture is not None and architecture.base_version:
        fields["ss_base_model_version"] = architecture.base_version
        fields["ss_v2"] = str(architecture.base_version.startswith("sd_v2"))
    if architecture is not None and architecture.model_spec:
        fields["modelspec.architecture"] = f"{architecture.model_spec}/lora"
    if trigger:
        fields["modelspec.trigger_phrase"] = trigger
        fields["ss_tag_frequency"] = json.dumps({name: {trigger: 1}}, ensure_ascii=False)  # A1111, Forge, ComfyUI
        fields["trained_words"] = json.dumps([trigger], ensure_ascii=False)  # ComfyUI
    if side := provenance.get("resolution"):
        fields |= {"modelspec.resolution": f"{side}x{side}", "ss_resolution": f"({side}, {side})"}
    if base := provenance.get("base_model"):
        fields |= {"ss_sd_model_name": base, "delora.base_model": base}
    if fingerprint := provenance.get("base_fingerprint"):
        fields["delora.base_fingerprint"] = fingerprint
    return fields | hashes(tensors, fields)


def hashes(tensors: Mapping[str, Tensor], fields: Mapping[str, str]) -> dict[str, str]:
    """What ModelSpec and kohya's tools call a file by: SHA-256 of its data, and of 64 KiB where old tools looked."""
    file = memoryview(save(dict(tensors), {name: value for name, value in fields.items() if name.startswith("ss_")}))
    digest = hashlib.sha256(file[8 + int.from_bytes(file[:8], "little") :]).hexdigest()
    legacy = hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": digest, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{digest}"}


def _today() -> str:
    """Now, or what SOURCE_DATE_EPOCH says for builds that are to repeat; to the second, UTC."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        now = datetime.now(timezone.utc) if given is None else datetime.fromtimestamp(int(given), timezone.utc)
    except (ValueError, OverflowError, OSError) as error:
        raise LoraError(f"SOURCE_DATE_EPOCH is {given!r}; it is a number of seconds since 1970, or unset") from error
    return now.isoformat(timespec="seconds").replace("+00:00", "Z")


def recommended_strength(source: Any) -> float | None:
    """The strength that the folder of an adapter recommends; None where none was measured, or for several adapters."""
    sources = source if isinstance(source, (list, tuple)) else [source]
    if len(sources) != 1 or not isinstance(sources[0], (str, Path)):
        return None
    folder = Path(sources[0]) if Path(sources[0]).is_dir() else Path(sources[0]).parent
    try:
        value = json.loads(RunFolder(folder).strengths.read_text(encoding="utf-8"))["recommended"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, (int, float)) else None


def write_sidecar(
    path: Path, trigger: str | None, strength: float | None, architecture: Architecture | None
) -> list[str]:
    """Write what user interfaces read beside a LoRA, `NAME.json`; one that is there, which a user may have edited,
    stays. Returns a note on it."""
    beside = path.with_suffix(".json")
    if beside.exists():
        return [f"{beside} was there and stays as it is"]
    version = {"sd1": "SD1", "sd2": "SD2", "sd2_v": "SD2", "sdxl": "SDXL"}
    fields: dict[str, Any] = {"sd version": version.get(architecture.name if architecture else "", "Unknown")}
    if trigger:
        fields["activation text"] = trigger
    if strength is not None:
        fields["preferred weight"] = strength
    with complete_file(beside) as aside:
        aside.write_text(json.dumps(fields, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
    return [f"trigger words and strength for A1111, Forge and InvokeAI: {beside}"]
