"""The log of a run: JSON lines of the loss and the adapter, and of what was measured on previews; the progress bar.

A line of the loss has the key "loss"; a line of a preview has the figures measured on it instead.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..atomic import complete_file
from ..evaluation.scores import METRIC, METRICS
from ..method.state import current_lambdas, update_norms

log = logging.getLogger(__name__)
LOG_STEPS = 10
#: Blocks of one kind that are told apart in the log; longer rows of them are told in this many ranges.
BLOCKS_OF_A_KIND = 4


@dataclass(frozen=True)
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
    """The log of a run: one JSON line every `LOG_STEPS` steps and every preview; a resumed run drops what comes after
    its start, and the preview of the start, which is looked at again.

    `fresh` is the line that was just written, or empty.
    """

    def __init__(self, path: Path, start: int) -> None:
        kept = [line for line in read_log(path) if line["step"] < start + ("loss" in line)] if start else []
        with complete_file(path) as aside:
            aside.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        self.path, self.since = path, time.perf_counter()
        self.losses: list[float] = []
        self.fresh: dict[str, Any] = {}
        self.shown: dict[str, str] = {}

    def add(self, step: int, loss: float, rates: list[float], denoiser: nn.Module, *, last: bool) -> dict[str, str]:
        """Note a step; returns what the progress bar shows: loss and mean |dW|/|W|, averaged over the interval."""
        self.losses.append(loss)
        self.fresh = {}
        if step % LOG_STEPS == 0 or last or step == 1:
            norms, lambdas = update_norms(denoiser), current_lambdas(denoiser)
            mean_loss, mean_norm = _mean(self.losses), _mean(norms.values())
            pace = (time.perf_counter() - self.since) / len(self.losses)
            self._write({
                "step": step, "loss": round(mean_loss, 6), "update_norm": round(mean_norm, 6),
                "learning_rate": rates[0], "seconds_per_step": round(pace, 4),
                **_by_block("update_norm", norms), **_by_block("lambda", lambdas),
            })  # fmt: skip
            self.losses, self.since = [], time.perf_counter()
            self.shown |= {"loss": f"{mean_loss:.4f}", "|dW|/|W|": f"{mean_norm:.4f}"}
        return self.shown

    def paused(self, seconds: float) -> None:
        """Leave out of the pace of training what a preview took."""
        self.since += seconds

    def measured(self, step: int, result: PreviewResult) -> dict[str, str]:
        """Note what was measured on a preview, also for the eye; returns what the progress bar shows."""
        self._write({"step": step, **result.figures, "protocol": result.protocol})
        told = ", ".join(f"{METRIC[name].in_a_row} {value:.3f}" for name, value in result.figures.items())
        log.info("step %d: %s%s", step, told, "; the best yet, kept in best/" if result.kept else "")
        self.shown |= {
            m.title: f"{result.figures[m.name]:.3f}" for m in METRICS if m.brief and m.name in result.figures
        }
        return self.shown

    def _write(self, line: dict[str, Any]) -> None:
        self.fresh = line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; none without the file. A last line that a crash cut off is left out."""
    lines: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            if number < len(texts):
                raise
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
