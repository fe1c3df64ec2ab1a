"""`Adapter`, an adapter in memory, and its native file: one safetensors file.

Its tensors have PEFT's names with the component of the pipeline in front (`unet.<layer>.delora_A`); its header
holds the configuration of each component, where the adapter comes from, and a checksum of all that.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..atomic import complete_file
from ..method.config import DeloraConfig
from ..method.delora import INIT_TENSOR_NAMES, TENSOR_NAMES, factors_of
from ..method.lowrank import LowRank
from ..options import OptionError
from ..run_folder import ADAPTER_NAME
from .safetensors_file import AdapterFileError as AdapterFileError
from .safetensors_file import check_sum, described, read_header, read_tensors, with_checksum, write_tensors

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.safetensors)(?<!\.ckpt)")
FORMAT = "delora-2"
_WITHOUT_CHECKSUM = "delora-1"
#: Characters of a configuration: far more than a rank and a lambda for each layer of the largest models.
CONFIG_LIMIT = 1_000_000


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: for each component of a pipeline, its tensors by name and its configuration.

    A PEFT folder does not say which component it is for; it stands under "".

    Raises:
        AdapterFileError: the name of a component that is none: it would become a folder's, or part of a tensor's.
    """

    tensors: dict[str, dict[str, Tensor]]
    configs: dict[str, DeloraConfig]
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for component in (*self.tensors, *self.configs):
            if component and not component.isidentifier():
                raise AdapterFileError(
                    f"{component[:80]!r} cannot be the name of a component; those of pipelines are unet, transformer, "
                    f"text_encoder and the like"
                )


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
        write_tensors(aside, tensors, with_checksum(tensors, header))
    return path


def is_native(path: Path) -> bool:
    """Whether a file is a native adapter that can be read."""
    try:
        return read_header(path)[1].get("format") in (FORMAT, _WITHOUT_CHECKSUM)
    except AdapterFileError:
        return False


def check_layers(tensors: Mapping[str, Tensor], *, where: str, config: DeloraConfig | None = None) -> None:
    """Refuse layers that lack a tensor, or whose tensors are not of one layer.

    Args:
        tensors: one component's, by their names in a file.
        where: what to say in front of a layer's name.
        config: what says their ranks, if it is to agree.

    Raises:
        AdapterFileError: naming the first such layer.
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf.startswith("delora_"):
            layers.setdefault(layer, {})[leaf] = tuple(tensor.shape)
            if not tensor.is_floating_point():
                raise AdapterFileError(
                    f"{where}{name} holds {str(tensor.dtype).removeprefix('torch.')}, where fractions belong; the "
                    f"adapter is damaged, copy or train it again"
                )
    for layer, shapes in layers.items():
        needed = TENSOR_NAMES + (INIT_TENSOR_NAMES if any(leaf in INIT_TENSOR_NAMES for leaf in shapes) else ())
        if missing := [leaf for leaf in needed if leaf not in shapes]:
            raise AdapterFileError(
                f"{where}{layer} lacks {', '.join(missing)}; the adapter is incomplete, copy or train it again"
            )
        r, *inputs = shapes["delora_A"] or (0,)
        outputs = (*shapes["delora_B"], 0)[0]
        if not r * math.prod(inputs) * outputs:
            raise AdapterFileError(f"{where}{layer} has no size; the adapter is damaged, copy or train it again")
        inputs = inputs if len(inputs) in (1, 3) else [0]  # features, or channels and a kernel
        whole = {"A": (r, *inputs), "B": (outputs, r), "lambda": (1,), "w_norm": (math.prod(inputs),)}
        for leaf in needed:
            if shapes[leaf] != whole[leaf.removeprefix("delora_").removesuffix("_init")]:
                raise AdapterFileError(
                    f"{where}{layer}.{leaf} is {shapes[leaf]}, which does not go with delora_A {shapes['delora_A']} "
                    f"and delora_B {shapes['delora_B']}; the adapter is damaged, copy or train it again"
                )
        if config is not None and config.rank_of(layer) != r:
            raise AdapterFileError(
                f"{where}{layer}.delora_A has rank {r}, and the configuration says {config.rank_of(layer)}; the "
                f"adapter is damaged, copy or train it again"
            )


def _read_native(path: Path) -> Adapter:
    names, header = read_header(path)
    version = header.get("format", "")
    if version not in (FORMAT, _WITHOUT_CHECKSUM):
        newer = "it is of another version than this delora_diffusion reads; update it"
        raise AdapterFileError(
            f"{path} is no DeLoRA adapter: {newer if version.startswith('delora-') else described(names, header)}"
        )
    configs = _configs_in(path, header)
    tensors, header = read_tensors(path)
    named: dict[str, dict[str, Tensor]] = {component: {} for component in configs}
    for key, tensor in tensors.items():
        component, _, name = key.partition(".")
        if component not in named:
            raise AdapterFileError(
                f"{path} holds {key!r}, but its header knows only {', '.join(configs)}; it is damaged"
            )
        named[component][name] = tensor
    for component, part in named.items():
        check_layers(part, where=f"{path}: {component}.", config=configs[component])
    check_sum(path, tensors, header, needed=version == FORMAT)
    return Adapter(named, configs, {k: v for k, v in header.items() if k not in ("format", "delora_config")})


def _configs_in(path: Path, header: Mapping[str, str]) -> dict[str, DeloraConfig]:
    """The configuration of each component, in the header of a native file."""
    try:
        text = header["delora_config"]
        if len(text) > CONFIG_LIMIT:
            raise ValueError(f"it takes {len(text):,} characters, and {CONFIG_LIMIT:,} are allowed")
        configs = {component: DeloraConfig.from_dict(values) for component, values in json.loads(text).items()}
        return Adapter({}, configs).configs  # which looks at the names
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{path}: the configuration in its header cannot be read ({error}); it is damaged, or of a newer version"
        ) from error


def adapted(tensors: Iterable[str]) -> list[str]:
    """Names of the adapted layers among the names of an adapter's tensors."""
    return [name.removesuffix(".delora_A") for name in tensors if name.endswith(".delora_A")]


def in_full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that were trained in full: biases, and those of `modules_to_save`."""
    return {name: tensor for name, tensor in tensors.items() if not name.rpartition(".")[2].startswith("delora_")}


def update_of(layer: str, tensors: Mapping[str, Tensor], weight: float = 1.0) -> LowRank:
    """The update of a layer as thin factors, fp32, from its tensors by their own names.

    Raises:
        AdapterFileError: values so large that it is not finite; `layer` is named.
    """
    update = factors_of({leaf: tensor.detach().float().cpu() for leaf, tensor in tensors.items()}, weight)
    if not (update.down.isfinite().all() and update.up.isfinite().all() and update.norm().isfinite()):
        raise AdapterFileError(f"the update of {layer} is not finite; the adapter is of no use, train it again")
    return update


def layer_tensors(layer: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one adapted layer, by their own names."""
    leaves = (*TENSOR_NAMES, *INIT_TENSOR_NAMES)
    return {leaf: tensors[f"{layer}.{leaf}"] for leaf in leaves if f"{layer}.{leaf}" in tensors}


def base_of(adapters: Sequence[Adapter], sources: Sequence[str], *, option: str) -> str:
    """The base model that adapters were trained on, by their own word: a Hub id, or a folder or file that is here.

    A relative path is looked for from the current folder, then from each folder above an adapter's file: where runs
    and models lie in one project, it is found again from anywhere, and after the project was moved.

    Raises:
        OptionError: they name none, several, or one that is not here; `option` is where the user can.
    """
    named = [adapter.provenance.get("base_model", "") for adapter in adapters]
    bases = {_found(base, Path(source)) for base, source in zip(named, sources, strict=True)}
    if len(bases) != 1 or bases == {""}:
        raise OptionError(f"{', '.join(sources)} do not name one base model; give --{option}")
    base = bases.pop()
    if not Path(base).exists() and not _HUB_ID.fullmatch(base):
        raise OptionError(
            f"{', '.join(sources)} were trained on {base}, which is neither in the current folder nor in one above "
            f"the adapter; say where it is: --{option}"
        )
    return base


def _found(base: str, source: Path) -> str:
    """A base where it is from here, if it is a relative path that an adapter at `source` names."""
    if not base or Path(base).exists() or not source.exists():
        return base
    places = (parent / base for parent in source.resolve().parents)
    return next((str(place) for place in places if place.is_file() or (place / "model_index.json").is_file()), base)


def adapter_hash(adapter: Adapter) -> str:
    """Hash of an adapter's tensors: the same file elsewhere is the same adapter, a retrained one is not."""
    digest = hashlib.sha256()
    for component, tensors in sorted(adapter.tensors.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{component}.{name}".encode())
            digest.update(tensor.contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]
