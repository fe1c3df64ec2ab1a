"""Families. Oracle: what the real pipelines hand to their denoiser, their scheduler and their VAE, caught by a spy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline
from torch import Tensor, nn

from delora_diffusion.base.latents import denormalise, normalise, posterior
from delora_diffusion.families import (
    FAMILIES,
    Conditioning,
    FamilyError,
    Setting,
    check_sizes,
    check_trainable,
    family_of,
    from_tensors,
    placed,
    stack_conditioning,
    to_tensors,
)
from delora_diffusion.method.config import ALL_LINEAR, DeloraConfig
from delora_diffusion.method.inject import delora_adapters, inject_delora

from ..tiny_families import BUILDERS, build

PROMPTS = ["a dog", "b cat in the snow"]
GUIDANCE = 2.5
PACKED = {"FluxPipeline", "QwenImagePipeline"}
UNGUIDED = {"sd": 1.0, "z-image": 0.0, "flux.1-dev": GUIDANCE, "flux.2-dev": GUIDANCE}
NOT_SAID = {"return_dict", "joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs"}


def size_of(kind: str) -> tuple[int, int]:
    """Height and width: not square, so that nobody mistakes one for the other."""
    return {"lumina2": (64, 96), "sana": (32, 64)}.get(kind, (16, 24))


def as_images(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Latents as (B, C, H, W), by the pipeline's own means."""
    if type(pipe).__name__ in PACKED:
        unpacked: Tensor = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        return unpacked.squeeze(2)
    if type(pipe).__name__.startswith("Flux2"):
        h, w = (side // (2 * pipe.vae_scale_factor) for side in (height, width))
        ids = pipe._prepare_latent_ids(torch.empty(len(latents), 1, h, w))
        return pipe._unpack_latents_with_ids(latents, ids)  # type: ignore[no-any-return]
    return latents


class Run:
    """A run of a real pipeline: what it gave to the denoiser, to `scheduler.step` and to the VAE, in order."""

    def __init__(self, kind: str, pipe: Any, prompts: Sequence[str] = PROMPTS, **settings: Any) -> None:
        self.prompts = prompts
        self.kind, self.pipe, self.family = kind, pipe, family_of(pipe)
        self.height, self.width = size_of(kind)
        self.setting = Setting(self.height, self.width, GUIDANCE)
        self.denoiser: Any = getattr(pipe, self.family.denoiser)
        self.steps: list[dict[str, Any]] = []
        self.decoded: list[Tensor] = []
        given: dict[str, Any] = {}
        scale, step, decode = getattr(pipe.scheduler, "scale_model_input", None), pipe.scheduler.step, pipe.vae.decode

        def note_scaled(sample: Tensor, timestep: Any = None) -> Tensor:
            given["x_t"] = scale(sample, timestep)
            return given["x_t"]  # type: ignore[no-any-return]

        def note_step(model_output: Tensor, timestep: Any, sample: Tensor, **rest: Any) -> Any:
            done = step(model_output, timestep, sample, **rest)
            x_t, output, last = (self.images(v) for v in (given.get("x_t", sample), model_output, done[0]))
            self.steps.append(dict(x_t=x_t, t=timestep, output=output, last=last, said=given["said"]))
            return done

        def note_decoded(z: Tensor, *args: Any, **rest: Any) -> Any:
            self.decoded.append(z)
            return decode(z, *args, **rest)

        handle = self.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: given.update(said=said(module, args, kwargs)), with_kwargs=True
        )
        if scale is not None:
            pipe.scheduler.scale_model_input = note_scaled
        pipe.scheduler.step, pipe.vae.decode = note_step, note_decoded
        chosen = {"num_inference_steps": 3} | {self.family.guidance: UNGUIDED.get(kind, 1.0)} | settings
        usual = self.family.sampling(pipe).items()
        extra = {k: v for k, v in usual if k not in ("guidance_scale", "num_inference_steps")}
        try:
            generator = torch.Generator().manual_seed(0)
            self.images_drawn = pipe(
                prompt=list(self.prompts), generator=generator, height=self.height, width=self.width, output_type="pt",
                **extra, **chosen,
            ).images  # fmt: skip
        finally:
            handle.remove()
            pipe.scheduler.__dict__.pop("scale_model_input", None)
            del pipe.scheduler.step, pipe.vae.decode

    @functools.cached_property
    def cond(self) -> Conditioning:
        with torch.no_grad():
            return self.family.encode_prompt(self.pipe, self.prompts)

    def images(self, latents: Tensor) -> Tensor:
        return as_images(self.pipe, latents, self.height, self.width)

    @torch.no_grad()
    def predicted(self, step: dict[str, Any], predict: Any = None, setting: Setting | None = None) -> Tensor:
        cond = placed(self.cond, self.denoiser.device, self.denoiser.dtype)
        x_t = step["x_t"].to(self.denoiser.dtype)
        t = torch.as_tensor(step["t"]).expand(len(PROMPTS))
        return (predict or self.family.predict)(self.denoiser, x_t, t, cond, setting or self.setting)  # type: ignore[no-any-return]

    def agrees(self, predict: Any = None, setting: Setting | None = None, *, atol: float = 1e-4) -> list[bool]:
        """For each step: is the prediction what the pipeline handed to `scheduler.step`, dtype and shape included?"""
        found = []
        for step in self.steps:
            ours, theirs = self.predicted(step, predict, setting), step["output"]
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            found.append(torch.allclose(ours.float(), theirs.float(), atol=atol))
        return found


def said(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments of a denoiser's call by name, without those that say nothing."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return {name: value for name, value in bound.items() if value is not None and name not in NOT_SAID}


def same(ours: Any, theirs: Any) -> bool:
    """Equal values in equal containers; tensors of one dtype and shape, up to rounding."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, Tensor):
        alike = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        return alike and torch.allclose(ours.float(), theirs.float(), atol=1e-5)
    return bool(ours == theirs)


_RUNS: dict[str, Run] = {}


@pytest.fixture(params=BUILDERS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of three steps without classifier-free guidance for each kind of model."""
    kind = request.param
    if kind not in _RUNS:
        _RUNS[kind] = Run(kind, build(kind, tmp_path_factory.mktemp("families")))
    return _RUNS[kind]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build("sd", tmp_path_factory.mktemp("families"))


def test_every_family_has_a_builder(tmp_path: Path) -> None:
    built = {type(builder(tmp_path / kind)).__name__ for kind, builder in BUILDERS.items()}
    assert built == {name for family in FAMILIES for name in family.pipelines}


# ---- predict --------------------------------------------------------------------------------------


def test_predict_is_what_the_pipeline_hands_to_the_scheduler(run: Run) -> None:
    assert run.agrees() == [True] * 3
    assert min(step["output"].std() for step in run.steps) > 0.05, "outputs near zero would agree with anything"
    assert len({float(step["t"]) for step in run.steps}) == 3


@pytest.mark.parametrize("kind", BUILDERS)
def test_predict_holds_in_half_precision(kind: str, tmp_path: Path) -> None:
    """With the pipeline's own casts: what it hands over in fp32 is fp32 here."""
    pipe = build(kind, tmp_path)
    pipe.to(torch.bfloat16)
    assert Run(kind, pipe, num_inference_steps=2).agrees(atol=0.05) == [True] * 2


def test_the_denoiser_is_told_the_same_as_by_the_pipeline(run: Run) -> None:
    """Embeddings, masks, ids, sizes, guidance and time."""
    heard: list[dict[str, Any]] = []
    handle = run.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: heard.append(said(module, args, kwargs)), with_kwargs=True
    )
    try:
        for step in run.steps:
            run.predicted(step)
    finally:
        handle.remove()
    for ours, step in zip(heard, run.steps, strict=True):
        theirs = dict(step["said"])
        time = "t" if "t" in theirs else "timestep"
        theirs[time] = theirs[time].expand(len(ours[time]))
        assert same(ours, theirs), [name for name in theirs if not same(ours.get(name), theirs[name])]


MISTAKES: dict[str, Any] = {
    "sign": lambda predict: lambda net, x_t, t, cond, setting: -predict(net, x_t, t, cond, setting),
    "t": lambda predict: lambda net, x_t, t, cond, setting: predict(net, x_t, t * 0.9 + 9, cond, setting),
    "time reversed": lambda predict: lambda net, x_t, t, cond, setting: predict(net, x_t, 1000 - t, cond, setting),
    "t / 1000": lambda predict: lambda net, x_t, t, cond, setting: predict(net, x_t, t / 1000, cond, setting),
    "scale": lambda predict: lambda net, x_t, t, cond, setting: predict(net, x_t * 0.98, t, cond, setting),
    "another's prompt": lambda predict: lambda net, x_t, t, cond, setting: predict(
        net, x_t, t, {k: v[::-1] if isinstance(v, list) else v.flip(0) for k, v in cond.items()}, setting
    ),
    "mirrored": lambda predict: lambda net, x_t, t, cond, setting: predict(
        net, x_t.flip(-1), t, cond, setting
    ).flip(-1),
    "another's latents": lambda predict: lambda net, x_t, t, cond, setting: predict(
        net, x_t.flip(0), t, cond, setting
    ),
    "channels": lambda predict: lambda net, x_t, t, cond, setting: predict(net, x_t, t, cond, setting).roll(1, 1),
    "pixels": lambda predict: lambda net, x_t, t, cond, setting: predict(net, x_t, t, cond, setting).roll(1, 3),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_would_be_seen_at_every_step(mistake: str, run: Run) -> None:
    assert run.agrees(MISTAKES[mistake](run.family.predict)) == [False] * 3


@pytest.mark.parametrize("kind", ["flux.1-dev", "flux.2-dev", "sdxl", "pixart-alpha"])
def test_guidance_and_size_are_told_where_the_model_listens(kind: str, tmp_path: Path) -> None:
    run = Run(kind, build(kind, tmp_path))
    other = replace(run.setting, guidance=GUIDANCE + 1) if "flux" in kind else Setting(run.width, run.height, GUIDANCE)
    assert run.agrees(setting=run.setting) == [True] * 3 and run.agrees(setting=other) == [False] * 3


def test_the_variance_half_of_the_channels_is_not_the_prediction(tmp_path: Path) -> None:
    run = Run("pixart-sigma", build("pixart-sigma", tmp_path))
    cond: Any = run.cond
    with torch.no_grad():
        whole = run.denoiser(
            run.steps[0]["x_t"], encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["prompt_attention_mask"], timestep=run.steps[0]["t"].expand(2),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
    first, second = whole.chunk(2, dim=1)
    assert torch.allclose(first, run.steps[0]["output"], atol=1e-5)
    assert not torch.allclose(second, run.steps[0]["output"], atol=0.1)


@pytest.mark.parametrize(
    "kind, settings",
    [(DDPMScheduler, {}), (PNDMScheduler, {"skip_prk_steps": True}), (EulerDiscreteScheduler, {})],
    ids=["ddpm", "pndm", "euler"],
)
def test_predict_holds_for_the_scheduler_of_any_base(kind: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """Euler scales its input: x_t is what the denoiser sees."""
    pipe = build("sd", tmp_path)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    run = Run("sd", pipe)
    assert len(run.steps) >= 3 and all(run.agrees())


def test_each_example_of_a_batch_is_predicted_with_its_own_time_and_prompt(run: Run) -> None:
    """Prompts have different lengths: what is padded to stack them does not count."""
    x_t = torch.randn(run.steps[0]["x_t"].shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 900]) if run.family.denoiser == "unet" else torch.tensor([3.0, 900.0])
    with torch.no_grad():
        conds = [run.family.encode_prompt(run.pipe, [prompt]) for prompt in PROMPTS]
        both = run.family.predict(run.denoiser, x_t, t, run.cond, run.setting)
        for i, cond in enumerate(conds):
            one = run.family.predict(run.denoiser, x_t[i : i + 1], t[i : i + 1], cond, run.setting)
            assert torch.allclose(both[i : i + 1], one, atol=1e-4)


# ---- latents --------------------------------------------------------------------------------------


def test_denormalise_is_what_the_pipeline_does_before_decoding(run: Run) -> None:
    (z,), latents = run.decoded, run.steps[-1]["last"]
    assert torch.allclose(denormalise(run.pipe.vae, latents), z, atol=1e-5)
    assert torch.allclose(normalise(run.pipe.vae, z), latents, atol=1e-5)
    assert not torch.allclose(z.flatten(), latents.flatten(), atol=0.05), "the VAE's scale is not 1"


def test_the_posterior_is_the_vaes_own_normalised(run: Run) -> None:
    pixels = torch.rand(2, 3, run.height, run.width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = run.pipe.vae
    mean, std = posterior(vae, pixels)
    assert mean.shape == std.shape == run.steps[0]["x_t"].shape
    with torch.no_grad():
        z = denormalise(vae, mean)
        encoded = vae.encode(pixels[:, :, None] if z.dim() == 5 else pixels)
        own = getattr(encoded, "latent_dist", None)
        assert torch.allclose(z, encoded.latent if own is None else own.mean, atol=1e-5)
        if own is None:
            assert not std.any()
        else:  # one deviation more is one std more
            assert torch.allclose(denormalise(vae, mean + std), own.mean + own.std, atol=1e-5)
        assert vae.decode(z, return_dict=False)[0].shape[-2:] == pixels.shape[-2:]


# ---- adapters -------------------------------------------------------------------------------------


def silent_layers(module: nn.Module) -> set[str]:
    """Layers whose adapter got no gradient."""
    return {
        name
        for name, adapter in delora_adapters(module).items()
        if not any(p.grad is not None and p.grad.any() for p in adapter.parameters())
    }


def backward(run: Run, pipe: Any) -> None:
    """A gradient of the prediction at a step of `run`, in a pipeline built alike."""
    step, generator = run.steps[1], torch.Generator().manual_seed(1)
    cond, denoiser = run.family.encode_prompt(pipe, PROMPTS), getattr(pipe, run.family.denoiser)
    output = run.family.predict(denoiser, step["x_t"], torch.as_tensor(step["t"]).expand(2), cond, run.setting)
    (output * torch.randn(output.shape, generator=generator)).sum().backward()


@pytest.mark.parametrize("targets", ["attention", "attention+ff", ALL_LINEAR])
def test_every_adapter_receives_a_gradient_or_is_listed_as_dead(targets: str, run: Run, tmp_path: Path) -> None:
    """In the denoiser, and with the attention layers also in the text encoders that can be adapted."""
    pipe = build(run.kind, tmp_path)
    components = run.family.components() if targets == "attention" else [run.family.denoiser]
    for component in components:
        inject_delora(getattr(pipe, component), DeloraConfig(r=2, target_modules=targets, init_weights="kaiming"))
    backward(run, pipe)
    for component in components:
        module = getattr(pipe, component)
        adapted, dead = set(delora_adapters(module)), set(run.family.dead_layers(component, module))
        assert silent_layers(module) == dead & adapted, component
        assert len(adapted - dead) > len(dead)


# ---- prompts --------------------------------------------------------------------------------------


def test_a_conditioning_survives_as_tensors(run: Run) -> None:
    with torch.no_grad():
        cond = run.family.encode_prompt(run.pipe, PROMPTS[:1])
    kept = to_tensors(cond)
    assert all(isinstance(value, Tensor) for value in kept.values())
    assert same(from_tensors(kept), cond)


def test_stacked_conditionings_are_the_conditioning_of_the_batch(run: Run) -> None:
    with torch.no_grad():
        stacked = stack_conditioning([run.family.encode_prompt(run.pipe, [prompt]) for prompt in PROMPTS])
    assert same(stacked, run.cond)


#: Tokens of a prompt that has more than any model reads: what the pipelines' authors chose.
LONGEST = {
    "sd": 16, "sdxl": 16, "sd3.5": 16 + 256, "flux.1-dev": 512, "flux.1-schnell": 256, "flux.2-dev": 512,
    "flux.2-klein": 512, "pixart-alpha": 120, "pixart-sigma": 300, "sana": 300, "lumina2": 256, "qwen-image": 512,
    "z-image": 512,
}  # fmt: skip


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_long_prompt_is_cut_where_the_pipeline_cuts_it(kind: str, tmp_path: Path) -> None:
    """Next to a short one, whose padding is masked, or not, as there."""
    run = Run(kind, build(kind, tmp_path), ["word " * 300, "a dog"], num_inference_steps=2)
    embeds: Any = run.cond["prompt_embeds"]
    assert len(embeds[0]) == LONGEST.get(kind, len(embeds[0])), "tokens"
    heard: list[dict[str, Any]] = []
    handle = run.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: heard.append(said(module, args, kwargs)), with_kwargs=True
    )
    try:
        run.predicted(run.steps[0])
    finally:
        handle.remove()
    (ours,), theirs = heard, run.steps[0]["said"]
    time = {"t", "timestep"}
    assert ours.keys() == theirs.keys()
    assert not [name for name in theirs.keys() - time if not same(ours[name], theirs[name])]


# ---- which pipeline is of which family ------------------------------------------------------------


def test_every_supported_pipeline_exists_and_has_the_components_named() -> None:
    for family in FAMILIES:
        for name in (*family.pipelines, *family.related):
            arguments = getattr(diffusers, name).__init__.__annotations__
            assert {family.denoiser, "vae", "scheduler"} <= set(arguments), name
            if name in family.pipelines:
                assert set(family.text_encoders) <= set(arguments)
    names = [name for family in FAMILIES for name in (*family.pipelines, *family.related)]
    assert len(names) == len(set(names))


def test_a_pipeline_made_of_the_same_components_is_of_the_same_family(pipe: Any) -> None:
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert family_of(other) is family_of(pipe)
    with pytest.raises(FamilyError, match="carries adapters but is not trained with; give a text-to-image base"):
        check_trainable({"_class_name": type(other).__name__}, train_text_encoder=False)


def test_an_unsupported_pipeline_is_refused_with_the_list() -> None:
    class DummyPipeline:
        pass

    with pytest.raises(FamilyError) as refused:
        family_of(DummyPipeline())
    assert "DummyPipeline is of no supported family" in str(refused.value)
    names = [name for family in FAMILIES for name in (*family.pipelines, *family.related)]
    assert len(names) > 50 and all(name in str(refused.value) for name in names)


def test_a_base_that_cannot_be_trained_as_asked_is_refused(tmp_path: Path) -> None:
    pipe = build("lumina2", tmp_path / "parts")
    pipe.save_pretrained(tmp_path / "base")
    listed = type(pipe).load_config(tmp_path / "base")
    assert check_trainable(listed, train_text_encoder=False).name == "lumina2"
    with pytest.raises(FamilyError, match="text encoder of lumina2 is a large language model"):
        check_trainable(listed, train_text_encoder=True)
    check_sizes(pipe, [(64, 96)], option="x")
    with pytest.raises(FamilyError, match=r"resolution is 72; Lumina2Pipeline needs a multiple of 16, e\.g\. 64"):
        check_sizes(pipe, [(64, 72)], option="resolution")
