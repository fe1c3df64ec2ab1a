"""Norms, singular values and effective rank of an update, against the dense dW."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from delora_diffusion import (
    DeloraConfig,
    delora_state_dict,
    inject_delora,
    merge_delora,
    set_delora_adapters,
    update_norms,
)
from delora_diffusion.method.delora import factors_of
from delora_diffusion.method.inject import delora_adapters
from delora_diffusion.method.lowrank import effective_rank


def trained(init_weights: str = "zero", *, shape: tuple[int, int] = (12, 20), r: int = 4) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(*shape))
    inject_delora(module, DeloraConfig(r=r, delora_lambda=3.0, target_modules=["0"], init_weights=init_weights))
    for p in module.parameters():
        if p.requires_grad:
            p.data += torch.rand_like(p)
    return module


def dense(module: nn.Module) -> Tensor:
    """dW in fp64."""
    down, up = delora_adapters(module)["0"].factors()
    return (up.double() @ down.double()).detach()


@pytest.mark.parametrize("shape", [(12, 20), (6, 5)], ids=["thin factors", "k above out and in"])
@pytest.mark.parametrize("init_weights", ["zero", "paired", "residual"])
def test_norm_and_singular_values_are_those_of_the_dense_update(init_weights: str, shape: tuple[int, int]) -> None:
    module = trained(init_weights, shape=shape)
    set_delora_adapters(module, "default", 0.7)
    adapter, dw = delora_adapters(module)["0"], dense(module)
    found = adapter.factors().singular_values().float()
    expected = torch.linalg.svdvals(dw).float()
    torch.testing.assert_close(found, expected[: len(found)], rtol=1e-5, atol=1e-6)
    assert float(expected[len(found) :].sum()) < 1e-5
    assert update_norms(module)["0"] == pytest.approx(float(dw.norm() / module[0].weight.norm()), rel=1e-5)


def test_the_relative_update_is_what_a_merge_changes() -> None:
    module = trained("residual")
    before, ratio = module[0].weight.detach().clone(), update_norms(module)["0"]
    merge_delora(module, permanently=True)
    assert ratio == pytest.approx(float((module[0].weight - before).norm() / before.norm()), rel=1e-5)


@pytest.mark.parametrize("init_weights", ["zero", "residual"])
def test_a_file_has_the_factors_of_the_live_adapter(init_weights: str) -> None:
    module = trained(init_weights)
    tensors = {name.removeprefix("0."): t for name, t in delora_state_dict(module).items()}
    for ours, live in zip(factors_of(tensors), delora_adapters(module)["0"].factors(), strict=True):
        assert torch.equal(ours, live)


def test_a_residual_adapter_that_has_barely_moved_is_measured_exactly() -> None:
    """Two updates cancel to 1e-5 of either; Gram matrices in fp32 would be wrong by a factor here."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 48))
    inject_delora(module, DeloraConfig(r=4, delora_lambda=3.0, target_modules=["0"], init_weights="residual"))
    adapter = delora_adapters(module)["0"]
    assert update_norms(module)["0"] == pytest.approx(0, abs=1e-7)
    adapter.delora_B.data += 1e-6 * torch.randn_like(adapter.delora_B)
    torch.testing.assert_close(adapter.factors().norm(), dense(module).norm().float(), rtol=1e-2, atol=0)


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    two_to_one = effective_rank(torch.tensor([2.0, 1.0]))  # p = 2/3, 1/3, not 4/5, 1/5
    assert two_to_one == pytest.approx(3 / 2 ** (2 / 3))
