"""The model card and the upload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from torch import nn

from delora_diffusion import DeloraConfig, export_peft, inject_delora, read_adapter, save_delora_weights
from delora_diffusion.cli import main
from delora_diffusion.reports.card import HubError, push_to_hub, write_card
from delora_diffusion.reports.inspect import inspect_adapter, relative_update


@pytest.mark.parametrize("given, shown", [(None, "| relative_lambda | 0.05 |"), (4.0, "| delora_lambda | 4.0 |")])
def test_the_card_tells_the_strength_that_was_used(tmp_path: Path, given: float | None, shown: str) -> None:
    options = {"relative_lambda": 0.05, "delora_lambda": given}
    card = write_card(tmp_path, base_model="b", trigger=None, options=options, pipeline="P", pictures=[]).read_text()
    assert shown in card and card.count("_lambda |") == 1


def test_the_card_is_one_the_hub_reads(tmp_path: Path) -> None:
    options = {"rank": 16, "learning_rate": 1e-3, "seed": 0}
    path = write_card(tmp_path / "my-dog", base_model="some/base", trigger="a sks dog", options=options,
                      pipeline="StableDiffusionPipeline", pictures=["before_after.png"])  # fmt: skip
    card = ModelCard.load(path)
    assert card.data.base_model == "some/base"
    assert card.data.to_dict()["instance_prompt"] == "a sks dog"
    assert "delora" in card.data.tags
    for told in ("# my-dog", "| rank | 16 |", "(before_after.png)", 'load_delora_weights(pipe, "my-dog")'):
        assert told in card.text
    plain = write_card(tmp_path, base_model="b", trigger=None, options={}, pipeline="P", pictures=[]).read_text()
    assert "instance_prompt" not in plain and "![" not in plain


def adapter(folder: Path) -> Path:
    """A folder as training leaves it, with an adapter of two layers."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    inject_delora(module, DeloraConfig(r=2, target_modules="all-linear", init_weights="kaiming"))
    save_delora_weights(folder, {"unet": module}, provenance={"base_model": "some/base", "instance_prompt": "a sks"})
    for name in ("previews/step_000000.png", "checkpoint-5/state.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def test_the_card_tells_trigger_words_and_the_figures_of_the_adapter(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "my-dog")
    text = write_card(
        folder, base_model="some/base", trigger="a sks", options={}, pipeline="P", pictures=[]
    ).read_text()
    layers = inspect_adapter(read_adapter(folder), "x").layers
    assert "Trigger words: `a sks`" in text
    assert f"| unet | 2 | {2 * (4 + 6) + 2 * (6 + 3) + 2} | {relative_update(layers):.4f} | " in text
    local = write_card(folder, base_model="samples/pocket/base", trigger=None, options={}, pipeline="P", pictures=[])
    assert "base_model" not in ModelCard.load(local).data.to_dict()  # the Hub would refuse it


class Address(str):
    repo_id = "me/my-dog"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was uploaded: {repository: names of the files}, and whether it was made private."""
    sent: dict[str, Any] = {}

    def create(repo: str, *, exist_ok: bool, private: bool) -> Address:
        sent["private"] = private
        return Address(f"https://hub/{repo}")

    def upload(repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        files = [str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()]
        sent[repo_id] = sorted(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns))

    monkeypatch.setattr(huggingface_hub, "create_repo", create)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    return sent


def test_the_upload_holds_the_result_and_no_checkpoint(tmp_path: Path, sent: dict[str, Any]) -> None:
    folder = adapter(tmp_path / "my-dog")
    assert push_to_hub(folder, None) == "https://hub/my-dog"
    assert sent == {
        "private": False,
        "me/my-dog": ["README.md", "delora_weights.safetensors", "previews/step_000000.png"],
    }
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "some/base" and card.data.to_dict()["instance_prompt"] == "a sks"
    assert push_to_hub(folder, "you/other") == "https://hub/you/other"


def test_the_command_names_the_repository_and_shows_the_sheet_and_keeps_what_was_written(
    tmp_path: Path, sent: dict[str, Any]
) -> None:
    folder, sheet = adapter(tmp_path / "my-dog"), tmp_path / "drawn.png"
    sheet.write_bytes(b"picture")
    path = write_card(folder, base_model="some/base", trigger="a sks", options={}, pipeline="P", pictures=[])
    path.write_text(path.read_text() + "\nMy own words.\n")
    command = ["push", "--folder", str(folder), "--repo", "me/my-dog", "--private", "--contact_sheet", str(sheet)]
    assert main(command) == main(command) == 0
    text = path.read_text()
    assert 'load_delora_weights(pipe, "me/my-dog")' in text and "My own words." in text
    assert text.count("![contact sheet](contact_sheet.png)") == 1
    assert (folder / "contact_sheet.png").read_bytes() == b"picture"
    assert "contact_sheet.png" in sent["me/my-dog"] and sent["private"] is True


def test_peft_folders_are_uploaded_as_well(tmp_path: Path, sent: dict[str, Any]) -> None:
    export_peft(adapter(tmp_path / "my-dog"), tmp_path / "peft")
    push_to_hub(tmp_path / "peft", None)
    assert sent["me/my-dog"] == ["README.md", "unet/adapter_config.json", "unet/adapter_model.safetensors"]


def test_an_upload_that_cannot_be_says_why(
    tmp_path: Path, sent: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["push", "--folder", str(tmp_path / "empty")]) == 1
    assert "holds no adapter" in capfd.readouterr().err and not sent and not list((tmp_path / "empty").iterdir())
    folder = adapter(tmp_path / "my-dog")
    with pytest.raises(HubError, match=r"no contact sheet .*; delora sample writes one"):
        push_to_hub(folder, None, sheet=tmp_path / "none.png")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    assert main(["push", "--folder", str(folder)]) == 1
    assert "as my-dog: Token is required; are you logged in (hf auth login)?" in capfd.readouterr().err
    assert not (folder / "README.md").exists()
    monkeypatch.undo()
    with pytest.raises(HubError, match="cannot upload"):  # the suite is offline: the real client refuses
        push_to_hub(folder, "me/my-dog")


def test_a_hub_that_cannot_be_reached_is_said_and_other_errors_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real client, allowed to connect, to a port where nobody listens."""
    folder = adapter(tmp_path / "my-dog")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "token", "hf_nobody")
    assert main(["push", "--folder", str(folder), "--repo", "me/my-dog"]) == 1
    said = capfd.readouterr().err
    assert f"cannot upload {folder} as me/my-dog: " in said and "Traceback" not in said

    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(huggingface_hub, "create_repo", broken)
    with pytest.raises(KeyError, match="a bug"):
        push_to_hub(folder, "me/my-dog")
