"""Training state on disk: complete or absent, tensors and JSON only, enough to go on bit for bit.

Noise, timesteps and the order of photos are functions of (seed, step), so no state of a random generator is stored.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..adapters.adapter import write_adapter
from ..adapters.read import read_adapter
from ..adapters.safetensors_file import AdapterFileError, write_tensors
from ..atomic import complete_folder, remove
from ..errors import DeloraError
from ..options import options_with
from ..run_folder import RunFolder, step_of
from .config import GROUPS

log = logging.getLogger(__name__)


class CheckpointError(DeloraError):
    """A checkpoint that cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        options: those it was started with.
        identity: what it trains on, by content.
        unlogged: losses that no line of the log holds yet.
        lambdas: the lambda of every layer by the name of its tensor. The adapter beside it has them at the strength of
            that step, which a ramp may not have brought to 1: opened as an adapter, it is what the preview showed.
    """

    step: int
    options: dict[str, Any]
    identity: dict[str, Any]
    unlogged: list[float] = field(default_factory=list)
    lambdas: dict[str, list[float]] = field(default_factory=dict)


def write_checkpoint(
    folder: Path,
    *,
    progress: Progress,
    adapter: Any,
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor] | None,
) -> None:
    """Write everything a continuation needs into `folder`, which is complete or absent."""
    tensors, packed = _flatten(optimizer.state_dict())
    state = {**asdict(progress), "written": time.time(), "optimizer": packed}
    with complete_folder(folder) as aside:
        write_adapter(aside, adapter)
        write_tensors(aside / "optimizer.safetensors", tensors)
        if ema is not None:
            write_tensors(aside / "ema.safetensors", {name: t.cpu().contiguous() for name, t in ema.items()})
        (aside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")


def read_progress(folder: Path) -> Progress:
    """Where the run in a checkpoint stands.

    Raises:
        CheckpointError: `folder` is no complete checkpoint.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        known = {name: state[name] for name in ("step", "options", "identity")}
        return Progress(**known, unlogged=state.get("unlogged", []), lambdas=state.get("lambdas", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is no checkpoint ({error}); give a checkpoint-N folder, or latest") from error


def read_checkpoint(
    folder: Path, optimizer: torch.optim.Optimizer, *, ema: bool
) -> tuple[Any, dict[str, Tensor] | None]:
    """The adapter and, with `ema`, the moving average in a checkpoint; the optimiser is filled in place.

    Raises:
        CheckpointError: a missing or damaged file.
    """
    try:
        adapter = read_adapter(folder)
        for name, values in read_progress(folder).lambdas.items():
            component, _, tensor = name.partition(".")
            adapter.tensors[component][tensor] = torch.tensor(values)
        packed = json.loads((folder / "state.json").read_text(encoding="utf-8"))["optimizer"]
        optimizer.load_state_dict(_unflatten(_finite_tensors(folder / "optimizer.safetensors"), packed))
        return adapter, _finite_tensors(folder / "ema.safetensors") if ema else None
    except (AdapterFileError, SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot resume from {folder}: {error}; resume from an earlier checkpoint") from error


def _finite_tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(path)
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{path.name} holds values that are not finite ({wrong[0]})")
    return tensors


def check_continues(folder: Path, then: Progress, now: Progress) -> None:
    """Refuse a continuation that would not compute what the run computed.

    Raises:
        CheckpointError: other photos, another base, options that differ (all are listed), or no step is left to do.
    """
    if then.step > now.options["max_train_steps"]:
        raise CheckpointError(
            f"{folder} is at step {then.step}, and max_train_steps is {now.options['max_train_steps']}; give more "
            f"steps, or an earlier checkpoint"
        )
    free = options_with(*GROUPS, resume="free")
    before, after = then.options | then.identity, now.options | now.identity
    changed = [
        f"{k} was {before.get(k)!r} and is {after.get(k)!r}"
        for k in after
        if k not in free and before.get(k) != after.get(k)
    ]
    if changed:
        raise CheckpointError(
            f"{folder} belongs to another run: {'; '.join(changed)}; set these back, or start afresh without "
            f"resume_from_checkpoint in another output_dir"
        )


def find_checkpoint(output_dir: Path, asked: str) -> Path | None:
    """The checkpoint folder that `--resume_from_checkpoint` means; None for "latest" when there is none yet.

    The latest is the one written last: a run that went on from an earlier checkpoint may not have come as far as it
    had been before.

    Raises:
        CheckpointError: a named folder that does not exist.
    """
    if asked == "latest":
        return next(reversed(_by_age(output_dir)), None)
    for folder in (Path(asked), output_dir / asked):
        if folder.is_dir():
            return folder
    have = ", ".join(p.name for p in RunFolder(output_dir).checkpoints()) or "none"
    raise CheckpointError(f"no checkpoint {asked}; {output_dir} has: {have}")


def keep_newest(output_dir: Path, limit: int | None) -> None:
    """Delete all but the `limit` checkpoints that were written last."""
    for folder in _by_age(output_dir)[:-limit] if limit else []:
        try:
            remove(folder)
        except OSError as error:
            log.warning("%s cannot be deleted: %s", folder, error.strerror or error)


def _by_age(output_dir: Path) -> list[Path]:
    """The checkpoints there are, the one that was written last at the end."""

    def age(folder: Path) -> tuple[float, int]:
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return float(state["written"]), step_of(folder)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # damaged, or of an older version
            return folder.stat().st_mtime, step_of(folder)

    return sorted(RunFolder(output_dir).checkpoints(), key=age)


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """An optimiser's state as tensors by name, and the rest as JSON, where {"tensor": name} stands for one."""
    tensors: dict[str, Tensor] = {}

    def packed(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()
            return {"tensor": path}
        if isinstance(value, dict):
            return {"dict": [[key, packed(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return [packed(item, f"{path}.{number}") for number, item in enumerate(value)]
        return value

    return tensors, packed(state, "optimizer")


def _unflatten(tensors: Mapping[str, Tensor], packed: Any) -> Any:
    """The inverse of `_flatten`; keys keep their types, tuples come back as lists."""
    if isinstance(packed, dict) and "tensor" in packed:
        return tensors[packed["tensor"]]
    if isinstance(packed, dict):
        return {key: _unflatten(tensors, item) for key, item in packed["dict"]}
    return [_unflatten(tensors, item) for item in packed] if isinstance(packed, list) else packed
