"""Reading an adapter: a native file, a folder of ours or of PEFT's, or the Hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from ..run_folder import ADAPTER_NAME
from .adapter import CONFIG_LIMIT, Adapter, _read_native, check_layers, is_native
from .peft import CONFIG_NAME, WEIGHTS_NAME, from_peft
from .safetensors_file import AdapterFileError as AdapterFileError
from .safetensors_file import check_sum, described, read_header, read_tensors


def read_adapter(source: str | Path, *, revision: str | None = None) -> Adapter:
    """Read an adapter from a native file, a folder that holds one, a PEFT folder, or the Hub.

    A folder whose subfolders are PEFT's (`unet/`, `text_encoder/`) is one adapter for those components.

    Args:
        source: a path, or a Hub id ("user/my-dog") when no such path exists.
        revision: revision on the Hub.

    Raises:
        AdapterFileError: nothing there, a damaged file, or a file of another method (the message says which).
    """
    path = Path(source)
    if not path.exists():
        path = _from_hub(str(source), revision)
    if path.is_dir():
        if (path / ADAPTER_NAME).is_file():
            return _read_native(path / ADAPTER_NAME)
        if (path / CONFIG_NAME).is_file():
            return _read_peft(path)
        if folders := [p.parent for p in sorted(path.glob(f"*/{CONFIG_NAME}"))]:
            if other := [folder.name for folder in folders if not folder.name.isidentifier()]:
                raise AdapterFileError(f"{path} holds several adapters, such as {other[0]}; give the folder of one")
            return _joined({folder.name: _read_peft(folder) for folder in folders})
        raise AdapterFileError(_nothing_in(path, source))
    return _read_native(path)


def _nothing_in(folder: Path, source: str | Path) -> str:
    """What to say of a folder that holds no adapter: what it holds, and what opens that."""
    if not Path(source).exists():
        return (
            f"{source} on the Hub holds no adapter: neither {ADAPTER_NAME} nor {CONFIG_NAME} with {WEIGHTS_NAME}, and "
            f"nothing else is fetched; if it is a LoRA, pipe.load_lora_weights opens it"
        )
    inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
    said = f"{folder} holds no adapter: expected {ADAPTER_NAME} or {CONFIG_NAME}, found {inside}"
    for file in sorted(folder.glob("*.safetensors"))[:1]:
        what = "it is a DeLoRA adapter; give the file itself" if is_native(file) else described(*read_header(file))
        said += f". As to {file.name}, {what}"
    return said


def _read_peft(folder: Path) -> Adapter:
    try:
        text = (folder / CONFIG_NAME).read_text(encoding="utf-8")
        if len(text) > CONFIG_LIMIT:
            raise ValueError(f"it takes {len(text):,} characters, and {CONFIG_LIMIT:,} are allowed")
        values = dict(json.loads(text))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"cannot read {folder / CONFIG_NAME}: {error}; it is damaged") from error
    if values.get("peft_type") != "DELORA":
        raise AdapterFileError(
            f"{folder} is a PEFT adapter of type {values.get('peft_type')}, not DELORA; load it with PEFT"
        )
    if not (folder / WEIGHTS_NAME).is_file():
        pickled = (
            f"pickled weights, which can carry code and are not read (nor fetched from the Hub); if you trust "
            f"them, open them with PEFT and save_pretrained them again: it writes {WEIGHTS_NAME}"
        )
        if list(folder.glob("*.bin")):
            raise AdapterFileError(f"{folder} holds {pickled}")
        raise AdapterFileError(f"{folder} holds {CONFIG_NAME}, but no {WEIGHTS_NAME}; perhaps it has {pickled}")
    tensors, header = read_tensors(folder / WEIGHTS_NAME)
    component = header.get("component", "")
    base = {"base_model": str(values.get("base_model_name_or_path") or "")}
    try:
        config, named = from_peft(values, tensors)
        adapter = Adapter({component: named}, {component: config}, header)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"cannot use the configuration in {folder / CONFIG_NAME}: {error}") from error
    check_layers(named, where=f"{folder}: ", config=config)
    check_sum(folder / WEIGHTS_NAME, tensors, header, needed=False)
    told = {name: text for name, text in header.items() if name not in ("format", "component")}
    return dataclasses.replace(adapter, provenance=told | base)


def _joined(parts: Mapping[str, Adapter]) -> Adapter:
    """PEFT folders beside each other as one adapter, each for the component that its folder is called by."""
    tensors = {component: next(iter(part.tensors.values())) for component, part in parts.items()}
    configs = {component: next(iter(part.configs.values())) for component, part in parts.items()}
    return Adapter(tensors, configs, next(iter(parts.values())).provenance)


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [
            ADAPTER_NAME,
            *(f"{folder}{name}" for folder in ("", "*/") for name in (CONFIG_NAME, WEIGHTS_NAME)),
        ]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise AdapterFileError(f"there is no adapter at {repo}: no such file or folder") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterFileError(
            f"there is no file or folder {repo}, and the Hub gave none of that name: {str(error).splitlines()[0]}"
        ) from error
