"""Frozen blocks of a denoiser that live in the host's memory and come to its device for their turn.

A denoiser is a row of blocks, and a step needs one of them at a time. Those that are swapped share two places on the
device, each as large as the largest of them: while one computes, the next is copied into the other place, on a stream
of its own. Frozen weights do not change, so nothing is ever copied back.

Checkpointing calls a block again for its backward pass, and the same hook brings it then. The backward pass of a block
is over before that of an earlier one begins, so what autograd still reads is never overwritten. Without checkpointing
it would be. What is small (norms, biases, tables of vectors), trained or between the blocks stays on the device.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..families import Family
from ..options import OptionError

log = logging.getLogger(__name__)
#: Blocks that have a place on the device at once.
PLACES = 2
_ALIGNED = 256  # bytes: what CUDA's own allocator aligns to


def swapped_blocks(denoiser: nn.Module, family: Family, count: int) -> dict[str, nn.Module]:
    """The blocks that are swapped, by name: `count` of those that checkpointing calls, spread evenly, so that a copy
    has the blocks in between to hide behind.

    Raises:
        OptionError: there are fewer.
    """
    named = [name for name, _ in denoiser.named_modules() if re.fullmatch(family.blocks, name)]
    if count > len(named):
        raise OptionError(
            f"blocks_to_swap is {count}, and {type(denoiser).__name__} has {len(named)} blocks; give at most as many"
        )
    chosen = [named[(2 * place + 1) * len(named) // (2 * count)] for place in range(count)]
    return {name: denoiser.get_submodule(name) for name in chosen}


def swappable(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """What of a block lives in the host's memory, by owner and name: frozen weights of two dimensions and more."""
    return [
        (owner, key)
        for name, owner in block.named_modules()
        for key, weight in owner._parameters.items()
        if weight is not None and weight.dim() > 1 and not weight.requires_grad and "delora" not in name.split(".")
    ]


def swap_blocks(denoiser: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Bring a denoiser to `device`, but for the weights of `blocks`, which from now on come for their turn only.

    Whatever reads these weights at another time finds them in the host's memory. Moving the denoiser later would move
    them too, so it is to stay where it is.
    """
    rows = [_Block(block) for block in blocks]
    places = [(owner, key, owner._parameters[key]) for row in rows for owner, key in row.weights]
    for owner, key, _ in places:
        owner._parameters[key] = None
    denoiser.to(device)
    for owner, key, weight in places:
        owner._parameters[key] = weight
    for row in rows:
        row.settle(device)
    ring = _Ring(rows, device)
    for place, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda module, args, place=place: ring.bring(place), prepend=True)
    size = sum(row.host.nbytes for row in rows)
    log.info("%d blocks (%.2f GiB) are in the host's memory and come for their turn", len(rows), size / 2**30)


class _Block:
    """The weights of a block, one after another in one buffer of bytes, wherever that is."""

    host: Tensor

    def __init__(self, module: nn.Module) -> None:
        self.weights = swappable(module)
        self.pieces: list[list[_Piece]] = []
        self.size = 0
        for weight in self._current():
            self.pieces.append([self._piece(leaf) for leaf in _leaves(weight)])

    def _current(self) -> list[Any]:
        return [owner._parameters[key] for owner, key in self.weights]

    def _piece(self, leaf: Tensor) -> _Piece:
        like = torch.empty_like(leaf, device="meta")  # with the strides of `leaf`, where it has no gaps
        piece = _Piece(offset=self.size, dtype=leaf.dtype, shape=like.shape, stride=like.stride())
        self.size += -(-leaf.numel() * leaf.itemsize // _ALIGNED) * _ALIGNED
        return piece

    def settle(self, device: torch.device) -> None:
        """Take the weights from wherever they are into a buffer in the host's memory that `device` can copy from."""
        self.host = _host_buffer(self.size, device)
        for weight, pieces in zip(self._current(), self.pieces, strict=True):
            for leaf, piece in zip(_leaves(weight), pieces, strict=True):
                piece.of(self.host).copy_(leaf)
        self.point_to(self.host)

    def point_to(self, buffer: Tensor) -> None:
        """Let the module's weights be those in `buffer`."""
        for (owner, key), weight, pieces in zip(self.weights, self._current(), self.pieces, strict=True):
            leaves = iter([piece.of(buffer) for piece in pieces])
            if is_traceable_wrapper_subclass(weight):  # a quantised tensor is made of plain ones
                owner._parameters[key] = nn.Parameter(_rebuilt(weight, leaves), requires_grad=False)
            else:
                weight.data = next(leaves)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Where a plain tensor is in a buffer of bytes."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def of(self, buffer: Tensor) -> Tensor:
        """The tensor, as a view."""
        end = self.offset + self.shape.numel() * self.dtype.itemsize
        return buffer[self.offset : end].view(self.dtype).as_strided(self.shape, self.stride)


class _Ring:
    """The places on the device, and which block each of them holds. A block that is brought for its turn lets the one
    that followed it the last time be copied into the other place."""

    def __init__(self, blocks: Sequence[_Block], device: torch.device) -> None:
        largest = max(block.size for block in blocks)
        self.blocks = blocks
        self.places = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(PLACES)]
        self.holds: list[int | None] = [None] * PLACES
        cuda: Any = torch.cuda
        self.stream = cuda.Stream(device) if device.type == "cuda" else None
        self.arrived = [cuda.Event() for _ in range(PLACES)] if self.stream else []
        self.following: dict[tuple[int, bool], int] = {}
        self.turn: tuple[int, bool] | None = None
        self.latest = 0

    def bring(self, number: int) -> None:
        """Let a block's weights be on the device, and begin to copy those of the next."""
        if self.turn is not None:
            self.following[self.turn] = number
        self.turn = number, torch._C._current_graph_task_id() != -1  # in a backward pass they come in reverse
        self.latest = self._place_of(number)
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(self.arrived[self.latest])
        self.blocks[number].point_to(self.places[self.latest])
        self._place_of(self.following.get(self.turn, number))

    def _place_of(self, number: int) -> int:
        """The place that a block's bytes are in or on their way to; they never go where the latest block computes."""
        if number in self.holds:
            return self.holds.index(number)
        place = (self.latest + 1) % PLACES
        if (leaving := self.holds[place]) is not None:
            self.blocks[leaving].point_to(self.blocks[leaving].host)
        self.holds[place] = number
        host = self.blocks[number].host
        if self.stream is None:
            self.places[place][: len(host)].copy_(host)
            return place
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))  # somebody may still read what is there
        with torch.cuda.stream(self.stream):
            self.places[place][: len(host)].copy_(host, non_blocking=True)
            self.arrived[place].record(self.stream)
        return place


def _leaves(weight: Any) -> list[Tensor]:
    """The plain tensors that a tensor is made of."""
    if not is_traceable_wrapper_subclass(weight):
        return [weight.data]
    names, _ = weight.__tensor_flatten__()
    return [leaf for name in names for leaf in _leaves(getattr(weight, name))]


def _rebuilt(weight: Any, leaves: Iterator[Tensor]) -> Any:
    """A tensor like `weight`, made of other plain tensors."""
    if not is_traceable_wrapper_subclass(weight):
        return next(leaves)
    names, context = weight.__tensor_flatten__()
    inner = {name: _rebuilt(getattr(weight, name), leaves) for name in names}
    return type(weight).__tensor_unflatten__(inner, context, weight.size(), weight.stride())


def _host_buffer(size: int, device: torch.device) -> Tensor:
    """Bytes in the host's memory, pinned where a GPU copies from them: torch's own pinned memory is up to twice as
    large as what is asked for."""
    buffer = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda":
        cuda: Any = torch.cuda
        runtime, address = cuda.cudart(), buffer.data_ptr()
        if runtime.cudaHostRegister(address, size, 0) == runtime.cudaError.success:
            weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False
        else:
            log.warning("%.2f GiB of the host's memory cannot be pinned: copies of blocks take longer", size / 2**30)
    return buffer
