"""The estimate of memory against real tensors: weights, adapters and optimiser to the byte, a step by the profiler."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from delora_diffusion.base.config import ModelConfig
from delora_diffusion.base.latents import posterior
from delora_diffusion.base.load import load_base
from delora_diffusion.base.quantise import quantise_pipeline
from delora_diffusion.data.config import DataConfig
from delora_diffusion.families import Setting, family_of, stack_conditioning
from delora_diffusion.method.config import DeloraConfig
from delora_diffusion.method.inject import inject_delora
from delora_diffusion.method.targets import excluding
from delora_diffusion.options import parse
from delora_diffusion.training import memory
from delora_diffusion.training.config import AdapterConfig, Options, TrainingConfig, ValidationConfig

from ..base.test_quantise import stored
from ..benchmarks import memory as bench
from ..runs import Run
from ..test_options import TRAINING
from ..tiny_families import BUILDERS
from .test_prepare import saved

PRESETS = sorted((Path(__file__).parents[2] / "train_scripts" / "configs").glob("memory_*gb.yaml"))


def side_of(kind: str) -> int:
    return {"lumina2": 64, "sana": 64}.get(kind, 32)


def plan_of(kind: str, folder: Path, side: int | None = None, **training: Any) -> tuple[memory.Plan, Any]:
    """A plan for a tiny base of this kind, and that base, read."""
    model = saved(kind, folder)
    pipe = load_base(model, precision="no")
    family = family_of(pipe)
    dead = family.dead_layers(family.denoiser, getattr(pipe, family.denoiser))
    adapter = DeloraConfig(r=4, exclude_modules=excluding(None, dead))
    settings = TrainingConfig(**{"train_batch_size": 1} | training)
    side = side or side_of(kind)
    data, shown = DataConfig(instance_data_dir="photos", instance_prompt="a dog", resolution=side), ValidationConfig()
    return memory.Plan(
        options=Options(model=model, adapter=AdapterConfig(), data=data, training=settings, validation=shown),
        family=family,
        adapter=adapter,
        text_adapter=None,
        precision="no",
        like_cuda=False,
    ), pipe


def with_options(plan: memory.Plan, **groups: Any) -> memory.Plan:
    return replace(plan, options=replace(plan.options, **groups))


def phase_of(plan: memory.Plan, name: str) -> dict[str, int]:
    (found,) = (phase.parts for phase in memory.estimate(plan) if phase.name == name)
    return found


def bytes_of(*modules: nn.Module) -> int:
    return sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))


def peak(work: Callable[[], Any]) -> int:
    """The most that the CPU's allocator has given out at once, by torch's profiler."""
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def step_of(plan: memory.Plan, pipe: Any, checkpointing: bool) -> Callable[[], None]:
    """One step of training on two pictures."""
    denoiser, side = getattr(pipe, plan.family.denoiser), plan.options.data.resolution
    inject_delora(denoiser, plan.adapter)
    denoiser.train()
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    with torch.no_grad():
        x_t = torch.randn_like(posterior(pipe.vae, torch.zeros(2, 3, side, side))[0])
    cond, t = stack_conditioning([plan.family.blank(denoiser)] * 2), torch.full([2], 500.0)

    def step() -> None:
        plan.family.predict(denoiser, x_t, t, cond, Setting(side, side)).square().mean().backward()
        denoiser.zero_grad()

    return step


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_are_counted_to_the_byte(kind: str, dtype: str, tmp_path: Path) -> None:
    plan, _ = plan_of(kind, tmp_path)
    plan = with_options(plan, model=replace(plan.options.model, base_dtype=dtype))
    pipe = load_base(plan.options.model, precision="no")
    texts = [module for name in plan.family.text_encoders if (module := getattr(pipe, name, None)) is not None]
    told = {phase.name: phase.parts for phase in memory.estimate(plan)}
    assert told["training"]["denoiser"] == bytes_of(getattr(pipe, plan.family.denoiser))
    # Gemma 2 has a scale, one number, that is read in the precision of the weights
    assert told["encoding prompts"]["text encoders"] == pytest.approx(bytes_of(*texts), abs=2)
    assert told["encoding photos"]["VAE"] == bytes_of(pipe.vae)


@pytest.mark.parametrize("ema", [False, True])
def test_adapters_and_optimiser_are_counted_to_the_byte(ema: bool, tmp_path: Path) -> None:
    plan, pipe = plan_of("sd", tmp_path, use_ema=ema, gradient_accumulation_steps=2)
    before = bytes_of(pipe.unet)
    inject_delora(pipe.unet, plan.adapter)
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    told = phase_of(plan, "training")
    assert told["adapters"] == bytes_of(pipe.unet) - before
    assert told["gradients"] == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert told["optimiser"] == sum(t.nbytes for t in moments) + ema * sum(p.nbytes for p in trained)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_step_has_alive_what_the_profiler_sees(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    plan, pipe = plan_of(kind, tmp_path, train_batch_size=2, gradient_checkpointing=checkpointing)
    assert phase_of(plan, "training")["step"] == pytest.approx(peak(step_of(plan, pipe, checkpointing)), rel=0.15)


@pytest.mark.parametrize("kind, quantization", [("sd", "int8"), ("flux.1-dev", "float8"), ("flux.1-dev", "nf4")])
def test_a_quantised_base_is_counted(kind: str, quantization: str, tmp_path: Path) -> None:
    """Its weights to the byte, and a step in which layers form their weights by the profiler."""
    plan, pipe = plan_of(kind, tmp_path, train_batch_size=2, gradient_checkpointing=True)
    quantised = replace(plan.options.model, base_quantization=quantization, text_encoder_quantization=quantization)
    plan = with_options(plan, model=quantised)
    quantise_pipeline(pipe, quantised, torch.device("cpu"))
    told = {phase.name: phase.parts for phase in memory.estimate(plan)}
    denoiser = getattr(pipe, plan.family.denoiser)
    assert told["training"]["denoiser"] == stored(denoiser)
    assert told["encoding prompts"]["text encoders"] == sum(
        stored(module) for name in plan.family.text_encoders if (module := getattr(pipe, name, None)) is not None
    )
    assert told["training"]["step"] == pytest.approx(peak(step_of(plan, pipe, checkpointing=True)), rel=0.15)


def test_encoding_and_drawing_have_alive_what_the_profiler_sees(tmp_path: Path) -> None:
    plan, pipe = plan_of("sd", tmp_path, side=64)
    plan = with_options(plan, validation=ValidationConfig(validation_prompt=["a dog"], num_validation_images=3))
    with torch.no_grad():
        photo = torch.zeros(1, 3, 64, 64)
        latents = posterior(pipe.vae, photo)[0].repeat(3, 1, 1, 1)
        encoding = peak(lambda: posterior(pipe.vae, photo))
        decoding = peak(lambda: pipe.vae.decode(latents))
        doubled, t = latents.repeat(2, 1, 1, 1), torch.full([6], 500.0)
        cond = stack_conditioning([plan.family.blank(pipe.unet)] * 6)
        predicting = peak(lambda: plan.family.predict(pipe.unet, doubled, t, cond, Setting(64, 64)))
    # the CPU's convolutions copy their inputs into an order of their own, which is not counted
    assert 0.65 < phase_of(plan, "encoding photos")["work"] / encoding < 1.1
    assert 0.65 < phase_of(plan, "previews")["work"] / max(decoding, predicting) < 1.1


def test_an_estimate_changes_no_random_numbers(tmp_path: Path) -> None:
    plan, _ = plan_of("sd", tmp_path)
    before = torch.get_rng_state()
    memory.estimate(plan)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_said_names_the_peak_and_what_to_change(tmp_path: Path) -> None:
    plan, _ = plan_of("sd", tmp_path)
    training = memory.Phase("training", {"step": 3 * 2**30, "w": 2**30})
    phases = [memory.Phase("encoding photos", {"VAE": 2**30}), training]
    assert memory.summary(phases).startswith("memory, estimated: 4.00 GiB at the peak, in training\n")
    assert memory.warning(plan, phases, free=5 * 2**30) is None
    said = memory.warning(plan, phases, free=4 * 2**30)  # without room for what an allocator takes
    assert said and "training need about 4.40 GiB: gradient_checkpointing, base_dtype bf16" in said
    assert "encoding photos" not in said
    checkpointing = with_options(plan, training=replace(plan.options.training, gradient_checkpointing=True))
    assert "gradient_checkpointing" not in (memory.warning(checkpointing, phases, free=2**32) or "")


def test_without_an_estimate_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan, _ = plan_of("sd", tmp_path)
    with caplog.at_level(logging.INFO, "delora_diffusion"):
        memory.announce(plan, torch.device("cpu"))
        memory.announce(
            with_options(plan, model=ModelConfig(pretrained_model_name_or_path=str(tmp_path / "gone"))),
            torch.device("cpu"),
        )
    good, bad = [text for record in caplog.records if (text := record.getMessage()).startswith("memory")]
    assert "at the peak" in good and "no estimate" in bad and "BaseModelError" in bad


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_a_preset_is_read_by_the_trainer_and_gives_a_reason_for_every_line(preset: Path, tmp_path: Path) -> None:
    own = tmp_path / "my_dog.yaml"
    own.write_text(f"pretrained_model_name_or_path: {tmp_path}\ninstance_data_dir: {tmp_path}\n"
                   "instance_prompt: a sks dog\nresolution: 256\n")  # fmt: skip
    read = parse(["--config", str(own), str(preset)], *TRAINING, prog="train", description="")
    found = {key: value for group in read for key, value in vars(group).items()}
    lines = [line for line in preset.read_text().splitlines() if line.strip() and not line.startswith("#")]
    for line in lines:
        key, _, rest = line.partition(":")
        value, _, reason = rest.partition("#")
        assert str(found[key]).lower() == value.strip() and len(reason) > 10, line
    assert len(lines) >= 8 and found["instance_prompt"] == "a sks dog"


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_a_preset_fits_its_card(preset: Path, tmp_path: Path) -> None:
    card = int(preset.stem.rpartition("_")[2].removesuffix("gb"))
    for name, more in bench.FITTING[preset.stem]:
        plan = bench.preset_plan(
            bench.paper_base(name, tmp_path / name), name, bench.read_yaml(preset, *TRAINING) | more
        )
        assert max(phase.total for phase in memory.estimate(plan)) * memory.OVERHEAD < card * 2**30


def test_the_smallest_preset_fits_its_card(tmp_path: Path) -> None:
    (preset,) = (path for path in PRESETS if path.stem == "memory_8gb")
    values = bench.read_yaml(preset, *TRAINING)
    name = "Stable Diffusion 1.5"
    phases = memory.estimate(bench.preset_plan(bench.paper_base(name, tmp_path), name, values))
    assert 2 * 2**30 < max(phase.total for phase in phases) * memory.OVERHEAD < 8 * 2**30


def test_previews_decode_one_picture_at_a_time_with_offload(tmp_path: Path) -> None:
    plan, _ = plan_of("sd", tmp_path)
    shown = ValidationConfig(validation_prompt=["a dog"], num_validation_images=4)
    plain, saving = (
        phase_of(with_options(plan, validation=replace(shown, enable_model_cpu_offload=offload)), "previews")
        for offload in (False, True)
    )
    assert saving["in turn"] < plain["VAE"] + plain["work"] and plain["denoiser"] == saving["denoiser"]


def test_the_script_says_it_first_where_it_is_asked(run: Run, capsys: Any) -> None:
    run("out", "--max_train_steps=1", "--estimate_memory", "--train_text_encoder", "--validation_prompt=a")
    said = capsys.readouterr().err
    assert said.index("memory, estimated") < said.index("adapted layers") and "text encoders" in said
    run("silent", "--max_train_steps=1")
    assert "memory, estimated" not in capsys.readouterr().err
