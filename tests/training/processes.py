"""Several processes on this machine, for test_processes.py: imports once, forks, and trains in each of the forks.

    python -m tests.training.processes FOLDER

FOLDER holds `base` and `photos`; what every process saw is written there as PLAN_RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from diffusers import StableDiffusionPipeline

from delora_diffusion.data import encode
from delora_diffusion.training import loop, processes

from .. import tiny  # noqa: F401  imports the classes of the base before any fork
from ..runs import arguments, load_script

SCRIPT = load_script()
Plan = Callable[[Path, int], dict[str, Any]]


def forked(plan: Plan, folder: Path, world: int) -> list[int]:
    """Run a plan in forks that know of each other; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ |= {name: str(value) for name, value in own.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            seen = plan(folder, rank)
            (folder / f"{plan.__name__}_{rank}.json").write_text(json.dumps(seen))
            sys.stderr.flush()
            os._exit(seen["code"])
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def train(folder: Path, name: str, *extra: str) -> int:
    code: int = SCRIPT.main(arguments(folder / "base", folder / "photos", folder / name, *extra))
    return code


def shared_work(folder: Path, rank: int) -> dict[str, Any]:
    """A run with half the batch in each process, and what was encoded in each."""
    counts = {"photos": 0, "prompts": 0}
    posterior, encode_prompt = encode.posterior, StableDiffusionPipeline.encode_prompt

    def one_photo(*args: Any) -> Any:
        counts["photos"] += 1
        return posterior(*args)

    def one_prompt(pipe: Any, prompt: Any, *args: Any, **settings: Any) -> Any:
        counts["prompts"] += prompt is not None  # a pipeline that draws calls it with what is encoded
        return encode_prompt(pipe, prompt, *args, **settings)

    encode.posterior, StableDiffusionPipeline.encode_prompt = one_photo, one_prompt
    prior = ("--with_prior_preservation", "--class_prompt=a dog", f"--class_data_dir={folder / 'classes'}",
             "--num_class_images=3", "--validation_prompt=a sks dog", "--num_validation_images=1")  # fmt: skip
    code = train(folder, "two", "--train_batch_size=2", "--learning_rate=1e-4", *prior)
    return counts | {"code": code}


def asked_to_stop(folder: Path, rank: int) -> dict[str, Any]:
    """Only the second process gets a signal."""
    if rank == 1:
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    return {"code": train(folder, "stopped", "--max_train_steps=1000", f"--cache_dir={folder / 'cache'}")}


def killed(folder: Path, rank: int) -> dict[str, Any]:
    """The second process dies between two steps."""
    if rank == 1:
        at_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return {"code": train(folder, "killed", "--checkpointing_steps=2", "--max_train_steps=1000")}


def failed(folder: Path, rank: int) -> dict[str, Any]:
    """The first process, alone, meets an error before the first step, where the second waits for what it makes."""
    if rank == 0:
        StableDiffusionPipeline.encode_prompt = None
    return {"code": train(folder, "failed")}


def at_step(number: int, do: Callable[[], None]) -> None:
    original = loop.step_gradients

    def wrapped(*args: Any, step: int, **settings: Any) -> Any:
        if step == number:
            do()
        return original(*args, step=step, **settings)

    loop.step_gradients = wrapped


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    processes.BEAT, processes.GRACE = 0.2, 1.0
    assert not PartialState._shared_state
    codes = {plan.__name__: forked(plan, folder, 2) for plan in (shared_work, asked_to_stop, killed, failed)}
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
