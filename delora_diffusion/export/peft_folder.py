"""Adapters as PEFT folders: `PeftModel.from_pretrained(pipe.unet, folder)` opens them with the same outputs.

    export_peft("runs/my_dog", "my_dog_peft")      # my_dog_peft/unet, my_dog_peft/text_encoder

`read_adapter` and `load_delora_weights` read such folders, ours and PEFT's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.peft import CONFIG_NAME, WEIGHTS_NAME, PeftFormatError, check_expressible, check_kinds, to_peft
from ..adapters.safetensors_file import with_checksum, write_tensors
from ..adapters.sources import as_adapter, live_modules
from ..atomic import complete_file


def export_peft(
    source: Any, directory: str | Path, *, adapter_name: str = "default", overwrite: bool = False
) -> dict[str, Path]:
    """Write an adapter as a PEFT folder for each component: `directory/unet`, `directory/text_encoder`, ...

    The strength an adapter has now is part of what is written. A residual adapter is written at twice its rank, the
    only form PEFT has for it, and with the same outputs.

    Args:
        source: what `read_adapter` reads, an `Adapter`, a pipeline, or modules {component: module}; an adapter of a
            single module (component "") is written to `directory` itself.
        adapter_name: which adapter of a pipeline or of modules.
        overwrite: replace an adapter of PEFT's that is there.

    Returns:
        The folder of each component.

    Raises:
        AdapterFileError: `source` holds no adapter.
        PeftFormatError: an adapter that PEFT cannot express, or one that must not be replaced; nothing is written.
    """
    adapter = as_adapter(source, adapter_name)
    check_kinds(adapter)
    modules = live_modules(source)
    for component, tensors in adapter.tensors.items():
        if component in modules:
            check_expressible(modules[component], adapter.configs[component], tensors)
    folders = {component: Path(directory) / component for component in adapter.tensors}
    for folder in folders.values():
        if (folder / CONFIG_NAME).exists() and not overwrite:
            raise PeftFormatError(f"{folder} holds an adapter; give another folder, or replace it with overwrite")
    return {
        component: write_peft(folder, adapter, component, module=modules.get(component))
        for component, folder in folders.items()
    }


def write_peft(folder: Path, adapter: Adapter, component: str, *, module: nn.Module | None = None) -> Path:
    """Write one component of an adapter; other files in `folder` stay.

    Args:
        module: what the adapter is for, if it is at hand; PEFT's AutoPeftModel looks for its class.
    """
    fields, tensors = to_peft(adapter.configs[component], adapter.tensors[component])
    base = adapter.provenance.get("base_model") or None
    fields = {"base_model_name_or_path": base, "auto_mapping": _auto_mapping(module), **fields}
    header = {**adapter.provenance, "format": "pt", **({"component": component} if component else {})}
    with complete_file(folder / WEIGHTS_NAME) as weights, complete_file(folder / CONFIG_NAME) as config:
        write_tensors(weights, tensors, with_checksum(tensors, header))
        config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _auto_mapping(module: nn.Module | None) -> dict[str, str] | None:
    if module is None:
        return None
    return {"base_model_class": type(module).__name__, "parent_library": type(module).__module__}
