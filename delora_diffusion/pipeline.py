"""DeLoRA adapters on a diffusers pipeline: diffusers' LoRA verbs, with delora in the name.

    pipe = StableDiffusionPipeline.from_pretrained(base)
    load_delora_weights(pipe, "my-dog/", adapter_name="dog")
    set_adapters(pipe, ["dog"], [0.8])
    fuse_delora(pipe)          # as fast as the base;   unfuse_delora(pipe) gives it back bit for bit

Adapters stay in the components (`pipe.unet`, `pipe.text_encoder`), so they are still there in another pipeline that
is made from the same components.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .adapters.adapter import Adapter, write_adapter
from .adapters.assign import Part, assign
from .adapters.read import read_adapter
from .adapters.sources import collect, components, live_modules, unwrapped
from .base.prediction import Prediction, predict
from .base.single_file import is_single_file, open_single_file
from .errors import DeloraError
from .method import inject, merge
from .method.block_weights import Weight, component_weight, listed, one_each
from .method.inject import delora_names
from .method.offloaded import stored, written
from .method.state import StateReport, check_fits, delora_state_dict, load_delora_state_dict
from .method.weights import is_quantised

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was loaded: the adapter's name, how many layers of each component it adapts, how many parameters it brings
    that were trained in full, and how far the base's column norms are from those it was trained on (see
    `state.StateReport`; None if not compared)."""

    adapter_name: str
    layers: dict[str, int]
    in_full: dict[str, int] = field(default_factory=dict)
    base_off: float | None = None

    def __str__(self) -> str:
        parts = [f"{number} layers of {component}" for component, number in self.layers.items()]
        parts += [f"{number} parameters of {component} in full" for component, number in self.in_full.items()]
        base = "not compared" if self.base_off is None else f"within {self.base_off:.2%} of the one it was trained on"
        return f"adapter {self.adapter_name!r}: {', '.join(parts)}; base {base}"


def load_delora_weights(
    pipe: DiffusionPipeline,
    source: str | Path | Adapter,
    adapter_name: str | None = None,
    *,
    component: str | None = None,
    revision: str | None = None,
    check_base: bool = True,
    hotswap: bool = False,
) -> LoadReport:
    """Load an adapter into the components of a pipeline and make it the active one, at strength 1.

    LoRAs of diffusers may be there already, or come later, on the same layers: both act, and either is unloaded alone.

    Args:
        source: a native file, a folder that holds one, a PEFT folder, a Hub id, or an `Adapter`.
        adapter_name: a name not in use; "default", "default_1", ... if None.
        component: what a PEFT folder is for ("unet", "text_encoder"); found by its layers if None.
        check_base: refuse an adapter that was trained on another base.
        hotswap: put it into the place of the adapter called `adapter_name`, which has the same layers and ranks:
            nothing is compiled again, and what acts, and how strongly, stays.

    Returns:
        What matched; it is logged as well.

    Raises:
        AdapterFileError: no adapter there, or one for components that the pipeline lacks.
        ValueError: tensors that do not fit, or another base. The pipeline is as it was before the call.
    """
    adapter = source if isinstance(source, Adapter) else read_adapter(source, revision=revision)
    parts = assign(components(pipe), adapter, component)
    if hotswap:
        return _hotswap(pipe, parts, "default" if adapter_name is None else adapter_name, check_base)
    adapter_name = _new_name(pipe, adapter_name)
    layers = [layer for module in _adapted(pipe).values() for _, layer in inject.adapted_layers(module)]
    enabled = all(layer.enabled for layer in layers)
    done: dict[str, StateReport] = {}
    with inject.complete_or_absent(components(pipe).values(), adapter_name):
        for component, (config, tensors) in parts.items():
            module = unwrapped(getattr(pipe, component))
            try:
                check_fits(module, config, tensors)
                inject.inject_delora(module, config, adapter_name)
                done[component] = load_delora_state_dict(module, tensors, adapter_name, check_base=check_base)
            except DeloraError as error:
                raise DeloraError(f"{type(pipe).__name__}.{component}: {error}") from error
            module.requires_grad_(False)
    for component, module in _adapted(pipe).items():
        if component not in done:
            inject.set_delora_adapters(module, [])
    if not enabled:
        disable_delora(pipe)  # the layers that are adapted for the first time as well
    return _reported(adapter_name, done)


def _reported(adapter_name: str, done: Mapping[str, StateReport]) -> LoadReport:
    compared = [part.base_off for part in done.values() if part.base_off is not None]
    report = LoadReport(
        adapter_name=adapter_name,
        layers={c: part.layers for c, part in done.items()},
        in_full={c: part.in_full for c, part in done.items() if part.in_full},
        base_off=max(compared, default=None),
    )
    log.info("%s", report)
    return report


def _hotswap(pipe: DiffusionPipeline, parts: Mapping[str, Part], adapter_name: str, check_base: bool) -> LoadReport:
    """Fill an adapter that is there from another file; if one component does not fit, none is changed."""
    _check_known(pipe, [adapter_name])
    having = {
        component: module for component, module in _adapted(pipe).items() if adapter_name in delora_names(module)
    }
    if set(having) != set(parts):
        raise DeloraError(
            f"adapter {adapter_name!r} is in {', '.join(having)}, and the new one is for {', '.join(parts)}; "
            f"delete_adapters it and load the new one instead of swapping"
        )
    if fused := [c for c, names in get_fused_adapters(pipe).items() if adapter_name in names]:
        raise DeloraError(f"adapter {adapter_name!r} is fused in {', '.join(fused)}; unfuse_delora first")
    before = {
        component: {name: tensor.clone() for name, tensor in delora_state_dict(module, adapter_name).items()}
        for component, module in having.items()
    }
    done: dict[str, StateReport] = {}
    try:
        for component, module in having.items():
            done[component] = load_delora_state_dict(module, parts[component][1], adapter_name, check_base=check_base)
    except DeloraError as error:
        for component in done:
            load_delora_state_dict(having[component], before[component], adapter_name, check_base=False)
        raise DeloraError(
            f"{error}; to swap, layers and ranks must be the same: delete_adapters, then load"
        ) from error
    for component, module in having.items():
        inject.record_of(module).configs[adapter_name] = parts[component][0]
    return _reported(adapter_name, done)


def _new_name(pipe: DiffusionPipeline, asked: str | None) -> str:
    """The name that was asked for, if it is not taken; the first free one of "default", "default_1", ... for None."""
    taken = {name for module in components(pipe).values() for name in delora_names(module)}
    if asked in taken:
        raise DeloraError(f"the pipeline has an adapter {asked!r} already; delete_adapters it, or choose another name")
    usual = ("default", *(f"default_{number}" for number in range(1, len(taken) + 2)))
    return asked if asked is not None else next(name for name in usual if name not in taken)


def save_delora_weights(
    directory: str | Path, source: Any, adapter_name: str = "default", *, provenance: Mapping[str, str] | None = None
) -> Path:
    """Write one adapter of a pipeline, or of modules given as {component: module}, as a native file.

    Returns:
        The file written.

    Raises:
        ValueError: no component has an adapter of that name.
    """
    return write_adapter(Path(directory), collect(live_modules(source), adapter_name, provenance=provenance))


def set_adapters(
    pipe: DiffusionPipeline, names: str | Sequence[str], weights: Weight | Sequence[Weight] = 1.0
) -> None:
    """Make exactly these adapters active, each at its strength: 1 as trained, 0 the base.

    A strength is a number, or a dictionary as in diffusers: by component, and by block of a UNet, e.g.
    `{"text_encoder": 0.5, "unet": {"down": 0.8, "up": {"block_1": [0.2, 0.5, 1.0]}}}`; what it does not name stays 1.
    Changing strengths loads nothing, and compiles nothing again.

    Raises:
        ValueError: an unknown name, component or block, a wrong number of weights, or fused adapters. Nothing is
            changed then.
    """
    names = listed(names)
    _check_known(pipe, names)
    wanted, adapted, known = one_each(names, weights), _adapted(pipe), list(components(pipe))
    plan = {
        component: {n: component_weight(v, component, known) for n, v in wanted.items() if n in delora_names(module)}
        for component, module in adapted.items()
    }
    for component, module in adapted.items():
        inject.planned_weights(module, list(plan[component]), list(plan[component].values()))
    for component, module in adapted.items():
        inject.set_delora_adapters(module, list(plan[component]), list(plan[component].values()))


def get_active_adapters(pipe: DiffusionPipeline) -> list[str]:
    """Names of the adapters that act."""
    seen: dict[str, None] = {}
    for module in _adapted(pipe).values():
        seen.update(dict.fromkeys(inject.active_delora_adapters(module)))
    return list(seen)


def get_list_adapters(pipe: DiffusionPipeline) -> dict[str, list[str]]:
    """Names of the adapters of each component, active or not."""
    return {component: delora_names(module) for component, module in _adapted(pipe).items()}


def get_fused_adapters(pipe: DiffusionPipeline) -> dict[str, list[str]]:
    """Names of the adapters that are in the weights of each component; components with none are left out."""
    found = {}
    for component, module in _adapted(pipe).items():
        names = dict.fromkeys(name for _, layer in inject.adapted_layers(module) for name in layer.merged)
        if names:
            found[component] = list(names)
    return found


def set_adapters_to_device(pipe: DiffusionPipeline, names: str | Sequence[str], device: torch.device | str) -> None:
    """Keep adapters that do not act on another device, e.g. "cpu"; `set_adapters` brings back those that it activates.

    Raises:
        ValueError: an unknown name, or an adapter that acts.
    """
    names = listed(names)
    _check_known(pipe, names)
    if acting := [name for name in names if name in get_active_adapters(pipe)]:
        raise DeloraError(f"adapter {acting[0]!r} acts; make others active before it is moved")
    for module in _adapted(pipe).values():
        for name in set(names) & set(delora_names(module)):
            for adapter in inject.delora_adapters(module, name).values():
                adapter.to(device)


def delete_adapters(pipe: DiffusionPipeline, names: str | Sequence[str]) -> None:
    """Take these adapters out of the pipeline. Fused ones are unfused first."""
    names = listed(names)
    _check_known(pipe, names)
    for module in _adapted(pipe).values():
        for name in names:
            if name in delora_names(module):
                inject.remove_delora(module, name)


def disable_delora(pipe: DiffusionPipeline) -> None:
    """Let no adapter act until `enable_delora`. Fused ones stay fused."""
    for module in _adapted(pipe).values():
        inject.enable_delora(module, False)


def enable_delora(pipe: DiffusionPipeline) -> None:
    """The inverse of `disable_delora`."""
    for module in _adapted(pipe).values():
        inject.enable_delora(module)


def fuse_delora(
    pipe: DiffusionPipeline,
    adapter_names: str | Sequence[str] | None = None,
    scale: float = 1.0,
    *,
    dequantize: bool = False,
    components: str | Sequence[str] | None = None,
) -> dict[str, merge.MergeReport]:
    """Add the adapters (the active ones if None) to the weights, at their strengths times `scale`.

    Args:
        dequantize: as for `merge_delora`; without it a quantised component is refused.
        components: of the pipeline; all that have such an adapter if None.

    Returns:
        For each component: layers changed, and the part of the update lost to rounding in a half-precision base.

    Raises:
        ValueError, TypeError: see `merge_delora`; the weights are then as they were before the call.
    """
    names = get_active_adapters(pipe) if adapter_names is None else listed(adapter_names)
    _check_known(pipe, names)
    modules = _chosen(pipe, components)
    reports: dict[str, merge.MergeReport] = {}
    layers = [pair for module in _adapted(pipe).values() for pair in inject.adapted_layers(module)]
    fused = {
        layer: (stored(linear, "weight").detach().clone(), layer.merged) for linear, layer in layers if layer.merged
    }
    try:
        for component, module in modules.items():
            here = [name for name in names if name in delora_names(module)]
            reports[component] = merge.merge_delora(module, here, scale=scale, dequantize=dequantize)
    except BaseException:
        for linear, layer in layers:
            if layer in fused:
                weight, layer.merged = fused[layer]
                written(linear).data.copy_(weight)
            else:
                layer.restore(linear)
        for module in _adapted(pipe).values():
            inject.update_hooks(module)
        raise
    return reports


def unfuse_delora(pipe: DiffusionPipeline, *, components: str | Sequence[str] | None = None) -> None:
    """Restore the weights of the base, bit for bit; the adapters act beside them again.

    Args:
        components: of the pipeline; all if None.
    """
    for module in _chosen(pipe, components).values():
        merge.unmerge_delora(module)


def _chosen(pipe: DiffusionPipeline, names: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """The components of these names, which have adapters."""
    adapted = _adapted(pipe)
    names = list(adapted) if names is None else listed(names)
    if unknown := [name for name in names if name not in adapted]:
        raise DeloraError(f"{unknown[0]} has no adapter; those that have are {', '.join(adapted) or '(none)'}")
    return {name: adapted[name] for name in names}


def unload_delora_weights(pipe: DiffusionPipeline) -> None:
    """Take all adapters out; the pipeline is the base again, bit for bit."""
    for module in _adapted(pipe).values():
        inject.remove_delora(module)


def load_pipeline(
    base: str | Path,
    *adapters: str | Path,
    weights: float | Sequence[float] | None = None,
    single_file_config: str | None = None,
    **from_pretrained: Any,
) -> Any:
    """A plain diffusers pipeline of `base` with adapters fused into it, ready to sample; prints what matched.

    Into components that are quantised (by `quantization_config`, or in their files) nothing is fused: there the
    adapters act beside the weights.

    Args:
        base: folder or Hub id of the base pipeline, or a .safetensors file of it.
        adapters: what `load_delora_weights` takes.
        weights: one strength, or one for each adapter; 1 if None.
        single_file_config: see `open_single_file`.
        from_pretrained: passed to `DiffusionPipeline.from_pretrained` (variant, dtype, ...); fp32 without a dtype.
    """
    from diffusers import DiffusionPipeline

    if "torch_dtype" not in from_pretrained:  # left alone, transformers 5 keeps fp16 files fp16 and diffusers does not
        from_pretrained = {"dtype": torch.float32, **from_pretrained}
    if is_single_file(str(base)):
        pipe = open_single_file(str(base), single_file_config, dtype=from_pretrained.get("dtype", torch.float32))
    else:
        pipe = DiffusionPipeline.from_pretrained(str(base), **from_pretrained)
    read = [read_adapter(adapter) for adapter in adapters]
    predict(pipe, prediction_told(read, base))
    reports = [load_delora_weights(pipe, adapter) for adapter in read]
    set_adapters(pipe, [report.adapter_name for report in reports], 1.0 if weights is None else weights)
    for report in reports:
        print(report)  # it returns the pipeline, so what matched can be told only so
    for name, module in _adapted(pipe).items():
        if any(is_quantised(linear) for linear, _ in inject.adapted_layers(module)):
            print(f"{name} is quantised: the adapters act beside its weights")
        else:
            merge.merge_delora(module, permanently=True)
    return pipe


def prediction_told(adapters: Sequence[Adapter], base: str | Path) -> Prediction:
    """What adapters say that the base they were trained on predicts, where it is this one and its own scheduler may
    not say so."""
    told = [one.provenance for one in adapters if Path(one.provenance.get("base_model", "")) == Path(base)]
    kinds = {one.get("prediction_type") for one in told} & {"v_prediction", "sample"}
    zero = {one.get("rescale_betas_zero_snr") for one in told}
    return Prediction(kinds.pop() if len(kinds) == 1 else None, True if zero == {"true"} else None)


def _adapted(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: module for name, module in components(pipe).items() if delora_names(module)}


def _check_known(pipe: DiffusionPipeline, names: Sequence[str]) -> None:
    known = {name for module in components(pipe).values() for name in delora_names(module)}
    for name in names:
        if name not in known:
            raise DeloraError(f"no adapter is called {name!r}; loaded are: {', '.join(sorted(known)) or '(none)'}")
