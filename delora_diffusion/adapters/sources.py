"""An adapter from wherever it is: in memory, in the modules that carry it, in a pipeline, on disk, on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import DeloraError
from ..families import family_of
from ..method.inject import delora_config, delora_names
from ..method.state import delora_state_dict
from .adapter import Adapter
from .peft import not_linear
from .read import read_adapter

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def as_adapter(source: Any, adapter_name: str = "default") -> Adapter:
    """An adapter from wherever it is: an `Adapter`, what `read_adapter` reads, a pipeline, or live modules.

    A pipeline tells where it comes from as well, its class and its base.

    Args:
        adapter_name: which adapter of a pipeline, of modules {component: module}, or of one module (component "").
    """
    if isinstance(source, Adapter):
        return source
    if isinstance(source, (str, Path)):
        return read_adapter(source)
    told = {}
    if not isinstance(source, (Mapping, nn.Module)):
        told = {"pipeline": type(source).__name__, "base_model": str(source.config.get("_name_or_path") or "")}
    return collect(live_modules(source), adapter_name, provenance=told)


def collect(
    modules: Mapping[str, nn.Module],
    adapter_name: str,
    *,
    provenance: Mapping[str, str] | None = None,
    at_current_weight: bool = True,
) -> Adapter:
    """One adapter out of the modules that carry it.

    Args:
        at_current_weight: at the strength it has now, which a lambda ramp may not have brought to 1 yet.

    Raises:
        ValueError: no module has an adapter of that name.
    """
    having = {component: module for component, module in modules.items() if adapter_name in delora_names(module)}
    if not having:
        raise DeloraError(f"none of {', '.join(modules)} has an adapter called {adapter_name!r}")
    tensors = {c: delora_state_dict(m, adapter_name, at_current_weight=at_current_weight) for c, m in having.items()}
    told = {**(provenance or {}), **not_linear(having, tensors)}
    return Adapter(tensors, {c: delora_config(m, adapter_name) for c, m in having.items()}, told)


def live_modules(source: Any) -> dict[str, nn.Module]:
    """The modules that can carry an adapter: of a pipeline, {component: module}, or one module; none of a file."""
    if isinstance(source, (Adapter, str, Path)):
        return {}
    if isinstance(source, nn.Module):
        return {"": unwrapped(source)}
    return {c: unwrapped(m) for c, m in source.items()} if isinstance(source, Mapping) else components(source)


def components(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The components of a pipeline that can carry an adapter, by name."""
    found = {name: getattr(pipe, name, None) for name in family_of(pipe).components()}
    return {name: unwrapped(module) for name, module in found.items() if isinstance(module, nn.Module)}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, where `torch.compile(module)` has put a wrapper around it that renames its layers."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module
