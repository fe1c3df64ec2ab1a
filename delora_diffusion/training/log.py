"""The log of a run: JSON lines of the loss and the adapter, and of what was measured on previews; the progress bar.

A line of the loss has the key "loss"; a line of a preview has the figures measured on it instead.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from ..atomic import complete_file
from ..console import one_line
from ..evaluation.scores import METRIC, METRICS
from ..method.state import current_lambdas, update_norms

log = logging.getLogger(__name__)
LOG_STEPS = 10
#: Blocks of one kind that are told apart in the log; longer rows of them are told in this many ranges.
BLOCKS_OF_A_KIND = 4


@dataclass(frozen=True, kw_only=True)
class PreviewResult:
    """What came of a preview: figures by name (none without encoders), whether it was one too many, and whether its
    adapter was kept as the best yet.

    Only figures of one `protocol` (prompts, encoders, photos: a hash) can be compared.
    """

    figures: dict[str, float] = field(default_factory=dict)
    enough: bool = False
    protocol: str = ""
    kept: bool = False


class TrainingLog:
    """The log of a run: one JSON line every `LOG_STEPS` steps and every preview, and the progress bar. A resumed run
    drops what comes after its start, and the preview of the start, which is looked at again.

    `fresh` is the line that was just written, or empty.
    """

    def __init__(
        self,
        path: Path | None,
        start: int = 0,
        *,
        total: int | None = None,
        losses: list[float] | None = None,
        track: Callable[[Mapping[str, Any], int], None] | None = None,
    ) -> None:
        """Begin at step `start`.

        Args:
            path: the file; None on processes that keep no log.
            total: steps of the run, for the bar; None for no bar.
            losses: those that no line holds yet, kept up to date.
            track: is told every line, and its step.
        """
        self.path, self.track, self.since = path, track, time.perf_counter()
        self.losses = [] if losses is None else losses
        self.steps = 0  # since `since`
        self.unwritten = ""
        self.fresh: dict[str, Any] = {}
        self.shown: dict[str, str] = {}
        self.bar = tqdm(total=total, initial=start, desc="train", disable=path is None or total is None)
        if path is not None:
            kept = [line for line in read_log(path) if line["step"] < start + ("loss" in line)] if start else []
            with complete_file(path) as aside:
                aside.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")

    def add(self, step: int, losses: Sequence[float], rates: list[float], denoiser: nn.Module, *, line: bool) -> None:
        """Note the steps up to `step`; with `line`, write the means of loss and |dW|/|W| since the line before."""
        if self.path is None:
            return
        self.losses += losses
        self.steps += len(losses)
        self.fresh = {}
        if line:
            norms, lambdas = update_norms(denoiser), current_lambdas(denoiser)
            mean_loss, mean_norm = _mean(self.losses), _mean(norms.values())
            pace = (time.perf_counter() - self.since) / self.steps
            content = {
                "step": step,
                "loss": round(mean_loss, 6),
                "update_norm": round(mean_norm, 6),
                "learning_rate": rates[0],
                "seconds_per_step": round(pace, 4),
                **_by_block("update_norm", norms),
                **_by_block("lambda", lambdas),
            }
            self._write(content, content)
            self.losses.clear()
            self.steps, self.since = 0, time.perf_counter()
            self._show({"loss": f"{mean_loss:.4f}", "|dW|/|W|": f"{mean_norm:.4f}"})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the pace of training what a preview takes."""
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def measured(self, step: int, result: PreviewResult) -> None:
        """Note what was measured on a preview, also for the eye."""
        figures = result.figures
        if self.path is None or not figures:
            return
        self._write({"step": step, **figures, "protocol": result.protocol}, figures)
        text = ", ".join(f"{METRIC[name].in_a_row} {value:.3f}" for name, value in figures.items())
        log.info("step %d: %s%s", step, text, "; the best yet, kept in best/" if result.kept else "")
        self._show({m.title: f"{figures[m.name]:.3f}" for m in METRICS if m.brief and m.name in figures})

    def _show(self, more: dict[str, str]) -> None:
        self.shown |= more
        self.bar.set_postfix(self.shown)

    def _write(self, line: dict[str, Any], tracked: Mapping[str, Any]) -> None:
        assert self.path is not None
        self.fresh = line
        self.unwritten += json.dumps(line) + "\n"
        try:
            _append(self.path, self.unwritten)
            self.unwritten = ""
        except OSError as error:
            log.warning("%s cannot be written, the next line tries again: %s", self.path, error.strerror or error)
        if self.track is not None:
            try:
                self.track(tracked, line["step"])
            except Exception as error:
                log.warning("nothing more is sent to the tracker: %s", one_line(error))
                self.track = None


def due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps is to be done at this one; never with 0."""
    return every > 0 and step % every == 0


def _append(path: Path, text: str) -> None:
    """Add text to a file, all of it or nothing."""
    data = text.encode()
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; none without the file. What a crash cut off or damage made unreadable is left out."""
    lines: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(texts):
                log.warning("%s: line %d cannot be read and is left out", path, number)
    return lines


def figures_by_step(lines: Iterable[Mapping[str, Any]], *, protocol: str | None = None) -> dict[int, dict[str, float]]:
    """What was measured on the previews of a log, by step, the last word on each; with `protocol`, only by that."""
    return {
        line["step"]: {name: line[name] for name in METRIC if name in line}
        for line in lines
        if "loss" not in line and protocol in (None, line.get("protocol"))
    }


def block_names(layers: Sequence[str]) -> dict[str, str]:
    """The block of each layer: its first part and the number after it (`down_blocks.0`), if there is one.

    Of a long row of blocks, ranges: `transformer_blocks.0-4`, ...
    """
    parts = {layer: [*layer.split("."), ""][:2] for layer in layers}
    last: dict[str, int] = {}
    for kind, number in parts.values():
        if number.isdigit():
            last[kind] = max(last.get(kind, 0), int(number))
    named = {}
    for layer, (kind, number) in parts.items():
        if not number.isdigit():
            named[layer] = kind
            continue
        width = math.ceil((last[kind] + 1) / BLOCKS_OF_A_KIND)
        first = int(number) // width * width
        end = min(first + width - 1, last[kind])
        named[layer] = f"{kind}.{first}" + (f"-{end}" if end > first else "")
    return named


def _by_block(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """`name/block` -> mean over its layers; a tracker shows such names as one group."""
    groups: dict[str, list[float]] = {}
    for layer, block in block_names(list(values)).items():
        groups.setdefault(f"{name}/{block}", []).append(values[layer])
    return {block: round(_mean(members), 6) for block, members in groups.items()}


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
