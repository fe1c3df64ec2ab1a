"""What a run leaves in its folder, and what each of these files is called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ADAPTER_NAME = "delora_weights.safetensors"
#: The file that `pipe.load_lora_weights(folder)` takes first.
LORA_NAME = "pytorch_lora_weights.safetensors"
CARD_NAME = "README.md"
SHEET_NAME = "contact_sheet.png"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run: paths by what lies there."""

    path: Path

    @property
    def adapter(self) -> Path:
        """The adapter, in the native format."""
        return self.path / ADAPTER_NAME

    @property
    def lora(self) -> Path:
        """The same as a LoRA, for plain diffusers."""
        return self.path / LORA_NAME

    @property
    def settings(self) -> Path:
        """Every option, as a file that repeats the run."""
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        """JSON lines of the loss and of what was measured."""
        return self.path / "log.jsonl"

    @property
    def previews(self) -> Path:
        """The folder of previews."""
        return self.path / "previews"

    @property
    def best(self) -> Path:
        """The folder of the adapter of the best preview."""
        return self.path / "best"

    @property
    def before_after(self) -> Path:
        """The sheet of photos, the base's pictures and the adapter's."""
        return self.path / "before_after.png"

    @property
    def plot(self) -> Path:
        """The run in one picture."""
        return self.path / "training.png"

    @property
    def strength_sheet(self) -> Path:
        """Previews at several strengths."""
        return self.path / "strength_sheet.png"

    @property
    def strengths(self) -> Path:
        """What was measured at each of them."""
        return self.path / "strengths.json"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / CARD_NAME

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
