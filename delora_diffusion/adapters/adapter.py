"""`Adapter`, an adapter in memory, and its native file: one safetensors file.

Its tensors have PEFT's names with the component of the pipeline in front (`unet.<layer>.delora_A`); its header
holds the configuration of each component and where the adapter comes from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..atomic import complete_file
from ..method.config import DeloraConfig
from ..method.delora import INIT_TENSOR_NAMES, TENSOR_NAMES
from ..options import OptionError
from ..run_folder import ADAPTER_NAME
from .safetensors_file import AdapterFileError as AdapterFileError
from .safetensors_file import described, read_tensors

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
    path = path if path.suffix == ".safetensors" else path / ADAPTER_NAME
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


def adapted(tensors: Iterable[str]) -> list[str]:
    """Names of the adapted layers among the names of an adapter's tensors."""
    return [name.removesuffix(".delora_A") for name in tensors if name.endswith(".delora_A")]


def in_full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that were trained in full: biases, and those of `modules_to_save`."""
    return {name: tensor for name, tensor in tensors.items() if not name.rpartition(".")[2].startswith("delora_")}


def layer_tensors(layer: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one adapted layer, by their own names."""
    leaves = (*TENSOR_NAMES, *INIT_TENSOR_NAMES)
    return {leaf: tensors[f"{layer}.{leaf}"] for leaf in leaves if f"{layer}.{leaf}" in tensors}


def base_of(adapters: Sequence[Adapter], sources: Sequence[str], *, option: str) -> str:
    """The base model that adapters were trained on, by their own word.

    Raises:
        OptionError: they name none, or several; `option` is where the user can.
    """
    bases = {adapter.provenance.get("base_model", "") for adapter in adapters}
    if len(bases) != 1 or bases == {""}:
        raise OptionError(f"{', '.join(sources)} do not name one base model; give --{option}")
    return bases.pop()
