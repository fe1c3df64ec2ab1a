"""Convolutions, embeddings and GPT-2's Conv1D: the oracle is the formula on their weight as a matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from delora_diffusion import (
    DeloraConfig,
    DeloraConfigError,
    DeloraModel,
    delora_state_dict,
    export_peft,
    inject_delora,
    load_delora_state_dict,
    merge_delora,
    remove_delora,
    save_delora_weights,
    unmerge_delora,
)
from delora_diffusion.adapters.peft import PeftFormatError
from delora_diffusion.method.inject import delora_adapters

Layer = tuple[Callable[[], nn.Module], Callable[[], Tensor]]


class Scaled(nn.Embedding):
    """As in Gemma and BART: the vectors are multiplied once they are read."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


def picture(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.tensor([[1, 4, 4], [0, 9, 1]])


LAYERS: dict[str, Layer] = {
    "conv": (lambda: nn.Conv2d(3, 5, 3, padding=1), picture(2, 3, 6, 6)),
    "strided, reflecting": (lambda: nn.Conv2d(3, 5, 3, 2, 1, padding_mode="reflect"), picture(2, 3, 6, 6)),
    "dilated, of one picture": (lambda: nn.Conv2d(3, 4, (3, 2), dilation=2, bias=False), picture(3, 8, 8)),
    "one by one": (lambda: nn.Conv2d(6, 4, 1), picture(1, 6, 4, 4)),
    "Conv1D": (lambda: Conv1D(7, 5), picture(2, 4, 5)),
    "embedding": (lambda: nn.Embedding(10, 6, padding_idx=0), tokens),
    "scaled embedding": (lambda: Scaled(10, 6), tokens),
}


@pytest.fixture(params=list(LAYERS))
def layer(request: pytest.FixtureRequest) -> Layer:
    return LAYERS[request.param]


def adapted(make: Callable[[], nn.Module], **fields: object) -> nn.Module:
    """A layer in a module, with an adapter that looks trained."""
    torch.manual_seed(0)
    module = nn.Sequential(make())
    inject_delora(module, DeloraConfig(r=2, delora_lambda=3.0, target_modules=["0"], **fields))
    with torch.no_grad():
        for p in delora_adapters(module)["0"].parameters():
            p += 0.3 * torch.randn_like(p)
    return module


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """W (out, in): independent of the code under test."""
    if isinstance(layer, nn.Conv2d):
        return weight.reshape(weight.shape[0], -1)
    return weight.T


def with_update(module: nn.Module) -> nn.Module:
    """The plain layer with dW added to its weight, from the adapter's tensors and the paper's formula."""
    adapter, plain = delora_adapters(module)["0"], copy.deepcopy(module)
    remove_delora(plain)
    weight = plain[0].weight
    W = as_matrix(plain[0], weight.detach())
    A, B, w = adapter.delora_A.detach(), adapter.delora_B.detach(), W.norm(dim=0)
    torch.testing.assert_close(adapter.delora_w_norm, w)
    xi = adapter.delora_lambda.detach() / len(A) / (A.norm(dim=1) * B.norm(dim=0))
    dW = B @ torch.diag(xi) @ A @ torch.diag(w)
    assert 0 < float(dW.norm()) <= abs(float(adapter.delora_lambda)) * float(w.max()) + 1e-6
    new = (W + dW).reshape(weight.shape) if isinstance(plain[0], nn.Conv2d) else (W + dW).T
    weight.data = new.contiguous()
    return plain


def test_the_layer_does_what_the_formula_says_of_its_matrix(layer: Layer) -> None:
    make, inputs = layer
    module = adapted(make)
    expected = with_update(module)(inputs())
    torch.testing.assert_close(module(inputs()), expected)
    torch.testing.assert_close(module[0](inputs()), expected)  # by itself, out of the module's forward
    before = module[0].weight.detach().clone()
    merge_delora(module)
    torch.testing.assert_close(module(inputs()), expected)
    unmerge_delora(module)
    assert torch.equal(module[0].weight, before)
    merge_delora(module, permanently=True, dtype=torch.float64)
    torch.testing.assert_close(module.double()(inputs().double() if inputs().is_floating_point() else inputs()),
                               expected.double(), rtol=1e-5, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("init_weights", ["zero", "residual", "paired"])
def test_it_starts_as_the_base_and_the_gradient_is_the_formulas(layer: Layer, init_weights: str) -> None:
    make, inputs = layer
    torch.manual_seed(0)
    module = nn.Sequential(make())
    base = module(inputs())
    inject_delora(module, DeloraConfig(r=2, target_modules=["0"], init_weights=init_weights))
    torch.testing.assert_close(module(inputs()), base)
    module = adapted(make)
    adapter = delora_adapters(module)["0"]
    module(inputs()).square().sum().backward()
    found = [p.grad for p in (adapter.delora_A, adapter.delora_B, adapter.delora_lambda)]
    plain = copy.deepcopy(module)
    remove_delora(plain)
    A, B, lam = (p.detach().requires_grad_() for p in (adapter.delora_A, adapter.delora_B, adapter.delora_lambda))
    W = as_matrix(plain[0], plain[0].weight.detach())
    dW = B @ torch.diag(lam / 2 / (A.norm(dim=1) * B.norm(dim=0))) @ A @ torch.diag(W.norm(dim=0))
    shape = plain[0].weight.shape
    weight = (W + dW).reshape(shape) if isinstance(plain[0], nn.Conv2d) else (W + dW).T
    torch.func.functional_call(plain[0], {"weight": weight}, (inputs(),)).square().sum().backward()
    for ours, theirs in zip(found, (A.grad, B.grad, lam.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_half_precision_autocast_checkpointing_and_dropout(layer: Layer) -> None:
    make, inputs = layer
    module = adapted(make)
    expected = module(inputs())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(inputs()).float(), expected, rtol=0.1, atol=0.1)
    kept = checkpoint(module, inputs(), use_reentrant=False)
    torch.testing.assert_close(kept, expected)
    kept.sum().backward()
    with_dropout = adapted(make, module_dropout=0.5)
    assert not torch.equal(with_dropout(inputs()), with_dropout(inputs()))
    assert torch.equal(with_dropout.eval()(inputs()), with_dropout(inputs()))
    half = adapted(make).bfloat16()
    x = inputs().bfloat16() if inputs().is_floating_point() else inputs()
    torch.testing.assert_close(half(x).float(), expected, rtol=0.1, atol=0.1)


def test_files_hold_it_and_peft_cannot(layer: Layer, tmp_path: Path) -> None:
    make, inputs = layer
    module = adapted(make)
    tensors = delora_state_dict(module)
    other = adapted(make)
    with torch.no_grad():
        for p in delora_adapters(other)["0"].parameters():
            p.zero_()
    load_delora_state_dict(other, tensors)
    assert torch.equal(other(inputs()), module(inputs()))
    save_delora_weights(tmp_path / "native", {"unet": module})
    torch.manual_seed(0)
    opened = DeloraModel.from_pretrained(nn.Sequential(make()), tmp_path / "native")
    assert torch.equal(opened(inputs()), module(inputs()))
    for source in (module, tmp_path / "native"):
        with pytest.raises(PeftFormatError, match=r"PEFT's DeLoRA adapts nn\.Linear only.*keep the native file"):
            export_peft(source, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    opened.save_pretrained(tmp_path / "again")
    torch.manual_seed(0)
    again = DeloraModel.from_pretrained(nn.Sequential(make()), tmp_path / "again")
    assert torch.equal(again(inputs()), module(inputs()))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "a Conv2d in 2 groups"),
        (lambda: nn.Embedding(4, 3, max_norm=1.0), "an? Embedding that changes its weight"),
        (lambda: nn.ConvTranspose2d(4, 4, 3), "a ConvTranspose2d; DeLoRA adapts nn.Linear, nn.Conv2d"),
        (lambda: nn.LayerNorm(4), "a LayerNorm; DeLoRA adapts nn.Linear, nn.Conv2d"),
    ],
)
def test_what_no_kind_covers_is_refused(make: Callable[[], nn.Module], why: str) -> None:
    module = nn.Sequential(make(), nn.Linear(2, 2))
    with pytest.raises(DeloraConfigError, match=why):
        inject_delora(module, DeloraConfig(target_modules=["0", "1"]))
    assert not any("delora" in name for name, _ in module.named_modules())


def test_the_rows_of_other_tokens_are_not_formed() -> None:
    module = adapted(lambda: nn.Embedding(50_000, 4))
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not func.is_view:
                seen.append(result.numel())
            return result

    with torch.no_grad(), Watch():
        module(tokens())
    assert max(seen) < 1000


def test_gpt2_by_its_default_layers_and_a_tied_embedding() -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()
    ids = torch.tensor([[1, 2, 3]])
    model = DeloraModel(copy.deepcopy(base), DeloraConfig(r=2, init_weights="kaiming"))
    assert list(delora_adapters(model)) == ["transformer.h.0.attn.c_attn"]
    acting = model(ids).logits
    assert not torch.allclose(acting, base(ids).logits)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, acting)
    tied = DeloraModel(copy.deepcopy(base), DeloraConfig(r=2, target_modules=["wte"], init_weights="kaiming"))
    with pytest.raises(ValueError, match=r"transformer\.wte shares its weight with lm_head\.weight"):
        tied.merge_adapter()
