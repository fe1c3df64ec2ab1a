"""What a run refuses that no option shows alone: ranks above a layer, checkpoints beyond the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from delora_diffusion.method.config import DeloraConfig
from delora_diffusion.options import OptionError
from delora_diffusion.training.adapt import check_ranks
from delora_diffusion.training.checkpoint import CheckpointError, Progress, check_continues


def test_a_rank_above_a_layers_width_is_refused_with_the_way_out() -> None:
    layers = {"block.to_q": nn.Linear(12, 8), "block.to_k": nn.Linear(6, 20)}
    check_ranks(layers, DeloraConfig(r=6))
    check_ranks(layers, DeloraConfig(r=8, rank_pattern={"to_k": 6}))
    with pytest.raises(OptionError, match=r"the rank of block\.to_k is 8, and it is only 6 wide") as refused:
        check_ranks(layers, DeloraConfig(r=8))
    pattern = json.loads(str(refused.value).partition("rank_pattern ")[2].partition(", or")[0])
    check_ranks(layers, DeloraConfig(r=8, rank_pattern=pattern))


def test_a_checkpoint_beyond_the_run_is_refused_and_one_at_its_end_is_not() -> None:
    def at(step: int) -> Progress:
        return Progress(step=step, options={"max_train_steps": 6}, identity={})

    check_continues(Path("checkpoint-6"), at(6), at(6))
    with pytest.raises(CheckpointError, match="checkpoint-9 is at step 9, and max_train_steps is 6; give more steps"):
        check_continues(Path("checkpoint-9"), at(9), at(9))
