"""A whole pipeline with adapters in its weights, as a folder that everything can load that loads the base.

    delora merge --base some/base --adapter runs/my_dog runs/my_style --weights 1 0.6 --output my_dog_model

The base is read in the precision of its files, an update is added in fp32, and the sum is rounded once. Layer by layer
is replaced, so that memory holds the model once.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..adapters.adapter import Adapter, adapter_hash, base_of
from ..adapters.read import read_adapter
from ..adapters.sources import components
from ..atomic import clear_scraps, complete_file, complete_folder
from ..base.checks import as_base_error, giving
from ..base.config import ModelConfig
from ..base.load import DTYPE, listed_in
from ..base.prediction import predict
from ..base.single_file import is_single_file, open_single_file, single_file_dtype
from ..errors import DeloraError
from ..families import family_named
from ..method.inject import delora_names
from ..method.merge import MergeReport, merge_delora
from ..options import OptionError
from ..pipeline import load_delora_weights, prediction_told, set_adapters
from .config import MergingConfig
from .lora_names import LoraError
from .single_file import check_family, single_file_entries, write_single_file

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

log = logging.getLogger(__name__)
RECORD_NAME = "delora_merge.json"
RECORD_FIELD = "delora.merge"  # in the header of a single file
_TORCH_DTYPE = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class QuantizedBaseError(DeloraError):
    """Adapters cannot be merged into quantised weights; the message says which, and the way out."""


def merge_into_base(config: MergingConfig) -> dict[str, MergeReport]:
    """Write the base with adapters merged into it to `config.output`: a complete pipeline or single file, or nothing.

    Beside it lies `delora_merge.json`, or in the file's header `delora.merge`: what was merged into what, and what
    rounding cost.

    Returns:
        For each adapted component: layers changed, and the part of the update lost to rounding.

    Raises:
        OptionError: the output is in use, or no base is named.
        AdapterFileError, BaseModelError, ValueError: an adapter or a base that cannot be loaded or do not fit.
        QuantizedBaseError: a quantised component, without `config.dequantize`.
        LoraError: with `config.single_file`, a base or an adapter that such a file cannot hold.
    """
    out = Path(config.output)
    clear_scraps(out.parent)
    adapters = [read_adapter(source) for source in config.adapter]
    base = config.base or base_of(adapters, config.adapter, option="base")
    asked = _asked(config, base, adapters)
    if done := _merged_before(out, asked):
        log.info("%s holds these adapters in this base already", out)
        return done
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OptionError(f"output {out} exists already and is not empty; give another name, or move it away")
    with giving("base"):
        if config.single_file:
            _check_single(base, config, adapters)
        pipe, stored = _open(base, config)
    predict(pipe, prediction_told(adapters, base))
    if config.single_file:
        single_file_entries(pipe)  # what it cannot hold is said before anything is merged
    exact = _make_plain(pipe, {part for adapter in adapters for part in adapter.tensors}, config)
    check = config.check_base and exact  # quantising has moved the column norms that are compared
    names = [load_delora_weights(pipe, adapter, check_base=check).adapter_name for adapter in adapters]
    set_adapters(pipe, names, config.strengths)
    wanted = None if config.dtype == "auto" else DTYPE[config.dtype]
    reports = {}
    for component, module in components(pipe).items():
        if delora_names(module):
            dtype = wanted or stored.get(component, torch.float32)
            reports[component] = merge_delora(module, permanently=True, dtype=dtype)
            module.to(dtype)
    _cast_others(pipe, reports, wanted)
    record = _record(asked, reports)
    if config.single_file:
        with complete_file(out) as aside:
            write_single_file(aside, single_file_entries(pipe), {"format": "pt", RECORD_FIELD: record})
        return reports
    with complete_folder(out) as aside:
        pipe.save_pretrained(aside)
        (aside / RECORD_NAME).write_text(record, encoding="utf-8")
    return reports


def _check_single(base: str, config: MergingConfig, adapters: Sequence[Adapter]) -> None:
    """Refuse, before anything large is read, what a single file of this base cannot hold."""
    asked = ModelConfig(
        pretrained_model_name_or_path=base, single_file_config=config.single_file_config, revision=config.revision
    )
    family = family_named(listed_in(asked)["_class_name"])
    check_family(family)
    others = {part for adapter in adapters for part in adapter.tensors} - {family.denoiser, ""}
    if family.denoiser == "transformer" and others:
        raise LoraError(
            f"a single file of {family.name} holds the transformer, and the adapter also changes "
            f"{', '.join(sorted(others))}; merge into a folder instead"
        )


def _open(base: str, config: MergingConfig) -> tuple[Any, dict[str, torch.dtype]]:
    """The pipeline in the precision of its files, and that precision by component."""
    from diffusers import DiffusionPipeline

    if is_single_file(base):
        kept = single_file_dtype(base)
        pipe = open_single_file(base, config.single_file_config, dtype=kept)
        return pipe, dict.fromkeys(pipe.components, kept)
    where = {"revision": config.revision, "variant": config.variant}
    with as_base_error(base):
        folder = base if Path(base).is_dir() else DiffusionPipeline.download(base, **where)
        stored = stored_dtypes(Path(folder), config.variant)
        dtypes = {"default": torch.float32, **stored}
        return DiffusionPipeline.from_pretrained(folder, dtype=dtypes, variant=config.variant), stored


def stored_dtypes(folder: Path, variant: str | None = None) -> dict[str, torch.dtype]:
    """The precision of most of the numbers in each component's .safetensors files; quantised ones are left out."""
    found = {}
    for component in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [f for f in component.glob("*.safetensors") if variant is None or f".{variant}" in f.name]
        sizes: collections.Counter[str] = collections.Counter()
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(key)
                    sizes[part.get_dtype()] += max(1, torch.Size(part.get_shape()).numel())
        if sizes and (kind := sizes.most_common(1)[0][0]) in _TORCH_DTYPE:
            found[component.name] = _TORCH_DTYPE[kind]
    return found


def _make_plain(pipe: DiffusionPipeline, parts: set[str], config: MergingConfig) -> bool:
    """Dequantise the components that adapters are for, or refuse; whether none had to be."""
    exact = True
    for component, module in components(pipe).items():
        if getattr(module, "hf_quantizer", None) is None:
            continue
        if hasattr(module, "_weight_conversions"):  # transformers would undo the quantiser's when saving, and cannot
            module._weight_conversions = None  # type: ignore[assignment]
        if component not in parts and "" not in parts:
            continue
        method = getattr(getattr(module.config, "quantization_config", None), "quant_method", "quantised")
        if not config.dequantize:
            raise QuantizedBaseError(
                f"{component} is quantised ({method}), and an update would drown in its rounding; give the "
                f"unquantised base, or --dequantize to write it in full precision"
            )
        try:
            setattr(pipe, component, module.dequantize())  # type: ignore[operator]
        except NotImplementedError as error:
            raise QuantizedBaseError(
                f"{component} is quantised ({method}), which cannot be undone here: {error}; give the unquantised base"
            ) from error
        exact = False
        log.info("%s: dequantised", component)
    return exact


def _cast_others(pipe: DiffusionPipeline, merged: Mapping[str, MergeReport], dtype: torch.dtype | None) -> None:
    """The components without adapters; the VAE keeps its precision rather than become fp16, which overflows in it."""
    for name, module in pipe.components.items():
        if dtype is None or name in merged or not isinstance(module, nn.Module):
            continue
        if getattr(module, "hf_quantizer", None) is None and not (name == "vae" and dtype == torch.float16):
            module.to(dtype)


def _asked(config: MergingConfig, base: str, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What a merged pipeline is made of, and how."""
    given = zip(config.adapter, adapters, config.strengths, strict=True)
    return {
        "base": base,
        "revision": config.revision,
        "variant": config.variant,
        "adapters": [{"adapter": name, "content": adapter_hash(part), "weight": w} for name, part, w in given],
        "dtype": config.dtype,
    }


def _record(asked: Mapping[str, Any], reports: Mapping[str, MergeReport]) -> str:
    components = {name: dataclasses.asdict(report) for name, report in reports.items()}
    return json.dumps({**asked, "components": components}, indent=2) + "\n"


def _merged_before(out: Path, asked: Mapping[str, Any]) -> dict[str, MergeReport] | None:
    """The reports of a merge that was whole already when its command was cut off; None if it is another, or none."""
    try:
        record = json.loads(_recorded_in(out))
        if {name: record[name] for name in asked} != asked:
            return None
        return {name: MergeReport(**report) for name, report in record["components"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def _recorded_in(out: Path) -> str:
    if out.is_dir():
        return (out / RECORD_NAME).read_text(encoding="utf-8")
    with safe_open(out, framework="pt") as file:
        record: str = file.metadata()[RECORD_FIELD]
    return record
