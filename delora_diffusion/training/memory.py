"""How much memory of the device a run takes, phase by phase, before anything large is loaded.

Weights are counted on outlines (config.json alone), and what a step, an encoding or a decoding has alive at once by
running it on fake tensors, see `fake_tensors.py`; tests/benchmarks/memory.py holds both against measurement.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base.latents import denormalise, posterior
from ..base.load import DTYPE, base_dtype, listed_in, outline
from ..base.quantise import quantisable, quantise_outline, quantised_bytes
from ..base.swap import PLACES, swappable, swapped_blocks
from ..families import Conditioning, Family, Setting, placed, stack_conditioning
from ..method.config import DeloraConfig
from ..method.inject import inject_delora
from .adapt import text_encoder_config
from .check import Checked
from .config import Options
from .fake_tensors import fake_weights, faked, peak_of

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)
GIB = 2**30
#: Bytes of an optimiser's state for each trained parameter: two moments in fp32 or in 8 bits; Prodigy keeps two more.
STATE = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}
#: What an allocator takes on top of what is asked for: rounding, fragments, workspaces. An assumption, not measured.
OVERHEAD = 1.1


@dataclass(frozen=True)
class Phase:
    """A phase of a run, and the bytes of everything that is on the device at its peak."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a run's memory depends on."""

    options: Options
    family: Family
    adapter: DeloraConfig
    text_adapter: DeloraConfig | None  # None: text encoders are not trained
    precision: str  # accelerate's mixed precision
    like_cuda: bool = True
    processes: int = 1

    @property
    def dtype(self) -> torch.dtype:
        return base_dtype(self.options.model, precision=self.precision)


def plan_of(checked: Checked, accelerator: Accelerator) -> Plan:
    """What a run's memory depends on, of a run that was checked."""
    options = checked.options
    text = text_encoder_config(options.adapter, []) if options.adapter.train_text_encoder else None
    return Plan(
        options=options,
        family=checked.family,
        adapter=checked.config,
        text_adapter=text,
        precision=accelerator.mixed_precision,
        like_cuda=accelerator.device.type == "cuda",
        processes=accelerator.num_processes,
    )


def estimate(plan: Plan) -> list[Phase]:
    """The phases of a run in their order.

    training = weights + adapters + optimiser state + what one step has alive (kept for backward, gradients, work)
    + gradients of the steps before it, where they are accumulated;
    previews = what training keeps + the VAE + the larger of drawing and decoding; class images the same without
    training. Text encoders are all on the device at once while they encode; what they work on is left out, being small
    beside them, also where they are trained.

    Raises:
        BaseModelError: a config.json that cannot be read.
    """
    data, training, shown = plan.options.data, plan.options.training, plan.options.validation
    offload = shown.enable_model_cpu_offload
    texts = [name for name in plan.family.text_encoders if any(listed_in(plan.options.model).get(name) or ())]
    text = {name: outline(plan.options.model, name) for name in texts}
    text_weights = sum(
        size_of(module, plan.dtype, plan.options.model.text_encoder_quantization) for module in text.values()
    )
    vae, denoiser = outline(plan.options.model, "vae"), outline(plan.options.model, plan.family.denoiser)
    vae_weights = size_of(vae, torch.float32)
    weights = size_of(denoiser, plan.dtype, plan.options.model.base_quantization) - _waiting(plan, denoiser)
    latents, encoding = _encoding(plan, vae)
    phases = [
        Phase("encoding photos", {"VAE": vae_weights, "work": encoding}),
        Phase("encoding prompts", {"text encoders": text_weights}),
    ]

    def drawing(count: int, resident: Mapping[str, int], passing: int = 0) -> dict[str, int]:
        """`passing` is the denoiser where it may leave. With `offload` what is not in use is gone, and one picture is
        decoded at a time; without, all is there. Guidance doubles the denoiser's batch."""
        decode, predict = _decoding(plan, latents, 1 if offload else count), _predicting(plan, latents, 2 * count)
        if offload:
            return {**resident, "in turn": max(vae_weights + decode, passing + predict)}
        moving = {"denoiser": passing} if passing else {}
        return {**resident, **moving, "VAE": vae_weights, "work": max(decode, predict)}

    if data.with_prior_preservation:
        fixed, moving = ({"denoiser": weights}, 0) if training.blocks_to_swap or training.shard_base else ({}, weights)
        phases.append(
            Phase("class images", drawing(min(data.sample_batch_size, data.num_class_images), fixed, moving))
        )
    trained, adapters = _adapters(denoiser, plan.adapter)
    if plan.text_adapter is not None:
        for module in text.values():
            more = _adapters(module, plan.text_adapter)
            trained, adapters = trained + more[0], adapters + more[1]
    kept = {"denoiser": weights, "adapters": adapters}
    kept["optimiser"] = trained * (STATE[training.optimizer] + 4 * training.use_ema)
    summed = {"gradients": 4 * trained} if training.gradient_accumulation_steps > 1 else {}
    if plan.text_adapter is not None:
        kept["text encoders"] = text_weights
    places = training.train_batch_size * (1 + data.with_prior_preservation + data.with_base_preservation)
    phases.append(Phase("training", {**kept, **summed, "step": _step(plan, latents, places)}))
    if shown.validation_prompt:
        phases.append(Phase("previews", drawing(shown.num_validation_images, kept)))
    return phases


def size_of(module: nn.Module, dtype: torch.dtype, kind: str = "none") -> int:
    """Bytes of a module's weights when they are `dtype`, and the layers of its blocks quantised to `kind`.

    Buffers that no file holds keep their own precision.
    """
    transient = {id(part._buffers[key]) for part in module.modules() for key in part._non_persistent_buffers_set}
    kept_own = [t for t in module.buffers() if id(t) in transient or not t.is_floating_point()]
    kept = {id(t) for t in kept_own}
    rest = [t for t in (*module.parameters(), *module.buffers()) if id(t) not in kept]
    plain = sum(t.numel() * t.itemsize for t in kept_own) + sum(t.numel() for t in rest) * dtype.itemsize
    layers = [linear for _, linear in quantisable(module)]
    return plain - sum(quantised_bytes(x, "none", dtype) - quantised_bytes(x, kind, dtype) for x in layers)


def _waiting(plan: Plan, denoiser: nn.Module) -> int:
    """Bytes of the denoiser that are not on the device: those of swapped blocks, but for their places there, or the
    parts that other processes hold, but for two whole blocks and what is in no block."""
    if plan.options.training.shard_base:
        named = [part for name, part in denoiser.named_modules() if re.fullmatch(plan.family.blocks, name)]
        whole, parts = size_of(denoiser, plan.dtype), [size_of(block, plan.dtype) for block in named]
        return max(0, sum(parts) - whole // plan.processes - 2 * max(parts))
    blocks = swapped_blocks(denoiser, plan.family, plan.options.training.blocks_to_swap).values()
    kind, dtype = plan.options.model.base_quantization, plan.dtype
    small: dict[nn.Module, int] = {x: quantised_bytes(x, kind, dtype) for _, x in quantisable(denoiser)}
    sizes = [
        sum(small.get(owner, owner.get_parameter(key).numel() * dtype.itemsize) for owner, key in swappable(block))
        for block in blocks
    ]
    return sum(sizes) - PLACES * max(sizes, default=0)


# ---- what is done, on fake tensors -----------------------------------------------------------------


def _encoding(plan: Plan, vae: nn.Module) -> tuple[tuple[int, ...], int]:
    """Shape of a photo's latents (1, C, h, w), and what encoding it has alive."""
    side, shapes = plan.options.data.resolution, []
    with faked():
        fake = fake_weights(vae, torch.float32)
        work = peak_of(lambda: shapes.append(posterior(fake, torch.zeros(1, 3, side, side))[0].shape), fake)
    return tuple(shapes[0]), work


def _decoding(plan: Plan, latents: tuple[int, ...], count: int) -> int:
    with faked(), torch.no_grad():
        vae: Any = fake_weights(outline(plan.options.model, "vae"), torch.float32)
        return peak_of(lambda: vae.decode(denormalise(vae, torch.zeros(count, *latents[1:]))), vae)


def _predicting(plan: Plan, latents: tuple[int, ...], count: int) -> int:
    denoiser = _denoiser(plan).eval()
    with torch.no_grad():
        return _alive(plan, denoiser, latents, count, lambda prediction: None)


def _step(plan: Plan, latents: tuple[int, ...], count: int) -> int:
    """What the forward and backward pass of a batch has alive: gradients are among it."""
    denoiser: Any = _denoiser(plan)
    inject_delora(denoiser, plan.adapter)
    denoiser.train()
    if plan.options.training.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()

    def learn(prediction: Tensor) -> None:
        loss = (prediction.float() - torch.zeros(prediction.shape)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]

    return _alive(plan, denoiser, latents, count, learn)


def _denoiser(plan: Plan) -> nn.Module:
    denoiser = outline(plan.options.model, plan.family.denoiser)
    quantise_outline(denoiser, plan.options.model.base_quantization)
    return denoiser


def _alive(
    plan: Plan, denoiser: nn.Module, latents: tuple[int, ...], count: int, then: Callable[[Tensor], None]
) -> int:
    side, guidance = plan.options.data.resolution, plan.options.training.guidance_scale
    cond: Conditioning = stack_conditioning([plan.family.blank(denoiser)] * count)  # real: values of masks are asked

    def run() -> None:
        x_t, t = torch.zeros(count, *latents[1:], dtype=plan.dtype), torch.full([count], 500.0)
        with torch.autocast("cpu", DTYPE[plan.precision]) if plan.precision != "no" else contextlib.nullcontext():
            placed_cond = placed(cond, torch.device("cpu"), plan.dtype)
            prediction = plan.family.predict(denoiser, x_t, t, placed_cond, Setting(side, side, guidance))
        then(prediction)

    with faked():
        return peak_of(run, fake_weights(denoiser, plan.dtype, like_cuda=plan.like_cuda))


def _adapters(module: nn.Module, config: DeloraConfig) -> tuple[int, int]:
    """Number of trained parameters, and bytes of the adapters that hold them; `module` is left without weights."""
    before = sum(t.numel() for t in (*module.parameters(), *module.buffers()))
    inject_delora(module, config)
    added = sum(t.numel() for t in (*module.parameters(), *module.buffers())) - before
    return sum(p.numel() for p in module.parameters() if p.requires_grad), added * 4


# ---- what is said ----------------------------------------------------------------------------------


def announce(plan: Plan, device: torch.device) -> None:
    """Log the estimate, and a warning if the device has less free than the peak. An estimate never ends a run."""
    try:
        phases = estimate(plan)
    except Exception as error:  # fake tensors cannot run everything that real ones can
        first = (str(error).splitlines() or [""])[0]
        log.warning(
            "memory: no estimate for this base, training goes on without one (%s: %s)", type(error).__name__, first
        )
        return
    log.info("%s", summary(phases))
    if device.type == "cuda" and (said := warning(plan, phases, free=torch.cuda.mem_get_info(device)[0])):
        log.warning("%s", said)


def summary(phases: Sequence[Phase]) -> str:
    """One line for each phase, and where the peak is."""
    lines = [f"  {phase.name}: {_gib(phase.total)} ({_parts(phase)})" for phase in phases]
    worst = max(phases, key=lambda phase: phase.total)
    return "\n".join([f"memory, estimated: {_gib(worst.total)} at the peak, in {worst.name}", *lines])


def warning(plan: Plan, phases: Sequence[Phase], *, free: int) -> str | None:
    """What does not fit into `free` bytes, and what to change; None if everything fits."""
    tight = [phase for phase in phases if phase.total * OVERHEAD > free]
    if not tight:
        return None
    lines = [f"{p.name} need about {_gib(p.total * OVERHEAD)}: {', '.join(advice(plan, p))}" for p in tight]
    return f"the device has {_gib(free)} free, which may be too little: " + "; ".join(lines)


def advice(plan: Plan, phase: Phase) -> list[str]:
    """Options that make a phase smaller and are not chosen yet, the most effective first."""
    model, training, shown = plan.options.model, plan.options.training, plan.options.validation
    fewer_bits = ["base_quantization"] if model.base_quantization == "none" else []
    half = ["base_dtype bf16"] if plan.dtype == torch.float32 else []
    smaller = [f"a resolution below {plan.options.data.resolution}"]
    by_phase = {
        "encoding photos": smaller,
        "encoding prompts": [
            *half,
            *(["text_encoder_quantization"] if model.text_encoder_quantization == "none" else []),
            "a base with smaller text encoders",
        ],
        "training": [
            *([] if training.gradient_checkpointing else ["gradient_checkpointing"]),
            *half,
            *fewer_bits,
            *([] if training.blocks_to_swap else ["blocks_to_swap"]),
            *(["train_batch_size 1 with gradient_accumulation_steps"] if training.train_batch_size > 1 else []),
            *(["optimizer adamw8bit"] if training.optimizer != "adamw8bit" and plan.adapter.r > 32 else []),
            *smaller,
        ],
    }
    fewer = ["a smaller num_validation_images"] if phase.name == "previews" and shown.num_validation_images > 1 else []
    offload = [] if shown.enable_model_cpu_offload else ["enable_model_cpu_offload"]
    return by_phase.get(phase.name, [*offload, *fewer, *half, *fewer_bits, *smaller])


def _parts(phase: Phase) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in phase.parts.items())


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
