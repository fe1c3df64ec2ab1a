"""Adapters on disk: what is written is read back, PEFT's folders mean the same as in PEFT, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from delora_diffusion import (
    Adapter,
    AdapterFileError,
    DeloraConfig,
    export_peft,
    inject_delora,
    load_delora_state_dict,
    read_adapter,
    write_adapter,
)
from delora_diffusion.adapters import safetensors_file as module
from delora_diffusion.adapters.adapter import base_of
from delora_diffusion.adapters.sources import collect
from delora_diffusion.options import OptionError
from delora_diffusion.run_folder import ADAPTER_NAME

from .. import tiny


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("adapter_file"))


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# ---- helpers -------------------------------------------------------------------------------------


def adapter_of(pipe: Any, *components: str, **fields: Any) -> Adapter:
    """An adapter that changes something, for copies of the pipeline's components."""
    modules = {name: copy.deepcopy(getattr(pipe, name)) for name in components or ("unet",)}
    for number, part in enumerate(modules.values()):
        config = DeloraConfig(**{"r": 2, "delora_lambda": 8.0, "init_weights": "kaiming"} | fields)
        inject_delora(part, config, generator=torch.Generator().manual_seed(number))
    return collect(modules, "default", provenance={"base_model": "some/base", "seed": "3"})


def same(found: Adapter, expected: Adapter) -> bool:
    tensors = [(c, n, t) for c, named in expected.tensors.items() for n, t in named.items()]
    return (
        found.configs == expected.configs
        and found.provenance == expected.provenance
        and {c: set(named) for c, named in found.tensors.items()}
        == {c: set(named) for c, named in expected.tensors.items()}
        and all(found.tensors[c][n].dtype == t.dtype and torch.equal(found.tensors[c][n], t) for c, n, t in tensors)
    )


def unet_output(unet: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x_t, prompt = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 16, generator=generator)
    with torch.no_grad():
        output: Tensor = unet(x_t, torch.tensor([7, 500]), encoder_hidden_states=prompt).sample
    return output


def refusal(source: Path | str) -> str:
    with pytest.raises(AdapterFileError) as refused:
        read_adapter(source)
    return str(refused.value)


# ---- the native file ------------------------------------------------------------------------------


BOTH = ("unet", "text_encoder")


@pytest.mark.parametrize(
    "components, fields",
    [
        (("unet",), {}),
        (("text_encoder",), {}),
        (BOTH, {"init_weights": "residual"}),
        (BOTH, {"bias": "all"}),
        (BOTH, {"target_modules": "all-linear", "module_dropout": 0.25}),
        (("unet",), {"rank_pattern": {"to_q": 3}, "lambda_pattern": {".*attn2.*": 0.5}, "target_modules": ["to_q"]}),
        (("unet",), {"modules_to_save": ["conv_out"]}),
    ],
    ids=["unet", "text encoder", "residual", "bias", "all-linear", "patterns", "modules to save"],
)
def test_what_is_written_is_read_back_bit_for_bit(
    components: tuple[str, ...], fields: dict[str, Any], pipe: Any, tmp_path: Path
) -> None:
    adapter = adapter_of(pipe, *components, **fields)
    write_adapter(tmp_path, adapter)
    assert same(read_adapter(tmp_path), adapter) and list(adapter.tensors) == list(components)


@pytest.mark.parametrize("target", ["", "deep/er", "my.safetensors", "deep/er/my.safetensors", "v1.5"])
def test_a_destination_is_a_folder_unless_it_ends_in_safetensors(target: str, pipe: Any, tmp_path: Path) -> None:
    adapter = adapter_of(pipe)
    written = write_adapter(tmp_path / target, adapter)
    expected = tmp_path / target if target.endswith(".safetensors") else tmp_path / target / ADAPTER_NAME
    assert written == expected and written.is_file()
    for source in (written, str(written), *([written.parent] if written.name == ADAPTER_NAME else [])):
        assert same(read_adapter(source), adapter)


def test_tensor_names_are_pefts_with_the_component_in_front(pipe: Any, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, adapter_of(pipe))
    with safe_open(path, framework="pt") as file:
        names, header = list(file.keys()), file.metadata()
    model = peft.get_peft_model(copy.deepcopy(pipe.unet), peft_config(target_modules=PEFT_TARGETS))
    pefts = peft.get_peft_model_state_dict(model)
    assert set(names) == {name.replace("base_model.model.", "unet.") for name in pefts}
    assert header["base_model"] == "some/base" and json.loads(header["delora_config"])["unet"]["r"] == 2


def test_provenance_cannot_break_the_header(pipe: Any, tmp_path: Path) -> None:
    adapter = adapter_of(pipe)
    spoiled = Adapter(
        adapter.tensors, adapter.configs, {"format": "x", "delora_config": "y", "prompt": "süß 'n' \"b\""}
    )
    write_adapter(tmp_path, spoiled)
    found = read_adapter(tmp_path)
    assert found.provenance == {"prompt": "süß 'n' \"b\""} and found.configs == adapter.configs


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("old", [False, True])
def test_an_interrupted_write_leaves_the_old_file_and_no_scraps(
    error: type[BaseException], old: bool, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = adapter_of(pipe), adapter_of(pipe, delora_lambda=3.0)
    if old:
        write_adapter(tmp_path, first)

    def interrupted(tensors: dict[str, Tensor], path: Path, **settings: Any) -> None:
        save_file(tensors, path, **settings)
        path.write_bytes(path.read_bytes()[:1000])
        raise error

    monkeypatch.setattr(module, "save_file", interrupted)
    with pytest.raises(error):
        write_adapter(tmp_path, second)
    assert [path.name for path in tmp_path.iterdir()] == ([ADAPTER_NAME] if old else [])
    assert not old or same(read_adapter(tmp_path), first)


# ---- PEFT's folder --------------------------------------------------------------------------------

PEFT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def peft_config(**fields: Any) -> peft.DeloraConfig:
    defaults = {"r": 4, "delora_lambda": 8, "target_modules": ["to_q", "to_v"], "init_weights": False}
    return peft.DeloraConfig(**defaults | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": r".*attn2\.to_(q|k)"},
        {"target_modules": PEFT_TARGETS, "exclude_modules": ["to_k"]},
        {"rank_pattern": {"to_q": 2}, "lambda_pattern": {"to_v": 3.0}},
        {"init_weights": True},
        {"bias": "delora_only", "target_modules": ["to_out.0"]},
        {"bias": "all"},
        {"modules_to_save": ["conv_out"]},
    ],
    ids=str,
)
def test_a_folder_written_by_peft_gives_the_same_output(fields: dict[str, Any], pipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(pipe.unet), peft_config(**fields))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    theirs.eval().save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.configs[""].init_weights == ("zero" if fields.get("init_weights") else "kaiming")
    ours = copy.deepcopy(pipe.unet)
    inject_delora(ours, adapter.configs[""])
    load_delora_state_dict(ours, adapter.tensors[""])
    assert torch.allclose(unet_output(ours), unet_output(theirs), atol=1e-5)
    assert (unet_output(ours) - unet_output(pipe.unet)).abs().max() > 1e-3, "it changes something"


def test_a_peft_folder_without_its_weights_or_with_a_broken_config_is_refused(pipe: Any, tmp_path: Path) -> None:
    peft.get_peft_model(copy.deepcopy(pipe.unet), peft_config()).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal(tmp_path)
    for text in ('{"peft_type": "DEL', "[1, 2]", ""):
        (tmp_path / "adapter_config.json").write_text(text)
        assert f"cannot read {tmp_path / 'adapter_config.json'}" in refusal(tmp_path)


def test_a_peft_config_that_cannot_be_meant_names_its_file(pipe: Any, tmp_path: Path) -> None:
    peft.get_peft_model(copy.deepcopy(pipe.unet), peft_config()).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"r": 0}))
    assert f"cannot use the configuration in {tmp_path / 'adapter_config.json'}: rank" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig"])
def test_a_peft_folder_of_another_method_is_named(kind: str, pipe: Any, tmp_path: Path) -> None:
    config = getattr(peft, kind)(r=2, target_modules=["to_q"])
    peft.get_peft_model(copy.deepcopy(pipe.unet), config).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert str(tmp_path) in message and f"of type {config.peft_type.value}, not DELORA" in message


# ---- what is not there ----------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["nothing/here", "./nothing", "nothing", "a/b/c/d.safetensors", "with space/x"])
def test_a_path_that_is_not_there_is_named(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(source)
    assert source in message and ("no file or folder" in message or "no such file or folder" in message)
    assert "\n" not in message


@pytest.mark.parametrize("files, found", [([], "nothing"), (["notes.txt", "pytorch_lora.bin"], "notes.txt, pytorch")])
def test_a_folder_without_an_adapter_says_what_it_holds(files: list[str], found: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    message = refusal(tmp_path)
    assert f"{tmp_path} holds no adapter: expected {ADAPTER_NAME} or adapter_config.json, found {found}" in message


def test_a_folder_with_another_file_says_what_that_is(pipe: Any, tmp_path: Path) -> None:
    save_file({f"unet.{LAYER}.lora_A.weight": torch.ones(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    said = "pytorch_lora_weights.safetensors, it is a LoRA in diffusers' names; pipe.load_lora_weights opens it"
    assert f"As to {said}" in refusal(tmp_path)
    write_adapter(tmp_path / "a.safetensors", adapter_of(pipe))
    assert "As to a.safetensors, it is a DeLoRA adapter; give the file itself" in refusal(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 9)
    assert f"cannot read {tmp_path / 'a.safetensors'}" in refusal(tmp_path)


def test_a_repository_of_the_hub_without_an_adapter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **settings: str(tmp_path))
    message = refusal("someone/a-lora")
    assert "someone/a-lora on the Hub holds no adapter" in message and "pipe.load_lora_weights" in message
    assert str(tmp_path) not in message


# ---- what is damaged ------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 200, -5000, -4, -1])
def test_a_truncated_file_is_refused(cut: int, pipe: Any, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, adapter_of(pipe))
    path.write_bytes(path.read_bytes()[:cut])
    message = refusal(path)
    assert f"cannot read {path}: " in message and "damaged or incomplete" in message


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_are_refused(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(torch.randint(0, 256, (500,), generator=torch.Generator().manual_seed(seed)).numpy().tobytes())
    assert f"cannot read {path}" in refusal(path)


CONFIG = json.dumps({"unet": {"r": 2}})


@pytest.mark.parametrize(
    "header, said",
    [
        (
            {},
            "no DeLoRA adapter: its tensors are DeLoRA's, but the header is missing; for a PEFT file give the folder",
        ),
        ({"delora_config": CONFIG}, "the header is missing"),
        ({"format": "delora-1"}, "configuration in its header cannot be read ('delora_config')"),
        ({"format": "delora-1", "delora_config": "{"}, "configuration in its header cannot be read"),
        ({"format": "delora-1", "delora_config": "[1]"}, "configuration in its header cannot be read"),
        ({"format": "delora-1", "delora_config": '{"unet": 3}'}, "configuration in its header cannot be read"),
        ({"format": "delora-1", "delora_config": '{"unet": {"rr": 2}}'}, "unknown DeloraConfig field 'rr'"),
        ({"format": "delora-1", "delora_config": '{"unet": {"r": 0}}'}, "rank of 'r' is 0"),
        ({"format": "delora-1", "delora_config": '{"vae": {"r": 2}}'}, "its header knows only vae; it is damaged"),
    ],
)
def test_a_header_that_is_missing_or_damaged_is_said(header: dict[str, str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"unet.layer.delora_A": torch.ones(2, 3)}, path, metadata=header)
    message = refusal(path)
    assert said in message and str(path) in message


# ---- what is something else -----------------------------------------------------------------------

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = LAYER.replace(".", "_")


@pytest.mark.parametrize(
    "names, said",
    [
        (
            [f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"],
            "it is a LoRA in diffusers' names; pipe.load_lora",
        ),
        (
            [f"lora_unet_{KOHYA}.lora_down.weight", f"lora_unet_{KOHYA}.alpha"],
            "it is a LoRA in kohya's names; ComfyUI, A1",
        ),
        ([f"unet.{LAYER.replace('to_q', 'processor.to_q_lora')}.down.weight"], "it is a LoRA in diffusers' names"),
        (
            [f"base_model.model.{LAYER}.lora_A.weight"],
            "it is a PEFT adapter; PeftModel.from_pretrained opens the folder",
        ),
        (
            [f"lora_unet_{KOHYA}.lora_down.weight", f"lora_unet_{KOHYA}.dora_scale"],
            "it is a DoRA; ComfyUI, A1111 and PEFT",
        ),
        ([f"lora_unet_{KOHYA}.hada_w1_a", f"lora_unet_{KOHYA}.hada_w2_a"], "it is a LoHa (LyCORIS); ComfyUI, A1111"),
        ([f"lora_unet_{KOHYA}.lokr_w1"], "it is a LoKr (LyCORIS)"),
        (
            ["model.diffusion_model.input_blocks.0.0.weight"],
            "it is a whole model; StableDiffusionPipeline.from_single_",
        ),
        (
            ["conv_in.weight", "conv_in.bias", "conv_out.bias"],
            "it holds 3 tensors such as conv_in.bias, conv_in.weight",
        ),
        ([], "it holds 0 tensors such as (none)"),
    ],
    ids=["lora", "kohya", "old diffusers", "peft", "dora", "loha", "lokr", "single file", "a model", "nothing"],
)
def test_a_file_of_another_method_is_told_apart(names: list[str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, path)
    message = refusal(path)
    assert f"{path} is no DeLoRA adapter: {said}" in message


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt", "pth"])
def test_a_pickle_is_never_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    message = refusal(path)
    assert f"{path} is not a .safetensors file; other formats can carry code" in message and "convert it" in message
    assert not (tmp_path / "sprung").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_a_pickle_by_another_name_is_not_opened(tmp_path: Path) -> None:
    for name, data in (("a", pickle.dumps(Trap(tmp_path / "sprung"))), ("b", b"PK\x03\x04" + bytes(range(200)))):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        assert "it is a pickle with another name" in refusal(path)
    assert not (tmp_path / "sprung").exists()


def with_header(
    path: Path, header: dict[str, Any] | bytes, *, data: bytes = bytes(16), length: int | None = None
) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def test_a_header_of_over_100_mb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with_header(path, b"{}", length=100_000_001)
    assert "its header is said to take 100,000,001 bytes, and 100,000,000 are allowed" in refusal(path)


@pytest.mark.parametrize("offsets", [[0, 32], [8, 16], [16, 32], [8, 0], [-8, 8]], ids=str)
def test_offsets_out_of_range_are_refused(offsets: list[int], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with_header(path, {"unet.a.delora_A": {"dtype": "F32", "shape": [4], "data_offsets": offsets}})
    assert f"cannot read {path}" in refusal(path) and "damaged or incomplete" in refusal(path)
    with_header(path, {"unet.a.delora_A": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})
    assert "the header is missing" in refusal(path), "the same with offsets in range is read"


def test_a_git_lfs_pointer_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert "git lfs pull" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused_when_read(value: float, pipe: Any, tmp_path: Path) -> None:
    adapter = adapter_of(pipe)
    name = next(name for name in adapter.tensors["unet"] if name.endswith("delora_A"))
    adapter.tensors["unet"][name] = torch.full_like(adapter.tensors["unet"][name], value)
    message = refusal(write_adapter(tmp_path, adapter))
    assert f"1 tensors that are not finite (unet.{name})" in message


@pytest.mark.parametrize(
    "form, leaf",
    [*((form, leaf) for form in ("native", "peft") for leaf in ("A", "B", "lambda", "w_norm")), ("native", "B_init")],
)
def test_a_layer_that_is_incomplete_or_does_not_fit_together_is_refused_when_read(
    form: str, leaf: str, pipe: Any, tmp_path: Path
) -> None:
    adapter = adapter_of(pipe, init_weights="residual" if leaf == "B_init" else "zero")
    if form == "native":
        file = source = write_adapter(tmp_path, adapter)
    else:
        source = export_peft(adapter, tmp_path)["unet"]
        file = source / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    whole = load_file(file)
    name = next(name for name in whole if name.endswith(f"delora_{leaf}"))
    layer = name.removesuffix(f".delora_{leaf}").removeprefix("base_model.model.")
    save_file({n: t for n, t in whole.items() if n != name}, file, metadata=header)
    assert f"{layer} lacks delora_{leaf}; the adapter is incomplete" in refusal(source)
    for dimension in range(leaf == "B", whole[name].dim()):  # how many outputs B has, only the base knows
        save_file(whole | {name: torch.cat([whole[name]] * 2, dim=dimension)}, file, metadata=header)
        assert f"{layer}.delora_" in refusal(source) and "does not go with" in refusal(source)
    save_file(whole, file, metadata=header)
    read_adapter(source)


# ---- the base it was trained on -------------------------------------------------------------------


def test_a_base_named_by_a_relative_path_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project / "runs" / "dog", project / "models" / "sd", elsewhere):
        folder.mkdir(parents=True)
    (project / "models" / "sd" / "model_index.json").touch()
    (project / "models" / "one.safetensors").touch()

    def found(base: str, source: str | Path = project / "runs" / "dog") -> str:
        return base_of([Adapter({}, {}, {"base_model": base})], [str(source)], option="base")

    monkeypatch.chdir(project)
    assert found("./models/sd") == "./models/sd"
    monkeypatch.chdir(elsewhere)
    for base in ("./models/sd", "models/sd", "models/one.safetensors", "../models/sd"):
        assert Path(found(base)).resolve() == (project / base.removeprefix("../")).resolve()
    project.rename(tmp_path / "moved")
    assert Path(found("./models/sd", tmp_path / "moved" / "runs" / "dog")) == tmp_path / "moved" / "models" / "sd"
    for gone in ("./models/sd", "/models/sd", "models/one.safetensors", "sd", "a/b/c"):
        with pytest.raises(OptionError, match=f"trained on {re.escape(gone)}, which is neither .*: --base"):
            found(gone)
    assert found("someone/a-model") == "someone/a-model"
    with pytest.raises(OptionError, match="do not name one base model; give --base"):
        found("")


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)
