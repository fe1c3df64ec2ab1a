"""Going on from an adapter that is no checkpoint: ours, PEFT's folder; what cannot be gone on from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from delora_diffusion import export_peft, read_adapter
from delora_diffusion.run_folder import ADAPTER_NAME, LORA_NAME
from delora_diffusion.training import initial
from delora_diffusion.training.config import AdapterConfig

from ..runs import Run, same, tensors


def test_a_run_goes_on_from_an_adapter_of_ours_and_from_pefts_folder(run: Run, tmp_path: Path) -> None:
    first = run("first", "--instance_prompt=a sks cat", "--relative_lambda=0.07", "--rank=2")
    told = [
        "--rank=16",
        "--max_train_steps=1",
        "--learning_rate=0",
        "--lambda_learning_rate=1e-30",
        "--max_grad_norm=0",
    ]
    still = run("still", *told, f"--initial_adapter={first}")
    assert same(tensors(first), tensors(still)), "a step at rate 0 leaves it as it was, rank and strength with it"
    header = read_adapter(still).provenance
    (before,) = json.loads(header["continued_from"])
    assert before.pop("content")
    assert before == {"source": str(first), "instance_prompt": "a sks cat", "steps": "6", "seed": "0",
                      "base_model": header["base_model"]}  # fmt: skip
    folders = export_peft(first, tmp_path / "peft")
    steps = ["--rank=16", "--max_train_steps=3"]
    again = run("again", *steps, f"--initial_adapter={still / ADAPTER_NAME}")
    assert [one["source"] for one in json.loads(read_adapter(again).provenance["continued_from"])] == [
        str(still / ADAPTER_NAME), str(first),
    ]  # fmt: skip
    from_peft = run("from_peft", *steps, f"--initial_adapter={folders['unet']}")
    assert same(tensors(again), tensors(from_peft)) and not same(tensors(again), tensors(first))


def test_what_cannot_be_gone_on_from_is_named(
    run: Run, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = run("both", "--train_text_encoder", "--max_train_steps=1")

    def refused(*argv: object) -> str:
        run("refused", *argv, code=1)
        return capsys.readouterr().err

    assert "initial_adapter also adapts text_encoder, which would be lost" in refused(f"--initial_adapter={both}")
    assert "it is a LoRA in diffusers' names" in refused(f"--initial_adapter={both / LORA_NAME}")
    beside = [f"--initial_adapter={both}", "--train_text_encoder"]
    assert "rank is 8, and 4 in initial_adapter" in refused(*beside, "--rank=8")
    moved = tmp_path / "moved"
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.5)
    pipe.save_pretrained(moved)
    other = refused(*beside, f"--pretrained_model_name_or_path={moved}")
    assert "cannot go on from initial_adapter" in other and "another base" in other


def test_a_default_is_no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    from delora_diffusion.method.config import DeloraConfig

    own = DeloraConfig(r=3, target_modules="all-linear")
    initial._check_options(AdapterConfig(initial_adapter="x"), own)
    initial._check_options(AdapterConfig(initial_adapter="x", rank=3, target_modules="all-linear"), own)
