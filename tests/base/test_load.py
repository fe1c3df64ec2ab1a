"""Loading a base: refusals that say what to do, and the precision each family is drawn in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import configuration_utils
from huggingface_hub import errors
from huggingface_hub.errors import HfHubHTTPError

from delora_diffusion.base.checks import BaseModelError
from delora_diffusion.base.config import ModelConfig
from delora_diffusion.base.load import half_precision, load_base
from delora_diffusion.families import FamilyError, family_of

from ..tiny_families import build


@pytest.mark.parametrize(("kind", "half"), [("sdxl", "fp16"), ("lumina2", "bf16"), ("z-image", "bf16")])
def test_a_base_is_loaded_in_its_familys_half_precision_with_an_fp32_vae(kind: str, half: str, tmp_path: Path) -> None:
    build(kind, tmp_path / "parts").save_pretrained(tmp_path / "base")
    assert half_precision(str(tmp_path / "base")) == half
    pipe = load_base(
        ModelConfig(pretrained_model_name_or_path=str(tmp_path / "base"), base_dtype=half), precision="no"
    )
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    assert denoiser.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[half] and pipe.vae.dtype == torch.float32
    assert not any(p.requires_grad for p in denoiser.parameters())


def test_a_base_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline", "_diffusers_version": "0.42.1"}')
    with pytest.raises(FamilyError, match="KolorsPipeline is of no supported family; supported pipelines are Stable"):
        half_precision(str(tmp_path))


@pytest.mark.parametrize("kind", ["sd", "flux.1-schnell"])
def test_a_missing_component_is_named(kind: str, tmp_path: Path) -> None:
    """Its folder is gone, or empty, or the index lists none; and nothing is read before."""
    made, base = tmp_path / "made", tmp_path / "base"
    build(kind, tmp_path / "parts").save_pretrained(made)
    index = json.loads((made / "model_index.json").read_text())
    names = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    assert {"vae", "scheduler", "tokenizer", "text_encoder"} < set(names) and len(names) == {"sd": 5}.get(kind, 7)
    for name in names:
        for state in ("gone", "empty", "null", "not listed"):
            shutil.rmtree(base, ignore_errors=True)
            shutil.copytree(made, base)
            if state in ("gone", "empty"):
                shutil.rmtree(base / name)
            if state == "empty":
                (base / name).mkdir()
            kept = {key: value for key, value in index.items() if key != name or state != "not listed"}
            (base / "model_index.json").write_text(
                json.dumps(kept | ({name: [None, None]} if state == "null" else {}))
            )
            with pytest.raises(BaseModelError) as refused:
                load_base(ModelConfig(pretrained_model_name_or_path=str(base)), precision="no")
            said = str(refused.value)
            assert f"the base {base} has no {name}: " in said and f"give a complete {index['_class_name']}" in said


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_missing_weights_are_named(name: str, tmp_path: Path) -> None:
    build("sd", tmp_path / "parts").save_pretrained(tmp_path / "base")
    for file in (tmp_path / "base" / name).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(BaseModelError, match="cannot load the base model in") as refused:
        load_base(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "base")), precision="no")
    assert str(tmp_path / "base" / name) in str(refused.value)


def test_sd3_does_without_its_t5(tmp_path: Path) -> None:
    """As the pipeline does: zeros stand for what it would say."""
    pipe = build("sd3.5", tmp_path / "parts")
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "base")
    found = load_base(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "base")), precision="no")
    assert found.text_encoder_3 is None and found.tokenizer_3 is None
    cond: Any = family_of(found).encode_prompt(found, ["a dog"])
    assert cond["prompt_embeds"].shape[1] > 77 and not cond["prompt_embeds"][:, 77:].any()


# ---- the Hub: what really arrives when it answers so ----------------------------------------------


def hub_says(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    """Let the download fail with an error of the Hub's client, for diffusers to turn into one of its own."""

    def refuse(*args: object, **settings: object) -> None:
        told: Any = (
            {} if issubclass(kind, OSError) and not issubclass(kind, HfHubHTTPError) else {"response": Response()}
        )
        raise kind("told by the Hub", **told)

    monkeypatch.setattr(configuration_utils, "hf_hub_download", refuse)


class Response:
    """As much of an HTTP response as the errors look at."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.request = None
        self.status_code = 401


@pytest.mark.parametrize(
    "kind, said",
    [
        (
            errors.GatedRepoError,
            "{id} is gated: accept its terms on https://huggingface.co/{id}, then log in with `hf a",
        ),
        (errors.RepositoryNotFoundError, "there is no base model {id}, neither as a folder nor on the Hub"),
        (
            errors.RevisionNotFoundError,
            "{id} has no revision 'new'; https://huggingface.co/{id} lists those there are",
        ),
        (
            errors.LocalEntryNotFoundError,
            "{id} is neither a folder nor among the models downloaded before, and the Hub",
        ),
        (errors.RemoteEntryNotFoundError, "https://huggingface.co/{id} is no pipeline in diffusers' layout"),
    ],
)
def test_what_the_hub_says_is_told_with_the_way_out(
    kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_says(monkeypatch, kind)
    name = "black-forest-labs/FLUX.1-dev"
    with pytest.raises(BaseModelError) as refused:
        load_base(ModelConfig(pretrained_model_name_or_path=name, revision="new"), precision="no")
    assert said.format(id=name) in str(refused.value)
    assert ("hf auth login" in str(refused.value)) == (kind in (errors.GatedRepoError, errors.RepositoryNotFoundError))


def test_offline_a_model_that_is_not_here_is_told_so() -> None:
    """Nothing is replaced: the suite runs with HF_HUB_OFFLINE."""
    with pytest.raises(
        BaseModelError, match="is neither a folder nor among the models downloaded before, and the Hub"
    ):
        load_base(ModelConfig(pretrained_model_name_or_path="nobody/nothing-of-this-name"), precision="no")
