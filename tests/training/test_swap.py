"""Swapped blocks through the real script: the same run, bit for bit, with class images, previews and resume."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn

from delora_diffusion.base.swap import swap_blocks, swappable, swapped_blocks
from delora_diffusion.families import Setting, family_of
from delora_diffusion.method.config import DeloraConfig
from delora_diffusion.method.inject import inject_delora
from delora_diffusion.run_folder import LORA_NAME

from ..runs import Run, arguments, load_script, same, tensors
from ..tiny_families import build
from .test_memory import bytes_of, phase_of, plan_of, with_options


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("kind", ["sd", "flux.1-dev"])
def test_a_run_is_the_same_run(kind: str, base: Path, photos: Path, tmp_path: Path, fresh_accelerator: None) -> None:
    if kind != "sd":
        build(kind, tmp_path / "parts").save_pretrained(base := tmp_path / "base")

    def train(name: str, *extra: str) -> Path:
        AcceleratorState._reset_state(True)
        options = ("--gradient_checkpointing", "--max_train_steps=4", "--checkpointing_steps=2", "--rank=2",
                   "--validation_prompt=a sks dog", "--num_validation_images=1", "--with_prior_preservation",
                   "--class_prompt=a dog", f"--class_data_dir={tmp_path / name / 'classes'}",
                   "--num_class_images=2")  # fmt: skip
        assert load_script().main(arguments(base, photos, tmp_path / name, *options, *extra)) == 0
        return tmp_path / name

    plain, swapped = train("plain"), train("swapped", "--blocks_to_swap=4")
    resumed = tmp_path / "resumed"
    shutil.copytree(swapped / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copytree(swapped / "classes", resumed / "classes")
    train("resumed", "--blocks_to_swap=3", "--enable_model_cpu_offload", "--resume_from_checkpoint=latest")
    assert same(tensors(plain), tensors(swapped)) and same(tensors(plain), tensors(resumed))
    pictures = written(plain)
    assert len(pictures) >= 6
    for name in (name for name in pictures if name.startswith(("classes", "previews"))):
        assert pictures[name] == written(swapped)[name], name
    assert same(load_file(plain / LORA_NAME), load_file(swapped / LORA_NAME))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--blocks_to_swap=4",), "blocks_to_swap is for gradient_checkpointing"),
        (("--blocks_to_swap=4", "--gradient_checkpointing", "--compile"), "do not go together"),
        (("--blocks_to_swap=2", "--gradient_checkpointing"), "blocks_to_swap is 2, which saves nothing"),
        (("--blocks_to_swap=12", "--gradient_checkpointing"), "UNet2DConditionModel has 11 blocks"),
    ],
)
def test_what_saves_nothing_is_refused(
    run: Run, extra: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    try:
        run("out", *extra, code=1)
    except SystemExit as stop:
        assert stop.code == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def gradients(denoiser: nn.Module, family: Any, side: int = 32) -> dict[str, Tensor]:
    denoiser.zero_grad()
    x_t = torch.randn(1, 4, side // 2, side // 2, generator=torch.Generator().manual_seed(0))
    prediction = family.predict(denoiser, x_t, torch.full([1], 500.0), family.blank(denoiser), Setting(side, side))
    prediction.square().mean().backward()
    return {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["sd", "flux.1-dev"])
def test_blocks_may_be_quantised_and_their_biases_trained(kind: str, tmp_path: Path) -> None:
    """Quantised weights are not plain tensors; as in a run, adapters come when the blocks are swapped already."""
    quantization = pytest.importorskip("torchao.quantization")
    found = []
    for count in (0, 4):
        pipe = build(kind, tmp_path)
        family = family_of(pipe)
        denoiser = getattr(pipe, family.denoiser)
        quantization.quantize_(denoiser, quantization.Int8WeightOnlyConfig())
        if count:
            blocks = list(swapped_blocks(denoiser, family, count).values())
            swap_blocks(denoiser, blocks, torch.device("cpu"))
        config = DeloraConfig(r=2, init_weights="kaiming", bias="all")
        inject_delora(denoiser, config, generator=torch.Generator().manual_seed(1))
        denoiser.train()
        denoiser.enable_gradient_checkpointing()
        found.append([gradients(denoiser, family) for _ in range(2)])
    (plain, _), (swapped, again) = found
    assert same(plain, swapped) and same(plain, again) and any("bias" in name for name in plain)


def test_the_estimate_counts_two_places(tmp_path: Path) -> None:
    plan, pipe = plan_of("sd", tmp_path, gradient_checkpointing=True, blocks_to_swap=5)
    plan = with_options(plan, data=replace(plan.options.data, with_prior_preservation=True, class_prompt="a dog",
                                           class_data_dir="classes"))  # fmt: skip
    blocks = list(swapped_blocks(pipe.unet, plan.family, 5).values())
    own = [owner._parameters[key] for block in blocks for owner, key in swappable(block)]
    left = bytes_of(pipe.unet) - sum(weight.nbytes for weight in own if weight is not None)
    swap_blocks(pipe.unet, blocks, torch.device("cpu"))
    in_host = storages(own)
    gradients(pipe.unet.requires_grad_(True), plan.family)
    places = {address: size for address, size in storages(own).items() if address not in in_host}
    assert len(places) == 2
    told = phase_of(plan, "training")["denoiser"], phase_of(plan, "class images")["denoiser"]
    assert told == pytest.approx((left + sum(places.values()),) * 2, rel=0.01)  # places are a little larger


def storages(weights: list[Any]) -> dict[int, int]:
    return {storage.data_ptr(): storage.nbytes() for storage in (weight.untyped_storage() for weight in weights)}
