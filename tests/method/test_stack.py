"""Factors formed once in a forward pass: for whom, for how long, and at what cost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from delora_diffusion import (
    DeloraConfig,
    inject_delora,
    merge_delora,
    remove_delora,
    set_delora_adapters,
    unmerge_delora,
)
from delora_diffusion.method import stack
from delora_diffusion.method.delora import form_factors
from delora_diffusion.method.forward_pass import ForwardPass
from delora_diffusion.method.inject import adapted_layers, delora_adapters, delora_disabled


class Block(nn.Module):
    """Two layers of one shape, one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12)
        self.back = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.back(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))))
        return out


class Net(nn.Module):
    """Blocks, checkpointed one by one if asked, that take a scale as diffusers' denoisers do."""

    def __init__(self, *, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor, cross_attention_kwargs: dict[str, Any] | None = None) -> Tensor:
        for block in self.blocks:
            if self.use_reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def net(*, use_reentrant: bool | None = None, **fields: Any) -> Net:
    torch.manual_seed(0)
    module = Net(use_reentrant=use_reentrant)
    config = {"r": 2, "delora_lambda": 3.0, "target_modules": "all-linear", "init_weights": "kaiming", **fields}
    inject_delora(module, DeloraConfig(**config), generator=torch.Generator().manual_seed(1))
    return module


def gradients(module: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    loss().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def alone(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every layer form its own factors, by plain autograd: the oracle."""
    monkeypatch.setattr(stack, "waits", lambda module: True)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], *, to: float = 5e-7) -> None:
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= to * max(1.0, float(value.norm())), name


X = torch.linspace(-1, 1, 40).reshape(5, 8)


@pytest.mark.parametrize("init_weights", ["kaiming", "residual", "paired"])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradients_are_those_of_plain_autograd_layer_by_layer(
    init_weights: str, use_reentrant: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = net(init_weights=init_weights, use_reentrant=use_reentrant)
    for p in module.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.rand_like(p)
    x = X.clone().requires_grad_()
    found = gradients(module, lambda: module(x).square().sum())
    alone(module, monkeypatch)
    assert_equal(found, gradients(module, lambda: module(x).square().sum()))


def test_lengths_below_the_floor_and_frozen_lambdas_have_autograds_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    module = net(init_weights="zero")
    for adapter in delora_adapters(module).values():
        adapter.delora_lambda.requires_grad_(False)
        adapter.delora_A.data[0] *= 1e-6
    found = gradients(module, lambda: module(X).square().sum())
    assert not any("lambda" in name for name in found)
    alone(module, monkeypatch)
    assert_equal(found, gradients(module, lambda: module(X).square().sum()), to=1e-5)


def test_what_is_computed_again_is_what_was_computed_whatever_has_changed_since() -> None:
    module = net(use_reentrant=False)
    x = X.clone().requires_grad_()
    expected = gradients(module, lambda: module(x).square().sum())

    def meanwhile(change: Callable[[], None]) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            value = module(x).square().sum()
            change()
            return value

        return loss

    for change in (lambda: set_delora_adapters(module, "default", 0.3), lambda: set_delora_adapters(module, [])):
        set_delora_adapters(module, "default")
        assert_equal(gradients(module, meanwhile(change)), expected, to=0)


def test_two_forwards_before_one_backward_each_have_their_own_factors() -> None:
    module = net(use_reentrant=False)
    x = X.clone().requires_grad_()

    def at(strength: float) -> Tensor:
        set_delora_adapters(module, "default", strength)
        return module(x).square().sum()

    parts = [gradients(module, lambda strength=strength: at(strength)) for strength in (1.0, 0.3)]
    together = gradients(module, lambda: at(1.0) + at(0.3))
    assert_equal(together, {name: parts[0][name] + parts[1][name] for name in parts[0]}, to=1e-6)


def test_a_pass_is_forgotten_with_its_graph() -> None:
    module = net()
    layers = [layer for _, layer in adapted_layers(module)]

    def alive() -> int:
        return sum(layers[0] in one.acting for one in ForwardPass.live)

    loss = module(X).sum()
    assert alive() == 1 and not any(layer.factors for layer in layers)
    loss.backward()
    del loss
    assert alive() == 0
    with torch.no_grad():
        module(X)
    assert alive() == 0


def test_a_submodule_called_by_itself_forms_its_own() -> None:
    module = net()
    block = module.blocks[1]
    expected: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, args, out: expected.extend([args[0].detach(), out.detach()]))
    module(X)
    handle.remove()
    torch.testing.assert_close(block(expected[0]), expected[1], rtol=1e-6, atol=1e-6)


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    module = net()
    with pytest.raises(RuntimeError):
        module(torch.zeros(2, 5))
    assert not any(layer.factors for _, layer in adapted_layers(module))


@pytest.mark.parametrize("name", stack.SCALE_ARGUMENTS)
def test_the_scale_of_a_call_is_for_that_call(name: str) -> None:
    module = net()
    module.forward = lambda x, **_: Net.forward(module, x)  # type: ignore[method-assign]
    with torch.no_grad():
        halved, full, zero = module(X, **{name: {"scale": 0.5}}), module(X), module(X, **{name: {"scale": 0.0}})
        set_delora_adapters(module, "default", 0.5)
        torch.testing.assert_close(module(X), halved)
        with delora_disabled(module):
            torch.testing.assert_close(module(X), zero)
    assert not torch.allclose(halved, full)


def test_offloaded_modules_form_their_factors_where_the_weights_have_come() -> None:
    from accelerate import cpu_offload, cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    module = net().requires_grad_(False)
    expected = module(X)
    _, hook = cpu_offload_with_hook(module, torch.device("cpu"))
    assert torch.allclose(module(X), expected, atol=1e-6)
    assert torch.allclose(module(X, cross_attention_kwargs={"scale": 0.0}), Net.forward(plain(module), X), atol=1e-6)
    hook.remove()
    cpu_offload(module, torch.device("cpu"))
    assert torch.allclose(module(X), expected, atol=1e-6)
    remove_hook_from_module(module, recurse=True)


def test_factors_are_formed_together_after_a_pipelines_cache_context(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    module, calls = net(), list[int]()
    monkeypatch.setattr(stack, "form_factors", lambda *args, **kw: calls.append(1) or form_factors(*args, **kw))
    registry = HookRegistry.check_if_exists_or_initialize(module)  # as `module.cache_context(...)` leaves it
    module(X)
    assert calls == [1] * 3, "one call a shape"
    registry.register_hook(ModelHook(), "brings the weights, for all we know")
    module(X)
    assert calls == [1] * 3


def plain(module: Net) -> Net:
    twin = copy.deepcopy(module)
    remove_delora(twin)
    return twin


def test_a_linear_may_be_called_by_keyword() -> None:
    module = net()
    assert torch.equal(module.blocks[0].a(input=X), module.blocks[0].a(X))


def test_merged_layers_have_no_hooks_and_get_them_back() -> None:
    module = net()
    expected = module(X)
    merge_delora(module)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    assert sum(hooks) == 0
    torch.testing.assert_close(module(X), expected, rtol=1e-5, atol=1e-5)
    unmerge_delora(module)
    assert torch.equal(module(X), expected)
    inject_delora(module, DeloraConfig(r=2, target_modules=["a"]), "other")
    set_delora_adapters(module, ["default", "other"])
    merge_delora(module, "default")
    assert sum(bool(m._forward_hooks) for m in module.modules()) == 3 + 1, "those of the other, and the module's"


def test_a_module_travels_with_its_adapters() -> None:
    module = net()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(X), module(X))
        set_delora_adapters(twin, "default", 0.0)
        assert not torch.equal(twin(X), module(X))


def test_compiled_blocks_read_the_factors_and_are_not_compiled_again_for_a_strength() -> None:
    module = net()
    expected = [module(X)]
    set_delora_adapters(module, "default", 0.2)
    expected.append(module(X))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):
        for block in module.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        for strength, wanted in zip((1.0, 0.2), expected, strict=True):
            set_delora_adapters(module, "default", strength)
            torch.testing.assert_close(module(X), wanted, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", [None, False])
def test_compiled_blocks_give_the_gradients_of_plain_ones(use_reentrant: bool | None) -> None:
    """Under checkpointing too: a compiled block that is computed again finds no factors of its forward pass."""
    plain = net(use_reentrant=use_reentrant)
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for module in (plain, compiled):
        module(X.clone().requires_grad_()).square().sum().backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        if one.grad is not None or other.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_an_adapter_that_comes_after_compiling_acts() -> None:
    """Dynamo does not see that a module has got a hook."""
    module = Net()
    for block in module.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    base = module(X)
    inject_delora(module, DeloraConfig(r=2, delora_lambda=3.0, target_modules="all-linear", init_weights="kaiming"))
    assert not torch.allclose(module(X), base)
    torch._dynamo.reset()


class Counting(TorchDispatchMode):
    """Counts the operations that do something: views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += not (func.is_view or func.overloadpacket.__name__ in ("_unsafe_view", "detach", "alias"))
        return func(*args, **(kwargs or {}))


def count(module: nn.Module, x: Tensor) -> int:
    module(x).square().sum().backward()
    module.zero_grad()
    x.grad = None
    with Counting() as counting:
        module(x).square().sum().backward()
    module.zero_grad()
    x.grad = None
    return counting.seen


def test_an_adapter_adds_seven_operations_to_a_layer_and_forty_to_a_shape() -> None:
    def chain(length: int) -> tuple[nn.Module, nn.Module]:
        base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(length))).requires_grad_(False)
        adapted = copy.deepcopy(base)
        inject_delora(adapted, DeloraConfig(r=2, target_modules="all-linear", init_weights="kaiming"))
        for adapter in delora_adapters(adapted).values():
            adapter.delora_lambda.requires_grad_(False)
        return base, adapted

    x = X.clone().requires_grad_()
    added = {n: count(chain(n)[1], x) - count(chain(n)[0], x) for n in (4, 24)}
    per_layer = (added[24] - added[4]) / 20
    assert per_layer <= 7 and added[4] - 4 * per_layer <= 40


def test_all_adapters_of_a_shape_are_formed_at_once() -> None:
    adapters = [adapter for name, adapter in delora_adapters(net()).items() if name.endswith((".a", ".b"))]
    downs, ups = form_factors(adapters, dtype=torch.float32)
    for adapter, down, up in zip(adapters, downs, ups, strict=True):
        expected = adapter.factors()
        torch.testing.assert_close(down, expected.down)
        torch.testing.assert_close(up, expected.up)
