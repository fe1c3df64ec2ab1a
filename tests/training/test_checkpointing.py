"""Gradient checkpointing and swapped blocks in every denoiser: the same gradients from less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from delora_diffusion.base.latents import posterior
from delora_diffusion.base.swap import swap_blocks, swappable, swapped_blocks
from delora_diffusion.families import Setting, family_of
from delora_diffusion.method.config import DeloraConfig
from delora_diffusion.method.inject import delora_adapters, inject_delora
from delora_diffusion.method.targets import excluding

from ..tiny_families import BUILDERS, build


def gradients(pipe: Any, x_t: Tensor, cond: Any, setting: Setting) -> tuple[dict[str, Tensor], int]:
    """Gradients of the adapters, and the bytes of all tensors that are kept for them and are no weights."""
    family = family_of(pipe)
    denoiser: nn.Module = getattr(pipe, family.denoiser)
    denoiser.zero_grad()
    own = {t.untyped_storage().data_ptr() for t in (*denoiser.parameters(), *denoiser.buffers())}
    kept: list[Tensor] = []  # holding them keeps their addresses apart

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    torch.manual_seed(3)  # of the dropout
    t = torch.full([len(x_t)], 500.0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = family.predict(denoiser, x_t, t, cond, setting).square().mean()
    sizes = {k.untyped_storage().data_ptr(): k.untyped_storage().nbytes() for k in kept}
    loss.backward()
    found = {n: p.grad.clone() for n, p in denoiser.named_parameters() if p.grad is not None}
    return found, sum(size for address, size in sizes.items() if address not in own)


def swap_all(denoiser: Any, blocks: dict[str, nn.Module]) -> list[tuple[str, set[str]]]:
    """Swap these blocks; returns a list that every call of one is added to, with those that have a place then."""
    swap_blocks(denoiser, list(blocks.values()), torch.device("cpu"))
    calls: list[tuple[str, set[str]]] = []
    home = {name: address_of(block) for name, block in blocks.items()}

    def note(called: str) -> None:
        calls.append((called, {name for name, block in blocks.items() if address_of(block) != home[name]}))

    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda module, args, name=name: note(name))
    return calls


def address_of(block: nn.Module) -> int:
    (address,) = {owner._parameters[key].untyped_storage().data_ptr() for owner, key in swappable(block)}  # type: ignore
    return int(address)


@pytest.mark.parametrize("kind", BUILDERS)
def test_gradients_are_the_same_and_less_is_kept(kind: str, tmp_path: Path) -> None:
    side = {"lumina2": 64, "sana": 64}.get(kind, 32)
    pipe = build(kind, tmp_path)
    family = family_of(pipe)
    denoiser = getattr(pipe, family.denoiser)
    dead = excluding(None, family.dead_layers(family.denoiser, denoiser))
    config = DeloraConfig(r=2, exclude_modules=dead, init_weights="kaiming", module_dropout=0.2)
    inject_delora(denoiser, config, generator=torch.Generator().manual_seed(1))
    denoiser.train()
    with torch.no_grad():
        cond = family.encode_prompt(pipe, ["a dog"])
        x_t = torch.randn_like(posterior(pipe.vae, torch.zeros(1, 3, side, side))[0])
    plain, all_kept = gradients(pipe, x_t, cond, Setting(side, side))
    called: list[nn.Module] = []

    def checkpointed(module: nn.Module, *args: Any) -> Any:
        called.append(module)
        return checkpoint(module.__call__, *args, use_reentrant=False)

    denoiser.enable_gradient_checkpointing(checkpointed)
    saving, less_kept = gradients(pipe, x_t, cond, Setting(side, side))
    directions = {f"{name}.delora_{part}" for name in delora_adapters(denoiser) for part in "AB"}
    assert directions <= {name.replace(".delora.adapters.default.", ".") for name in plain}
    assert plain.keys() == saving.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))
    assert any(gradient.any() for gradient in plain.values())
    assert less_kept < 0.75 * all_kept

    # ---- the blocks in the host's memory: those that checkpointing calls, two of them at a time here, and bit for bit
    blocks = swapped_blocks(denoiser, family, len(called))
    assert set(blocks.values()) == set(called)
    first, _ = next(iter(denoiser.named_parameters()))  # tells the device
    assert not any(first.startswith(f"{name}.") for name in blocks)
    calls = swap_all(denoiser, blocks)
    for _ in range(2):  # the second time the order is known, and blocks come before they are called
        swapped, _ = gradients(pipe, x_t, cond, Setting(side, side))
        assert all(torch.equal(swapped[name], gradient) for name, gradient in saving.items())
    counts = {name: sum(one == name for one, _ in calls) for name in blocks}
    assert set(counts.values()) <= {2, 4} and max(counts.values()) == 4  # no gradient goes through a UNet's first part
    assert all(name in there and len(there) <= 2 for name, there in calls)
