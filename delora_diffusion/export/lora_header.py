"""The text in a LoRA file's header: what A1111, ComfyUI's managers and Civitai read there.

kohya's `ss_` fields and ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec); our own begin with `delora.`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

from ..families import Architecture


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
    digest = data_hash(tensors)
    implementation = "https://github.com/kohya-ss/sd-scripts" if style == "kohya" else "diffusers"
    fields = {
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank)),
        "ss_output_name": name, "sshs_model_hash": digest,
        "modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": implementation, "modelspec.title": name,
        "modelspec.hash_sha256": f"0x{digest}",
    }  # fmt: skip
    if architecture is not None and architecture.base_version:
        fields["ss_base_model_version"] = architecture.base_version
        fields["ss_v2"] = str(architecture.base_version.startswith("sd_v2"))
    if architecture is not None and architecture.model_spec:
        fields["modelspec.architecture"] = f"{architecture.model_spec}/lora"
    if trigger:
        fields["modelspec.trigger_phrase"] = trigger
    if side := provenance.get("resolution"):
        fields |= {"modelspec.resolution": f"{side}x{side}", "ss_resolution": f"({side}, {side})"}
    if base := provenance.get("base_model"):
        fields |= {"ss_sd_model_name": base, "delora.base_model": base}
    if fingerprint := provenance.get("base_fingerprint"):
        fields["delora.base_fingerprint"] = fingerprint
    return fields


def data_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a safetensors file without its header, as ModelSpec and kohya's tools count it."""
    data = save(dict(tensors))
    return hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
