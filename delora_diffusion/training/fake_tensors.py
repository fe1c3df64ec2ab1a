"""Bytes that a computation has alive at once, counted on real tensors, or on fake ones: shapes without data."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Tally:
    """Bytes alive now, and the most that were alive at once."""

    now: int = 0
    peak: int = 0


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the storage of every tensor that an operation returns, and takes it off when it is freed."""

    def __init__(self, tally: Tally, resident: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tally = tally
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in resident)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.tally.now += storage.nbytes()
                self.tally.peak = max(self.tally.peak, self.tally.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.tally.now -= size


class _RealAlone(TorchFunctionMode):
    """Lets what is given real tensors only compute for real: the values of masks decide shapes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, (FakeTensor, nn.Parameter)) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def counted(resident: Iterable[Tensor] = ()) -> Iterator[Tally]:
    """Count what is allocated inside.

    Args:
        resident: tensors that are there already and do not count.
    """
    tally = Tally()
    with _Counting(tally, resident):
        yield tally


@contextlib.contextmanager
def faked() -> Iterator[None]:
    """New tensors have no data, but those made from real ones alone: any model runs, of any size, in no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), _RealAlone():
        yield


def fake_weights(module: nn.Module, dtype: torch.dtype, *, like_cuda: bool = False) -> nn.Module:
    """Put fake tensors in place of the weights of a module on the meta device; to be called inside `faked`.

    Those of adapters keep their own precision.

    Args:
        like_cuda: under autocast norms run in fp32, as on a GPU, and keep that for the backward pass; CPUs do without.
    """

    def fake(tensor: Tensor, name: str) -> Tensor:
        kept = "delora" in name.split(".") or not tensor.is_floating_point()
        return torch.empty(tensor.shape, dtype=tensor.dtype if kept else dtype, device="cpu")

    for name, child in module.named_modules():
        if like_cuda and isinstance(child, (nn.LayerNorm, nn.GroupNorm)):
            child.register_forward_pre_hook(_in_fp32)
        for key, parameter in child._parameters.items():
            if parameter is not None:
                faked_parameter = nn.Parameter(fake(parameter, name), requires_grad=parameter.requires_grad)
                child._parameters[key] = faked_parameter
        for key, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[key] = fake(buffer, name)
        for key, value in vars(child).items():  # tables of rotary embeddings are neither
            if isinstance(value, Tensor):
                vars(child)[key] = _empty_like(value)
            elif isinstance(value, list) and value and all(isinstance(item, Tensor) for item in value):
                vars(child)[key] = [_empty_like(item) for item in value]
    return module


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _in_fp32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].float(), *args[1:]) if torch.is_autocast_enabled("cpu") else args


def peak_of(run: Callable[[], Any], *modules: nn.Module) -> int:
    """The most bytes that `run` has alive at once, besides the weights of `modules`."""
    resident = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    parts = [part for module in modules for part in module.modules()]
    resident += [leaf for part in parts for leaf in tree_leaves(list(vars(part).values())) if isinstance(leaf, Tensor)]
    with counted(resident) as tally:
        kept = run()
        del kept
    return tally.peak
