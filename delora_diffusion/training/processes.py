"""The processes of a run: what one of them makes for all, and that none waits for one that is gone.

Processes meet in every step, and whoever comes first waits. A launcher ends the others on its own machine when one of
them dies; those on other machines, and those that nobody launched, would wait for days. So each of them beats, and
each looks whether the others do.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed
from accelerate.utils import send_to_device
from torch import nn

from ..base.shard import is_sharded
from ..console import one_line
from ..data.encode import Cache
from ..errors import DeloraError

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)
T = TypeVar("T")
BEAT = 2.0  # seconds
#: Seconds without a beat after which a process is taken for dead: it may have been in one long call until now.
SILENCE = 40.0
#: Seconds in which a process that hears of an end may end by itself, with its own last words.
GRACE = 8.0
#: Encoded photos or prompts that travel from each process at once, so that no message is larger than a device.
_MESSAGE = 32


class LostProcessError(DeloraError, RuntimeError):
    """Another process of the run is gone; the message says what is known of it, and what to do."""


# ---- what one makes for all ------------------------------------------------------------------------


def from_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """What the main process makes, on every process; only the main one calls `make`."""
    if accelerator.num_processes == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    made: list[Any] = broadcast_object_list([make() if accelerator.is_main_process else None])
    result: T = made[0]
    return result


def spread(accelerator: Accelerator, cache: Cache) -> None:
    """Let every process have in its cache what any of them has; what is on a disk that they share is not sent."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    known = dict.fromkeys(gather_object(list(cache.known)))
    lacking = set(gather_object([key for key in known if not cache.holds(key)]))
    mine = [key for key in cache.known if key in lacking]
    for first in range(0, max(gather_object([len(mine)])), _MESSAGE):
        sent = [(key, cache.get(key, dict)) for key in mine[first : first + _MESSAGE]]
        for key, tensors in gather_object(sent):
            cache.get(key, tensors.copy)


def by_main(accelerator: Accelerator, denoiser: nn.Module, work: Callable[[], T]) -> T | None:
    """What the main process makes with a denoiser; None on the others. Where it is shared out, the others run every
    forward pass along with the main one, for their parts of the weights.

    Raises:
        LostProcessError: a forward pass failed on the main process, and the others wait within it.
    """
    main = accelerator.is_main_process
    if accelerator.num_processes == 1 or not is_sharded(denoiser):
        return work() if main else None
    from accelerate.utils import broadcast_object_list

    if not main:
        call: list[Any] = [None]
        while broadcast_object_list(call)[0] is not None:
            args, kwargs = send_to_device(call[0], accelerator.device)
            with torch.no_grad(), accelerator.autocast():
                denoiser(*args, **kwargs)
        return None
    under_way: list[bool] = []

    def announce(module: nn.Module, args: Any, kwargs: Any) -> None:
        under_way.append(True)
        broadcast_object_list([send_to_device((args, kwargs), "cpu")])

    hooks = [
        denoiser.register_forward_pre_hook(announce, with_kwargs=True, prepend=True),
        denoiser.register_forward_hook(lambda *_: under_way.clear()),
    ]
    try:
        result = work()
    finally:
        for hook in hooks:
            hook.remove()
        if under_way:
            raise LostProcessError("a picture could not be drawn on a base that is shared out: all processes end")
        broadcast_object_list([None])
    return result


# ---- nobody waits for the dead ---------------------------------------------------------------------


@contextlib.contextmanager
def watched(accelerator: Accelerator) -> Iterator[None]:
    """For the block, end this process within a minute when another one of the run is gone: killed, out of memory,
    switched off, or ended by an error, which is then told here too.

    Raises:
        LostProcessError: another one went away while this one spoke to it.
    """
    if accelerator.num_processes == 1:
        yield
        return
    watch = Watch(_common_store(accelerator), accelerator.process_index, accelerator.num_processes)
    try:
        yield
    except BaseException as error:
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        watch.close("" if lost else f"process {watch.rank} ended: {one_line(error)}")
        if lost:
            raise LostProcessError(
                f"{watch.told or 'another process of the run is gone'} ({one_line(error)}); checkpoints are as they "
                f"were: --resume_from_checkpoint latest"
            ) from error
        raise
    watch.close()


class Watch:
    """Beats for one process of a run, and looks whether the others do: the first at all, all others at the first.

    `told` is why the run ends, once that is known. A process that does not end then is ended.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.told = ""
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def close(self, told: str = "") -> None:
        """This process ends, and tells the others why, if it is before the end of the run."""
        self.closing.set()
        self.thread.join()
        with contextlib.suppress(RuntimeError):  # the store is gone with the first process
            if told:
                self.store.set("ended", told)
            self.store.set(f"done {self.rank}", "")
            if self.rank == 0:  # the store is in this process: the others are to read it
                patience = datetime.timedelta(seconds=GRACE + BEAT if told or self.told else SILENCE)
                self.store.wait([f"done {rank}" for rank in range(1, self.world)], patience)

    def _watch(self) -> None:
        heard: dict[int, tuple[int, float]] = {}
        while not self.told and not self.closing.wait(BEAT):
            try:
                self.told = self._look(heard)
            except RuntimeError:
                self.told = "process 0 is gone"
        if self.told and not self.closing.is_set():
            log.error("%s: this process ends as well", self.told)
            if not self.closing.wait(GRACE):  # it waits in a call that does not come back
                with contextlib.suppress(RuntimeError):
                    self.store.set(f"done {self.rank}", "")
                os._exit(1)

    def _look(self, heard: dict[int, tuple[int, float]]) -> str:
        """Beat once, and say who is gone; "" while nobody is."""
        self.store.add(f"beat {self.rank}", 1)
        now = time.monotonic()
        for rank in range(1, self.world) if self.rank == 0 else [0]:
            beats = self.store.add(f"beat {rank}", 0)
            if beats != heard.get(rank, (None, now))[0]:
                heard[rank] = beats, now
            if now - heard[rank][1] > SILENCE and not self.store.check([f"done {rank}"]):
                self.store.set("ended", f"process {rank} is gone (killed, or out of memory?)")
        return str(self.store.get("ended").decode()) if self.store.check(["ended"]) else ""


def _common_store(accelerator: Accelerator) -> Any:
    """A store of the run's own: that of torch.distributed is held by whoever waits in it."""
    patience, host = datetime.timedelta(seconds=SILENCE), os.environ.get("MASTER_ADDR", "127.0.0.1")

    distributed: Any = torch.distributed

    def store(port: int) -> Any:
        return distributed.TCPStore(host, port, None, not port, patience, wait_for_workers=False)

    own = store(0) if accelerator.is_main_process else None  # at a port that is free
    port = from_main(accelerator, lambda: own.port if own else 0)
    return own or store(port)
