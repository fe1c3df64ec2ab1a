"""Compiled blocks compute what plain ones do, and a machine or a model that cannot is told so."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from delora_diffusion import DeloraConfig, inject_delora, set_delora_adapters
from delora_diffusion.base.speed import attention_of, compile_blocks, to_channels_last
from delora_diffusion.options import OptionError
from delora_diffusion.training import adapt

from .. import tiny
from ..runs import Run, losses
from ..tiny_families import build

CPU = torch.device("cpu")
plainly = partial(compile_blocks, backend="aot_eager")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build("flux.1-dev", tmp_path_factory.mktemp("flux")).transformer.requires_grad_(False)


def answer(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    config, ids = transformer.config, torch.zeros(4, 3)
    out: torch.Tensor = transformer(
        hidden_states=torch.randn(1, 4, config.in_channels, generator=generator),
        encoder_hidden_states=torch.randn(1, 4, config.joint_attention_dim, generator=generator),
        pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=generator),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        img_ids=ids,
        txt_ids=ids,
    ).sample
    return out


def test_the_blocks_of_a_transformer_are_compiled_once_for_every_strength(
    transformer: Any, fresh_dynamo: None
) -> None:
    plain = copy.deepcopy(transformer)
    inject_delora(plain, DeloraConfig(r=2, init_weights="kaiming"))
    compiled = copy.deepcopy(plain)
    plainly(compiled, CPU)
    assert compiled._compiled_call_impl is None and compiled.transformer_blocks[0]._compiled_call_impl is not None
    seen = 0
    with torch.no_grad():
        for strength in (1.0, 0.3, 0.0):
            for module in (plain, compiled):
                set_delora_adapters(module, "default", strength)
            torch.testing.assert_close(answer(compiled), answer(plain), rtol=1e-4, atol=1e-5)
            assert seen in (0, counters["stats"]["unique_graphs"])
            seen = counters["stats"]["unique_graphs"]


def test_a_machine_that_cannot_compile_is_told_before_training(
    transformer: Any, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmany lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(OptionError, match=r"cannot compile for cpu here \(InvalidCxxCompiler.*found\); install"):
        compile_blocks(transformer, CPU)


def test_channels_last_is_for_unets(transformer: Any, tmp_path: Path) -> None:
    unet = tiny.stable_diffusion(tmp_path).unet
    to_channels_last(unet)
    assert unet.down_blocks[0].resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(OptionError, match="no convolutions to gain by it"):
        to_channels_last(transformer)


def test_the_attention_is_named(transformer: Any, tmp_path: Path) -> None:
    assert attention_of(transformer) == "FluxAttnProcessor on torch's own choice"
    assert attention_of(tiny.stable_diffusion(tmp_path).unet) == "AttnProcessor2_0 on torch's own choice"


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_plain_one(
    run: Run, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapt, "compile_blocks", plainly)
    plain = run("plain", "--max_train_steps=2", "--gradient_checkpointing")
    fast = run("fast", "--max_train_steps=2", "--gradient_checkpointing", "--compile", "--channels_last")
    assert counters["stats"]["unique_graphs"] > 0
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-4)
