"""One module under two classes: an object that *is* a given module, with the methods of one more class in front."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


@functools.cache
def _joined(front: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """A class with the methods of `front` before those of `base`, which goes by the name of `base`.

    Libraries look their own classes up by name and module: for the labels a model takes, for its loss, for its source.
    """
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": front.__doc__}
    return type(base.__name__, (front, base), names)


def in_front(front: type[nn.Module], module: nn.Module) -> Any:
    """An object of both classes that shares every attribute with `module`: parameters, hooks, mode, configuration.

    `front` has a slot `_same` for `module` itself, and no `__init__` of `nn.Module` is called.
    """
    joined = object.__new__(_joined(front, type(module)))  # type: ignore[arg-type]
    object.__setattr__(joined, "__dict__", module.__dict__)
    object.__setattr__(joined, "_same", module)
    return joined


def rebuilt(front: type[nn.Module], base: type[nn.Module]) -> Any:
    """What copying and unpickling begin with: two objects of one empty `__dict__`."""
    return in_front(front, base.__new__(base))
