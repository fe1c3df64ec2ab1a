"""What a run refuses that no option shows alone: ranks above a layer, checkpoints beyond the run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from torch import nn

from delora_diffusion.method.config import DeloraConfig
from delora_diffusion.options import OptionError, build
from delora_diffusion.training.adapt import check_ranks
from delora_diffusion.training.check import check_apart, check_precisions
from delora_diffusion.training.checkpoint import CheckpointError, Progress, check_continues
from delora_diffusion.training.config import GROUPS, Options

from ..runs import load_script


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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_data_dir": "photos"}, "class_data_dir and instance_data_dir are the same folder"),
        ({"class_data_dir": "./sub/../photos"}, "class_data_dir and instance_data_dir"),
        ({"output_dir": "link"}, "output_dir and instance_data_dir"),
        ({"validation_holdout_dir": "photos"}, "validation_holdout_dir and instance_data_dir"),
        ({"cache_dir": "out", "output_dir": "out"}, "cache_dir and output_dir"),
        ({"class_data_dir": "dogs", "output_dir": "out", "cache_dir": "cache"}, None),
    ],
)
def test_folders_that_must_differ_are_compared_through_links(
    changes: dict[str, str], said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    values: dict[str, object] = {
        "pretrained_model_name_or_path": "base", "instance_data_dir": str(tmp_path / "photos"), "output_dir": "run",
        "instance_prompt": "a dog", "validation_prompt": ["a sks dog"], "validation_clip": "clip", **changes,
    }  # fmt: skip
    prior = {"with_prior_preservation": True, "class_prompt": "a dog"} if "class_data_dir" in changes else {}
    groups = [build(group, values | prior) for group in GROUPS]
    options = Options(**dict(zip(("model", "adapter", "data", "training", "validation"), groups, strict=True)))
    with pytest.raises(OptionError, match=said) if said else contextlib.nullcontext():
        check_apart(options)


@pytest.mark.parametrize(("base", "mixed"), [("bf16", "fp16"), ("fp16", "bf16")])
def test_two_half_precisions_do_not_go_together(base: str, mixed: str) -> None:
    with pytest.raises(OptionError, match=f"base_dtype {base} does not go with mixed_precision {mixed}"):
        check_precisions(base, mixed)
    for fine in ((base, base), ("auto", mixed), ("fp32", mixed), (base, "no")):
        check_precisions(*fine)


def test_the_launchers_gradient_accumulation_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_accelerator: None
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    values = {"pretrained_model_name_or_path": "b", "instance_data_dir": "p", "output_dir": str(tmp_path)}
    groups = [build(group, values) for group in GROUPS]
    options = Options(**dict(zip(("model", "adapter", "data", "training", "validation"), groups, strict=True)))
    assert load_script().start(options).gradient_accumulation_steps == 1
