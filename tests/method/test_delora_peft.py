"""DeLoRA against PEFT, in fp32 to 1e-6: outputs, gradients, merged weights, dropout, tensors in both directions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

from delora_diffusion import (
    DeloraConfig,
    delora_state_dict,
    inject_delora,
    load_delora_state_dict,
    merge_delora,
    set_delora_adapters,
)
from delora_diffusion.method.inject import delora_adapters

R, LAMBDA, LAYERS = 4, 6.0, ["0", "2"]
PREFIX = "base_model.model."


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def base() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 7))


def with_peft(module: nn.Module, *, kaiming: bool = False, dropout: float = 0.0) -> peft.PeftModel:
    config = peft.DeloraConfig(
        r=R, delora_lambda=LAMBDA, target_modules=LAYERS, init_weights=not kaiming, module_dropout=dropout
    )
    return peft.get_peft_model(copy.deepcopy(module), config)


def with_ours(module: nn.Module, *, init_weights: str = "zero", dropout: float = 0.0) -> nn.Module:
    module = copy.deepcopy(module)
    inject_delora(
        module,
        DeloraConfig(
            r=R, delora_lambda=LAMBDA, target_modules=LAYERS, init_weights=init_weights, module_dropout=dropout
        ),
    )
    return module


def peft_tensors(model: peft.PeftModel) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): t for name, t in peft.get_peft_model_state_dict(model).items()}


def peft_parameters(model: peft.PeftModel) -> dict[str, nn.Parameter]:
    named = model.named_parameters()
    return {n.removeprefix(PREFIX).removesuffix(".default"): p for n, p in named if "delora" in n}


def our_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    adapters = delora_adapters(module).items()
    return {f"{layer}.{leaf}": p for layer, adapter in adapters for leaf, p in adapter.named_parameters()}


def assert_same(ours: Tensor | None, theirs: Tensor | None) -> None:
    """Equal to 1e-6 of the largest value (at least 1)."""
    assert ours is not None and theirs is not None and ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * max(1.0, float(theirs.detach().abs().max())))


# ---- outputs and gradients -----------------------------------------------------------------------


def as_initialised(model: peft.PeftModel) -> None:
    """PEFT's own start: B = 0 or Kaiming."""


def random_everything(model: peft.PeftModel) -> None:
    for p in peft_parameters(model).values():
        nn.init.normal_(p)


def tiny_rows_of_A(model: peft.PeftModel) -> None:
    random_everything(model)
    for name, p in peft_parameters(model).items():
        if name.endswith("_A"):
            p.data[:2] *= 1e-6


def floored_columns_of_B(model: peft.PeftModel) -> None:
    random_everything(model)
    for name, p in peft_parameters(model).items():
        if name.endswith("_B"):
            p.data[:, 0] = 0
            p.data[:, 1] *= 1e-6


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)], ids=str)
@pytest.mark.parametrize("kaiming", [False, True], ids=["zero", "kaiming"])
@pytest.mark.parametrize("change", [as_initialised, random_everything, tiny_rows_of_A, floored_columns_of_B])
def test_outputs_and_all_gradients_are_pefts(
    change: Callable[[peft.PeftModel], None], kaiming: bool, shape: tuple[int, ...]
) -> None:
    module = base()
    theirs = with_peft(module, kaiming=kaiming)
    with torch.no_grad():
        change(theirs)
    ours = with_ours(module)
    load_delora_state_dict(ours, peft_tensors(theirs))
    x = torch.randn(shape)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_ours, y_theirs = ours(x_ours), theirs(x_theirs)
    assert_same(y_ours, y_theirs)
    direction = torch.randn_like(y_theirs)
    y_ours.backward(direction)
    y_theirs.backward(direction)
    assert_same(x_ours.grad, x_theirs.grad)
    expected = peft_parameters(theirs)
    found = our_parameters(ours)
    assert found.keys() == expected.keys()
    for name, p in found.items():
        assert_same(p.grad, expected[name].grad)


def test_two_active_adapters_add_up_as_in_peft() -> None:
    module = base()
    theirs, ours = with_peft(module, kaiming=True), with_ours(module)
    theirs.add_adapter("second", peft.DeloraConfig(r=2, delora_lambda=3.0, target_modules=["0"], init_weights=False))
    inject_delora(ours, DeloraConfig(r=2, delora_lambda=3.0, target_modules=["0"]), "second")
    for name in ("default", "second"):
        tensors = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        load_delora_state_dict(ours, {key.removeprefix(PREFIX): t for key, t in tensors.items()}, name)
    theirs.base_model.set_adapter(["default", "second"])
    set_delora_adapters(ours, ["default", "second"])
    x = torch.randn(5, 12)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("init_weights", ["zero", "kaiming"])
def test_initial_tensors_are_pefts_from_the_same_seed(init_weights: str) -> None:
    module = nn.Sequential(nn.Linear(12, 20))
    torch.manual_seed(1)
    config = peft.DeloraConfig(r=R, target_modules=["0"], init_weights=init_weights == "zero")
    theirs = peft_tensors(peft.get_peft_model(copy.deepcopy(module), config))
    torch.manual_seed(1)
    inject_delora(module, DeloraConfig(r=R, target_modules=["0"], init_weights=init_weights))
    ours = delora_state_dict(module)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- merge, and tensors in both directions -------------------------------------------------------


def test_merged_weights_are_pefts() -> None:
    module = base()
    theirs = with_peft(module, kaiming=True)
    ours = with_ours(module)
    load_delora_state_dict(ours, peft_tensors(theirs))
    merge_delora(ours, permanently=True)
    merged = theirs.merge_and_unload().state_dict()
    assert ours.state_dict().keys() == merged.keys()
    for name, weight in ours.state_dict().items():
        assert_same(weight, merged[name])


@pytest.mark.parametrize("init_weights", ["zero", "paired", "kaiming"])
def test_peft_loads_our_tensors(init_weights: str) -> None:
    module = base()
    ours, theirs = with_ours(module, init_weights=init_weights), with_peft(module, kaiming=True)
    for p in our_parameters(ours).values():
        p.data += 0.1 * torch.randn_like(p)
    tensors = {PREFIX + name: t for name, t in delora_state_dict(ours).items()}
    result = peft.set_peft_model_state_dict(theirs, tensors)
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "delora" in name]
    x = torch.randn(5, 12)
    assert_same(ours(x), theirs(x))


# ---- the paper's init, and dropout ---------------------------------------------------------------


def test_residual_is_the_current_minus_the_initial_adapter_with_the_initial_lambda_frozen() -> None:
    module = nn.Sequential(nn.Linear(12, 20))
    config = DeloraConfig(r=R, delora_lambda=LAMBDA, target_modules=["0"], init_weights="residual")
    ours = copy.deepcopy(module)
    inject_delora(ours, config)

    def as_peft(tensors: dict[str, Tensor]) -> peft.PeftModel:
        model = peft.get_peft_model(copy.deepcopy(module), peft.DeloraConfig(r=R, target_modules=["0"]))
        peft.set_peft_model_state_dict(model, {PREFIX + name: t for name, t in tensors.items()})
        return model

    plain = {name: t.clone() for name, t in delora_state_dict(ours).items() if not name.endswith("_init")}
    initial = as_peft(plain)
    for p in our_parameters(ours).values():
        p.data += torch.randn_like(p)
    current = as_peft({name: t for name, t in delora_state_dict(ours).items() if not name.endswith("_init")})
    assert float(delora_state_dict(ours)["0.delora_lambda_init"]) == LAMBDA

    xs = [torch.randn(5, 12).requires_grad_() for _ in range(4)]
    for x in xs[1:]:
        x.data.copy_(xs[0].data)
    y, y_current, y_initial, y_base = (m(x) for m, x in zip((ours, current, initial, module), xs, strict=True))
    assert_same(y, y_base + y_current - y_initial)
    direction = torch.randn_like(y)
    for out in (y, y_current, y_initial, y_base):
        out.backward(direction)
    grads = [x.grad for x in xs if x.grad is not None]
    assert_same(grads[0], grads[3] + grads[1] - grads[2])
    expected = peft_parameters(current)
    for name, p in our_parameters(ours).items():
        assert_same(p.grad, expected[name].grad)


@pytest.mark.parametrize("training", [True, False])
def test_module_dropout_drops_elements_of_the_input_as_peft_does(training: bool) -> None:
    module = base()
    theirs, ours = with_peft(module, kaiming=True, dropout=0.4), with_ours(module, dropout=0.4)
    load_delora_state_dict(ours, peft_tensors(theirs))
    theirs.train(training)
    ours.train(training)
    x = torch.randn(5, 12)
    outputs, gradients = [], []
    for model in (ours, theirs):
        torch.manual_seed(7)
        fed = x.clone().requires_grad_()
        outputs.append(model(fed))
        outputs[-1].square().sum().backward()
        gradients.append(fed.grad)
    assert_same(*outputs)
    assert_same(*gradients)
    undropped = with_ours(module)
    load_delora_state_dict(undropped, peft_tensors(theirs))
    assert torch.equal(outputs[0], undropped(x)) is not training


@pytest.mark.parametrize("name", ["A", "B", "lambda", "w_norm"])
def test_the_oracle_sees_a_change_in_any_tensor(name: str) -> None:
    module = base()
    theirs, ours = with_peft(module, kaiming=True), with_ours(module)
    tensors = peft_tensors(theirs) | {f"0.delora_{name}": peft_tensors(theirs)[f"0.delora_{name}"].flip(0) + 0.01}
    load_delora_state_dict(ours, tensors, check_base=False)
    x = torch.randn(5, 12)
    with pytest.raises(AssertionError):
        assert_same(ours(x), theirs(x))
