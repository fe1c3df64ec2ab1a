"""Layers that another adapter has wrapped: PEFT, and diffusers' LoRAs with it, put a module in a Linear's place that
holds the Linear as `base_layer`. It is adapted where it is, so both act; its name is the one it has without."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

#: What PEFT calls the layer that it has wrapped.
INNER = "base_layer"


def plain(module: nn.Module, name: str) -> str:
    """The name of a layer or parameter of `module` as it is where nothing is wrapped."""
    parts, here = [], module
    for part in name.split("."):
        if part != INNER or not _is_wrapper(here):
            parts.append(part)
        here = here._modules.get(part) or here  # the last part may be a parameter's
    return ".".join(parts)


def unwrapped_layer(module: nn.Module) -> nn.Module:
    """The layer itself, inside of what may have been put around it."""
    while _is_wrapper(module) and isinstance(inner := module._modules.get(INNER), nn.Module):
        module = inner
    return module


def _is_wrapper(module: nn.Module) -> bool:
    """Whether PEFT has made a module: others may call a layer of their own `base_layer`."""
    return hasattr(module, "adapter_layer_names")


def named_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` as if nothing were wrapped: neither the wrappers nor what they add are there."""
    seen, ahead = set(), [("", module)]
    while ahead:
        name, child = ahead.pop()
        child = unwrapped_layer(child)
        if id(child) not in seen:
            seen.add(id(child))
            yield name, child
            ahead += [(f"{name}.{leaf}".lstrip("."), part) for leaf, part in child._modules.items() if part][::-1]


def layer_at(module: nn.Module, name: str) -> nn.Module:
    """The layer of this plain name.

    Raises:
        AttributeError: there is none.
    """
    here = unwrapped_layer(module)
    for part in filter(None, name.split(".")):
        here = unwrapped_layer(here.get_submodule(part))
    return here
