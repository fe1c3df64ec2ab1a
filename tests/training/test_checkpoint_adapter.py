"""A checkpoint of a run whose strength still rises: opened as an adapter, and continued."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from delora_diffusion import load_delora_weights, read_adapter
from delora_diffusion.sampling.generate import Prompts, generate
from delora_diffusion.seeds import derived_seed

from .. import tiny
from ..runs import Run, same, tensors

RAMP = (
    "--max_train_steps=4", "--lambda_warmup_steps=8", "--init_weights=residual", "--learning_rate=1e-2", "--seed=5",
    "--validation_prompt", "a cat", "--validation_steps=2", "--num_validation_images=1", "--checkpointing_steps=2",
)  # fmt: skip


def test_a_checkpoint_is_the_adapter_its_preview_showed_and_goes_on_bit_for_bit(run: Run, base: Path) -> None:
    out = run("straight", *RAMP)
    checkpoint = read_adapter(out / "checkpoint-2")
    assert checkpoint.provenance["base_model"] == str(base) and checkpoint.provenance["steps"] == "2"
    assert checkpoint.provenance.keys() == read_adapter(out).provenance.keys()

    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    load_delora_weights(pipe, out / "checkpoint-2")
    settings = {"num_inference_steps": 2, "height": 16, "width": 16}
    (drawn,) = generate(pipe, Prompts(texts=["a cat"]), [derived_seed(5, "preview", 0)], **settings)
    shown = Image.open(out / "previews" / "step_000002" / "0_0.png")
    assert (tiny.as_array(drawn) == tiny.as_array(shown)).all()

    full = json.loads((out / "checkpoint-2" / "state.json").read_text())["lambdas"]
    for name, value in tensors(out / "checkpoint-2").items():
        if "delora_lambda" in name:
            share = value / torch.tensor(full[name])
            assert 0 < float(share) < 0.5, "at the strength of the second of eight steps"

    resumed = run("resumed", *RAMP)
    (resumed / "checkpoint-4" / "state.json").unlink()
    run("resumed", *RAMP, "--resume_from_checkpoint=checkpoint-2")
    assert same(tensors(out), tensors(resumed))
    assert same(tensors(out / "checkpoint-4"), tensors(resumed / "checkpoint-4"))
