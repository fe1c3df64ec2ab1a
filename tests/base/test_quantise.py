"""Quantised bases against the same base unquantised: gradients, bytes, norms; and a real run on each kind."""

from __future__ import annotations

import copy
import functools
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from delora_diffusion import DeloraConfig, delora_state_dict, inject_delora, load_delora_weights
from delora_diffusion.base.checks import BaseModelError
from delora_diffusion.base.config import QUANTIZATIONS, ModelConfig
from delora_diffusion.base.quantise import QuantisedLinear, check_installed, quantisable, quantise
from delora_diffusion.cli import main as delora
from delora_diffusion.method.inject import delora_adapters
from delora_diffusion.method.weights import is_quantised

from .. import full_size
from ..runs import Run, losses, same, tensors
from ..tiny_families import build, wake

KINDS = [kind for kind in QUANTIZATIONS if kind != "none"]
CPU = torch.device("cpu")
#: Least cosine of a kind of layer's gradients to the unquantised base's, over a whole model of random weights.
COSINE = {"int8": 0.99, "float8": 0.99, "nf4": 0.85}


def stored(module: nn.Module) -> int:
    """Bytes of everything that a module keeps, adapters left out."""

    def size(tensor: Any) -> int:
        if is_traceable_wrapper_subclass(tensor):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        state = getattr(tensor, "quant_state", None)
        scales = [*state.as_dict().values(), state.offset] if state is not None else ()
        return int(tensor.nbytes) + sum(t.nbytes for t in scales if isinstance(t, Tensor))

    tensors = [*module.named_parameters(), *module.named_buffers()]
    return sum(size(tensor) for name, tensor in tensors if "delora" not in name)


@functools.cache
def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    module = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=16, num_attention_heads=8,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    wake(module)
    return module.to(torch.bfloat16).requires_grad_(False)


@functools.cache
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    module = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    return module.requires_grad_(False)


def predicted(module: Any) -> Tensor:
    """A prediction for fixed inputs, in the module's precision."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(module.dtype)

    if isinstance(module, UNet2DConditionModel):
        found = module(drawn(2, 4, 8, 8), torch.tensor([500, 500]), drawn(2, 7, 64), return_dict=False)
    else:
        found = module(
            hidden_states=drawn(2, 16, 16), encoder_hidden_states=drawn(2, 7, 32), pooled_projections=drawn(2, 32),
            timestep=torch.full([2], 0.5), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(7, 3), return_dict=False,
        )  # fmt: skip
    return found[0]


class Trained:
    """A denoiser with adapters, its prediction and their gradients."""

    def __init__(self, whole: nn.Module, kind: str, *, checkpointing: bool = False) -> None:
        self.module: Any = copy.deepcopy(whole)
        quantise(self.module, kind, CPU)
        config = DeloraConfig(r=4, target_modules="attention+ff", init_weights="kaiming")
        inject_delora(self.module, config, generator=torch.Generator().manual_seed(2))
        self.module.train()
        if checkpointing:
            self.module.enable_gradient_checkpointing()
        self.prediction = predicted(self.module)
        self.prediction.float().square().mean().backward()
        self.gradients: dict[str, list[Tensor]] = defaultdict(list)
        for name, adapter in delora_adapters(self.module).items():
            found = [p.grad.flatten() for p in adapter.parameters() if p.grad is not None]
            self.gradients[re.sub(r"\d+", "N", name)].append(torch.cat(found))


@functools.cache
def unquantised(make: Any) -> Trained:
    return Trained(make(), "none")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [flux, unet])
def test_adapters_learn_on_a_quantised_base_as_on_the_plain_one(make: Any, kind: str) -> None:
    whole, found = unquantised(make), Trained(make(), kind, checkpointing=make is unet)
    assert found.gradients.keys() == whole.gradients.keys() and len(whole.gradients) >= 6
    for name, gradients in whole.gradients.items():
        likeness = cosine_similarity(torch.cat(gradients), torch.cat(found.gradients[name]), dim=0)
        assert likeness > COSINE[kind], f"{name}: {likeness}"
    assert 1e-4 < (found.prediction - whole.prediction).norm() / whole.prediction.norm() < 0.2
    ours, theirs = (delora_state_dict(one.module) for one in (found, whole))
    norms = [name for name in ours if name.endswith("w_norm")]
    assert norms and all(torch.equal(ours[name], theirs[name]) for name in norms)
    share = stored(found.module) / stored(whole.module)
    bound = {"int8": 0.55, "float8": 0.55, "nf4": 0.32} if make is flux else dict.fromkeys(KINDS, 0.9)
    assert share < bound[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_its_own_learns_as_the_plain_one(kind: str) -> None:
    """Without what other layers' rounding does to what comes in and back."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.ModuleList([nn.Linear(320, 320)])[0]).requires_grad_(False)
    holder = nn.Module()
    holder.blocks = nn.ModuleList([copy.deepcopy(plain)])
    quantise(holder, kind, CPU)
    x, back = torch.randn(2, 64, 320)
    found = []
    for module in (plain, holder.blocks[0]):
        layer, entry = module[0], x.clone().requires_grad_()
        y = layer(entry)
        y.backward(back)
        found.append((y.detach(), entry.grad))
    least = 0.98 if kind == "nf4" else 0.999
    assert all(cosine_similarity(a.flatten(), b.flatten(), dim=0) > least for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("name", ["FLUX.1", "FLUX.2 dev", "Z-Image", "SD3.5 medium", "SDXL"])
def test_at_full_size_nearly_everything_is_quantised_but_the_ends(name: str) -> None:
    """int8 takes at most .55 of the bytes of a transformer's bf16 weights; convolutions make a UNet's share larger."""
    module = full_size.denoiser(name)
    layers = dict(quantisable(module))
    total, inside = sum(p.numel() for p in module.parameters()), sum(x.weight.numel() for x in layers.values())
    assert (inside + 2 * (total - inside)) / (2 * total) < (0.58 if name == "SDXL" else 0.55)
    linears = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]
    ends = ("embed", "proj_out", "norm_out", "final_layer", "img_in", "txt_in", "conv", "stream_modulation")
    assert all(any(end in path for end in ends) for path in linears if path not in layers)
    assert not any(re.match(r"[a-z_]*(embed|proj_out|norm_out|final_layer|_in)", path) for path in layers)


def test_what_a_class_keeps_in_fp32_is_left_alone() -> None:
    from transformers import T5Config, T5EncoderModel

    encoder = T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=9))
    names = {name.rpartition(".")[2] for name, _ in quantisable(encoder)}
    assert {"q", "k", "v", "o", "wi"} <= names and "wo" not in names


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_layer_forms_its_weight_twice_and_keeps_nothing(kind: str, autocast: bool) -> None:
    holder = nn.Module()
    holder.blocks = nn.ModuleList([nn.Linear(16, 24)])
    quantise(holder, kind, CPU)
    layer = holder.blocks[0]
    layer.bias.requires_grad_(True)
    assert type(layer) is QuantisedLinear
    kept: list[Tensor] = []
    x = torch.randn(3, 5, 16, requires_grad=True)
    seen = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
    with seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert kept == []
    torch.testing.assert_close(layer.formed(), layer.weight.dequantize(), rtol=1e-6, atol=0)
    back = torch.randn_like(y)
    y.backward(back)
    wide = back.float()
    close = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(x.grad, wide @ layer.weight.dequantize(), **close)
    torch.testing.assert_close(layer.bias.grad, wide.sum((0, 1)), **close)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.weight.dequantize().T + layer.bias, rtol=1e-4, atol=1e-5)


def test_what_is_quantised_already_or_has_nothing_to_quantise_is_refused() -> None:
    module = copy.deepcopy(unet())
    quantise(module, "int8", CPU)
    with pytest.raises(BaseModelError, match="UNet2DConditionModel is quantised in its files already; leave the opt"):
        quantise(module, "float8", CPU)
    with pytest.raises(BaseModelError, match="this Linear has no Linear layers in repeated blocks"):
        quantise(nn.Linear(4, 4), "int8", CPU)


@pytest.mark.parametrize("package, kind", [("torchao", "float8"), ("bitsandbytes", "nf4")])
def test_a_missing_package_is_named_with_its_extra(package: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for option in ("base_quantization", "text_encoder_quantization"):
        model = ModelConfig(pretrained_model_name_or_path="base", **{option: kind})
        said = rf'{option} {kind} needs {package} .*pip install "delora_diffusion\[{package}\]"'
        with pytest.raises(ImportError, match=said):
            check_installed(model)
    check_installed(ModelConfig(pretrained_model_name_or_path="base"))


# ---- the script ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    build("flux.1-dev", folder / "parts").save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture
def quantised_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The classes of the modules that the script quantises, in order, with the kind."""
    from delora_diffusion.training import prepare

    seen: list[str] = []

    def noted(module: nn.Module, kind: str, *places: torch.device) -> None:
        quantise(module, kind, *places)
        count = sum(isinstance(part, nn.Linear) and is_quantised(part) for part in module.modules())
        seen.append(f"{type(module).__name__} {kind} {count > 0}")

    monkeypatch.setattr(prepare, "quantise", noted)
    yield seen


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be half of the time of a run."""
    monkeypatch.setattr("delora_diffusion.training.results.plot_run", lambda *args, **settings: None)


@pytest.mark.parametrize("name, kind", [("unet", "int8"), ("flux", "float8")])
def test_a_run_trains_resumes_previews_and_exports(
    name: str, kind: str, run: Run, base: Path, flux_base: Path, tmp_path: Path, quantised_layers: list[str]
) -> None:
    here = flux_base if name == "flux" else base
    options = [
        f"--pretrained_model_name_or_path={here}", "--max_train_steps=4", "--checkpointing_steps=2",
        "--validation_prompt=a sks dog", "--num_validation_images=1", "--gradient_checkpointing", "--learning_rate=1",
        f"--base_quantization={kind}", "--text_encoder_quantization=int8",
    ]  # fmt: skip
    out = run("quantised", *options)
    assert quantised_layers[-1].endswith(f"{kind} True") and quantised_layers[0] == "CLIPTextModel int8 True"
    resumed = tmp_path / "resumed"
    shutil.copytree(out / "checkpoint-2", resumed / "checkpoint-2")
    run("resumed", *options, "--blocks_to_swap=3", "--resume_from_checkpoint=latest")
    assert same(tensors(out), tensors(resumed)), "whether blocks are swapped or not"
    assert (out / "before_after.png").is_file()

    # ---- the file is that of the plain base, where it loads and is exported exactly
    pipe = DiffusionPipeline.from_pretrained(here, dtype=torch.float32)
    assert load_delora_weights(pipe, out).base_off == 0
    assert delora(["verify", f"--adapter={out}", f"--file={out / 'pytorch_lora_weights.safetensors'}"]) == 0


def test_a_run_goes_on_in_another_precision_and_draws_in_any(run: Run, tmp_path: Path, capsys: Any) -> None:
    shared = ["--max_train_steps=2", "--checkpointing_steps=1", "--learning_rate=1", "--gradient_checkpointing"]
    eight = run("eight", *shared, "--base_quantization=int8")
    found = {}
    for kind in ("none", "nf4"):
        shutil.copytree(eight / "checkpoint-1", tmp_path / kind / "checkpoint-1")
        found[kind] = run(kind, *shared, f"--base_quantization={kind}", "--resume_from_checkpoint=latest")
        assert f"base_quantization was int8 and is {kind}" in capsys.readouterr().err
    assert len({losses(out)[-1] for out in (eight, *found.values())}) == 3
    shutil.copytree(eight / "checkpoint-1", tmp_path / "swapped" / "checkpoint-1")
    swapped = run(
        "swapped", *shared, "--base_quantization=nf4", "--blocks_to_swap=3", "--resume_from_checkpoint=latest"
    )
    assert same(tensors(swapped), tensors(found["nf4"]))
    for kind in ("none", "float8"):
        asked = ["--prompts", "x", "--height=16", "--width=16", "--num_inference_steps=1", "--device=cpu"]
        out = f"--output_dir={tmp_path / 'drawn'}"
        assert delora(["sample", f"--adapter={eight}", out, *asked, f"--base_quantization={kind}"]) == 0
    assert len({file.read_bytes() for file in (tmp_path / "drawn").glob("x_*.png")}) == 2
