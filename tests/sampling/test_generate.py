"""Drawing. Oracle: the pipeline's own call with the same prompts, seeds and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from delora_diffusion.base.objective import FlowMatching, objective_of
from delora_diffusion.data.encode import Cache, cache_negative
from delora_diffusion.families import FamilyError, family_of
from delora_diffusion.sampling.config import SCHEDULERS
from delora_diffusion.sampling.generate import Prompts, generate, set_sampler

from .. import tiny
from ..families.test_families import PROMPTS, size_of
from ..tiny_families import BUILDERS, build

SEEDS = [3, 4]
NEGATIVE = "ZZ TOP! 0123456789, other letters than above" * 3
NO_NEGATIVE = {"flux.1-dev", "flux.1-schnell", "flux.2-dev", "flux.2-klein"}


def called(kind: str, pipe: Any, **settings: Any) -> list[Any]:
    """The pipeline's own images, at the family's usual guidance."""
    height, width = size_of(kind)
    family = family_of(pipe)
    usual = family.sampling(pipe) | {"num_inference_steps": 2}
    usual[family.guidance] = usual.pop("guidance_scale")
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images: list[Any] = pipe(
        prompt=list(PROMPTS), generator=generators, height=height, width=width, **usual | settings
    ).images
    return images


def same(ours: list[Any], theirs: list[Any]) -> bool:
    pairs = [(tiny.as_array(a), tiny.as_array(b)) for a, b in zip(ours, theirs, strict=True)]
    assert all(a.shape == b.shape and a.std() > 1 for a, b in pairs)
    return all(np.abs(a - b).max() <= 1 for a, b in pairs)


@pytest.mark.parametrize("kind", BUILDERS)
def test_what_is_drawn_is_what_the_pipeline_draws(kind: str, tmp_path: Path) -> None:
    """From texts, from conditionings with the text encoders gone, and with a negative prompt."""
    pipe = build(kind, tmp_path)
    family, (height, width) = family_of(pipe), size_of(kind)
    asked = {"height": height, "width": width, "num_inference_steps": 2}
    negative: dict[str, Any] = {"negative_prompt": [" "] * 2} if kind == "qwen-image" else {}
    theirs = called(kind, pipe, **negative)
    assert same(generate(pipe, Prompts(texts=PROMPTS), SEEDS, **asked), theirs)

    refused = None
    if kind in NO_NEGATIVE:
        with pytest.raises(FamilyError, match="takes no negative prompt"):
            generate(pipe, Prompts(texts=PROMPTS, negative=NEGATIVE), SEEDS, **asked)
    else:
        refused = called(kind, pipe, negative_prompt=[NEGATIVE] * 2)
        assert same(generate(pipe, Prompts(texts=PROMPTS, negative=NEGATIVE), SEEDS, **asked), refused)
        assert not same(refused, theirs), "it matters"

    with torch.no_grad():
        conds = [family.encode_prompt(pipe, [prompt]) for prompt in PROMPTS]
    against = cache_negative(Cache(tmp_path), pipe, family, None, identity="")
    for name in family.text_encoders:
        setattr(pipe, name, None)
    assert same(
        generate(pipe, Prompts(texts=PROMPTS, negative=None, encoded=conds, against=against), SEEDS, **asked), theirs
    )


def test_guidance_and_steps_are_the_familys_usual_unless_given(tmp_path: Path) -> None:
    pipe = build("sd", tmp_path)
    asked: list[dict[str, Any]] = []
    step = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda *args, **kw: [asked.append({"steps": args[0]}), step(*args, **kw)][1]
    generate(pipe, Prompts(texts=["a"]), [0], height=16, width=16)
    generate(pipe, Prompts(texts=["a"]), [0], height=16, width=16, num_inference_steps=3)
    assert [found["steps"] for found in asked] == [25, 3]
    size = {"height": 16, "width": 16, "num_inference_steps": 2}
    usual, same_one, other = (
        generate(pipe, Prompts(texts=["a"]), [0], guidance_scale=g, **size)[0] for g in (None, 7.5, 2.0)
    )
    assert np.array_equal(tiny.as_array(usual), tiny.as_array(same_one))
    assert not np.array_equal(tiny.as_array(usual), tiny.as_array(other))


@pytest.mark.parametrize("kind", BUILDERS)
def test_every_sampler_comes_to_the_pictures_of_the_bases_own(kind: str, tmp_path: Path) -> None:
    """With many steps, those without noise of their own; what a pipeline does not take is refused."""
    pipe, (height, width) = build(kind, tmp_path), size_of(kind)
    own, flow = pipe.scheduler, family_of(pipe).flow_samplers

    def drawn() -> np.ndarray:
        (image,) = generate(pipe, Prompts(texts=["a dog"]), [0], height=height, width=width, num_inference_steps=50)
        return tiny.as_array(image)

    theirs = drawn()
    for name in SCHEDULERS:
        pipe.scheduler = own
        if isinstance(objective_of(own), FlowMatching) and name not in flow:
            with pytest.raises(FamilyError) as refused:
                set_sampler(pipe, name)
            assert f"does not draw with the sampler {name}; choose one of {', '.join(flow)}," in str(refused.value)
            continue
        set_sampler(pipe, name)
        assert type(objective_of(pipe.scheduler)) is type(objective_of(own))
        off = np.abs(drawn() - theirs).mean() / theirs.std()
        assert off < 0.25 or name in ("ddpm", "euler_a"), name
        assert not pipe.scheduler.config.get("clip_sample"), "latents exceed 1"


@pytest.mark.parametrize("name", ["euler", "heun", "dpm++", "unipc"])
@pytest.mark.parametrize("kind", ["sd3.5", "sana"])
def test_a_sampler_keeps_the_bases_shift(kind: str, name: str, tmp_path: Path) -> None:
    """Which decides the noise levels it visits: unshifted, the middle one is 500, and 750 here."""
    pipe = build(kind, tmp_path)
    set_sampler(pipe, name)
    pipe.scheduler.set_timesteps(100)
    assert abs(pipe.scheduler.timesteps.float().median() - 750) < 15


def test_without_a_negative_prompt_qwen_is_guided_against_its_authors_space(tmp_path: Path) -> None:
    pipe = build("qwen-image", tmp_path)
    family = family_of(pipe)
    with torch.no_grad():
        found: Any = family.encode_negative(pipe, None)
        space, nothing = (pipe.encode_prompt([text])[0] for text in (" ", ""))
    assert torch.equal(found["prompt_embeds"], space) and space.shape != nothing.shape


def test_another_familys_schedule_would_be_seen(tmp_path: Path) -> None:
    pipe = build("sd3.5", tmp_path)
    settings = {"height": 16, "width": 16, "num_inference_steps": 50}
    theirs = tiny.as_array(generate(pipe, Prompts(texts=["a dog"]), [0], **settings)[0])
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert (
        np.abs(tiny.as_array(generate(pipe, Prompts(texts=["a dog"]), [0], **settings)[0]) - theirs).mean()
        > 0.5 * theirs.std()
    )


@pytest.mark.parametrize("kind", ["sd", "flux.2-klein", "qwen-image", "sana"])
def test_the_vae_decodes_in_its_own_precision(kind: str, tmp_path: Path) -> None:
    """Also under autocast, and the VAE is as it was afterwards."""
    pipe = build(kind, tmp_path)
    getattr(pipe, family_of(pipe).denoiser).to(torch.bfloat16)
    for name in family_of(pipe).text_encoders:
        getattr(pipe, name).to(torch.bfloat16)
    inside: list[torch.dtype] = []
    hook = next(m for m in pipe.vae.decoder.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))
    hook.register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    height, width = size_of(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(pipe, Prompts(texts=["a"]), [0], height=height, width=width, num_inference_steps=1)
    assert inside == [torch.float32] and "decode" not in vars(pipe.vae)
