"""Adapters in attention whose projections diffusers has fused. Oracle: the same model, not fused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delora_diffusion import DeloraConfig, delora_disabled, inject_delora, merge_delora, remove_delora, unmerge_delora
from delora_diffusion.method.inject import adapted_layers, delora_layers, enable_delora

from .. import tiny, tiny_pipelines

KINDS = ("unet", "sd3", "flux")
CONFIG = DeloraConfig(r=2, delora_lambda=4.0, target_modules="all-linear", init_weights="kaiming")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    folder = tmp_path_factory.mktemp("fused")
    return {
        "unet": tiny.stable_diffusion(folder).unet,
        "sd3": tiny_pipelines.stable_diffusion_3(folder).transformer,
        "flux": tiny_pipelines.flux(folder).transformer,
    }


@pytest.fixture(params=KINDS)
def pair(bases: dict[str, nn.Module], request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, copy.deepcopy(bases[request.param]).requires_grad_(False)


def inputs(kind: str) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    if kind == "unet":
        return {"sample": noise(2, 4, 8, 8), "timestep": torch.tensor(9), "encoder_hidden_states": noise(2, 5, 16)}
    common = {"encoder_hidden_states": noise(2, 5, 32 if kind == "sd3" else 16), "timestep": torch.tensor([0.5, 0.2])}
    if kind == "sd3":
        return {"hidden_states": noise(2, 4, 8, 8), "pooled_projections": noise(2, 32), **common}
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    return {"hidden_states": noise(2, 16, 16), "pooled_projections": noise(2, 16), **common, **ids}


@torch.no_grad()
def out(kind: str, module: Any) -> Tensor:
    result: Tensor = module(**inputs(kind), return_dict=False)[0]
    return result


def close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def inject(module: nn.Module) -> list[str]:
    return inject_delora(module, CONFIG, generator=torch.Generator().manual_seed(0))


def test_adapters_act_whether_projections_are_fused_before_or_after_they_come(pair: tuple[str, Any]) -> None:
    kind, module = pair
    base, twin = out(kind, module), copy.deepcopy(module)
    layers = inject(module)
    expected = out(kind, module)
    assert not torch.allclose(expected, base, atol=1e-3)
    module.fuse_qkv_projections()
    close(out(kind, module), expected)
    twin.fuse_qkv_projections()
    assert inject(twin) == layers, "the fused copies are no layers to adapt"
    close(out(kind, twin), expected)
    close(out(kind, copy.deepcopy(twin)), expected)
    with delora_disabled(twin):
        close(out(kind, twin), base)
    twin.unfuse_qkv_projections()
    close(out(kind, twin), expected)
    twin.fuse_qkv_projections()
    remove_delora(twin)
    close(out(kind, twin), base)
    assert not any(m._forward_hooks for m in twin.modules())


def test_merging_reaches_what_is_fused_and_undoing_it_too(pair: tuple[str, Any]) -> None:
    kind, module = pair
    base = out(kind, module)
    inject(module)
    expected = out(kind, module)
    merge_delora(module)
    module.fuse_qkv_projections()  # merged weights are copied
    fused = [m for name, m in module.named_modules() if name.rpartition(".")[2] in ("to_qkv", "to_kv", "to_added_qkv")]
    close(out(kind, module), expected)
    assert not any(m._forward_hooks for m in fused)
    with delora_disabled(module):
        close(out(kind, module), base)
    close(out(kind, module), expected)
    unmerge_delora(module)
    close(out(kind, module), expected)
    enable_delora(module, False)
    close(out(kind, module), base)
    enable_delora(module)
    merge_delora(module)
    close(out(kind, module), expected)
    remove_delora(module)
    close(out(kind, module), base)


def test_a_bias_trained_in_full_is_read_where_projections_are_fused(bases: dict[str, nn.Module]) -> None:
    module: Any = copy.deepcopy(bases["flux"]).requires_grad_(False)
    inject_delora(module, DeloraConfig(r=2, bias="delora_only", init_weights="kaiming"))
    with torch.no_grad():
        for linear, _ in adapted_layers(module):
            linear.bias.add_(0.5)
    expected = out("flux", module)
    module.fuse_qkv_projections()
    enable_delora(module, False)
    enable_delora(module)
    close(out("flux", module), expected)


def test_fusing_after_compiling_is_told_or_acted_on(bases: dict[str, nn.Module]) -> None:
    module: Any = copy.deepcopy(bases["flux"]).requires_grad_(False)
    inject(module)
    expected = out("flux", module)
    compiled = torch.compile(module, backend="eager")
    module.fuse_qkv_projections()
    close(out("flux", compiled), expected)
    torch._dynamo.reset()


def test_every_adapted_projection_is_in_one_place_or_two(bases: dict[str, nn.Module]) -> None:
    module: Any = copy.deepcopy(bases["unet"])
    inject(module)
    parts = {id(part) for place in module._delora.fused for part in place.parts}
    named = {id(m) for name, m in delora_layers(module).items() if name.endswith(("to_q", "to_k", "to_v"))}
    assert parts == named and len(parts) > 4
