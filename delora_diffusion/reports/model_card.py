"""The model card of a `DeloraModel`'s adapters, whatever the base is; a run has its own (`card.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from ..atomic import complete_file
from ..method.config import DeloraConfig
from .card import is_hub_id

_BODY = """\
# {title}

{adapters} for `{base}`, trained with DeLoRA ([arXiv 2503.18225](https://arxiv.org/abs/2503.18225)): an update of low
rank whose direction and strength are learned apart.

```python
{importing}from delora_diffusion import DeloraModel  # or: from peft import PeftModel as DeloraModel

base = {loading}
model = DeloraModel.from_pretrained(base, "{title}")
```

| adapter | rank | initial lambda | layers | init_weights |
|---|---|---|---|---|
{rows}
"""


def write_model_card(
    path: Path, *, module: nn.Module, base_model: str, configs: Mapping[str, DeloraConfig], tags: Iterable[str] = ()
) -> Path:
    """Write a card, or complete one that is there: its text stays, and its front matter gets what it lacks.

    Args:
        module: what the adapters are for.
        base_model: where it was loaded from, "" if nowhere.
        configs: of each adapter.
        tags: of the model, besides those of the method.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if path.is_file():
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        front = ModelCardData(library_name="peft")
        card = ModelCard(f"---\n{front.to_yaml()}\n---\n\n{_text(path.parent, module, base_model, configs)}")
    found = list(card.data.get("tags") or [])
    card.data["library_name"] = "peft"
    card.data["tags"] = list(dict.fromkeys([*found, "delora", *tags]))
    if is_hub_id(base_model):
        card.data["base_model"] = base_model
    if type(module).__name__.endswith("ForCausalLM") and not card.data.get("pipeline_tag"):
        card.data["pipeline_tag"] = "text-generation"
    with complete_file(path) as aside:
        aside.write_text(str(card), encoding="utf-8")
    return path


def _text(folder: Path, module: nn.Module, base: str, configs: Mapping[str, DeloraConfig]) -> str:
    kind, library = type(module).__name__, type(module).__module__.partition(".")[0]
    known = library in ("transformers", "diffusers") and base
    rows = [
        f"| {name} | {config.r} | {config.delora_lambda:g} | `{config.target_modules}` | {config.init_weights} |"
        for name, config in configs.items()
    ]
    return _BODY.format(
        title=folder.resolve().name,
        adapters="An adapter" if len(configs) == 1 else f"{len(configs)} adapters",
        base=base or "the base",
        importing=f"from {library} import {kind}\n" if known else "",
        loading=f'{kind}.from_pretrained("{base}")' if known else f"...  # the {kind} that it was trained on",
        rows="\n".join(rows),
    )
