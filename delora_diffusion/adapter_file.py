"""An adapter on disk.

The native file is one safetensors file. Its tensors have PEFT's names with the component of the pipeline in front
(`unet.<layer>.delora_A`); its header holds the configuration of each component and where the adapter comes from.
PEFT's own folders are read as well (`peft_format.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .delora import INIT_TENSOR_NAMES, TENSOR_NAMES
from .files import complete_file
from .peft_format import CONFIG_NAME, WEIGHTS_NAME, from_peft
from .targets import DeloraConfig
from .tensor_file import AdapterFileError as AdapterFileError
from .tensor_file import described, read_tensors

FILE_NAME = "delora_weights.safetensors"
FORMAT = "delora-1"


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: for each component of a pipeline, its tensors by name and its configuration.

    A PEFT folder does not say which component it is for; it stands under "".
    """

    tensors: dict[str, dict[str, Tensor]]
    configs: dict[str, DeloraConfig]
    provenance: dict[str, str] = field(default_factory=dict)


def write_adapter(path: Path, adapter: Adapter) -> Path:
    """Write the native file; it is complete or absent.

    Args:
        path: the file, or a folder to put `delora_weights.safetensors` into.

    Returns:
        The file written.
    """
    path = path if path.suffix == ".safetensors" else path / FILE_NAME
    tensors = {
        f"{component}.{name}": tensor.detach().to("cpu").contiguous()
        for component, named in adapter.tensors.items()
        for name, tensor in named.items()
    }
    configs = {component: config.to_dict() for component, config in adapter.configs.items()}
    header = {**adapter.provenance, "format": FORMAT, "delora_config": json.dumps(configs, sort_keys=True)}
    with complete_file(path) as aside:
        save_file(tensors, aside, metadata=header)
    return path


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
        if (path / FILE_NAME).is_file():
            return _read_native(path / FILE_NAME)
        if (path / CONFIG_NAME).is_file():
            return _read_peft(path)
        if parts := {p.parent.name: _read_peft(p.parent) for p in sorted(path.glob(f"*/{CONFIG_NAME}"))}:
            return _joined(parts)
        raise AdapterFileError(_nothing_in(path, source))
    return _read_native(path)


def _nothing_in(folder: Path, source: str | Path) -> str:
    """What to say of a folder that holds no adapter: what it holds, and what opens that."""
    if not Path(source).exists():
        return (
            f"{source} on the Hub holds no adapter: neither {FILE_NAME} nor {CONFIG_NAME} with {WEIGHTS_NAME}, and "
            f"nothing else is fetched; if it is a LoRA, pipe.load_lora_weights opens it"
        )
    inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
    said = f"{folder} holds no adapter: expected {FILE_NAME} or {CONFIG_NAME}, found {inside}"
    for file in sorted(folder.glob("*.safetensors"))[:1]:
        what = "it is a DeLoRA adapter; give the file itself" if is_native(file) else described(*read_tensors(file))
        said += f". As to {file.name}, {what}"
    return said


def is_native(path: Path) -> bool:
    """Whether a file is a native adapter that can be read."""
    try:
        return read_tensors(path)[1].get("format") == FORMAT
    except AdapterFileError:
        return False


def check_layers(tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse layers that lack a tensor, or whose tensors are not of one layer.

    Args:
        tensors: one component's, by their names in a file.
        where: what to say in front of a layer's name.

    Raises:
        AdapterFileError: naming the first such layer.
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf.startswith("delora_"):
            layers.setdefault(layer, {})[leaf] = tuple(tensor.shape)
    for layer, shapes in layers.items():
        needed = TENSOR_NAMES + (INIT_TENSOR_NAMES if any(leaf in INIT_TENSOR_NAMES for leaf in shapes) else ())
        if missing := [leaf for leaf in needed if leaf not in shapes]:
            raise AdapterFileError(
                f"{where}{layer} lacks {', '.join(missing)}; the adapter is incomplete, copy or train it again"
            )
        (r, inputs), (outputs, _) = ((*shapes[leaf], 0, 0)[:2] for leaf in ("delora_A", "delora_B"))
        whole = {"A": (r, inputs), "B": (outputs, r), "lambda": (1,), "w_norm": (inputs,)}
        for leaf in needed:
            if shapes[leaf] != whole[leaf.removeprefix("delora_").removesuffix("_init")]:
                raise AdapterFileError(
                    f"{where}{layer}.{leaf} is {shapes[leaf]}, which does not go with delora_A {shapes['delora_A']} "
                    f"and delora_B {shapes['delora_B']}; the adapter is damaged, copy or train it again"
                )


def _read_native(path: Path) -> Adapter:
    tensors, header = read_tensors(path)
    if header.get("format") != FORMAT:
        raise AdapterFileError(f"{path} is no DeLoRA adapter: {described(tensors, header)}")
    try:
        configs = {c: DeloraConfig.from_dict(values) for c, values in json.loads(header["delora_config"]).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(
            f"{path}: the configuration in its header cannot be read ({error}); it is damaged, or of a newer version"
        ) from error
    named: dict[str, dict[str, Tensor]] = {component: {} for component in configs}
    for key, tensor in tensors.items():
        component, _, name = key.partition(".")
        if component not in named:
            raise AdapterFileError(
                f"{path} holds {key!r}, but its header knows only {', '.join(configs)}; it is damaged"
            )
        named[component][name] = tensor
    for component, tensors in named.items():
        check_layers(tensors, where=f"{path}: {component}.")
    return Adapter(named, configs, {k: v for k, v in header.items() if k not in ("format", "delora_config")})


def _read_peft(folder: Path) -> Adapter:
    try:
        values = dict(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
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
    header.pop("format", None)
    component = header.pop("component", "")
    base = {"base_model": str(values.get("base_model_name_or_path") or "")}
    try:
        config, named = from_peft(values, tensors)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"cannot use the configuration in {folder / CONFIG_NAME}: {error}") from error
    check_layers(named, where=f"{folder}: ")
    return Adapter({component: named}, {component: config}, header | base)


def _joined(parts: Mapping[str, Adapter]) -> Adapter:
    """PEFT folders beside each other as one adapter, each for the component that its folder is called by."""
    tensors = {component: next(iter(part.tensors.values())) for component, part in parts.items()}
    configs = {component: next(iter(part.configs.values())) for component, part in parts.items()}
    return Adapter(tensors, configs, next(iter(parts.values())).provenance)


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [FILE_NAME, *(f"{folder}{name}" for folder in ("", "*/") for name in (CONFIG_NAME, WEIGHTS_NAME))]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise AdapterFileError(f"there is no adapter at {repo}: no such file or folder") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterFileError(
            f"there is no file or folder {repo}, and the Hub gave none of that name: {str(error).splitlines()[0]}"
        ) from error
