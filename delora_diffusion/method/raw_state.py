"""What is trained, by the names it has in the module: for trainers that know of state dicts only.

PEFT's form is another: it cannot hold a residual adapter as it is, nor say which of several adapters a tensor is of.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import DeloraError
from .inject import active_delora_adapters, delora_adapters, delora_names, record_of
from .state import IN_MODULE, load_delora_state_dict


def raw_adapter_state(module: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of all adapters, and the parameters that active ones train in full.

    Args:
        state_dict: the module's, if it is at hand already (gathered from several processes).
    """
    values = module.state_dict() if state_dict is None else state_dict
    full = {name for adapter in active_delora_adapters(module) for name in record_of(module).trained_in_full[adapter]}
    return {name: tensor for name, tensor in values.items() if IN_MODULE in f".{name}" or name in full}


def is_raw_adapter_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds adapters without the module that they are for."""
    here = raw_adapter_state(module)
    base = {name for name in module.state_dict() if name not in here}
    return bool(tensors) and any(IN_MODULE in f".{name}" for name in tensors) and not base & tensors.keys()


def load_raw_adapter_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `raw_adapter_state`, into the same adapters of the same base.

    Raises:
        ValueError: other adapters, other shapes or another base, as `load_delora_state_dict` says it.
    """
    found: dict[str, dict[str, Tensor]] = {name: {} for name in delora_names(module)}
    full = {}
    for name, tensor in tensors.items():
        layer, adapters, rest = name.partition(IN_MODULE)
        adapter, _, leaf = rest.partition(".")
        if adapters:
            found.setdefault(adapter, {})[f"{layer}.{leaf}"] = tensor
        else:
            full[name] = tensor
    record, acting = record_of(module), active_delora_adapters(module)
    for adapter, named in found.items():
        if adapter not in record.configs:
            raise DeloraError(
                f"the state is of an adapter {adapter!r}, and this {type(module).__name__} has "
                f"{', '.join(record.configs)}; add it before loading"
            )
        trained = record.trained_in_full[adapter]
        for layer, own in delora_adapters(module, adapter).items():
            for leaf in own.tensors():
                name = f"{layer}.{leaf}"
                if name in named:
                    named[name] = own.shaped(leaf, named[name])
        if adapter in acting:  # only these are in a module's state dict
            named |= {name: full.pop(name) for name in trained if name in full}
        else:
            named |= {name: value.detach() for name, value in trained.items()}
    if full:
        raise DeloraError(f"the state holds {len(full)} parameters that no adapter trains here, e.g. {min(full)}")
    for adapter, named in found.items():
        load_delora_state_dict(module, named, adapter)
