"""What makes the learning rate cancel: lengths in learning rates, and gradients without lengths."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from delora_diffusion import DeloraConfig, inject_delora
from delora_diffusion.method.inject import delora_adapters, set_delora_adapters
from delora_diffusion.method.state import update_norms
from delora_diffusion.training.config import TrainingConfig
from delora_diffusion.training.optimizer import make_optimizer, relative_gradients, set_lengths

RATE = 0.02


def adapted(init_weights: str = "kaiming", *, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    config = DeloraConfig(r=2, delora_lambda=5.0, target_modules=["0", "2"], init_weights=init_weights)
    inject_delora(module, config, generator=generator)
    return module


def gradients(module: nn.Module) -> list[torch.Tensor]:
    module.zero_grad()
    x = torch.linspace(-1, 1, 30).reshape(5, 6)
    module(x).square().sum().backward()
    relative_gradients({"module": module})
    return [matrix.grad for a in delora_adapters(module).values() for matrix in (a.delora_A, a.delora_B)]


def test_relative_gradients_do_not_depend_on_the_lengths() -> None:
    module = adapted()
    before = gradients(module)
    with torch.no_grad():
        for adapter in delora_adapters(module).values():
            adapter.delora_A.mul_(torch.tensor([[8.0], [0.25]]))
            adapter.delora_B.mul_(torch.tensor([[0.5, 64.0]]))
    for one, other in zip(before, gradients(module), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_direction_of_unit_length_keeps_its_gradient() -> None:
    module = adapted()
    with torch.no_grad():
        for adapter in delora_adapters(module).values():
            adapter.delora_A.div_(adapter.delora_A.norm(dim=1, keepdim=True))
            adapter.delora_B.div_(adapter.delora_B.norm(dim=0, keepdim=True))
    relative = gradients(module)
    module.zero_grad()
    module(torch.linspace(-1, 1, 30).reshape(5, 6)).square().sum().backward()
    plain = [matrix.grad for a in delora_adapters(module).values() for matrix in (a.delora_A, a.delora_B)]
    for one, other in zip(relative, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_relative_gradients_of_a_zero_start_are_no_larger_than_later_ones() -> None:
    module = adapted("zero")
    first = max(float(g.norm()) for g in gradients(module))
    with torch.no_grad():
        for adapter in delora_adapters(module).values():
            adapter.delora_B.normal_(generator=torch.Generator().manual_seed(1))
    later = max(float(g.norm()) for g in gradients(module))
    assert 0 < first < 10 * later


@pytest.mark.parametrize("init_weights", ["zero", "residual", "paired", "kaiming"])
@pytest.mark.parametrize(("steps", "length"), [(100, 1.0), (1600, 8.0), (25, 2**-1.5)])
def test_lengths_are_learning_rates_over_the_turn_and_grow_with_the_run_and_no_update_changes(
    steps: int, length: float, init_weights: str
) -> None:
    module = adapted(init_weights)
    x = torch.linspace(-1, 1, 30).reshape(5, 6)
    output, norms = module(x), update_norms(module)
    training = TrainingConfig(learning_rate=RATE, max_train_steps=steps, direction_turn=0.4)
    set_lengths({"module": module}, training)
    for adapter in delora_adapters(module).values():
        assert adapter.delora_A.square().mean().sqrt().item() == pytest.approx(RATE * 10 * length / 0.4)
        rms_of_B = adapter.delora_B.square().mean().sqrt().item()
        assert rms_of_B == pytest.approx(0 if init_weights == "zero" else RATE * 10 * length / 0.4)
    torch.testing.assert_close(module(x), output)
    assert update_norms(module) == pytest.approx(norms, abs=1e-6)
    if init_weights in ("residual", "paired"):
        assert set(update_norms(module).values()) == {0.0}


@pytest.mark.parametrize("fields", [{"optimizer": "prodigy"}, {"direction_turn": 0.0}, {"learning_rate": 0.0}])
def test_lengths_stay_where_there_is_nothing_to_measure_them_in(fields: dict[str, object]) -> None:
    module = adapted()
    before = {name: p.clone() for name, p in module.named_parameters()}
    set_lengths({"module": module}, TrainingConfig(**fields))
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())


@pytest.mark.parametrize("size, rank", [(16, 2), (64, 8)])
def test_a_relative_lambda_is_the_share_of_the_weight_with_orthogonal_components(size: int, rank: int) -> None:
    linear = nn.Linear(size, size)
    nn.init.orthogonal_(linear.weight)  # column norms are equal
    module = nn.ModuleDict({"linear": linear})
    config = DeloraConfig(r=rank, relative_lambda=0.07, target_modules=["linear"], init_weights="kaiming")
    inject_delora(module, config)
    adapter = delora_adapters(module)["linear"]
    assert adapter.delora_lambda.item() == pytest.approx(0.07 * math.sqrt(rank * size))
    nn.init.orthogonal_(adapter.delora_A)
    nn.init.orthogonal_(adapter.delora_B)
    assert update_norms(module)["linear"] == pytest.approx(0.07, rel=1e-5)


def test_a_lambda_pattern_and_a_rank_pattern_go_with_a_relative_lambda() -> None:
    config = DeloraConfig(r=4, relative_lambda=0.1, lambda_pattern={"b": 3.0}, rank_pattern={"c": 16})
    assert [config.lambda_of(name, 25) for name in ("x.a", "x.b", "x.c")] == pytest.approx([1.0, 3.0, 2.0])
    assert DeloraConfig(r=4, delora_lambda=9.0).lambda_of("a", 25) == 9.0


@pytest.mark.parametrize("rate", [1e-3 / 32, 1e-3, 1e-3 * 32])
@pytest.mark.parametrize("width", [16, 320, 1280])
def test_strength_grows_with_the_ramp_at_every_width_and_learning_rate(width: int, rate: float) -> None:
    """No jump: after step 1 of a ramp of 50, |dW|/|W| is a 50th of what it is at its end."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"linear": nn.Linear(width, width)})
    generator = torch.Generator().manual_seed(0)
    config = DeloraConfig(r=8, relative_lambda=0.05, target_modules=["linear"])
    inject_delora(module, config, generator=generator)
    training = TrainingConfig(learning_rate=rate, max_train_steps=100)
    set_lengths({"module": module}, training)
    optimizer = make_optimizer({"module": module}, training)
    x, y = torch.randn(32, width, generator=generator), torch.randn(32, width, generator=generator)
    shares = []
    for step in range(50):
        set_delora_adapters(module, "default", (step + 1) / 50)
        (module["linear"](x) - y).square().mean().backward()
        relative_gradients({"module": module})
        optimizer.step()
        optimizer.zero_grad()
        shares.append(update_norms(module)["linear"])
    assert 0.03 < shares[-1] < 0.05 * math.sqrt(8)
    assert shares[0] < shares[-1] / 20
