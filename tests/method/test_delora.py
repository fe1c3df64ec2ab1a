"""The DeLoRA method on any module: the formula, its bound, and what adapters may and may not do to the base.

The formula's oracle is `dense_update`, the paper's equation written out component by component in fp64. PEFT as a
second oracle is in `test_delora_peft.py`, the choice of layers in `test_targets.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from delora_diffusion import (
    DeloraConfig,
    active_delora_adapters,
    delora_disabled,
    delora_state_dict,
    inject_delora,
    load_delora_state_dict,
    merge_delora,
    print_trainable_parameters,
    remove_delora,
    set_delora_adapters,
    unmerge_delora,
    update_norms,
)
from delora_diffusion.method.delora import INIT_TENSOR_NAMES, TENSOR_NAMES, DeloraAdapter
from delora_diffusion.method.inject import delora_adapters, delora_layers, enable_delora

INITS = ("zero", "residual", "paired", "kaiming")
IDENTITIES = ("zero", "residual", "paired")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRAINED_IN_FULL: list[dict[str, Any]] = [
    {},
    {"bias": "delora_only"},
    {"bias": "all"},
    {"modules_to_save": ["norm"]},
    {"bias": "all", "modules_to_save": ["norm", "head"]},
]


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# ---- helpers -------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two Linear layers to adapt, a norm and a head to leave alone or to train in full."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 8, bias=False)
        self.head = nn.Linear(8, 5)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.fc2(torch.tanh(self.norm(self.fc1(x)))))
        return out


def config(**fields: Any) -> DeloraConfig:
    defaults: dict[str, Any] = {"r": 4, "delora_lambda": 6.0, "target_modules": ["fc1", "fc2"]}
    return DeloraConfig(**defaults | fields)


def adapted(name: str = "default", *, module: nn.Module | None = None, **fields: Any) -> nn.Module:
    """A module with an adapter whose every trainable number has been moved, as after training."""
    module = Net() if module is None else module
    inject_delora(module, config(**fields), name)
    move(module, name)
    return module


def move(module: nn.Module, name: str = "default") -> None:
    for key, tensor in delora_state_dict(module, name).items():
        if not key.endswith(("_w_norm", "_init")):
            tensor.add_(0.3 * torch.randn_like(tensor))


def one_linear(features: tuple[int, int] = (12, 20), **fields: Any) -> tuple[nn.Module, DeloraAdapter]:
    module = nn.Sequential(nn.Linear(*features))
    inject_delora(module, config(target_modules=["0"], **fields))
    return module, delora_adapters(module)["0"]


def dense_update(A: Tensor, B: Tensor, lam: Tensor, w: Tensor) -> Tensor:
    """dW = sum_i lambda / r * (b_i / |b_i|) (a_i w / |a_i|)^T with norms of at least 1e-4 (paper, Eq. 8)."""
    unit_a = A / A.norm(dim=1, keepdim=True).clamp(min=1e-4)
    unit_b = B / B.norm(dim=0, keepdim=True).clamp(min=1e-4)
    return sum((lam / len(A)) * torch.outer(unit_b[:, i], unit_a[i] * w) for i in range(len(A)))  # type: ignore[return-value]


def dense(adapter: DeloraAdapter, weight: float = 1.0) -> Tensor:
    t = {name.removeprefix("delora_"): tensor.double() for name, tensor in adapter.tensors().items()}
    update = dense_update(t["A"], t["B"], t["lambda"], t["w_norm"])
    if "A_init" in t:
        update = update - dense_update(t["A_init"], t["B_init"], t["lambda_init"], t["w_norm"])
    return weight * update


def close(found: Tensor, expected: Tensor, *, to: float = 1e-6) -> bool:
    """Equal to `to` of the largest value (at least 1)."""
    size = max(1.0, float(expected.detach().abs().max()))
    return found.shape == expected.shape and bool((found.double() - expected.double()).abs().max() <= to * size)


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """The same names in the same order, the same dtypes, the same bits."""
    return list(found) == list(expected) and all(
        found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in expected.items()
    )


def anatomy(module: nn.Module) -> dict[str, Any]:
    """Everything about a module that an adapter could leave behind, tensor values aside."""
    parameters = {name: (id(p), p.requires_grad, p.dtype) for name, p in module.named_parameters()}
    parts = {
        name: (type(m), sorted(vars(m)), list(m._modules), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in module.named_modules()
    }
    return {"parameters": parameters, "parts": parts}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# ---- the formula and its gradients ---------------------------------------------------------------


@pytest.mark.parametrize("init_weights", INITS)
def test_forward_adds_the_papers_update(init_weights: str) -> None:
    module, adapter = one_linear(init_weights=init_weights)
    move(module)
    set_delora_adapters(module, "default", 0.7)
    linear = delora_layers(module)["0"]
    x = torch.randn(2, 3, 12)
    weight = linear.weight.double() + dense(adapter, 0.7)
    assert close(module(x), x.double() @ weight.T + linear.bias.double())


@pytest.mark.parametrize("floored", [False, True])
@pytest.mark.parametrize("frozen", [(), ("A",), ("lambda",), ("A", "B"), ("A", "B", "lambda")], ids=str)
@pytest.mark.parametrize("x_needs_grad", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
def test_handwritten_backward_equals_autograd_through_the_dense_formula(
    shape: tuple[int, ...], x_needs_grad: bool, frozen: tuple[str, ...], floored: bool
) -> None:
    n_in, n_out, rank = torch.randint(2, 24, (3,)).tolist()
    module, adapter = one_linear((n_in, n_out), r=rank, init_weights="kaiming")
    if floored:
        adapter.delora_A.data[0] *= 1e-6
        adapter.delora_B.data[:, -1] = 0
    for name in frozen:
        getattr(adapter, f"delora_{name}").requires_grad_(False)
    set_delora_adapters(module, "default", 0.7)
    linear = delora_layers(module)["0"]
    x = torch.randn(*shape, n_in, requires_grad=x_needs_grad)
    direction = torch.randn(*shape, n_out)

    ours = {n: p for n, p in adapter.named_parameters() if p.requires_grad} | ({"x": x} if x_needs_grad else {})
    if not ours:
        assert not module(x).requires_grad
        return
    found = torch.autograd.grad(module(x), list(ours.values()), direction)

    exact = {n: t.detach().double().requires_grad_() for n, t in (adapter.tensors() | {"x": x}).items()}
    update = dense_update(*(exact[f"delora_{n}"] for n in ("A", "B", "lambda", "w_norm")))
    y = exact["x"] @ (linear.weight.double() + 0.7 * update).T
    expected = torch.autograd.grad(y, [exact[n] for n in ours], direction.double())
    for name, got, wanted in zip(ours, found, expected, strict=True):
        assert got.dtype == torch.float32
        assert close(got, wanted, to=2e-6), name


@pytest.mark.parametrize("needed", ["B", "lambda"])
def test_a_gradient_asked_for_alone_is_the_one_among_all(needed: str) -> None:
    module, adapter = one_linear(init_weights="kaiming")
    x = torch.randn(5, 12)
    module(x).square().sum().backward()
    alone = getattr(adapter, f"delora_{needed}")
    (found,) = torch.autograd.grad(module(x).square().sum(), [alone])
    assert torch.equal(found, alone.grad)


# ---- the bound, the start, and the first step ----------------------------------------------------


def huge(adapter: DeloraAdapter) -> None:
    adapter.delora_A.data.normal_().mul_(1e12)
    adapter.delora_B.data.normal_().mul_(1e12)


def tiny(adapter: DeloraAdapter) -> None:
    adapter.delora_A.data.normal_().mul_(1e-9)
    adapter.delora_B.data.normal_().mul_(1e-3)


def ordinary(adapter: DeloraAdapter) -> None:
    adapter.delora_A.data.normal_()
    adapter.delora_B.data.normal_()


def aligned_with_the_largest_column(adapter: DeloraAdapter) -> None:
    adapter.delora_A.data.zero_()
    adapter.delora_A.data[:, adapter.delora_w_norm.argmax()] = torch.rand(adapter.rank) + 0.5
    adapter.delora_B.data[:] = torch.randn(adapter.delora_B.shape[0], 1)


@pytest.mark.parametrize("init_weights", INITS)
@pytest.mark.parametrize("change", [ordinary, huge, tiny, aligned_with_the_largest_column])
def test_the_update_never_exceeds_lambda_times_the_largest_column_norm(
    change: Callable[[DeloraAdapter], None], init_weights: str
) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        rank = 2 * int(torch.randint(1, 6, ()))
        module, adapter = one_linear((9, 14), r=rank, delora_lambda=3.0, init_weights=init_weights)
        change(adapter)
        adapter.delora_lambda.data.fill_(5.0)
        largest = float(adapter.delora_w_norm.max())
        bound = (5.0 + 3.0 * adapter.is_residual) * largest  # the frozen copy brings its own lambda
        x = torch.eye(9)
        with delora_disabled(module):
            base = module(x)
        norm = float(torch.linalg.vector_norm((module(x) - base).detach()))
        assert norm <= bound * (1 + 1e-5)
        assert norm == pytest.approx(float(dense(adapter).norm()), rel=1e-4, abs=1e-5)
        if change is aligned_with_the_largest_column and not adapter.is_residual:
            assert norm == pytest.approx(bound, rel=1e-5)  # and the bound is reached


@pytest.mark.parametrize("init_weights", IDENTITIES)
def test_an_adapter_starts_as_the_identity(init_weights: str) -> None:
    module = Net()
    x = torch.randn(5, 12)
    base = module(x)
    inject_delora(module, config(init_weights=init_weights))
    assert close(module(x), base)
    assert init_weights != "zero" or torch.equal(module(x), base)
    assert max(update_norms(module).values()) < 1e-3


def test_kaiming_does_not_start_as_the_identity() -> None:
    module = Net()
    inject_delora(module, config(init_weights="kaiming"))
    assert min(update_norms(module).values()) > 0.1


def size_after_one_step(init_weights: str, lr: float, width: int = 320) -> float:
    """|dW| / |W| after one AdamW step on a regression."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(width, width))
    x, target = torch.randn(64, width), torch.randn(64, width)
    inject_delora(module, config(r=16, delora_lambda=15.0, target_modules=["0"], init_weights=init_weights))
    adapter = delora_adapters(module)["0"]
    optimiser = torch.optim.AdamW([adapter.delora_A, adapter.delora_B], lr=lr, weight_decay=0.0)
    (module(x) - target).square().mean().backward()
    optimiser.step()
    return update_norms(module)["0"]


@pytest.mark.parametrize("init_weights", ["residual", "paired"])
def test_the_first_step_is_proportional_to_the_learning_rate(init_weights: str) -> None:
    small, large = (size_after_one_step(init_weights, lr) for lr in (1e-4, 1e-3))
    assert 9.0 < large / small < 11.0
    assert large < 0.02


def test_the_first_step_of_pefts_zero_init_has_full_size_whatever_the_learning_rate() -> None:
    small, large = (size_after_one_step("zero", lr) for lr in (1e-4, 1e-2))
    assert small == pytest.approx(large, rel=0.02)
    assert small == pytest.approx(15 / (16 * 320) ** 0.5, rel=0.05)  # r near-orthogonal unit components


# ---- several adapters ----------------------------------------------------------------------------


@pytest.fixture
def two() -> tuple[nn.Module, Tensor]:
    """One Linear with adapters "a" (residual) and "b", both moved, "b" active; its base weight."""
    module = nn.Sequential(nn.Linear(12, 20))
    weight = module.get_parameter("0.weight").detach().clone()
    adapted("a", module=module, target_modules=["0"], init_weights="residual")
    adapted("b", module=module, target_modules=["0"], r=2, delora_lambda=2.0)
    return module, weight


@pytest.mark.parametrize(
    "names, weights", [(["a", "b"], [0.7, -0.3]), (["b", "a"], 1.0), ("a", 2.0), (["b"], [0.5]), ([], [])], ids=str
)
def test_active_adapters_add_up_with_their_weights(
    two: tuple[nn.Module, Tensor], names: str | list[str], weights: float | list[float]
) -> None:
    module, weight = two
    set_delora_adapters(module, names, weights)
    listed = [names] if isinstance(names, str) else names
    assert active_delora_adapters(module) == listed
    each = weights if isinstance(weights, list) else [weights] * len(listed)
    for listed_name, strength in zip(listed, each, strict=True):
        weight = weight + dense(delora_adapters(module, listed_name)["0"], strength)
    x = torch.randn(5, 12)
    assert close(module(x), x.double() @ weight.double().T + module[0].bias)  # type: ignore[index]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_zero_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    module = Net().to(dtype)
    x = torch.randn(5, 12).to(dtype)
    base = module(x)
    adapted("a", module=module, init_weights="residual")
    adapted("b", module=module)
    set_delora_adapters(module, ["a", "b"], 0.0)
    assert torch.equal(module(x), base)


@pytest.mark.parametrize(
    "names, weights, message",
    [
        (["a", "c"], 1.0, "no adapter is called 'c'; there are: a, b"),
        (["a", "b"], [1.0], "2 adapters but 1 weights; give one weight, or one for each adapter"),
        (["a", "a"], 1.0, "'a' is named twice"),
        (["a", "b"], [1.0, float("nan")], "weight of 'b' is nan"),
    ],
)
def test_a_wrong_choice_of_adapters_is_refused_and_changes_nothing(
    two: tuple[nn.Module, Tensor], names: list[str], weights: float | list[float], message: str
) -> None:
    module, _ = two
    with pytest.raises(ValueError, match=message):
        set_delora_adapters(module, names, weights)
    assert active_delora_adapters(module) == ["b"]


def test_two_adapters_that_trained_one_parameter_in_full_cannot_both_act() -> None:
    module = adapted("a", bias="all")
    adapted("b", module=module, bias="all")
    x = torch.randn(5, 12)
    before = module(x)
    with pytest.raises(ValueError, match=r"trained 'fc1\.bias' in full; activate one of them"):
        set_delora_adapters(module, ["a", "b"])
    assert active_delora_adapters(module) == ["b"]
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("fields", TRAINED_IN_FULL, ids=str)
def test_a_second_adapter_starts_from_the_base_not_from_the_first(fields: dict[str, Any]) -> None:
    module = Net()
    x = torch.randn(5, 12)
    base = module(x)
    adapted("a", module=module, **fields)
    inject_delora(module, config(**fields), "b")
    assert torch.equal(module(x), base)


@pytest.mark.parametrize("saved_first", [True, False])
def test_a_layer_is_not_adapted_by_one_adapter_and_trained_in_full_by_another(saved_first: bool) -> None:
    """The second would measure, and a merge would keep, the first one's weights in place of the base's."""
    saves, adapts = config(target_modules=["fc1"], modules_to_save=["fc2"]), config(target_modules=["fc2"])
    first, second = (saves, adapts) if saved_first else (adapts, saves)
    module = Net()
    inject_delora(module, first, "a")
    before = values(module)
    with pytest.raises(ValueError, match=r"'fc2'.*in full"):
        inject_delora(module, second, "b")
    assert equal(values(module), before)


def test_an_adapter_injected_while_another_is_merged_measures_the_base() -> None:
    module, fresh = Net(), Net()
    fresh.load_state_dict(module.state_dict())
    adapted("a", module=module)
    merge_delora(module)
    inject_delora(module, config(), "b")
    inject_delora(fresh, config(), "b")
    for name, adapter in delora_adapters(module, "b").items():
        assert torch.equal(adapter.delora_w_norm, delora_adapters(fresh, "b")[name].delora_w_norm)
    unmerge_delora(module)
    assert active_delora_adapters(module) == ["b"]


# ---- the base, for a while -----------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("fields", TRAINED_IN_FULL, ids=str)
def test_disabled_is_the_base_bit_for_bit_and_only_inside_the_block(fields: dict[str, Any], merged: bool) -> None:
    module = Net()
    x = torch.randn(5, 12)
    base = module(x)
    adapted(module=module, **fields)
    if merged:
        merge_delora(module)
    with_adapter = module(x)
    assert not close(with_adapter, base, to=1e-2)
    with pytest.raises(KeyError), delora_disabled(module):
        assert torch.equal(module(x), base)
        with delora_disabled(module):
            assert torch.equal(module(x), base)
        assert torch.equal(module(x), base)
        raise KeyError
    assert torch.equal(module(x), with_adapter)


@pytest.mark.parametrize("fields", TRAINED_IN_FULL, ids=str)
def test_what_is_chosen_while_disabled_acts_once_enabled(fields: dict[str, Any]) -> None:
    module = Net()
    x = torch.randn(5, 12)
    base = module(x)
    adapted("a", module=module, **fields | {"target_modules": ["fc2"]})
    with_a = module(x)
    enable_delora(module, False)
    assert torch.equal(module(x), base)
    adapted("b", module=module, **fields)
    set_delora_adapters(module, "a")
    assert torch.equal(module(x), base)
    enable_delora(module)
    assert torch.equal(module(x), with_a)


# ---- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_equals_the_forward_and_unmerge_restores_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    module = adapted(module=Net().to(dtype), init_weights="residual")
    base, x = values(module), torch.randn(5, 12).to(dtype)
    unmerged = module(x)
    for _ in range(10):
        merge_delora(module)
        for name, linear in delora_layers(module).items():
            exact = base[f"{name}.weight"].double() + dense(delora_adapters(module)[name])
            assert close(linear.weight, exact.to(dtype), to=1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
        assert close(module(x), unmerged, to=4 * torch.finfo(dtype).eps)
        unmerge_delora(module)
    assert equal(values(module), base)
    assert torch.equal(module(x), unmerged)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_reports_the_part_of_the_update_lost_to_rounding(dtype: torch.dtype) -> None:
    module = adapted(module=Net().to(dtype), delora_lambda=0.5)
    base = values(module)
    report = merge_delora(module)
    exact = {name: dense(adapter) for name, adapter in delora_adapters(module).items()}
    lost = [module.get_parameter(f"{n}.weight").double() - base[f"{n}.weight"].double() - d for n, d in exact.items()]
    expected = torch.stack([t.norm() for t in lost]).norm() / torch.stack([t.norm() for t in exact.values()]).norm()
    assert report.layers == 2
    assert report.rounding_loss == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    assert (report.rounding_loss > 1e-4) == (dtype != torch.float32)


def test_merging_one_after_the_other_is_merging_both(two: tuple[nn.Module, Tensor]) -> None:
    module, weight = two
    set_delora_adapters(module, ["a", "b"], [0.7, -0.3])
    expected = weight + dense(delora_adapters(module, "a")["0"], 0.35) + dense(delora_adapters(module, "b")["0"], -0.3)
    merge_delora(module, "a", scale=0.5)
    x = torch.randn(5, 12)
    assert close(module(x), x.double() @ expected.T + module[0].bias)  # type: ignore[index]
    merge_delora(module, ["b"])
    assert close(module[0].weight, expected)  # type: ignore[index]
    unmerge_delora(module)
    assert torch.equal(module[0].weight, weight)  # type: ignore[index]
    merge_delora(module)
    with pytest.raises(ValueError, match="adapter 'a' is merged already; unmerge_delora first"):
        merge_delora(module, "a")
    with pytest.raises(ValueError, match=r"adapter 'a' is merged at weight 0\.7; unmerge_delora first"):
        set_delora_adapters(module, "a", 0.2)
    with pytest.raises(ValueError, match="no adapter is called 'c'"):
        merge_delora(module, "c")


@pytest.mark.parametrize("cause", ["nan in the last layer", "fp16 overflow in the last layer"])
def test_a_merge_that_would_not_be_finite_names_the_layer_and_changes_none(cause: str) -> None:
    module = adapted(module=Net().to(torch.float16))
    last = delora_adapters(module)["fc2"]
    if cause.startswith("nan"):
        last.delora_A.data[0, 0] = torch.nan
    else:
        last.delora_lambda.data.fill_(1e7)
    before = values(module)
    with pytest.raises(ValueError, match="not finite in fc2; no layer was changed"):
        merge_delora(module, permanently=True)
    after = values(module)
    assert list(after) == list(before)
    assert all(torch.equal(after[name].nan_to_num(), t.nan_to_num()) for name, t in before.items())
    unmerge_delora(module)
    assert torch.equal(module.get_parameter("fc1.weight"), before["fc1.weight"])


@pytest.mark.parametrize("fields", TRAINED_IN_FULL, ids=str)
def test_a_permanent_merge_leaves_a_plain_module_that_computes_the_same(fields: dict[str, Any]) -> None:
    plain = Net()
    was = anatomy(plain)["parts"]
    module = adapted(module=plain, **fields)
    x = torch.randn(5, 12)
    expected = module(x)
    merge_delora(module, permanently=True)
    assert close(module(x), expected)
    assert anatomy(module)["parts"] == was
    assert list(module.state_dict()) == list(Net().state_dict())
    assert {n: p.requires_grad for n, p in module.named_parameters()} == {
        n: p.requires_grad for n, p in Net().named_parameters()
    }


@pytest.mark.parametrize("fields", TRAINED_IN_FULL, ids=str)
def test_a_permanent_merge_of_a_named_adapter_is_that_adapters_model(fields: dict[str, Any]) -> None:
    module = adapted("a", **fields)
    x = torch.randn(5, 12)
    expected = module(x)
    adapted("b", module=module, **fields)
    merge_delora(module, "a", permanently=True)
    assert close(module(x), expected)


# ---- removing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("fields", TRAINED_IN_FULL, ids=str)
@pytest.mark.parametrize("init_weights", ["zero", "residual"])
def test_remove_is_the_exact_inverse_of_inject(init_weights: str, fields: dict[str, Any], merged: bool) -> None:
    module = Net()
    tensors, structure = values(module), anatomy(module)
    adapted("a", module=module, init_weights=init_weights, **fields)
    adapted("b", module=module, target_modules=["fc2"], module_dropout=0.1, **fields)
    if merged:
        merge_delora(module)
    remove_delora(module)
    assert equal(values(module), tensors)
    assert anatomy(module) == structure
    with pytest.raises(ValueError, match="this Net has no adapter; inject_delora or load one first"):
        remove_delora(module)


@pytest.mark.parametrize("gone, left", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("fields", TRAINED_IN_FULL, ids=str)
def test_removing_one_of_two_leaves_the_other_alone(fields: dict[str, Any], gone: str, left: str) -> None:
    module = Net()
    tensors, structure = values(module), anatomy(module)
    x = torch.randn(5, 12)
    adapted("a", module=module, **fields)
    adapted("b", module=module, **fields | {"target_modules": ["fc2"]})
    set_delora_adapters(module, left)
    expected, kept = module(x), delora_state_dict(module, left)
    set_delora_adapters(module, gone)
    remove_delora(module, gone)
    assert equal(delora_state_dict(module, left), kept)
    set_delora_adapters(module, left)
    assert torch.equal(module(x), expected)
    remove_delora(module, left)
    assert equal(values(module), tensors)
    assert anatomy(module) == structure


def test_removing_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapter is called 'cat'; there are: default"):
        remove_delora(adapted(), "cat")


# ---- parameters trained in full ------------------------------------------------------------------


@pytest.mark.parametrize("fields", TRAINED_IN_FULL, ids=str)
def test_exactly_the_named_parameters_train_and_travel_with_the_adapter(fields: dict[str, Any]) -> None:
    module = Net()
    other = copy.deepcopy(module)
    base = values(module)
    inject_delora(module, config(init_weights="paired", **fields))
    full = {name for name, p in module.named_parameters() if p.requires_grad and "delora" not in name}
    bias = {"none": set(), "delora_only": {"fc1.bias"}, "all": {"fc1.bias", "norm.bias", "head.bias"}}
    saved = {f"{m}.{leaf}" for m in fields.get("modules_to_save", ()) for leaf in ("weight", "bias")}
    assert full == bias[fields.get("bias", "none")] | saved

    x = torch.randn(5, 12)
    trainable = [p for p in module.parameters() if p.requires_grad]
    for _ in range(3):
        module(x).square().mean().backward()
        torch.optim.SGD(trainable, lr=0.1).step()
    changed = {name for name, t in values(module).items() if name in base and not torch.equal(t, base[name])}
    assert changed == full

    tensors = {name: t.clone() for name, t in delora_state_dict(module).items()}
    assert full == {name for name in tensors if "delora" not in name}
    inject_delora(other, config(**fields))
    load_delora_state_dict(other, tensors)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("leave", [delora_disabled, remove_delora], ids=["disabled", "removed"])
@pytest.mark.parametrize("fields", TRAINED_IN_FULL, ids=str)
def test_the_base_follows_when_the_module_is_cast_after_injection(
    fields: dict[str, Any], leave: Callable[[nn.Module], Any]
) -> None:
    module = Net()
    expected = copy.deepcopy(module).to(torch.bfloat16)
    adapted(module=module, **fields)
    module.to(torch.bfloat16)
    x = torch.randn(5, 12).to(torch.bfloat16)
    context = leave(module)
    if context is None:
        assert torch.equal(module(x), expected(x))
        assert equal(values(module), values(expected))
    else:
        with context:
            assert torch.equal(module(x), expected(x))
        assert module(x).dtype == torch.bfloat16


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("cast", ["before", "after"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("init_weights", ["residual", "kaiming"])
def test_adapters_stay_fp32_on_any_base(init_weights: str, dtype: torch.dtype, cast: str, autocast: bool) -> None:
    """lambda 15 at r 4 is where PEFT's adapters in the base's dtype become NaN in fp16."""
    fields: dict[str, Any] = {"target_modules": ["0", "2"], "delora_lambda": 15.0, "init_weights": init_weights}
    exact = adapted(module=nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)), **fields)
    module = copy.deepcopy(exact)
    if cast == "before":
        remove_delora(module)
        inject_delora(module.to(dtype), config(**fields))
        load_delora_state_dict(module, delora_state_dict(exact))
    else:
        module = module.half() if dtype == torch.float16 else module.to(dtype)
    for adapter in delora_adapters(module).values():
        assert {t.dtype for t in (*adapter.parameters(), *adapter.buffers())} == {torch.float32}
    assert equal(delora_state_dict(module), delora_state_dict(exact))

    x = torch.randn(16, 12)
    fed = (x if autocast else x.to(dtype)).clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(fed)
        with delora_disabled(module):
            assert y.dtype == module(fed).dtype == (torch.bfloat16 if autocast else dtype)
    (y.float() - 1).square().mean().backward()
    (exact(x) - 1).square().mean().backward()
    in_fp32 = y.dtype == torch.float32
    assert y.isfinite().all()
    assert close(y, exact(x), to=2e-6 if in_fp32 else 8 * torch.finfo(torch.bfloat16).eps)
    assert fed.grad is not None and fed.grad.dtype == fed.dtype and fed.grad.isfinite().all()
    for name, adapter in delora_adapters(module).items():
        for leaf, p in adapter.named_parameters():
            expected = delora_adapters(exact)[name].get_parameter(leaf).grad
            assert p.grad is not None and expected is not None and p.grad.dtype == torch.float32
            assert (p.grad - expected).norm() < (1e-5 if in_fp32 else 0.1) * expected.norm(), (name, leaf)


class ComputesInFp32(nn.Linear):
    """A Linear that leaves autocast; bitsandbytes' 4-bit one also returns its input's dtype whatever autocast says."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


def test_a_layer_that_leaves_autocast_keeps_its_dtype_and_precision() -> None:
    module = adapted(module=nn.Sequential(ComputesInFp32(12, 20)), target_modules=["0"])
    x = torch.randn(5, 12)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)


def test_a_step_far_below_the_bases_precision_is_kept() -> None:
    """In bf16 15 + 1e-3 = 15."""
    module = adapted(module=Net().to(torch.bfloat16), delora_lambda=15.0)
    lam = delora_adapters(module)["fc1"].delora_lambda
    before = float(lam.detach())
    lam.data += 1e-3
    assert float(lam.detach()) - before == pytest.approx(1e-3, rel=1e-2)


# ---- what torch does to modules ------------------------------------------------------------------


def test_a_deepcopy_is_independent() -> None:
    module = adapted(bias="all", modules_to_save=["norm"])
    x = torch.randn(5, 12)
    expected, before = module(x), values(module)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), expected)
    move(twin)
    assert not close(twin(x), expected, to=1e-2)
    merge_delora(twin)
    remove_delora(twin)
    assert not any(m._forward_hooks for m in twin.modules())
    assert torch.equal(module(x), expected)
    assert equal(values(module), before)
    merge_delora(module)
    twin = copy.deepcopy(module)
    unmerge_delora(twin)
    assert equal(values(twin), before)
    assert not equal(values(module), before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    module = adapted(init_weights="residual", bias="delora_only", module_dropout=0.3)
    x = torch.randn(5, 12, requires_grad=True)
    found: list[dict[str, Tensor]] = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=use_reentrant)):
        module.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        run(x).square().sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        found.append(gradients(module) | {"x": x.grad.clone()})
    assert equal(*found)


@pytest.fixture
def dynamo() -> Iterator[Any]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize("init_weights", ["zero", "residual"])
def test_compiles_as_one_graph_that_a_new_weight_does_not_recompile(dynamo: Any, init_weights: str) -> None:
    module = adapted(init_weights=init_weights)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 12, requires_grad=True)
    for weight in (1.0, 0.3, 0.0):
        set_delora_adapters(module, "default", weight)
        found: list[dict[str, Tensor]] = []
        for run in (module, compiled):
            module.zero_grad()
            x.grad = None
            y = run(x)
            y.square().sum().backward()
            assert x.grad is not None
            found.append(gradients(module) | {"y": y.detach(), "x": x.grad.clone()})
        eager, graph = found
        assert eager.keys() == graph.keys()
        assert all(close(graph[name], t) for name, t in eager.items())


class Doubled(nn.Linear):
    """A Linear with its own forward, as quantised ones have."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_subclass_of_linear_keeps_its_class_and_its_forward() -> None:
    module = nn.Sequential(Doubled(12, 20))
    x = torch.randn(5, 12)
    base = module(x)
    adapted(module=module, target_modules=["0"])
    assert type(module[0]) is Doubled
    assert close(module(x), base + x.double() @ dense(delora_adapters(module)["0"]).T)
    remove_delora(module)
    assert torch.equal(module(x), base)


def test_an_adapter_follows_the_mode_its_layer_is_in() -> None:
    module = Net().eval()
    x = torch.randn(5, 12)
    adapted(module=module, module_dropout=0.5)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))


def test_a_base_checkpoint_loads_strictly_before_and_after_injection() -> None:
    checkpoint_of_base = values(Net())
    module = Net()
    names = list(module.state_dict())
    module.load_state_dict(checkpoint_of_base, strict=True)
    inject_delora(module, config(init_weights="residual"))
    assert [name for name in module.state_dict() if "delora" not in name] == names
    leaves = {name.rpartition(".")[2] for name in module.state_dict() if "delora" in name}
    assert leaves == {*TENSOR_NAMES, *INIT_TENSOR_NAMES}
    late = Net()
    inject_delora(late, config(init_weights="residual"))
    late.load_state_dict(checkpoint_of_base, strict=True)
    assert all(torch.equal(late.state_dict()[name], t) for name, t in checkpoint_of_base.items())
    late.load_state_dict(module.state_dict(), strict=True)
    assert equal(values(late), values(module))
    incomplete = {name: t for name, t in module.state_dict().items() if not name.endswith("fc1.delora_A")}
    del incomplete["fc1.delora.adapters.default.delora_A"]
    with pytest.raises(RuntimeError, match=r"Missing key.*delora_A"):
        late.load_state_dict(incomplete, strict=True)


def test_an_adapter_fits_a_base_that_was_loaded_after_injection() -> None:
    base = Net()
    late = Net()
    inject_delora(late, config())
    late.load_state_dict(base.state_dict(), strict=True)
    x = torch.randn(5, 12)
    trained = adapted(module=base)
    load_delora_state_dict(late, delora_state_dict(trained))
    assert torch.equal(late(x), trained(x))


def test_the_same_generator_gives_the_same_adapter() -> None:
    found = []
    for _ in range(2):
        module = Net()
        inject_delora(module, config(init_weights="paired"), generator=torch.Generator().manual_seed(5))
        found.append({n: t for n, t in delora_state_dict(module).items() if not n.endswith("w_norm")})
    assert equal(*found)


# ---- shapes of a real model, without its weights -------------------------------------------------


@pytest.fixture(scope="module")
def sd15_unet() -> nn.Module:
    """Stable Diffusion 1.5's UNet on the meta device."""
    with torch.device("meta"):
        unet: nn.Module = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
            sample_size=64,
        )
    return unet


@pytest.mark.parametrize("init_weights", INITS)
def test_sd15_has_128_adapted_layers_and_the_papers_number_of_parameters(
    sd15_unet: nn.Module, init_weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(inject_delora(sd15_unet, DeloraConfig(r=16, init_weights=init_weights))) == 128
    trained = [p for p in sd15_unet.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 3_188_864
    assert {p.device.type for p in trained} == {"meta"}
    print_trainable_parameters(sd15_unet)
    text = "trainable params: 3,188,864 || all params: 862,709,828 || trainable%: 0.3696"
    assert capsys.readouterr().out.strip() == text
    remove_delora(sd15_unet)


# ---- tensors in and out --------------------------------------------------------------------------


def without(tensors: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if not name.endswith(suffix)}


SPOILED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "nothing": (lambda t: {}, r"adapter does not fit Net: 9 missing (fc1.delora_A, fc1.delora_B, fc1.delora_lambda"),
    "missing": (lambda t: without(t, "fc2.delora_B"), "1 missing (fc2.delora_B)"),
    "unexpected": (lambda t: t | {"mid.delora_A": torch.ones(1)}, "1 unexpected (mid.delora_A)"),
    "wrong rank": (
        lambda t: t | {"fc1.delora_A": torch.ones(3, 12)},
        "1 of another shape (fc1.delora_A (3, 12) for (4, 12))",
    ),
    "not finite": (lambda t: t | {"fc2.delora_lambda": torch.tensor([torch.nan])}, "1 not finite (fc2.delora_lambda)"),
    "two problems": (
        lambda t: without(t, "lambda") | {"x": torch.ones(1)},
        "2 missing (fc1.delora_lambda, fc2.delora_lambda); 1 unexpected (x)",
    ),
    "another base": (
        lambda t: t | {"fc2.delora_w_norm": t["fc2.delora_w_norm"] * 1.02},
        "adapter was trained on another base than this Net: the column norms of fc2 differ by 2.0%",
    ),
}


@pytest.mark.parametrize("spoil, message", SPOILED.values(), ids=SPOILED.keys())
def test_tensors_that_do_not_fit_are_refused_and_nothing_changes(
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    module = adapted(bias="delora_only")
    before = values(module)
    tensors = {name: t + 1 if not name.endswith("w_norm") else t for name, t in delora_state_dict(module).items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_delora_state_dict(module, spoil(tensors))
    assert equal(values(module), before)
    load_delora_state_dict(module, tensors)
    assert not equal(values(module), before)


@pytest.mark.parametrize("init_weights", ["zero", "residual"])
def test_tensors_at_the_current_weight_give_the_same_output_at_weight_one(init_weights: str) -> None:
    module = adapted(init_weights=init_weights)
    other = copy.deepcopy(module)
    set_delora_adapters(module, "default", 0.4)
    load_delora_state_dict(other, delora_state_dict(module, at_current_weight=True))
    x = torch.randn(5, 12)
    assert close(other(x), module(x))


def test_a_plain_adapter_does_not_fit_a_residual_one() -> None:
    with pytest.raises(ValueError, match="6 missing"):
        load_delora_state_dict(adapted(init_weights="residual"), delora_state_dict(adapted()))


def test_another_base_is_accepted_on_request_and_the_stored_norms_are_used() -> None:
    module = adapted()
    right = {name: t.clone() for name, t in delora_state_dict(module).items()}
    foreign = {name: t * 2 if name.endswith("w_norm") else t for name, t in right.items()}
    load_delora_state_dict(module, foreign, check_base=False)
    assert torch.equal(delora_adapters(module)["fc1"].delora_w_norm, foreign["fc1.delora_w_norm"])
    load_delora_state_dict(module, right)  # the base itself is still the right one


def test_half_precision_copies_of_one_base_count_as_the_same() -> None:
    exact = adapted()
    for dtype in (torch.bfloat16, torch.float16):
        module = copy.deepcopy(exact)
        remove_delora(module)
        inject_delora(module.to(dtype), config())
        load_delora_state_dict(module, delora_state_dict(exact))


def test_asking_for_an_adapter_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapter is called 'cat'; there are: default"):
        delora_state_dict(adapted(), "cat")
    with pytest.raises(ValueError, match="this Net has no adapter"):
        delora_state_dict(Net())


@pytest.mark.parametrize("init_weights", INITS)
def test_update_norms_are_those_of_the_dense_update(init_weights: str) -> None:
    module = adapted(init_weights=init_weights)
    set_delora_adapters(module, "default", -0.6)
    for name, ratio in update_norms(module).items():
        weight = delora_layers(module)[name].weight.double()
        expected = float(dense(delora_adapters(module)[name], -0.6).norm() / weight.norm())
        assert ratio == pytest.approx(expected, rel=1e-5)
