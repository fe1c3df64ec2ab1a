"""What a run leaves in its folder, and what each of these files is called."""

from __future__ import annotations

import re
from pathlib import Path

ADAPTER_NAME = "delora_weights.safetensors"
#: The file that `pipe.load_lora_weights(folder)` takes first.
LORA_NAME = "pytorch_lora_weights.safetensors"
CARD_NAME = "README.md"
SHEET_NAME = "contact_sheet.png"


class RunFolder:
    """The folder of a run: paths by what lies there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = path / ".lock"  # of the run that is writing
        self.adapter = path / ADAPTER_NAME  # the native format
        self.lora = path / LORA_NAME  # the same as a LoRA, for plain diffusers
        self.settings = path / "config.yaml"  # every option: it repeats the run
        self.log = path / "log.jsonl"  # the loss, and what was measured
        self.previews = path / "previews"
        self.best = path / "best"  # the adapter of the best preview
        self.before_after = path / "before_after.png"  # photos, the base's pictures, the adapter's
        self.plot = path / "training.png"  # the run in one picture
        self.strength_sheet = path / "strength_sheet.png"  # previews at several strengths
        self.strengths = path / "strengths.json"  # what was measured on them
        self.card = path / CARD_NAME

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """The checkpoints there are, the one with the fewest steps first."""
        found = (p for p in self.path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name))
        return sorted(found, key=step_of)

    def of_a_run(self) -> list[Path]:
        """What is there by which a run is known."""
        named = (self.adapter, self.lora, self.settings, self.log, self.previews)
        return [*(path for path in named if path.exists()), *self.checkpoints()]

    def results(self) -> list[Path]:
        """What is there that a run made of itself besides: gone with it when it is replaced."""
        named = (self.best, self.before_after, self.plot, self.strength_sheet, self.strengths)
        return [path for path in named if path.exists()]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
