"""The verbs on a real `StableDiffusionPipeline`. Oracles: the base's own bits and images, dense sums of updates."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from delora_diffusion import (
    Adapter,
    AdapterFileError,
    DeloraConfig,
    delete_adapters,
    disable_delora,
    enable_delora,
    fuse_delora,
    get_active_adapters,
    inject_delora,
    load_delora_weights,
    load_pipeline,
    read_adapter,
    save_delora_weights,
    set_adapters,
    unfuse_delora,
    unload_delora_weights,
    write_adapter,
)
from delora_diffusion.adapters.sources import collect, components
from delora_diffusion.errors import DeloraError
from delora_diffusion.families import FamilyError
from delora_diffusion.method.inject import delora_adapters, delora_layers

from . import tiny

BOTH = ("unet", "text_encoder")
Bits = dict[str, Tensor]
Trained = Callable[..., Adapter]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """The base; no test may change it."""
    pipe = tiny.stable_diffusion(tmp_path_factory.mktemp("pipeline"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def lent(original: StableDiffusionPipeline) -> list[Any]:
    """The copy that `pipe` lends out, with its tensors and its anatomy."""
    return [clone(original), bits(original), anatomy(original)]


@pytest.fixture
def pipe(original: StableDiffusionPipeline, lent: list[Any]) -> Iterator[StableDiffusionPipeline]:
    """A copy of the base for tests that only load adapters; afterwards unloading must give the base back."""
    yield lent[0]
    unload_delora_weights(lent[0])
    if not (equal(bits(lent[0]), lent[1]) and anatomy(lent[0]) == lent[2]):
        lent[0] = clone(original)
        pytest.fail("unload_delora_weights did not give the base back")


@pytest.fixture
def own(original: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A copy of the base that a test may change in other ways."""
    return clone(original)


@pytest.fixture(scope="module")
def trained(original: StableDiffusionPipeline) -> Trained:
    """Makes adapters that change every layer they adapt, for components of the base; the UNet if none is named."""
    made: dict[str, Adapter] = {}

    def adapter(*names: str, seed: int = 0, **fields: Any) -> Adapter:
        key = repr((names, seed, fields))
        if key not in made:
            made[key] = adapter_for(original, *names, seed=seed, **fields)
        return made[key]

    return adapter


# ---- helpers -------------------------------------------------------------------------------------


def clone(pipe: Any) -> Any:
    """A copy of the pipeline with a UNet and a text encoder of its own; nothing changes the rest."""
    copied = copy.copy(pipe)
    for name in BOTH:
        setattr(copied, name, copy.deepcopy(getattr(pipe, name)))
    return copied


def cast(pipe: Any, dtype: torch.dtype) -> None:
    pipe.vae = copy.deepcopy(pipe.vae)
    pipe.to(dtype)


def adapter_for(pipe: Any, *names: str, seed: int = 0, **fields: Any) -> Adapter:
    modules = {name: copy.deepcopy(getattr(pipe, name)) for name in names or ("unet",)}
    for number, module in enumerate(modules.values()):
        config = DeloraConfig(**{"r": 2, "delora_lambda": 6.0, "init_weights": "kaiming"} | fields)
        inject_delora(module, config, generator=torch.Generator().manual_seed(10 * seed + number))
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad and parameter.dim() == 1 and parameter.numel() > 1:
                    parameter.add_(0.2)  # a bias trained in full
    return collect(modules, "default")


def draw(pipe: Any, **settings: Any) -> np.ndarray:
    """Two images as (2, 16, 16, 3) integers."""
    fixed: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 3.0}
    images = pipe(["a dog", "b"], generator=torch.Generator().manual_seed(0), **fixed | settings).images
    return np.stack([tiny.as_array(image) for image in images])


def noise_of(pipe: Any) -> Tensor:
    """What the pipeline's text encoder and UNet make of two latents and prompts, in fp32."""
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(["a dog", "b"], "cpu", 1, False)
        x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(pipe.unet.dtype)
        output: Tensor = pipe.unet(x_t, torch.tensor([10, 800]), encoder_hidden_states=embeds).sample
    return output.float()


def bits(pipe: Any) -> Bits:
    """Every tensor of the components that can carry an adapter, copied."""
    return {
        f"{name}.{key}": tensor.clone()
        for name, module in components(pipe).items()
        for key, tensor in module.state_dict().items()
    }


def equal(found: Bits, expected: Bits) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].dtype == tensor.dtype and torch.equal(found[key], tensor) for key, tensor in expected.items()
    )


def anatomy(pipe: Any) -> dict[str, Any]:
    """Everything about the pipeline's modules that an adapter could leave behind, tensor values aside."""
    return {
        f"{name}.{path}": (
            type(module), sorted(vars(module)), list(module._modules), len(module._forward_hooks), module.training,
            [p.requires_grad for p in module.parameters(recurse=False)],
            getattr(module, "active", None), getattr(module, "enabled", None), dict(getattr(module, "merged", {})),
        )
        for name, part in components(pipe).items()
        for path, module in part.named_modules()
    }  # fmt: skip


def dense(pipe: Any, updates: list[tuple[Adapter, float]]) -> Any:
    """A copy of the pipeline whose weights hold W + sum of weight * dW, each dW from the adapter's own tensors."""
    plain = clone(pipe)
    for adapter, weight in updates:
        for component, tensors in adapter.tensors.items():
            for name in (n.removesuffix(".delora_A") for n in tensors if n.endswith(".delora_A")):
                A, B, lam, w = (tensors[f"{name}.delora_{x}"].double() for x in ("A", "B", "lambda", "w_norm"))
                directions = (B / B.norm(dim=0)) @ (A / A.norm(dim=1, keepdim=True) * w)
                linear = getattr(plain, component).get_submodule(name)
                linear.weight.data += (weight * lam / len(A) * directions).to(linear.weight.dtype)
    return plain


def restored(pipe: Any) -> Any:
    """A copy without adapters."""
    plain = clone(pipe)
    unload_delora_weights(plain)
    return plain


def refused(kind: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


# ---- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("unet",), ("text_encoder",), BOTH], ids="+".join)
def test_a_loaded_adapter_adds_its_dense_update(names: tuple[str, ...], pipe: Any, trained: Trained) -> None:
    adapter, base = trained(*names), noise_of(pipe)
    expected = noise_of(dense(pipe, [(adapter, 1.0)]))
    load_delora_weights(pipe, adapter)
    assert torch.allclose(noise_of(pipe), expected, atol=1e-4) and (expected - base).abs().max() > 0.01


def test_the_report_names_the_adapter_and_counts_the_layers_of_each_component(pipe: Any, trained: Trained) -> None:
    endings = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    attention = {name: [n for n, _ in getattr(pipe, name).named_modules() if n.endswith(endings)] for name in BOTH}
    report = load_delora_weights(pipe, trained(*BOTH))
    assert report.adapter_name == "default" and get_active_adapters(pipe) == ["default"]
    assert (
        report.layers == {name: len(layers) for name, layers in attention.items()} and min(report.layers.values()) > 4
    )


def test_the_report_tells_how_well_the_base_fits_and_what_was_trained_in_full(
    pipe: Any, own: Any, trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "delora_diffusion")
    biases = sum(name.endswith("bias") for name, _ in pipe.unet.named_parameters())
    report = load_delora_weights(pipe, adapter_for(pipe, "unet", bias="all"))
    assert report.base_off == 0.0 and report.in_full == {"unet": biases}
    assert "32 layers of unet" in str(report) and "base within 0.00%" in str(report) and str(report) in caplog.text
    cast(own, torch.bfloat16)
    near = load_delora_weights(own, trained("unet"))
    assert near.base_off is not None and 0 < near.base_off < 5e-3 and near.in_full == {}
    unchecked = load_delora_weights(own, trained("unet"), "again", check_base=False)
    assert unchecked.base_off is None and "base not compared" in str(unchecked)


def test_a_loaded_adapter_is_frozen_and_needs_no_gradient(pipe: Any, trained: Trained) -> None:
    load_delora_weights(pipe, trained(*BOTH, bias="all"))
    assert not any(p.requires_grad for name in BOTH for p in getattr(pipe, name).parameters())


def test_every_source_gives_the_same_images(pipe: Any, trained: Trained, original: Any, tmp_path: Path) -> None:
    adapter = trained(*BOTH)
    path = write_adapter(tmp_path / "out", adapter)
    images = []
    for source in (adapter, path, str(path), tmp_path / "out"):
        fresh = clone(original)
        load_delora_weights(fresh, source)
        images.append(draw(fresh))
    assert all(np.array_equal(image, images[0]) for image in images)
    assert np.abs(images[0] - draw(original)).max() > 10, "the adapter can be seen"


def test_a_peft_folder_loads_into_the_denoiser(pipe: Any, tmp_path: Path) -> None:
    config = peft.DeloraConfig(r=2, delora_lambda=8, target_modules=["to_q", "to_v"], init_weights=False)
    theirs = clone(pipe)
    theirs.unet = peft.get_peft_model(theirs.unet, config)
    theirs.unet.eval().save_pretrained(tmp_path)
    expected = noise_of(theirs)
    assert list(load_delora_weights(pipe, tmp_path).layers) == ["unet"]
    assert torch.allclose(noise_of(pipe), expected, atol=1e-5)


def test_names_are_default_and_then_numbered(pipe: Any, trained: Trained) -> None:
    adapter = trained()
    names = [load_delora_weights(pipe, adapter, name).adapter_name for name in (None, None, "dog", None)]
    assert names == ["default", "default_1", "dog", "default_2"]
    delete_adapters(pipe, "default_1")
    assert load_delora_weights(pipe, adapter).adapter_name == "default_1"


def test_a_second_adapter_replaces_the_first_until_both_are_set(pipe: Any, trained: Trained) -> None:
    first, second = trained(*BOTH), trained(seed=1)
    load_delora_weights(pipe, first, "first")
    load_delora_weights(pipe, second, "second")
    assert get_active_adapters(pipe) == ["second"]
    unloaded = clone(pipe)
    unload_delora_weights(unloaded)
    assert torch.allclose(noise_of(pipe), noise_of(dense(unloaded, [(second, 1.0)])), atol=1e-4)


def test_an_adapter_loaded_while_all_are_disabled_waits_for_enable(pipe: Any, trained: Trained) -> None:
    base = noise_of(pipe)
    load_delora_weights(pipe, trained(target_modules=["to_q"]), "first")
    disable_delora(pipe)
    load_delora_weights(pipe, trained(*BOTH, seed=1), "second")
    assert torch.equal(noise_of(pipe), base)
    enable_delora(pipe)
    assert get_active_adapters(pipe) == ["second"] and not torch.allclose(noise_of(pipe), base, atol=1e-2)


# ---- strengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strength_zero_is_the_base_bit_for_bit(dtype: torch.dtype, own: Any, trained: Trained) -> None:
    cast(own, dtype)
    base, image = noise_of(own), draw(own)
    load_delora_weights(own, trained(*BOTH))
    assert not torch.equal(noise_of(own), base)
    set_adapters(own, "default", 0.0)
    assert torch.equal(noise_of(own), base) and np.array_equal(draw(own), image)
    fuse_delora(own)
    assert torch.equal(noise_of(own), base)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (1.0, -1.0), (0.0, 1.0)])
@pytest.mark.parametrize("fused", [False, True], ids=["beside", "fused"])
def test_two_adapters_add_up_with_their_weights(
    fused: bool, weights: tuple[float, float], pipe: Any, trained: Trained, original: Any
) -> None:
    first, second = trained(), trained(*BOTH, seed=1, target_modules=["to_q", "to_out.0", "q_proj"])
    load_delora_weights(pipe, first, "first")
    load_delora_weights(pipe, second, "second")
    set_adapters(pipe, ["first", "second"], weights)
    assert get_active_adapters(pipe) == ["first", "second"]
    if fused:
        fuse_delora(pipe)
    expected = noise_of(dense(original, [(first, weights[0]), (second, weights[1])]))
    assert torch.allclose(noise_of(pipe), expected, atol=1e-4)


def test_one_weight_counts_for_all_and_each_has_its_own_when_given(pipe: Any, trained: Trained, original: Any) -> None:
    adapters = [trained(seed=seed) for seed in range(3)]
    for number, adapter in enumerate(adapters):
        load_delora_weights(pipe, adapter, f"a{number}")
    for weights in (0.25, [0.1, 0.2, 0.3]):
        set_adapters(pipe, ["a0", "a1", "a2"], weights)
        each = [weights] * 3 if isinstance(weights, float) else weights
        expected = noise_of(dense(original, list(zip(adapters, each, strict=True))))
        assert torch.allclose(noise_of(pipe), expected, atol=1e-4)


def test_the_order_of_adapters_does_not_matter(pipe: Any, trained: Trained) -> None:
    for number in range(2):
        load_delora_weights(pipe, trained(*BOTH, seed=number), f"a{number}")
    outputs = []
    for names, weights in ((["a0", "a1"], [0.5, 2.0]), (["a1", "a0"], [2.0, 0.5])):
        set_adapters(pipe, names, weights)
        outputs.append(noise_of(pipe))
        for order in (names, names[::-1]):
            fuse_delora(pipe, order)
            outputs.append(noise_of(pipe))
            unfuse_delora(pipe)
    assert all(torch.allclose(output, outputs[0], atol=1e-4) for output in outputs)


def test_the_scale_of_a_call_is_a_strength_of_the_denoiser(pipe: Any, trained: Trained) -> None:
    load_delora_weights(pipe, trained("unet"))
    full, halved = draw(pipe), draw(pipe, cross_attention_kwargs={"scale": 0.5})
    set_adapters(pipe, "default", 0.5)
    assert np.array_equal(draw(pipe), halved) and not np.array_equal(full, halved)


@pytest.mark.parametrize("weight, scale", [(0.5, 1.0), (1.0, 0.5), (0.25, 2.0)])
def test_weight_times_scale_is_the_strength_of_a_fused_update(
    weight: float, scale: float, pipe: Any, trained: Trained
) -> None:
    base = bits(pipe)
    load_delora_weights(pipe, adapter := trained(*BOTH))
    set_adapters(pipe, "default", weight)
    fuse_delora(pipe, scale=scale)
    fused = bits(pipe)
    whole = bits(dense(restored(pipe), [(adapter, 1.0)]))
    for name in (name for name in base if not torch.equal(base[name], whole[name])):
        assert torch.allclose(fused[name] - base[name], 0.5 * (whole[name] - base[name]), atol=1e-5)


# ---- fusing and taking out ------------------------------------------------------------------------


def test_fused_images_are_the_unfused_ones(pipe: Any, trained: Trained) -> None:
    base = draw(pipe)
    load_delora_weights(pipe, trained(*BOTH))
    beside = draw(pipe)
    reports = fuse_delora(pipe)
    assert np.abs(draw(pipe) - beside).max() <= 1 < 10 < np.abs(beside - base).max()
    assert {name: report.layers for name, report in reports.items()} == {
        name: len(delora_layers(getattr(pipe, name))) for name in BOTH
    }
    assert all(report.rounding_loss < 1e-6 for report in reports.values())
    unfuse_delora(pipe)
    assert np.array_equal(draw(pipe), beside)


@pytest.mark.parametrize(
    "leave, dtype",
    [
        ("unfuse", torch.float32), ("unload", torch.float32), ("unload", torch.float16), ("unfuse", torch.bfloat16),
        ("unload", torch.bfloat16), ("delete", torch.bfloat16), ("delete one by one", torch.bfloat16),
        ("fuse twice and unload", torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_unfuse_and_unload_restore_every_tensor_bit_for_bit(
    leave: str, dtype: torch.dtype, own: Any, trained: Trained
) -> None:
    cast(own, dtype)
    base = bits(own)
    load_delora_weights(own, trained(), "first")
    load_delora_weights(own, trained(*BOTH, seed=1), "second")
    set_adapters(own, ["first", "second"], [0.7, 1.3])
    fuse_delora(own, "first" if "twice" in leave else None)
    if "twice" in leave:
        fuse_delora(own, "second", scale=0.5)
    changed = bits(own)
    assert sum(not torch.equal(changed[name], tensor) for name, tensor in base.items()) > 10
    if leave == "unfuse":
        unfuse_delora(own)
    elif leave == "delete one by one":
        delete_adapters(own, "first")
        delete_adapters(own, "second")
    elif leave == "delete":
        delete_adapters(own, ["second", "first"])
    else:
        unload_delora_weights(own)
    after = bits(own)
    kept = {name: tensor for name, tensor in after.items() if ".delora." not in name}
    assert equal(kept, base) and (leave == "unfuse") == (len(after) > len(base))


@pytest.mark.parametrize("fields", [{}, {"bias": "all"}, {"modules_to_save": ["conv_out"]}], ids=str)
def test_unload_leaves_nothing_behind(fields: dict[str, Any], own: Any, trained: Trained) -> None:
    own.unet.conv_in.weight.requires_grad_(False)  # must stay as it was
    before, base, image = anatomy(own), bits(own), draw(own)
    load_delora_weights(own, trained(**fields))
    set_adapters(own, "default", 0.5)
    disable_delora(own)
    assert anatomy(own) != before
    unload_delora_weights(own)
    assert anatomy(own) == before and equal(bits(own), base) and np.array_equal(draw(own), image)
    assert get_active_adapters(own) == []


def test_deleting_one_of_two_leaves_the_other(pipe: Any, trained: Trained, original: Any) -> None:
    first, second = trained(*BOTH), trained(seed=1)
    load_delora_weights(pipe, first, "first")
    load_delora_weights(pipe, second, "second")
    set_adapters(pipe, ["first", "second"], [0.5, 1.5])
    delete_adapters(pipe, "first")
    assert get_active_adapters(pipe) == ["second"]
    assert torch.allclose(noise_of(pipe), noise_of(dense(original, [(second, 1.5)])), atol=1e-4)
    assert not delora_layers(pipe.text_encoder)


def test_deleting_a_fused_adapter_takes_its_update_out(pipe: Any, trained: Trained, original: Any) -> None:
    first, second = trained(), trained(seed=1)
    load_delora_weights(pipe, first, "first")
    load_delora_weights(pipe, second, "second")
    set_adapters(pipe, ["first", "second"])
    fuse_delora(pipe)
    delete_adapters(pipe, ["first"])
    assert torch.allclose(noise_of(pipe), noise_of(dense(original, [(second, 1.0)])), atol=1e-4)


def test_disable_is_the_base_and_enable_the_adapter_again(pipe: Any, trained: Trained) -> None:
    base = noise_of(pipe)
    load_delora_weights(pipe, trained(*BOTH, bias="delora_only"))
    acting = noise_of(pipe)
    disable_delora(pipe)
    assert torch.equal(noise_of(pipe), base) and get_active_adapters(pipe) == ["default"]
    enable_delora(pipe)
    assert torch.equal(noise_of(pipe), acting) and not torch.equal(acting, base)


def test_disabling_leaves_what_is_fused(pipe: Any, trained: Trained) -> None:
    load_delora_weights(pipe, trained())
    fuse_delora(pipe)
    fused = noise_of(pipe)
    disable_delora(pipe)
    assert torch.equal(noise_of(pipe), fused)


def test_verbs_on_a_pipeline_without_adapters_change_nothing(pipe: Any) -> None:
    base = bits(pipe)
    for verb in (unfuse_delora, unload_delora_weights, disable_delora, enable_delora, fuse_delora):
        verb(pipe)
    assert get_active_adapters(pipe) == [] and equal(bits(pipe), base)


def test_adapters_are_there_in_another_pipeline_of_the_same_components(pipe: Any, trained: Trained) -> None:
    load_delora_weights(pipe, trained(*BOTH), "dog")
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert get_active_adapters(other) == ["dog"]
    set_adapters(other, "dog", 0.0)
    assert torch.equal(noise_of(pipe), noise_of(restored(pipe)))


def test_a_deepcopy_of_the_pipeline_has_its_own_adapters(pipe: Any, trained: Trained) -> None:
    load_delora_weights(pipe, trained(), "dog")
    acting = noise_of(pipe)
    unload_delora_weights(clone(pipe))
    assert torch.equal(noise_of(pipe), acting)


# ---- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"bias": "all"}, {"init_weights": "residual"}], ids=str)
def test_saved_and_loaded_gives_the_same_images(
    fields: dict[str, Any], pipe: Any, trained: Trained, original: Any, tmp_path: Path
) -> None:
    load_delora_weights(pipe, trained(*BOTH, **fields))
    path = save_delora_weights(tmp_path / "out", pipe, provenance={"seed": "1"})
    fresh = clone(original)
    load_delora_weights(fresh, path)
    assert np.array_equal(draw(fresh), draw(pipe)) and read_adapter(path).provenance == {"seed": "1"}


def test_one_of_two_adapters_is_saved_by_name_fused_or_not(
    pipe: Any, trained: Trained, original: Any, tmp_path: Path
) -> None:
    first, second = trained(*BOTH), trained(seed=1)
    load_delora_weights(pipe, first, "first")
    load_delora_weights(pipe, second, "second")
    fuse_delora(pipe)
    for name, adapter in (("first", first), ("second", second)):
        saved = read_adapter(save_delora_weights(tmp_path / name, pipe, name))
        assert saved.configs == adapter.configs and saved.tensors.keys() == adapter.tensors.keys()
        for part, tensors in adapter.tensors.items():
            assert equal(saved.tensors[part], tensors)


def test_an_adapter_is_saved_at_its_strength(pipe: Any, trained: Trained, original: Any, tmp_path: Path) -> None:
    load_delora_weights(pipe, trained(*BOTH))
    set_adapters(pipe, "default", 0.5)
    fresh = clone(original)
    load_delora_weights(fresh, save_delora_weights(tmp_path, pipe))
    assert torch.allclose(noise_of(fresh), noise_of(pipe), atol=1e-6)


def test_saving_an_adapter_that_is_not_there_is_refused(pipe: Any, trained: Trained, tmp_path: Path) -> None:
    load_delora_weights(pipe, trained(), "dog")
    said = refused(ValueError, lambda: save_delora_weights(tmp_path / "out", pipe))
    assert said == "none of unet, text_encoder has an adapter called 'default'"
    assert not (tmp_path / "out").exists()


# ---- load_pipeline --------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, 0.5, [0.3, 1.5]], ids=str)
def test_load_pipeline_is_load_set_and_fuse(trained: Trained, weights: Any, base: Path, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base)
    paths = [write_adapter(tmp_path / "first", trained(*BOTH)), write_adapter(tmp_path, trained(seed=1))]
    for path in paths:
        load_delora_weights(pipe, path)
    set_adapters(pipe, ["default", "default_1"], 1.0 if weights is None else weights)
    fuse_delora(pipe)
    found = load_pipeline(base, *paths, weights=weights)
    fused = {name: tensor for name, tensor in bits(pipe).items() if ".delora." not in name}
    assert equal(bits(found), fused) and not equal(fused, bits(StableDiffusionPipeline.from_pretrained(base)))


def test_load_pipeline_leaves_a_plain_pipeline_that_can_be_saved(
    trained: Trained, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = StableDiffusionPipeline.from_pretrained(base)
    adapter = write_adapter(tmp_path / "adapter", trained(*BOTH, bias="all"))
    pipe = load_pipeline(str(base), str(adapter), dtype=torch.float32)
    assert "adapter 'default': 8 layers of text_encoder, 32 layers of unet, " in capsys.readouterr().out
    assert type(pipe) is StableDiffusionPipeline and anatomy(pipe) == anatomy(plain)
    pipe.save_pretrained(tmp_path / "saved")
    for each in (pipe, again := StableDiffusionPipeline.from_pretrained(tmp_path / "saved"), plain):
        each.set_progress_bar_config(disable=True)
    assert equal(bits(again), bits(pipe)) and np.array_equal(draw(again), draw(pipe))
    assert np.abs(draw(again) - draw(plain)).max() > 10


def test_a_pipeline_is_saved_with_its_adapters_in_the_weights_or_not_at_all(
    trained: Trained, own: Any, tmp_path: Path
) -> None:
    plain = bits(own)
    load_delora_weights(own, trained(*BOTH, bias="all"), "dog")
    for refused in (own, clone(own)):
        with pytest.raises(DeloraError, match=r"dog would not be in what \w+.save_pretrained writes.*fuse_delora"):
            refused.save_pretrained(tmp_path / "refused")
    fuse_delora(own)
    own.save_pretrained(tmp_path / "fused")
    fused, expected = StableDiffusionPipeline.from_pretrained(tmp_path / "fused"), draw(own)
    fused.set_progress_bar_config(disable=True)
    assert anatomy(fused) != anatomy(own) and not [name for name in bits(fused) if "delora" in name]
    assert np.array_equal(draw(fused), expected) and not equal(bits(fused), plain)
    for component in BOTH:
        files = (tmp_path / "fused" / component).glob("*.safetensors")
        assert not [name for file in files for name in load_file(file) if "delora" in name]
    assert np.array_equal(draw(own), expected) and list(bits(own)) != list(plain), "the adapters are still there"
    unfuse_delora(own)
    disable_delora(own)
    own.save_pretrained(tmp_path / "disabled")
    unload_delora_weights(own)
    own.save_pretrained(tmp_path / "unloaded")
    for name in ("disabled", "unloaded"):
        assert equal(bits(StableDiffusionPipeline.from_pretrained(tmp_path / name)), plain)


def test_load_pipeline_without_adapters_is_the_base(base: Path) -> None:
    assert equal(bits(load_pipeline(base)), bits(StableDiffusionPipeline.from_pretrained(base)))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16], ids=str)
def test_load_pipeline_gives_one_precision_whatever_the_files_have(
    dtype: torch.dtype | None, own: Any, trained: Trained, tmp_path: Path
) -> None:
    """By itself `from_pretrained` makes an fp32 UNet of half-precision files, but a half-precision text encoder."""
    adapter = write_adapter(tmp_path, trained(*BOTH))
    cast(own, torch.float16)
    own.save_pretrained(tmp_path / "half")
    pipe = load_pipeline(tmp_path / "half", adapter, **({"dtype": dtype} if dtype else {}))
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {dtype or torch.float32}
    assert noise_of(pipe).isfinite().all()


def test_load_pipeline_refuses_another_number_of_weights(
    trained: Trained, base: Path, original: Any, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path, trained())
    said = refused(ValueError, lambda: load_pipeline(base, adapter, weights=[1.0, 2.0]))
    assert said == "1 adapters but 2 weights; give one weight, or one for each adapter"


# ---- text encoders with and without the `text_model.` level ---------------------------------------


class WithLevel(nn.Module):
    """A text encoder as transformers had it before 5.6: everything one level deeper."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = encoder

    @property
    def dtype(self) -> torch.dtype:
        return self.text_model.dtype  # type: ignore[return-value]

    @property
    def config(self) -> Any:
        return self.text_model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.text_model(*args, **kwargs)


@pytest.mark.parametrize("level", ["file", "module", "both", "neither"])
def test_the_text_model_level_may_be_in_the_file_or_in_the_module_alone(
    level: str, own: Any, trained: Trained
) -> None:
    adapter = trained(*BOTH)
    expected = noise_of(dense(own, [(adapter, 1.0)]))
    if level in ("file", "both"):
        deeper = {f"text_model.{name}": tensor for name, tensor in adapter.tensors["text_encoder"].items()}
        adapter = Adapter({"unet": adapter.tensors["unet"], "text_encoder": deeper}, adapter.configs)
    if level in ("module", "both"):
        own.text_encoder = WithLevel(own.text_encoder)
    report = load_delora_weights(own, adapter)
    assert report.layers["text_encoder"] == 8
    assert torch.allclose(noise_of(own), expected, atol=1e-4)


# ---- refusals: all or nothing ---------------------------------------------------------------------


def with_tensors(adapter: Adapter, component: str, tensors: Bits) -> Adapter:
    return Adapter(adapter.tensors | {component: tensors}, adapter.configs)


def without_one(adapter: Adapter) -> Adapter:
    return with_tensors(adapter, "text_encoder", dict(list(adapter.tensors["text_encoder"].items())[1:]))


def with_one_more(adapter: Adapter) -> Adapter:
    more = {"encoder.layers.9.self_attn.q_proj.delora_A": torch.ones(2, 16)}
    return with_tensors(adapter, "text_encoder", adapter.tensors["text_encoder"] | more)


def of_another_shape(adapter: Adapter) -> Adapter:
    wide = {n: torch.ones(*t.shape[:-1], t.shape[-1] + 1) for n, t in adapter.tensors["text_encoder"].items()}
    return with_tensors(adapter, "text_encoder", wide)


def not_finite(adapter: Adapter) -> Adapter:
    spoiled = {name: tensor * float("nan") for name, tensor in adapter.tensors["text_encoder"].items()}
    return with_tensors(adapter, "text_encoder", spoiled)


def of_another_base(adapter: Adapter) -> Adapter:
    scaled = {n: t * (1.1 if n.endswith("w_norm") else 1.0) for n, t in adapter.tensors["text_encoder"].items()}
    return with_tensors(adapter, "text_encoder", scaled)


def for_other_layers(adapter: Adapter) -> Adapter:
    config = DeloraConfig(r=2, target_modules=["no_such_layer"])
    return Adapter(adapter.tensors, adapter.configs | {"text_encoder": config})


def for_a_layer_of_another_kind(adapter: Adapter) -> Adapter:
    config = DeloraConfig(r=2, target_modules=["final_layer_norm"])
    return Adapter(adapter.tensors, adapter.configs | {"text_encoder": config})


WRONG = [
    (without_one, "1 missing (encoder.layers.0.self_attn."),
    (with_one_more, "1 unexpected (encoder.layers.9.self_attn.q_proj.delora_A)"),
    (of_another_shape, "32 of another shape ("),
    (not_finite, "32 not finite ("),
    (of_another_base, "trained on another base than this CLIPTextModel"),
    (for_other_layers, "target_modules ['no_such_layer'] matched none of the layers of CLIPTextModel"),
    (for_a_layer_of_another_kind, "DeLoRA adapts nn.Linear, nn.Conv2d"),
]


@pytest.mark.parametrize(
    "spoil, said, first",
    [pytest.param(*case, True, id=f"{case[0].__name__} beside another") for case in WRONG]
    + [pytest.param(*case, False, id=f"{case[0].__name__} alone") for case in WRONG[:1]],
)
def test_a_second_component_that_does_not_fit_leaves_the_pipeline_as_it_was(
    spoil: Callable[[Adapter], Adapter], said: str, first: bool, pipe: Any, trained: Trained
) -> None:
    good = trained(*BOTH)
    if first:
        load_delora_weights(pipe, trained("text_encoder", seed=1, bias="all"), "off")
        load_delora_weights(pipe, trained(*BOTH, seed=2, bias="delora_only"), "on")
        set_adapters(pipe, ["on"], 0.75)
    before, tensors, output = anatomy(pipe), bits(pipe), noise_of(pipe)
    message = refused(ValueError, lambda: load_delora_weights(pipe, spoil(good), "new"))
    assert said in message and "StableDiffusionPipeline.text_encoder: " in message
    assert anatomy(pipe) == before and equal(bits(pipe), tensors) and torch.equal(noise_of(pipe), output)
    assert get_active_adapters(pipe) == (["on"] if first else [])
    assert load_delora_weights(pipe, good, "new").adapter_name == "new", "the name is free"


def test_an_interrupted_load_leaves_the_pipeline_as_it_was(
    pipe: Any, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_delora_weights(pipe, trained(seed=1), "on")
    before, tensors = anatomy(pipe), bits(pipe)

    def interrupted(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("delora_diffusion.pipeline.load_delora_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_delora_weights(pipe, trained(*BOTH), "new")
    assert anatomy(pipe) == before and equal(bits(pipe), tensors)


def test_a_failed_load_while_disabled_leaves_everything_disabled(pipe: Any, trained: Trained) -> None:
    base = noise_of(pipe)
    load_delora_weights(pipe, trained(*BOTH, bias="all"), "on")
    disable_delora(pipe)
    before = anatomy(pipe)
    refused(ValueError, lambda: load_delora_weights(pipe, without_one(trained(*BOTH)), "new"))
    assert anatomy(pipe) == before and torch.equal(noise_of(pipe), base)


@pytest.mark.parametrize("earlier", [False, True], ids=["nothing fused before", "another fused before"])
def test_a_failed_fuse_leaves_the_weights_as_they_were(earlier: bool, pipe: Any, trained: Trained) -> None:
    load_delora_weights(pipe, trained(*BOTH, seed=1), "good")
    load_delora_weights(pipe, trained(*BOTH), "bad")
    with torch.no_grad():
        for adapter in delora_adapters(pipe.text_encoder, "bad").values():
            adapter.delora_lambda.fill_(float("inf"))
    if earlier:
        fuse_delora(pipe, "good", scale=0.5)
    before, tensors = anatomy(pipe), bits(pipe)
    message = refused(ValueError, lambda: fuse_delora(pipe, ["bad"]))
    assert "not finite" in message and anatomy(pipe) == before and equal(bits(pipe), tensors)
    unfuse_delora(pipe)
    unload_delora_weights(pipe)


def test_fusing_twice_is_refused_and_changes_nothing(pipe: Any, trained: Trained) -> None:
    load_delora_weights(pipe, trained(*BOTH), "dog")
    fuse_delora(pipe)
    before, tensors = anatomy(pipe), bits(pipe)
    assert "'dog' is merged already" in refused(ValueError, lambda: fuse_delora(pipe, "dog"))
    assert anatomy(pipe) == before and equal(bits(pipe), tensors)


def test_a_fused_adapter_cannot_be_given_another_strength(pipe: Any, trained: Trained, original: Any) -> None:
    load_delora_weights(pipe, trained(), "dog")
    fuse_delora(pipe)
    assert "merged at weight 1" in refused(ValueError, lambda: set_adapters(pipe, "dog", 0.5))
    unfuse_delora(pipe)
    set_adapters(pipe, "dog", 0.0)
    assert torch.equal(noise_of(pipe), noise_of(original))


# ---- refusals: the wrong thing --------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused_unless_asked_for(pipe: Any, tmp_path: Path) -> None:
    adapter = adapter_for(tiny.stable_diffusion(tmp_path, seed=1), *BOTH)
    base = bits(pipe)
    message = refused(ValueError, lambda: load_delora_weights(pipe, adapter))
    assert "trained on another base" in message and "check_base=False" in message and equal(bits(pipe), base)
    assert load_delora_weights(pipe, adapter, check_base=False).layers["text_encoder"] == 8
    expected = noise_of(dense(restored(pipe), [(adapter, 1.0)]))
    assert torch.allclose(noise_of(pipe), expected, atol=1e-4), "the update is the one that was trained"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_trained_on_an_fp32_base_fits_its_half_precision_copy(
    dtype: torch.dtype, own: Any, trained: Trained
) -> None:
    adapter = trained(*BOTH)
    expected = noise_of(dense(own, [(adapter, 1.0)]))
    cast(own, dtype)
    base = noise_of(own)
    load_delora_weights(own, adapter)
    off, effect = (noise_of(own) - expected).norm(), (base - expected).norm()
    assert off < 0.1 * effect


def test_a_name_in_use_is_refused(pipe: Any, trained: Trained) -> None:
    load_delora_weights(pipe, trained("text_encoder"), "dog")
    before = anatomy(pipe)
    message = refused(ValueError, lambda: load_delora_weights(pipe, trained(), "dog"))
    assert message == "the pipeline has an adapter 'dog' already; delete_adapters it, or choose another name"
    assert anatomy(pipe) == before


@pytest.mark.parametrize("name", ["a.b", "", "keys"])
def test_a_name_that_cannot_be_used_is_refused(name: str, pipe: Any, trained: Trained) -> None:
    before = anatomy(pipe)
    assert "cannot name an adapter" in refused(ValueError, lambda: load_delora_weights(pipe, trained(), name))
    assert anatomy(pipe) == before


@pytest.mark.parametrize(
    "verb",
    [set_adapters, fuse_delora, delete_adapters, lambda pipe, names: set_adapters(pipe, names[1], 0.5)],
    ids=["set", "fuse", "delete", "weigh"],
)
def test_an_unknown_adapter_is_named_with_those_there_are(verb: Any, pipe: Any, trained: Trained) -> None:
    load_delora_weights(pipe, trained(), "dog")
    load_delora_weights(pipe, trained("text_encoder"), "bird")
    before, tensors = anatomy(pipe), bits(pipe)
    message = refused(ValueError, lambda: verb(pipe, ["dog", "cat"]))
    assert message == "no adapter is called 'cat'; loaded are: bird, dog"
    assert anatomy(pipe) == before and equal(bits(pipe), tensors)


def test_an_unknown_adapter_of_a_plain_pipeline_is_named(pipe: Any) -> None:
    assert "loaded are: (none)" in refused(ValueError, lambda: set_adapters(pipe, "cat"))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], []], ids=str)
def test_another_number_of_weights_is_refused(weights: list[float], pipe: Any, trained: Trained) -> None:
    for name in ("dog", "cat"):
        load_delora_weights(pipe, trained(), name)
    before = anatomy(pipe)
    message = refused(ValueError, lambda: set_adapters(pipe, ["dog", "cat"], weights))
    assert f"2 adapters but {len(weights)} weights" in message and anatomy(pipe) == before


def test_an_adapter_for_a_component_the_pipeline_lacks_is_refused(own: Any, trained: Trained) -> None:
    adapter = trained(*BOTH)
    own.text_encoder = None
    before = anatomy(own)
    message = refused(AdapterFileError, lambda: load_delora_weights(own, adapter))
    assert message == "the adapter is for 'text_encoder', but the pipeline has only unet"
    other = Adapter({"transformer": adapter.tensors["unet"]}, {"transformer": adapter.configs["unet"]})
    assert "is for 'transformer'" in refused(AdapterFileError, lambda: load_delora_weights(own, other))
    assert anatomy(own) == before


def test_an_adapter_without_tensors_is_refused(pipe: Any, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, Adapter({}, {}))
    assert "holds no tensors" in refused(AdapterFileError, lambda: load_delora_weights(pipe, path))
    empty = Adapter({"unet": {}}, {"unet": DeloraConfig(r=2)})
    assert "missing (" in refused(ValueError, lambda: load_delora_weights(pipe, empty))


def test_a_pipeline_of_no_supported_family_is_refused(pipe: Any, trained: Trained) -> None:
    class Dummy:
        unet = pipe.unet

    for call in (lambda: load_delora_weights(Dummy(), trained()), lambda: fuse_delora(Dummy())):
        assert "Dummy is of no supported family" in refused(FamilyError, call)
