"""The model card of a finished run, and its upload to the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .adapter_file import FILE_NAME
from .files import complete_file


def write_card(
    folder: Path,
    *,
    base_model: str,
    trigger: str | None,
    pipeline: str,
    options: Mapping[str, Any],
    pictures: Sequence[str],
) -> Path:
    """Write `folder/README.md`: front matter for the Hub, how to load the adapter, how it was trained, pictures."""
    front = {
        "base_model": base_model,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["delora", "dreambooth", "text-to-image", "diffusers"],
        **({"instance_prompt": trigger} if trigger else {}),
    }
    told = ("rank", "delora_lambda", "init_weights", "learning_rate", "lambda_learning_rate", "max_train_steps",
            "train_batch_size", "resolution", "train_text_encoder", "with_prior_preservation", "seed")  # fmt: skip
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {folder.resolve().name}",
        "",
        f"A DeLoRA adapter for `{base_model}`" + (f", trained on “{trigger}”." if trigger else "."),
        "",
        *(f"![{name}]({name})" for name in pictures),
        "",
        "```python",
        f"from diffusers import {pipeline}",
        "from delora_diffusion import load_delora_weights",
        "",
        f'pipe = {pipeline}.from_pretrained("{base_model}")',
        f'load_delora_weights(pipe, "{folder.resolve().name}")  # this folder: {FILE_NAME}',
        f'image = pipe("{trigger or "a prompt"}").images[0]',
        "```",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {options[name]} |" for name in told if name in options),
        "",
        "`config.yaml` holds all settings: it repeats the run.",
        "",
    ]
    path = folder / "README.md"
    with complete_file(path) as aside:
        aside.write_text("\n".join(lines), encoding="utf-8")
    return path


def push_to_hub(folder: Path, repo: str | None) -> str:
    """Upload the adapter, its card, settings and pictures (no checkpoints).

    Args:
        repo: name on the Hub; the folder's name if None.

    Returns:
        The address of the repository.
    """
    from huggingface_hub import create_repo, upload_folder

    url = create_repo(repo or folder.resolve().name, exist_ok=True)
    patterns = [FILE_NAME, "README.md", "config.yaml", "log.jsonl", "before_after.png", "previews/*.png"]
    upload_folder(repo_id=url.repo_id, folder_path=folder, allow_patterns=patterns, commit_message="DeLoRA adapter")
    return str(url)
