"""The weight of a layer as plain numbers, also where bitsandbytes or torchao keep it quantised.

A quantised Linear carries an adapter as any other does. What differs is read here: W itself, its column norms, its
precision, and how to be rid of the quantisation.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightKindError
from .kinds import Host, known_kind
from .offloaded import stored

#: Half precision and 8 bits shift a column norm by less than this; another fine-tune of the same model by far more.
NORM_TOLERANCE = 5e-3
#: 4 bits shift it by this over the root of the rows, at most: the errors of a column's entries average out.
_NORM_SHIFT_4BIT = 0.25
#: The sixteen values of NF4 (Dettmers et al. 2023, appendix E).
_NF4 = (-1.0, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0.0,
        0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1.0)  # fmt: skip


def is_quantised(linear: Host) -> bool:
    """Whether a layer's weight is kept by bitsandbytes, torchao or the like, in few bits and scales."""
    return not linear.weight.is_floating_point() or type(linear.weight.data) is not Tensor


def base_weight(linear: Host) -> Tensor:
    """The frozen weight as the matrix W (out, in) in fp32: unmerged, and dequantised where the layer is quantised.

    Raises:
        TypeError: a quantised weight of a kind that cannot be read.
    """
    layer: Any = getattr(linear, "delora", None)
    current = stored(linear, "weight")
    kept = current if layer is None or layer.base_weight is None else layer.base_weight
    plain: Tensor = _plain(linear, kept).detach().to(current.device).float()
    return known_kind(linear).matrix(plain)


def _plain(linear: Host, weight: Any) -> Tensor:
    state = getattr(weight, "quant_state", None)
    found: Tensor = weight
    if state is not None:  # bitsandbytes, 4 bits
        from bitsandbytes.functional import dequantize_4bit

        data = weight.data.to(state.absmax.device)  # a weight may wait in the host's memory, its scales do not
        found = dequantize_4bit(*_unpacked(data, copy.copy(state)))
    elif weight.dtype == torch.int8 and hasattr(weight, "SCB"):  # bitsandbytes, 8 bits
        owner: Any = linear  # the first call takes the scales from the weight to the layer
        scales = owner.state.SCB if weight.SCB is None else weight.SCB
        found = weight.data * (scales.to(weight.device) / 127)[:, None]
    elif type(weight.data) is not Tensor and hasattr(weight, "dequantize"):  # torchao and other tensor subclasses
        found = weight.dequantize()
    if not found.is_floating_point():
        raise WeightKindError(
            f"cannot read the weight of a {type(linear).__name__} ({found.dtype}); "
            f"plain, torchao and bitsandbytes Linear layers can be adapted"
        )
    return found


def column_norms(linear: Host) -> Tensor:
    """w_j = |W[:, j]| (in,) in fp32, of the weight before it was quantised where that is known (`note_norms`)."""
    known: Tensor | None = linear.__dict__.get("unquantised_norms")
    if known is not None:
        return known.to(stored(linear, "weight").device)
    norms: Tensor = torch.linalg.vector_norm(base_weight(linear), dim=0)
    return norms


def note_norms(linear: Host, norms: Tensor) -> None:
    """Let a quantised layer know the column norms (in,) that its weight had; no file of the layer holds them."""
    linear.__dict__["unquantised_norms"] = norms


def norms_off(linear: Host, norms: Tensor) -> tuple[float, bool]:
    """How far column norms (in,) are from a layer's, relative to their size, and whether they can be of its weight.

    Where the layer is quantised to 4 bits and only knows what is left of its weight, they may be further off; where it
    is not, they may have been read from the same weight in NF4: then they are compared with that.
    """
    here = column_norms(linear)
    off = _relative(norms, here)
    close = off <= NORM_TOLERANCE
    if not close and off <= _NORM_SHIFT_4BIT / known_kind(linear).outputs(linear) ** 0.5:
        weight: Any = linear.weight
        blurred = getattr(weight, "quant_state", None) is not None and "unquantised_norms" not in linear.__dict__
        close = blurred or _relative(norms, _nf4_norms(base_weight(linear))) <= NORM_TOLERANCE
    return off, close


def _relative(norms: Tensor, here: Tensor) -> float:
    size = torch.linalg.vector_norm(here).clamp(min=torch.finfo(here.dtype).tiny)
    return float(torch.linalg.vector_norm(norms.to(here) - here) / size)


def _nf4_norms(weight: Tensor) -> Tensor:
    """Column norms (in,) of W (out, in) rounded to NF4: blocks of 64 entries, in units of the largest of each."""
    count = weight.numel()
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -count % 64)).view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    values = torch.tensor(_NF4, device=weight.device)
    nearest = torch.bucketize(blocks / scale, (values[1:] + values[:-1]) / 2)
    rounded = (values[nearest] * scale).flatten()[:count].view_as(weight)
    norms: Tensor = torch.linalg.vector_norm(rounded, dim=0)
    return norms


def weight_dtype(linear: Host) -> torch.dtype:
    """The precision in which a layer computes: its weight's, or what bitsandbytes has quantised that from."""
    weight: Any = linear.weight
    if weight.is_floating_point():
        found: torch.dtype = weight.dtype
    elif getattr(weight, "quant_state", None) is not None:
        found = getattr(weight.quant_state, "original_dtype", weight.quant_state.dtype)
    else:
        bias: Any = getattr(linear, "bias", None)
        found = torch.float32 if bias is None else bias.dtype
    return found


def keep_unpacked(module: nn.Module) -> list[nn.Module]:
    """Let 4-bit layers of bitsandbytes keep the order of their numbers, and bring back what has left it.

    On processors with AVX512-BF16 a call without gradients packs a weight for a kernel of its own, which no gradient
    passes, and whose scales are rounded to bf16.

    Returns:
        The layers that would pack; `may_pack` lets them again.
    """
    packing = [part for part in module.modules() if getattr(part, "support_avx512bf16_for_cpu", False)]
    for part in packing:
        weight: Any = part.weight
        if weight.quant_state is not None:
            weight.data, weight.quant_state = _unpacked(weight.data, weight.quant_state)
        may_pack(part, False)
    return packing


def may_pack(part: nn.Module, allowed: bool = True) -> None:
    part.support_avx512bf16_for_cpu = allowed  # type: ignore[assignment]


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A 4-bit weight in the order of files; `state` is changed."""
    if not getattr(state, "packing_format_for_cpu", False):
        return data, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    found: tuple[Tensor, Any] = _convert_weight_packed_for_cpu_inverse(data, state)
    return found


@torch.no_grad()
def dequantise(module: nn.Module) -> list[str]:
    """Put plain Linear layers in the place of quantised ones, in the precision they compute in; adapters stay.

    The layers compute what they have computed, up to rounding: what quantising lost stays lost.

    Returns:
        The names of these layers.
    """
    found = {n: part for n, part in module.named_modules() if isinstance(part, nn.Linear) and is_quantised(part)}
    for name, part in found.items():
        plain = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None, device="meta")
        plain.weight = nn.Parameter(base_weight(part).to(weight_dtype(part)), requires_grad=False)
        plain.bias = part.bias
        layer: Any = part._modules.get("delora")
        if layer is not None:
            plain.delora = layer
            if layer.hook is not None:
                layer.hook.remove()
                layer.hook = None
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, plain.train(part.training))
    if found:
        _forget_quantiser(module)
    return list(found)


def _forget_quantiser(module: Any) -> None:
    """Take away what diffusers and transformers note on a model that they quantised, and write with it."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit",
                 "_weight_conversions"):  # fmt: skip
        module.__dict__.pop(name, None)
    config: Any = getattr(module, "config", None)
    if "_internal_dict" in module.__dict__:  # diffusers
        module._internal_dict = type(config)({k: v for k, v in config.items() if k != "quantization_config"})
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
