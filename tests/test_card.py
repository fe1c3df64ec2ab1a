"""The model card and the upload."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from delora_diffusion.card import push_to_hub, write_card


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


def test_the_upload_holds_the_result_and_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my-dog"
    for name in ("delora_weights.safetensors", "README.md", "previews/step_000000.png", "checkpoint-5/state.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    sent: dict[str, list[str]] = {}

    def upload(repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        files = [str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()]
        sent[repo_id] = sorted(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns))

    class Address(str):
        repo_id = "me/my-dog"

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, exist_ok: Address(f"https://hub/{repo}"))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    assert push_to_hub(folder, None) == "https://hub/my-dog"
    assert sent == {"me/my-dog": ["README.md", "delora_weights.safetensors", "previews/step_000000.png"]}
    assert push_to_hub(folder, "you/other") == "https://hub/you/other"
