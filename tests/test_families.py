"""Families. Oracle: what the real pipeline hands to its scheduler, caught by a spy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline
from torch import Tensor, nn

from delora_diffusion.families import FAMILIES, Conditioning, FamilyError, family_of, stack_conditioning

from . import tiny

Predict = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
PROMPTS = ["a dog", "b cat in the snow"]
SIZE = {"height": 16, "width": 16, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pipe = tiny.stable_diffusion(tmp_path_factory.mktemp("families"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Spy:
    """What the pipeline gave to the denoiser and to `scheduler.step`, in order."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[dict[str, Any]] = []
        scale, step = pipe.scheduler.scale_model_input, pipe.scheduler.step
        seen: dict[str, Any] = {}

        def scale_model_input(sample: Tensor, timestep: Any = None) -> Tensor:
            seen["x_t"] = scale(sample, timestep)
            return seen["x_t"]

        def note_step(model_output: Tensor, timestep: Any, sample: Tensor, **settings: Any) -> Any:
            self.steps.append({"x_t": seen["x_t"], "t": timestep, "output": model_output, "given": seen["given"]})
            return step(model_output, timestep, sample, **settings)

        def note_conditioning(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen["given"] = kwargs["encoder_hidden_states"]

        monkeypatch.setattr(pipe.scheduler, "scale_model_input", scale_model_input)
        monkeypatch.setattr(pipe.scheduler, "step", note_step)
        self.handle = pipe.unet.register_forward_pre_hook(note_conditioning, with_kwargs=True)


@pytest.fixture
def spy(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    spy = Spy(pipe, monkeypatch)
    yield spy
    spy.handle.remove()


def run(pipe: Any, **settings: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    pipe(PROMPTS, output_type="latent", generator=generator, **SIZE | {"guidance_scale": 1.0} | settings)


@torch.no_grad()
def agrees(pipe: Any, spy: Spy, predict: Predict, prompts: list[str] = PROMPTS) -> list[bool]:
    """For each step: is the prediction what the pipeline handed to `scheduler.step`?"""
    cond = family_of(pipe).encode_prompt(pipe, prompts)
    found = []
    for step in spy.steps:
        prediction = predict(pipe.unet, step["x_t"], step["t"].expand(len(prompts)), cond)
        found.append(torch.allclose(prediction, step["output"], atol=1e-5))
    return found


# ---- predict --------------------------------------------------------------------------------------


def test_predict_is_what_the_pipeline_hands_to_the_scheduler(pipe: Any, spy: Spy) -> None:
    run(pipe)
    assert agrees(pipe, spy, family_of(pipe).predict) == [True] * 3
    outputs = [step["output"] for step in spy.steps]
    assert min(output.std() for output in outputs) > 0.05, "outputs near zero would agree with anything"
    assert len({int(step["t"]) for step in spy.steps}) == 3


@pytest.mark.parametrize(
    "kind, settings",
    [(DDPMScheduler, {}), (PNDMScheduler, {"skip_prk_steps": True}), (EulerDiscreteScheduler, {})],
    ids=["ddpm", "pndm", "euler"],
)
def test_predict_holds_for_the_scheduler_of_any_base(
    kind: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """Euler scales its input: x_t is what the denoiser sees."""
    pipe = tiny.stable_diffusion(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    spy = Spy(pipe, monkeypatch)
    run(pipe)
    assert len(spy.steps) >= 3 and all(agrees(pipe, spy, family_of(pipe).predict))


def test_with_guidance_the_two_predictions_combine_to_what_the_pipeline_uses(pipe: Any, spy: Spy) -> None:
    run(pipe, guidance_scale=7.5, negative_prompt=["x", "y z"])
    family = family_of(pipe)
    with torch.no_grad():
        wanted, unwanted = (family.encode_prompt(pipe, prompts) for prompts in (PROMPTS, ["x", "y z"]))
        for step in spy.steps:
            x_t, t = step["x_t"][:2], step["t"].expand(2)
            with_it, without = (family.predict(pipe.unet, x_t, t, cond) for cond in (wanted, unwanted))
            assert torch.allclose(without + 7.5 * (with_it - without), step["output"], atol=1e-4)
            assert (with_it - without).abs().max() > 1e-3, "the prompt matters"


@pytest.mark.parametrize(
    "mistake",
    [
        lambda predict: lambda net, x_t, t, cond: -predict(net, x_t, t, cond),
        lambda predict: lambda net, x_t, t, cond: predict(net, x_t, t - 1, cond),
        lambda predict: lambda net, x_t, t, cond: predict(net, x_t, t / 1000, cond),
        lambda predict: lambda net, x_t, t, cond: predict(net, x_t, 1000 - t, cond),
        lambda predict: lambda net, x_t, t, cond: predict(net, x_t * 0.99, t, cond),
        lambda predict: lambda net, x_t, t, cond: predict(net, x_t, t, {k: v.flip(0) for k, v in cond.items()}),
        lambda predict: lambda net, x_t, t, cond: predict(net, x_t.flip(-1), t, cond).flip(-1),
        lambda predict: lambda net, x_t, t, cond: predict(net, x_t.flip(0), t, cond),
    ],
    ids=["sign", "t - 1", "t / 1000", "time reversed", "scale", "another's prompt", "mirrored", "another's latents"],
)
def test_a_planted_mistake_would_be_seen_at_every_step(mistake: Any, pipe: Any, spy: Spy) -> None:
    run(pipe)
    assert agrees(pipe, spy, mistake(family_of(pipe).predict)) == [False] * 3


def test_each_example_of_a_batch_is_predicted_at_its_own_timestep(pipe: Any) -> None:
    family, x_t = family_of(pipe), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cond = family.encode_prompt(pipe, PROMPTS)
        both = family.predict(pipe.unet, x_t, torch.tensor([3, 900]), cond)
        for i, t in enumerate((3, 900)):
            alone = {name: tensor[i : i + 1] for name, tensor in cond.items()}
            one = family.predict(pipe.unet, x_t[i : i + 1], torch.tensor([t]), alone)
            assert torch.allclose(both[i : i + 1], one, atol=1e-5)


# ---- prompts --------------------------------------------------------------------------------------


def test_a_conditioning_is_what_the_pipeline_gives_to_the_denoiser(pipe: Any, spy: Spy) -> None:
    run(pipe)
    cond = family_of(pipe).encode_prompt(pipe, PROMPTS)
    assert list(cond) == ["prompt_embeds"]
    assert torch.equal(cond["prompt_embeds"], spy.steps[0]["given"])
    assert not torch.equal(cond["prompt_embeds"][0], cond["prompt_embeds"][1])


def test_the_pipeline_takes_a_conditioning_in_place_of_the_prompt(pipe: Any, spy: Spy) -> None:
    run(pipe)
    cond = family_of(pipe).encode_prompt(pipe, PROMPTS)
    generator = torch.Generator().manual_seed(0)
    pipe(**cond, output_type="latent", guidance_scale=1.0, generator=generator, **SIZE)
    first, second = spy.steps[:3], spy.steps[3:]
    assert all(torch.equal(a["output"], b["output"]) for a, b in zip(first, second, strict=True))


def test_gradients_flow_to_the_text_encoder(pipe: Any) -> None:
    encoder = pipe.text_encoder
    try:
        encoder.requires_grad_(True)
        embeds = family_of(pipe).encode_prompt(pipe, PROMPTS)["prompt_embeds"]
        generator = torch.Generator().manual_seed(0)
        (embeds * torch.randn(embeds.shape, generator=generator)).sum().backward()
        for name, parameter in encoder.named_parameters():
            if name.endswith(("q_proj.weight", "v_proj.weight", "token_embedding.weight")):
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    finally:
        encoder.zero_grad()
        encoder.requires_grad_(False)


def test_stacked_conditionings_are_the_conditioning_of_the_batch(pipe: Any) -> None:
    family = family_of(pipe)
    with torch.no_grad():
        stacked = stack_conditioning([family.encode_prompt(pipe, [prompt]) for prompt in PROMPTS])
        together = family.encode_prompt(pipe, PROMPTS)
    assert stacked.keys() == together.keys()
    assert all(torch.allclose(stacked[name], together[name], atol=1e-6) for name in stacked)


# ---- which pipeline is of which family ------------------------------------------------------------


def test_every_supported_pipeline_exists_and_has_the_components_named() -> None:
    for family in FAMILIES:
        for name in family.pipelines:
            assert set(family.components()) <= set(getattr(diffusers, name).__init__.__annotations__)
    names = [name for family in FAMILIES for name in family.pipelines]
    assert len(names) == len(set(names))


def test_a_pipeline_made_of_the_same_components_is_of_the_same_family(pipe: Any) -> None:
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert family_of(other) is family_of(pipe)


def test_an_unsupported_pipeline_is_refused_with_the_list() -> None:
    class DummyPipeline:
        pass

    with pytest.raises(FamilyError) as refused:
        family_of(DummyPipeline())
    assert "DummyPipeline is of no supported family" in str(refused.value)
    assert all(name in str(refused.value) for family in FAMILIES for name in family.pipelines)
