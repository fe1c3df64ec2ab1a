"""Adapters in a module: inject, remove, choose which act, and look them up. The method itself is in `delora.py`."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import DeloraError
from .block_weights import Weight, layer_weights, listed, one_each
from .config import DeloraConfig
from .delora import DeloraAdapter, DeloraLayer, add_update
from .fused import Place, fused_places
from .kinds import Host, known_kind
from .offloaded import runs_on, stored, written
from .saving import guard_saving, unguard_saving
from .stack import end_forward, start_forward
from .targets import adaptable, only_layers, target_layers, within
from .weights import column_norms, keep_unpacked, may_pack
from .wrapped import layer_at, named_layers, plain

# ---- injecting and removing ----------------------------------------------------------------------


@dataclass(kw_only=True)
class Record:
    """What an adapted module must remember; it hangs on the module, so that a deepcopy carries it along."""

    configs: dict[str, DeloraConfig] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)  # of the base's parameters, before any adapter
    #: adapter -> name -> its value; parameters, and buffers, which a module replaces when it is moved.
    trained_in_full: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base_values: dict[str, Tensor] = field(default_factory=dict)  # what a value above stands in for
    in_place: dict[str, str] = field(default_factory=dict)  # by name, the adapter whose value that is
    enabled: bool = True  # False: no adapter acts, and the base's own parameters are in
    layers: list[tuple[Host, DeloraLayer]] = field(default_factory=list)  # that are adapted
    hooks: list[RemovableHandle] = field(default_factory=list)  # of the module itself
    unpacked: list[nn.Module] = field(default_factory=list)  # layers that may not pack their weights meanwhile
    fused: list[Place] = field(default_factory=list)  # where layers may be called in one that stands for them

    def values_in_full(self, module: nn.Module, adapter: str) -> dict[str, Tensor]:
        """What an adapter trained in full; where its values are in place, as they are there by now."""
        full = self.trained_in_full[adapter]
        return {name: value_of(module, name) if self.in_place.get(name) == adapter else full[name] for name in full}

    def copy_fused_again(self, changed: bool) -> None:
        """Bring what has changed in layers into those that stand for them."""
        for place in self.fused if changed else ():
            place.copy_again()


def inject_delora(
    module: nn.Module,
    config: DeloraConfig,
    adapter_name: str = "default",
    *,
    generator: torch.Generator | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Add an adapter to the layers that `config` names, freeze everything else, and make it the active one.

    The norms w are taken now: load the base's weights first (an adapter's file brings its own norms along). Of a
    quantised layer they are those of the dequantised weight, unless it knows better (see `weights.column_norms`).

    Args:
        module: any module; its layers stay where and what they are.
        config: which layers, which rank, which lambda.
        adapter_name: a name that `module` does not use yet, without dots.
        generator: a CPU generator for A and B; torch's global one if None.
        state_dict: an adapter's tensors, whose layers are adapted instead of those that `config` names. They are not
            loaded.

    Returns:
        The names of the adapted layers, in module order.

    Raises:
        ValueError: the name is taken or unusable, or `config` matches nothing.
        DeloraConfigError: `config` names a layer of another kind (see `kinds.py`), or none.
    """
    record = getattr(module, "_delora", None) or Record()
    _check_name(module, record, adapter_name)
    if state_dict is not None:
        ends = ".delora_A"
        config = only_layers(config, [name.removesuffix(ends) for name in state_dict if name.endswith(ends)])
    targets = target_layers(module, config)  # everything that can fail comes before the module is touched
    record.unpacked += keep_unpacked(module)
    adapters = {name: _new_adapter(config, name, linear, generator) for name, linear in targets.items()}
    full = _trained_in_full(module, config, targets, record.base_values)
    _check_no_clash(module, record, targets, full)
    if not record.configs:
        record.requires_grad = {plain(module, name): p.requires_grad for name, p in module.named_parameters()}
        module.requires_grad_(False)
    for name, linear in targets.items():
        if not hasattr(linear, "delora"):
            layer = linear.delora = DeloraLayer(known_kind(linear))
            layer.enabled = record.enabled
        layer_of(linear).adapters[adapter_name] = adapters[name].train(linear.training)
    record.configs[adapter_name] = config
    record.trained_in_full[adapter_name] = full
    module._delora = record  # type: ignore[assignment]
    guard_saving(module)
    update_hooks(module)
    set_delora_adapters(module, adapter_name)
    for p in parameters_of(module, adapter_name):
        p.requires_grad_(not config.inference_mode)
    return list(targets)


def _check_name(module: nn.Module, record: Record, adapter_name: str) -> None:
    if not all(listed(adapter_name)) or "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
        raise DeloraError(f"{adapter_name!r} cannot name an adapter; use letters, digits, - and _")
    if adapter_name in record.configs:
        raise DeloraError(
            f"{type(module).__name__} has an adapter {adapter_name!r} already; remove it or choose another name"
        )


def _check_no_clash(module: nn.Module, record: Record, targets: Iterable[str], full: Iterable[str]) -> None:
    """Refuse to adapt what another adapter trains in full, and the other way round."""
    adapted = [name for name in delora_layers(module) if f"{name}.weight" in set(full)]
    saved = {name for values in record.trained_in_full.values() for name in values}
    if clash := adapted + [name for name in targets if f"{name}.weight" in saved]:
        raise DeloraError(
            f"{clash[0]!r} cannot be adapted by one adapter and trained in full by another; leave it out of one"
        )


def _new_adapter(config: DeloraConfig, name: str, linear: Host, generator: torch.Generator | None) -> DeloraAdapter:
    w_norm = column_norms(linear)
    kind = known_kind(linear)
    adapter = DeloraAdapter(
        w_norm.cpu() if generator else w_norm,
        kind.outputs(linear),
        rank=config.rank_of(name),
        dropout=config.module_dropout,
        inputs=kind.inputs(linear),
    )
    adapter.initialise(config.lambda_of(name, w_norm.numel()), config.init_weights, generator)
    return adapter.to(runs_on(linear) or w_norm.device)


def _trained_in_full(
    module: nn.Module, config: DeloraConfig, targets: dict[str, Host], base_values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Trainable copies of the base parameters that `bias` and `modules_to_save` name, and copies of buffers."""
    names = names_in_full(module, config, targets)
    base = {name: base_values.get(name, value_of(module, name)) for name in names}
    if away := [name for name, value in base.items() if value.is_meta]:
        raise DeloraError(
            f"{away[0]} is offloaded, and this adapter has its own value for it; load the adapter before offloading"
        )
    copies = {name: value.detach().clone() for name, value in base.items()}
    return {name: nn.Parameter(t) if isinstance(base[name], nn.Parameter) else t for name, t in copies.items()}


def names_in_full(module: nn.Module, config: DeloraConfig, targets: dict[str, Host]) -> list[str]:
    """The parameters that `bias` and `modules_to_save` name, where `targets` are the adapted layers, and the buffers
    of these modules that files hold: the averages of a BatchNorm, say."""
    own = {f"{name}." for name, _ in adaptable(module)} | {"."}
    names: list[str] = []
    seen: set[int] = set()
    for name, parameter in ((plain(module, n), p) for n, p in module.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        saved = any(within(pattern, owner) for pattern in config.modules_to_save or ())  # of tied weights, each alone
        bias = leaf == "bias" and (config.bias == "all" or (config.bias == "delora_only" and owner in targets))
        if f"{owner}." in own and (saved or (bias and id(parameter) not in seen)):
            names.append(name)
        seen.add(id(parameter))
    for pattern in config.modules_to_save or ():
        if not any(within(pattern, name.rpartition(".")[0]) for name in names):
            raise DeloraError(
                f"modules_to_save {pattern!r} matches no module with parameters in {type(module).__name__}"
            )
    for name, part in named_layers(module) if config.modules_to_save else ():
        if any(within(pattern, name) for pattern in config.modules_to_save or ()) and f"{name}." in own:
            kept = (leaf for leaf in part._buffers if leaf not in part._non_persistent_buffers_set)
            names += [f"{name}.{leaf}" for leaf in kept if part._buffers[leaf] is not None]
    return names


def remove_delora(module: nn.Module, adapter_name: str | None = None) -> None:
    """Take an adapter (all of them if None) out again: the exact inverse of `inject_delora`.

    If it is merged, all adapters are unmerged first; those that stay act beside the weights.

    Raises:
        ValueError: there is no such adapter.
    """
    record = record_of(module)
    names = list(record.configs) if adapter_name is None else [known_adapter(record, adapter_name)]
    if any(name in layer.merged for _, layer in adapted_layers(module) for name in names):
        for linear, layer in adapted_layers(module):
            layer.restore(linear)
    active = [name for name in active_delora_adapters(module) if name not in names]
    _swap_in(module, record, active)
    for linear, layer in adapted_layers(module):
        layer.active = tuple(name for name in layer.active if name not in names)
        for name in names:
            if name in layer.adapters:
                del layer.adapters[name]
        if not layer.adapters:
            if layer.hook is not None:
                layer.hook.remove()
            del linear.delora
    for name in names:
        del record.configs[name], record.trained_in_full[name]
    update_hooks(module)
    if not record.configs:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(record.requires_grad.get(plain(module, name), parameter.requires_grad))
        for part in record.unpacked:
            may_pack(part)
        unguard_saving(module)
        del module._delora


def update_hooks(module: nn.Module) -> None:
    """Let hooks be where adapters can act beside the weights: on such layers, and on the module, which forms all their
    factors. Where every adapter is merged there are none, and a forward costs what the base's costs."""
    record = record_of(module)
    record.layers = adapted_layers(module)
    beside = False
    for linear, layer in record.layers:
        needed = any(name not in layer.merged for name in layer.adapters)
        if layer.hook is not None and not needed:
            layer.hook.remove()
            layer.hook = None
        elif layer.hook is None and needed:
            layer.hook = linear.register_forward_hook(add_update, with_kwargs=True)
            forget_compiled()
        beside |= needed
    if beside and not record.hooks:
        record.hooks = [
            module.register_forward_pre_hook(start_forward, with_kwargs=True),
            module.register_forward_hook(end_forward, always_call=True),
        ]
    elif record.hooks and not beside:
        for hook in record.hooks:
            hook.remove()
        record.hooks = []
    before, record.fused = record.fused, fused_places(module)
    for place in before:
        place.detach()
    for place in record.fused if beside else ():
        place.attach()
    for place in (*before, *record.fused):
        place.copy_again()


def forget_compiled() -> None:
    """Let what torch.compile has compiled be compiled again: it does not see that a module has got a hook."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and frames.FRAME_COUNTER:
        torch._dynamo.reset()


@contextlib.contextmanager
def complete_or_absent(modules: Iterable[nn.Module], adapter_name: str) -> Iterator[None]:
    """For a `with` block that puts a new adapter into several modules: if it fails, none has it, and those that acted
    before act again."""
    modules = list(modules)
    active = {layer: layer.active for module in modules for _, layer in adapted_layers(module)}
    enabled = all(layer.enabled for layer in active)
    try:
        yield
    except BaseException:
        for module in modules:
            if adapter_name in delora_names(module):
                remove_delora(module, adapter_name)
        for layer, names in active.items():
            layer.active = names
        for module in modules:
            if delora_names(module):
                enable_delora(module, enabled)
        raise


# ---- which adapters act --------------------------------------------------------------------------


def set_delora_adapters(
    module: nn.Module, names: str | Sequence[str], weights: Weight | Sequence[Weight] = 1.0
) -> None:
    """Make exactly these adapters active, each with its weight (its lambda times `weight` is its strength).

    A weight is a number, or numbers by block or path (see `block_weights`). Weights are tensors: nothing is loaded or
    compiled again when they change.

    Raises:
        ValueError: an unknown name or block, a number of weights that is not the number of names, or a merged adapter
            at another weight than it was merged with (merged ones stay merged, active or not).
    """
    names = listed(names)
    chosen = planned_weights(module, names, weights)
    _swap_in(module, record_of(module), names)
    for path, linear in delora_layers(module).items():
        layer = layer_of(linear)
        layer.active = tuple(name for name in names if name in layer.adapters)
        for name in layer.active:
            if (device := runs_on(linear) or linear.weight.device) != layer[name].delora_weight.device:
                layer[name].to(device)
            layer[name].delora_weight.fill_(chosen[name][path])


def planned_weights(
    module: nn.Module, names: Sequence[str], weights: Weight | Sequence[Weight]
) -> dict[str, dict[str, float]]:
    """adapter -> layer -> weight, as `set_delora_adapters` sets them; raises what it raises, and changes nothing."""
    layers = {path: layer_of(linear) for path, linear in delora_layers(module).items()}
    chosen = {}
    for name, value in one_each(names, weights).items():
        known_adapter(record_of(module), name)
        chosen[name] = layer_weights(value, module, [path for path, layer in layers.items() if name in layer.adapters])
        for path, strength in chosen[name].items():
            if not math.isfinite(strength):
                raise DeloraError(f"weight of {name!r} is {strength}; it must be finite")
            merged = layers[path].merged.get(name, strength)
            if merged != strength:
                raise DeloraError(f"adapter {name!r} is merged at weight {merged:g}; unmerge_delora first")
    return chosen


def active_delora_adapters(module: nn.Module) -> list[str]:
    """Names of the active adapters of `module`, in the order they act."""
    seen: dict[str, None] = {}
    for _, layer in adapted_layers(module):
        seen.update(dict.fromkeys(layer.active))
    return list(seen)


def enable_delora(module: nn.Module, enabled: bool = True) -> None:
    """Let the active adapters act, or (False) let none act. Merged weights stay as they are."""
    record = record_of(module)
    record.enabled = enabled
    _swap_in(module, record, active_delora_adapters(module))
    for _, layer in adapted_layers(module):
        layer.enabled = enabled


@contextlib.contextmanager
def delora_disabled(module: nn.Module) -> Iterator[None]:
    """The base model for the length of a `with` block, also while adapters are merged."""
    layers = adapted_layers(module)
    merged = [(linear, layer.base_weight) for linear, layer in layers if layer.base_weight is not None]
    merged_weights = [stored(linear, "weight").detach().clone() for linear, _ in merged]
    was_enabled = all(layer.enabled for _, layer in layers)
    with torch.no_grad():
        for linear, weight in merged:
            written(linear).copy_(weight)
    enable_delora(module, False)
    record_of(module).copy_fused_again(bool(merged))
    try:
        yield
    finally:
        with torch.no_grad():
            for (linear, _), weight in zip(merged, merged_weights, strict=True):
                written(linear).copy_(weight)
        enable_delora(module, was_enabled)
        record_of(module).copy_fused_again(bool(merged))


def _swap_in(module: nn.Module, record: Record, names: Sequence[str]) -> None:
    """Put the base's own parameters back, then those that the adapters `names` trained in full in their place."""
    wanted: dict[str, str] = {}
    for adapter in names:
        for name in record.trained_in_full[adapter]:
            if name in wanted:
                raise DeloraError(f"two of the adapters {list(names)} trained {name!r} in full; activate one of them")
            wanted[name] = adapter
    changed = bool(record.base_values)
    for name, value in record.base_values.items():
        record.trained_in_full[record.in_place[name]][name] = value_of(module, name)
        _set_value(module, name, value)
    record.base_values, record.in_place = {}, wanted if record.enabled else {}
    for name, adapter in record.in_place.items():
        record.base_values[name] = value_of(module, name)
        _set_value(module, name, record.trained_in_full[adapter][name])
    record.copy_fused_again(changed or bool(wanted))


def value_of(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of `module`."""
    owner, _, leaf = name.rpartition(".")
    value: Tensor = getattr(layer_at(module, owner), leaf)
    return value


def _set_value(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter or buffer in another's place, on the device and in the dtype the module has been moved to
    meanwhile."""
    owner, _, leaf = name.rpartition(".")
    there = value_of(module, name)
    if there.is_meta:
        raise DeloraError(f"{name} is offloaded, and an adapter has its own value for it; choose before offloading")
    value.data = value.data.to(there.device, there.dtype)
    setattr(layer_at(module, owner), leaf, value)


# ---- looking adapters up ------------------------------------------------------------------------


def delora_layers(module: nn.Module) -> dict[str, Host]:
    """The adapted layers of `module` by name."""
    return {
        plain(module, name): m  # type: ignore[misc]
        for name, m in module.named_modules()
        if isinstance(m._modules.get("delora"), DeloraLayer)
    }


def delora_adapters(module: nn.Module, adapter_name: str = "default") -> dict[str, DeloraAdapter]:
    """The adapters called `adapter_name`, by the name of the layer they adapt.

    Raises:
        ValueError: there is no such adapter.
    """
    known_adapter(record_of(module), adapter_name)
    layers = {name: layer_of(linear) for name, linear in delora_layers(module).items()}
    return {name: layer[adapter_name] for name, layer in layers.items() if adapter_name in layer.adapters}


def parameters_of(module: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """The parameters of one adapter: of its layers, and those that it trains in full."""
    own = [p for adapter in delora_adapters(module, adapter_name).values() for p in adapter.parameters()]
    full = record_of(module).trained_in_full[adapter_name].values()
    return [*own, *(value for value in full if isinstance(value, nn.Parameter))]


def delora_config(module: nn.Module, adapter_name: str = "default") -> DeloraConfig:
    """The configuration an adapter was injected with."""
    record = record_of(module)
    return record.configs[known_adapter(record, adapter_name)]


def delora_names(module: nn.Module) -> list[str]:
    """Names of the adapters in `module`, active or not; none for a module without adapters."""
    record: Record | None = getattr(module, "_delora", None)
    return list(record.configs) if record else []


def record_of(module: nn.Module) -> Record:
    record: Record | None = getattr(module, "_delora", None)
    if record is None:
        raise DeloraError(f"this {type(module).__name__} has no adapter; inject_delora or load one first")
    return record


def known_adapter(record: Record, name: str) -> str:
    if name not in record.configs:
        raise DeloraError(f"no adapter is called {name!r}; there are: {', '.join(record.configs)}")
    return name


def layer_of(linear: Host) -> DeloraLayer:
    """The adapters of an adapted layer."""
    layer = linear.delora
    assert isinstance(layer, DeloraLayer)
    return layer


def adapted_layers(module: nn.Module) -> list[tuple[Host, DeloraLayer]]:
    """The adapted layers of `module`, each with its adapters."""
    return [(linear, layer_of(linear)) for linear in delora_layers(module).values()]
