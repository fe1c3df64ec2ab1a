"""The model card of a finished run, and its upload: `delora push --folder runs/my_dog --repo you/my_dog`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..adapters.peft import CONFIG_NAME, WEIGHTS_NAME
from ..adapters.read import read_adapter
from ..atomic import complete_file
from ..errors import DeloraError
from ..run_folder import ADAPTER_NAME, CARD_NAME, LORA_NAME, SHEET_NAME
from .inspect import inspect_adapter, relative_update

#: What lies between is `set_strength`'s.
_START, _END = "<!-- strength -->", "<!-- end of strength -->"
#: What is uploaded of a folder: adapters in any form, the card and what it shows; no checkpoints.
UPLOADED = (
    ADAPTER_NAME, LORA_NAME, CARD_NAME, "config.yaml", "log.jsonl", "*.png",
    "best/*", "previews/*.png", CONFIG_NAME, WEIGHTS_NAME, f"*/{CONFIG_NAME}", f"*/{WEIGHTS_NAME}",
)  # fmt: skip


_SETTINGS = (
    "rank", "init_weights", "learning_rate", "lambda_learning_rate", "max_train_steps", "train_batch_size",
    "resolution", "train_text_encoder", "with_prior_preservation", "seed",
)  # fmt: skip
_EXAMPLE = f"""\
```python
from diffusers import {{pipeline}}
from delora_diffusion import load_delora_weights

pipe = {{pipeline}}.from_pretrained("{{base}}")
{{loading}}  # {ADAPTER_NAME}
image = pipe("{{prompt}}").images[0]
```"""


class HubError(DeloraError):
    """An upload that failed; the message says to what, why, and what to do."""


def write_card(
    folder: Path,
    *,
    base_model: str,
    trigger: str | None,
    pipeline: str,
    options: Mapping[str, Any],
    pictures: Sequence[str],
    figures: str = "",
    strength: str = "",
) -> Path:
    """Write `folder/README.md`: front matter for the Hub, trigger words, how to load the adapter, how it was trained,
    figures of the adapter that lies in the folder, pictures.

    Args:
        figures: what was measured while it was trained, in Markdown.
        strength: which strength to use and why, in Markdown; `set_strength` can write it later.
    """
    front = {
        **({"base_model": base_model} if is_hub_id(base_model) else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["delora", "dreambooth", "text-to-image", "diffusers"],
        **({"instance_prompt": trigger} if trigger else {}),
    }
    name = folder.resolve().name
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# {name}",
        f"A DeLoRA adapter for `{base_model}`" + (f", trained on “{trigger}”." if trigger else "."),
        *([f"Trigger words: `{trigger}`"] if trigger else []),
        *(["\n".join(f"![{picture}]({picture})" for picture in pictures)] if pictures else []),
        _EXAMPLE.format(pipeline=pipeline, base=base_model, loading=_loading(name), prompt=trigger or "a prompt"),
        "\n".join(_strength_lines(strength)).strip(),
        *([f"## Figures\n\n{figures.strip()}"] if figures else []),
        "\n".join(["## Settings", "", "| setting | value |", "|---|---|", *_settings(options)]),
        "`config.yaml` holds all settings: it repeats the run.",
        "\n".join(_figures(folder)).strip(),
    ]
    path = folder / CARD_NAME
    with complete_file(path) as aside:
        aside.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _settings(options: Mapping[str, Any]) -> list[str]:
    strength = "delora_lambda" if options.get("delora_lambda") is not None else "relative_lambda"
    return [f"| {name} | {options[name]} |" for name in (_SETTINGS[0], strength, *_SETTINGS[1:]) if name in options]


def set_strength(folder: Path, strength: str) -> bool:
    """Put a recommendation into the card of an adapter's folder; False if there is no card that has a place for it."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, start, rest = text.partition(_START)
    _, end, after = rest.partition(_END)
    if not (start and end):
        return False
    with complete_file(path) as aside:
        aside.write_text(before + "\n".join(_strength_lines(strength)) + after.removeprefix("\n"), encoding="utf-8")
    return True


def _strength_lines(strength: str) -> list[str]:
    return [_START, *(["", "## Strength", "", strength.strip(), ""] if strength else []), _END, ""]


def push_to_hub(folder: Path, repo: str | None, *, private: bool = False, sheet: Path | None = None) -> str:
    """Upload the adapter, its card, settings and pictures (no checkpoints).

    The card's code is made to name the repository. Nothing is changed or sent if the folder holds no adapter.

    Args:
        repo: name on the Hub; the folder's name if None.
        private: make a new repository private.
        sheet: a contact sheet (of `delora sample`) to show on the card; it is copied into the folder.

    Returns:
        The address of the repository.

    Raises:
        AdapterFileError: the folder holds no adapter that can be read.
        HubError: no such contact sheet, or the Hub refused.
    """
    from huggingface_hub import create_repo, upload_folder

    adapter = read_adapter(folder)
    if sheet is not None and not sheet.is_file():
        raise HubError(f"there is no contact sheet {sheet}; delora sample writes one")
    name = repo or folder.resolve().name
    try:
        url = create_repo(name, exist_ok=True, private=private)
        if not (folder / CARD_NAME).is_file():
            shown = adapter.provenance
            write_card(
                folder,
                base_model=shown.get("base_model", ""),
                trigger=shown.get("instance_prompt"),
                pipeline="DiffusionPipeline",
                options={},
                pictures=[],
            )
        _complete_card(folder, url.repo_id, sheet)
        upload_folder(
            repo_id=url.repo_id, folder_path=folder, allow_patterns=list(UPLOADED), commit_message="DeLoRA adapter"
        )
    except Exception as error:
        if not _of_the_hub(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(f"cannot upload {folder} as {name}: {first}; are you logged in (hf auth login)?") from error
    return str(url)


def check_login(repo: str | None) -> None:
    """Refuse early an upload that the Hub would refuse at the end.

    Raises:
        HubError: nobody is logged in, the name cannot be a repository's, or huggingface_hub is offline.
    """
    from huggingface_hub import constants, get_token, whoami
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    if constants.HF_HUB_OFFLINE:
        raise HubError("push_to_hub: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or leave this out")
    if get_token() is None:
        raise HubError("push_to_hub: nobody is logged in; hf auth login, or set HF_TOKEN")
    try:
        if repo is not None:
            validate_repo_id(repo)
        whoami()
    except HFValidationError as error:
        raise HubError(f"push_to_hub: {error}; give another hub_model_id") from error
    except Exception as error:
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        if refused or isinstance(error, LocalTokenNotFoundError):
            raise HubError("push_to_hub: the Hub knows no such login; hf auth login, or set HF_TOKEN") from error
        if not _of_the_hub(error):
            raise
        # away for the moment: it may be back when there is something to upload


def _of_the_hub(error: Exception) -> bool:
    """Whether an upload failed because of the Hub or the way to it.

    Not every version of huggingface_hub wraps the errors of its HTTP client, and that client has changed twice.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    known = HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, ConnectionError
    return isinstance(error, known) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")


def _complete_card(folder: Path, repo_id: str, sheet: Path | None) -> None:
    """The repository's name in the card's code, and the contact sheet at its end; the rest of the card stays."""
    path = folder / CARD_NAME
    text = path.read_text(encoding="utf-8").replace(_loading(folder.resolve().name), _loading(repo_id))
    if sheet is not None:
        if sheet.resolve() != (folder / SHEET_NAME).resolve():
            with complete_file(folder / SHEET_NAME) as aside:
                shutil.copyfile(sheet, aside)
        if f"({SHEET_NAME})" not in text:
            text = f"{text.rstrip()}\n\n![contact sheet]({SHEET_NAME})\n"
    with complete_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _loading(name: str) -> str:
    return f'load_delora_weights(pipe, "{name}")'


def _figures(folder: Path) -> Iterator[str]:
    """A table of what the adapter does to each component."""
    if not (folder / ADAPTER_NAME).is_file():
        return
    found = inspect_adapter(read_adapter(folder / ADAPTER_NAME), folder.name)
    yield "| component | layers | parameters | size of the update, dW / W | share of its bound | effective rank |"
    yield "|---|---|---|---|---|---|"
    for component in found.components():
        layers = found.of(component)
        count = max(1, len(layers))
        share = sum(layer.bound_share for layer in layers) / count
        directions = sum(layer.effective_rank for layer in layers) / count
        yield (
            f"| {component} | {len(layers)} | {found.parameters[component]:,} | {relative_update(layers):.4f} "
            f"| {share:.1%} | {directions:.1f} |"
        )
    yield ""


def is_hub_id(name: str) -> bool:
    """Whether a base can be found by others: the Hub rejects a card that names a folder as its base."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
