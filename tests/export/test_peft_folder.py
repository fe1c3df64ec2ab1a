"""PEFT folders in both directions, with PEFT as the oracle: outputs, names, components, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from delora_diffusion import (
    AdapterFileError,
    DeloraConfig,
    export_peft,
    inject_delora,
    load_delora_state_dict,
    load_delora_weights,
    read_adapter,
    save_delora_weights,
    set_delora_adapters,
)
from delora_diffusion.adapters.adapter import adapted, layer_tensors
from delora_diffusion.adapters.assign import assign
from delora_diffusion.adapters.peft import PeftFormatError
from delora_diffusion.cli import main
from delora_diffusion.method.delora import factors_of
from delora_diffusion.method.inject import delora_adapters, delora_config

from .. import tiny

INITS = ("zero", "paired", "residual", "kaiming")


class Net(nn.Module):
    """Two attention-like blocks, norms with biases, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"to_q": nn.Linear(12, 12), "to_v": nn.Linear(12, 12), "norm": nn.LayerNorm(12)})
            for _ in range(2)
        )
        self.head = nn.Linear(12, 5)
        self.lm_head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["norm"](x + block["to_v"](torch.tanh(block["to_q"](x))))
        return self.lm_head(self.head(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def trained(module: nn.Module, config: DeloraConfig) -> nn.Module:
    """As training leaves it: everything trainable has moved, lambda as well."""
    torch.manual_seed(1)
    inject_delora(module, config)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
    return module


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * max(1.0, float(theirs.detach().abs().max())))


X = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))


# ---- ours opens in PEFT --------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.4, -0.5])
@pytest.mark.parametrize("init_weights", INITS)
def test_peft_opens_every_init_at_its_strength_with_the_same_outputs(
    init_weights: str, weight: float, tmp_path: Path
) -> None:
    module = trained(net(), DeloraConfig(r=4, delora_lambda=3.0, init_weights=init_weights))
    set_delora_adapters(module, "default", weight)
    folders = export_peft(module, tmp_path / "out")
    assert folders == {"": tmp_path / "out"}
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path / "out"))
    close(module(X), theirs(X))
    assert float((module(X) - net()(X)).detach().abs().max()) > 0.02
    ranks = {layer.r["default"] for layer in theirs.modules() if isinstance(layer, peft.tuners.delora.DeloraLayer)}
    assert ranks == {8 if init_weights == "residual" else 4}
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    double = 2 if init_weights == "residual" else 1
    assert (told["r"], told["delora_lambda"]) == (4 * double, 3.0 * double), "lambda / r stays"


@pytest.mark.parametrize("lam, lam_0", [(3.0, 3.0), (0.5, 3.0), (4.0, 3.0), (-2.0, 3.0), (0.0, 3.0), (0.0, 0.0)])
def test_a_residual_adapter_is_exact_at_any_pair_of_lambdas_and_with_floored_columns(
    lam: float, lam_0: float, tmp_path: Path
) -> None:
    module = trained(net(), DeloraConfig(r=3, delora_lambda=3.0, init_weights="residual"))
    with torch.no_grad():
        for adapter in delora_adapters(module).values():
            adapter.delora_lambda.fill_(lam)
            adapter.delora_lambda_init.fill_(lam_0)
            adapter.delora_B[:, 0] *= 1e-6
            adapter.delora_A_init[1] *= 1e-6
            adapter.delora_B_init[:, 2] = 0
    export_peft(module, tmp_path)
    close(module(X), peft.PeftModel.from_pretrained(net(), str(tmp_path))(X))


@pytest.mark.parametrize(
    "config",
    [
        DeloraConfig(r=2, bias="delora_only"),
        DeloraConfig(r=2, bias="all"),
        DeloraConfig(r=2, target_modules=["to_q"], modules_to_save=["blocks.1.norm", "lm_head"]),
        DeloraConfig(r=2, target_modules=["to_q"], modules_to_save=["lm_hea."], bias="all"),
        DeloraConfig(r=2, target_modules="all-linear", rank_pattern={"to_q": 4}, lambda_pattern={"head": 1.0}),
        DeloraConfig(r=2, target_modules=r"blocks\.1|.*to_q", init_weights="residual", rank_pattern={"1.to_q": 5}),
        DeloraConfig(r=2, target_modules=["to_q", "to_v"], layers_to_transform=[1], layers_pattern="blocks"),
        DeloraConfig(r=2, target_modules=["to_q", "head"], exclude_modules=["blocks.0.to_q", "lm_head"]),
        DeloraConfig(r=2, target_modules="all-linear", relative_lambda=0.1, lambda_pattern={"head": 1.0}),
        DeloraConfig(r=2, target_modules=["to_q", "head"], exclude_modules="attention", init_weights="kaiming"),
    ],
    ids=[
        "biases",
        "all biases",
        "saved modules",
        "saved and biases",
        "all-linear",
        "regex",
        "layers",
        "excluded",
        "relative",
        "excluded by preset",
    ],
)
def test_every_field_opens_in_peft_and_comes_back(config: DeloraConfig, tmp_path: Path) -> None:
    module = trained(net(), config)
    export_peft(module, tmp_path)
    close(module(X), peft.PeftModel.from_pretrained(net(), str(tmp_path))(X))
    again = net()
    (part,) = read_adapter(tmp_path).tensors.values()
    inject_delora(again, read_adapter(tmp_path).configs[""])
    load_delora_state_dict(again, part)
    close(module(X), again(X))


def test_the_lambdas_of_a_relative_one_are_written_for_every_width(tmp_path: Path) -> None:
    config = DeloraConfig(r=2, target_modules="all-linear", relative_lambda=0.1)
    inject_delora(module := net(), config)
    export_peft(module, tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "relative_lambda" not in told
    assert told["delora_lambda"] == pytest.approx(0.1 * (2 * 12) ** 0.5)
    assert told["lambda_pattern"] == {"lm_head": pytest.approx(0.1 * (2 * 5) ** 0.5)}


def test_saved_modules_that_peft_would_look_for_in_vain_are_refused(tmp_path: Path) -> None:
    module = trained(net(), DeloraConfig(r=2, target_modules=["to_q"], modules_to_save=["head"]))
    with pytest.raises(PeftFormatError, match=r"it expects lm_head\.weight in the file.*delora merge"):
        export_peft(module, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- PEFT's opens in ours ------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "all", "delora_only"])
@pytest.mark.parametrize("init_weights", [True, False])
def test_ours_opens_a_folder_that_peft_wrote(init_weights: bool, bias: str, tmp_path: Path) -> None:
    config = peft.DeloraConfig(
        r=4, target_modules=["to_q", "to_v"], init_weights=init_weights, bias=bias, modules_to_save=["lm_head"],
        rank_pattern={"blocks.1.to_q": 2},
    )  # fmt: skip
    theirs = peft.get_peft_model(net(), config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
    theirs.save_pretrained(str(tmp_path))
    adapter = read_adapter(tmp_path)
    assert adapter.configs[""].init_weights == ("zero" if init_weights else "kaiming")
    ours = net()
    inject_delora(ours, adapter.configs[""])
    load_delora_state_dict(ours, adapter.tensors[""])
    close(ours(X), theirs(X))


def test_what_an_older_configuration_does_not_say_is_pefts_default(tmp_path: Path) -> None:
    module = trained(net(), DeloraConfig(r=8, delora_lambda=15.0, target_modules=["to_q"]))
    export_peft(module, tmp_path)
    kept = {"peft_type": "DELORA", "target_modules": ["to_q"], "unheard_of": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(kept))
    adapter = read_adapter(tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path))
    assert adapter.configs[""] == DeloraConfig(target_modules=["to_q"], init_weights="zero")
    ours = net()
    inject_delora(ours, adapter.configs[""])
    load_delora_state_dict(ours, adapter.tensors[""])
    close(ours(X), theirs(X))


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    export_peft(trained(net(), DeloraConfig(r=2)), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match=r"holds pickled weights.*save_pretrained them again"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()  # as a folder of the Hub looks: nothing pickled is fetched
    with pytest.raises(AdapterFileError, match=r"but no adapter_model.safetensors; perhaps it has pickled weights"):
        read_adapter(tmp_path)


# ---- pipelines: a folder for each component ------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("pipe"))


@pytest.fixture
def both(pipe: StableDiffusionPipeline) -> Any:
    """The pipeline with a trained adapter in the UNet and the text encoder."""
    made = copy.deepcopy(pipe)
    for module, init in ((made.unet, "residual"), (made.text_encoder, "zero")):
        trained(module, DeloraConfig(r=2, delora_lambda=2.0, init_weights=init))
    return made


def unet_output(unet: Any) -> Tensor:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return unet(torch.randn(2, 4, 8, 8, generator=g), 5, torch.randn(2, 6, 16, generator=g)).sample


def text_output(encoder: Any) -> Tensor:
    with torch.no_grad():
        return encoder(torch.arange(12).reshape(2, 6)).last_hidden_state


def test_peft_opens_every_component_and_the_folder_comes_back_as_one_adapter(
    both: Any, pipe: Any, tmp_path: Path
) -> None:
    folders = export_peft(both, tmp_path)
    assert folders == {"unet": tmp_path / "unet", "text_encoder": tmp_path / "text_encoder"}
    assert json.loads((folders["unet"] / "adapter_config.json").read_text())["auto_mapping"] == {
        "base_model_class": "UNet2DConditionModel",
        "parent_library": "diffusers.models.unets.unet_2d_condition",
    }
    expected = unet_output(both.unet), text_output(both.text_encoder)
    for component, output, want in zip(folders, (unet_output, text_output), expected, strict=True):
        base = copy.deepcopy(getattr(pipe, component))
        close(want, output(peft.PeftModel.from_pretrained(base, str(folders[component]))))
    again = copy.deepcopy(pipe)
    report = load_delora_weights(again, tmp_path)
    assert set(report.layers) == {"unet", "text_encoder"}
    close(unet_output(again.unet), expected[0])
    close(text_output(again.text_encoder), expected[1])


def test_a_native_file_exports_as_the_live_pipeline_does(both: Any, tmp_path: Path) -> None:
    save_delora_weights(tmp_path / "native", both, provenance={"base_model": "some/base"})
    live, file = export_peft(both, tmp_path / "live"), export_peft(tmp_path / "native", tmp_path / "file")
    for component in live:
        a, b = (load_file(folders[component] / "adapter_model.safetensors") for folders in (live, file))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    values = json.loads((file["unet"] / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "some/base"
    assert read_adapter(tmp_path / "file").provenance["base_model"] == "some/base"


def test_the_export_command_writes_a_folder_for_each_component(
    both: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_delora_weights(tmp_path / "native", both)
    assert main(["export", f"--adapter={file}", "--format=peft", f"--output={tmp_path / 'out'}"]) == 0
    written, native = read_adapter(tmp_path / "out").tensors, read_adapter(file).tensors
    assert written.keys() == native.keys()
    for component, tensors in native.items():
        for layer in adapted(tensors):
            (down, up), (down_0, up_0) = (
                factors_of(layer_tensors(layer, some[component])) for some in (written, native)
            )
            close(up @ down, up_0 @ down_0)
    for ignored in ("--weights=0.5", "--rank=2", "--lora_dtype=fp16", "--trigger=sks", "--no-metadata",
                    "--allow_partial", "--component=unet", "--architecture=sd1"):  # fmt: skip
        with contextlib.suppress(SystemExit):
            assert main(["export", f"--adapter={file}", "--format=peft", f"--output={tmp_path / 'new'}", ignored]) == 1
        name = ignored.partition("=")[0].removeprefix("--").removeprefix("no-")
        said = capsys.readouterr().err
        assert "format peft writes" in said and name in said and "out" in said and not (tmp_path / "new").exists()


def test_an_adapter_of_pefts_that_is_there_is_replaced_only_when_asked(
    both: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_delora_weights("native", both)
    (tmp_path / "native_peft" / "unet").mkdir(parents=True)
    theirs = tmp_path / "native_peft" / "unet" / "adapter_config.json"
    theirs.write_text("mine")
    command = ["export", "--adapter", "native/", "--format", "peft"]
    assert main(command) == 1
    assert "unet holds an adapter; give another folder, or replace it with overwrite" in capsys.readouterr().err
    assert theirs.read_text() == "mine" and not (tmp_path / "native_peft" / "text_encoder").exists()
    assert main([*command, "--overwrite"]) == 0
    assert read_adapter(tmp_path / "native_peft").tensors.keys() == {"unet", "text_encoder"}
    assert main(["export", "--adapter", "some/where", "--format", "peft"]) == 1
    assert "say where to: output" in capsys.readouterr().err


@pytest.mark.parametrize("told", [None, "text_encoder"])
def test_pefts_folder_of_a_text_encoder_finds_the_text_encoder(told: str | None, pipe: Any, tmp_path: Path) -> None:
    encoder = copy.deepcopy(pipe.text_encoder)
    config = peft.DeloraConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False)
    theirs = peft.get_peft_model(encoder, config)
    theirs.save_pretrained(str(tmp_path))
    own = copy.deepcopy(pipe)
    assert load_delora_weights(own, tmp_path, component=told).layers == {"text_encoder": 4}
    close(text_output(own.text_encoder), text_output(theirs))


@pytest.mark.parametrize("by_full_name", [False, True], ids=["suffixes", "full names"])
def test_names_with_the_level_that_transformers_took_out_are_found(
    by_full_name: bool, pipe: Any, tmp_path: Path
) -> None:
    assert not hasattr(pipe.text_encoder, "text_model")  # else this test shows nothing: turn it round
    names = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.v_proj"] if by_full_name else ["q_proj"]
    config = DeloraConfig(r=2, target_modules=names, rank_pattern={names[0]: 3}, modules_to_save=["final_layer_norm"])
    module = trained(copy.deepcopy(pipe.text_encoder), config)
    expected = text_output(module)
    export_peft({"": module}, tmp_path)
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    before = "base_model.model."
    save_file({n.replace(before, f"{before}text_model."): t for n, t in load_file(file).items()}, file)
    values = json.loads(settings.read_text())
    if by_full_name:
        values["target_modules"] = [f"text_model.{name}" for name in names]
        values["rank_pattern"] = {f"text_model.{names[0]}": 3}
    values["modules_to_save"] = ["text_model.final_layer_norm"]
    settings.write_text(json.dumps(values))
    own = copy.deepcopy(pipe)
    assert load_delora_weights(own, tmp_path).layers == {"text_encoder": 2}
    close(text_output(own.text_encoder), expected)
    assert {n: a.rank for n, a in delora_adapters(own.text_encoder).items()} == {
        n: a.rank for n, a in delora_adapters(module).items()
    }
    again = copy.deepcopy(pipe)  # what it was renamed to is a whole adapter of its own
    save_delora_weights(tmp_path / "again", own)
    load_delora_weights(again, tmp_path / "again")
    close(text_output(again.text_encoder), expected)
    assert delora_config(again.text_encoder).rank_of(next(iter(delora_adapters(module)))) == 3


def test_a_nameless_adapter_that_fits_two_components_or_none_asks(pipe: Any, tmp_path: Path) -> None:
    export_peft(trained(net(), DeloraConfig(r=2, target_modules=["to_q"])), tmp_path)
    with pytest.raises(AdapterFileError, match=r"none of unet, text_encoder has the adapter's layers \(such as"):
        load_delora_weights(copy.deepcopy(pipe), tmp_path)
    adapter = read_adapter(tmp_path)
    with pytest.raises(AdapterFileError, match="fits one and two; give component='one'"):
        assign({"one": net(), "two": net()}, adapter)
    assert set(assign({"one": net(), "two": net()}, adapter, "two")) == {"two"}


def test_a_component_for_an_adapter_of_several_is_refused(both: Any, tmp_path: Path) -> None:
    export_peft(both, tmp_path)
    with pytest.raises(AdapterFileError, match="has parts for text_encoder, unet; leave it out"):
        load_delora_weights(copy.deepcopy(both), tmp_path, "second", component="unet")


def test_a_hub_repository_of_peft_folders_is_asked_for_them_and_for_nothing_pickled(
    both: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_peft(both, tmp_path / "remote")
    (tmp_path / "remote" / "unet" / "adapter_model.bin").write_bytes(b"pickle")
    asked = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        for file in (tmp_path / "remote").rglob("*"):
            name = str(file.relative_to(tmp_path / "remote"))
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    adapter = read_adapter("someone/dog-peft", revision="v2")
    assert asked == [("someone/dog-peft", "v2")] and set(adapter.tensors) == {"unet", "text_encoder"}
    assert not list((tmp_path / "cache").rglob("*.bin"))
