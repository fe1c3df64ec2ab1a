"""The log of a run, one JSON line an interval, and what its progress bar shows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch import nn

from .state import update_norms

LOG_STEPS = 10


class Journal:
    """The log of a run: one JSON line every `LOG_STEPS` steps; a resumed run drops the lines after its start.

    `fresh` is the line that was just written, or empty.
    """

    def __init__(self, path: Path, start: int) -> None:
        kept = (
            [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= start]
            if path.is_file()
            else []
        )
        path.write_text("".join(f"{line}\n" for line in (kept if start else [])))
        self.path, self.since = path, time.perf_counter()
        self.losses: list[float] = []
        self.fresh: dict[str, Any] = {}
        self.shown: dict[str, str] = {}

    def add(self, step: int, loss: float, rates: list[float], denoiser: nn.Module, *, last: bool) -> dict[str, str]:
        """Note a step; returns what the progress bar shows: loss and mean |dW|/|W|, averaged over the interval."""
        self.losses.append(loss)
        self.fresh = {}
        if step % LOG_STEPS == 0 or last or step == 1:
            norms = list(update_norms(denoiser).values())
            mean_loss, mean_norm = sum(self.losses) / len(self.losses), sum(norms) / len(norms)
            pace = (time.perf_counter() - self.since) / len(self.losses)
            self.fresh = {
                "step": step, "loss": round(mean_loss, 6), "update_norm": round(mean_norm, 6),
                "learning_rate": rates[0], "seconds_per_step": round(pace, 4),
            }  # fmt: skip
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.fresh) + "\n")
            self.losses, self.since = [], time.perf_counter()
            self.shown = {"loss": f"{mean_loss:.4f}", "|dW|/|W|": f"{mean_norm:.4f}"}
        return self.shown
