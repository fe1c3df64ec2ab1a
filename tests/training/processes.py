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
from safetensors.torch import save_file

from delora_diffusion.data import encode
from delora_diffusion.training import loop, processes
from delora_diffusion.training.loss import passes_of

from .. import tiny  # noqa: F401  imports the classes of the base before any fork
from ..runs import arguments, load_script

SCRIPT = load_script()
SHOWN = ("--with_prior_preservation", "--class_prompt=a dog", "--validation_prompt=a sks dog",
         "--num_validation_images=1")  # fmt: skip
#: Photos of two shapes, and prompts for which the base is kept: processes differ in the passes that they need.
UNLIKE = ("--aspect_ratio_buckets=16,24;24,16", "--with_base_preservation", "--class_prompt=a dog",
          "--max_train_steps=1", "--gradient_checkpointing", "--init_weights=kaiming",
          "--lambda_warmup_steps=0")  # fmt: skip
Plan = Callable[[Path, int], dict[str, Any]]


def forked(plan: Plan, folder: Path, world: int, machines: int = 1) -> list[int]:
    """Run a plan in forks that know of each other, as torchrun tells them on so many machines; their exit codes."""
    local = world // machines
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            own = {"RANK": rank, "LOCAL_RANK": rank % local, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local}
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
    prior = (*SHOWN, f"--class_data_dir={folder / 'classes'}", "--num_class_images=3")
    code = train(folder, "two", "--train_batch_size=2", "--learning_rate=1e-4", *prior)
    return counts | {"code": code}


def one_step_each(folder: Path, rank: int) -> dict[str, Any]:
    """The gradients of one step, from a base of which every process holds a part, in batches of unlike pictures."""
    seen: dict[str, Any] = {}
    take_step = loop.take_step

    def looked_at(state: Any, modules: Any, *args: Any) -> Any:
        seen["held"] = sum(getattr(p, "_local_tensor", p).numel() for p in modules["unet"].parameters())
        save_file({name: p.grad.clone() for name, p in state.parameters.items()}, folder / f"gradients_{world}_{rank}")
        return take_step(state, modules, *args)

    batch_loss = loop.batch_loss

    def counted(batch: Any, *args: Any, **settings: Any) -> Any:
        seen["passes"] = sum(passes_of(batch))
        return batch_loss(batch, *args, **settings)

    world, loop.take_step, loop.batch_loss = int(os.environ["WORLD_SIZE"]), looked_at, counted
    code = train(folder, f"sharded_step_{world}", "--shard_base", f"--train_batch_size={4 // world}", *UNLIKE)
    return seen | {"code": code}


def one_step_each_of_four(folder: Path, rank: int) -> dict[str, Any]:
    return one_step_each(folder, rank)


def sharded(folder: Path, rank: int) -> dict[str, Any]:
    """A run with everything that draws, on a base that is shared out."""
    options = (*SHOWN, f"--class_data_dir={folder / 'sharded_classes'}", "--num_class_images=3",
               "--strength_sheet=0.5,1", "--checkpointing_steps=3", "--gradient_checkpointing",
               "--learning_rate=1e-4")  # fmt: skip
    return {"code": train(folder, "sharded", "--shard_base", "--train_batch_size=2", *options)}


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
    two = (shared_work, one_step_each, asked_to_stop, killed, failed)
    codes = {plan.__name__: forked(plan, folder, 2) for plan in two}
    codes["sharded"] = forked(sharded, folder, 2, machines=2)
    codes["one_step_each_of_four"] = forked(one_step_each_of_four, folder, 4)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
