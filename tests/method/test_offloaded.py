"""Adapters in modules whose weights accelerate keeps elsewhere. Oracle: the same module, all of it in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

from delora_diffusion import DeloraConfig, delora_disabled, inject_delora, merge_delora, remove_delora, unmerge_delora
from delora_diffusion.method.state import delora_state_dict, load_delora_state_dict

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
CONFIG = DeloraConfig(r=2, delora_lambda=3.0, target_modules="all-linear", init_weights="kaiming")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(3)
    return Net().requires_grad_(False)


def adapted() -> Net:
    module = net()
    inject_delora(module, CONFIG, generator=torch.Generator().manual_seed(1))
    return module.requires_grad_(False)


@pytest.fixture(params=["memory", "disk"])
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[nn.Module], None]:
    def to_memory(module: nn.Module) -> None:
        cpu_offload(module, torch.device("cpu"))

    def to_disk(module: nn.Module) -> None:
        disk_offload(module, tmp_path / "away", torch.device("cpu"))

    return to_memory if request.param == "memory" else to_disk


def test_a_file_is_loaded_into_an_offloaded_module(offload: Callable[[nn.Module], None]) -> None:
    there, module = adapted(), net()
    tensors = delora_state_dict(there)
    offload(module)
    inject_delora(module, CONFIG)
    report = load_delora_state_dict(module, tensors)
    assert report.base_off is not None and report.base_off < 1e-6
    assert torch.equal(module(X), there(X))
    saved = delora_state_dict(module)
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    remove_delora(module)
    assert torch.equal(module(X), net()(X))


def test_another_base_is_told_when_it_is_offloaded(offload: Callable[[nn.Module], None]) -> None:
    module = net()
    module.first.weight.mul_(1.1)
    offload(module)
    inject_delora(module, CONFIG)
    with pytest.raises(ValueError, match="another base"):
        load_delora_state_dict(module, delora_state_dict(adapted()))


def test_an_adapter_that_was_there_before_offloading_is_saved(offload: Callable[[nn.Module], None]) -> None:
    module, there = adapted(), adapted()
    offload(module)
    assert torch.equal(module(X), there(X))
    for name, tensor in delora_state_dict(there).items():
        assert torch.equal(delora_state_dict(module)[name], tensor)


@pytest.mark.parametrize("first", ["adapter", "offload"])
def test_offloaded_weights_are_merged_where_they_are_kept(first: str) -> None:
    expected, base = adapted()(X), net()
    module = adapted() if first == "adapter" else copy.deepcopy(base)
    cpu_offload(module, torch.device("cpu"))
    if first == "offload":
        inject_delora(module, CONFIG, generator=torch.Generator().manual_seed(1))
    merge_delora(module)
    torch.testing.assert_close(module(X), expected)
    with delora_disabled(module):
        assert torch.equal(module(X), base(X))
    torch.testing.assert_close(module(X), expected)
    unmerge_delora(module)
    assert torch.equal(module(X), expected)
    merge_delora(module, permanently=True)
    remove_hook_from_module(module, recurse=True)
    torch.testing.assert_close(module(X), expected)


def test_what_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    module: Any = adapted()
    expected = module(X)
    disk_offload(module, tmp_path, torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded to disk"):
        merge_delora(module)
    assert torch.equal(module(X), expected)
    module = adapted()
    cpu_offload(module, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"first is offloaded and cannot become torch\.float16"):
        merge_delora(module, permanently=True, dtype=torch.float16)
    with pytest.raises(ValueError, match="bias is offloaded"):
        inject_delora(module, DeloraConfig(target_modules=["first"], bias="all"), "other")
    outline = Net().to("meta")
    inject_delora(outline, CONFIG)
    assert all(tensor.is_meta for tensor in delora_state_dict(outline).values())
