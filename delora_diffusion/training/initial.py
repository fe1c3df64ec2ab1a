"""Going on from an adapter that is no checkpoint: on other photos, with a new optimiser."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.assign import Part, assign
from ..adapters.read import read_adapter
from ..adapters.safetensors_file import AdapterFileError
from ..data.encode import fingerprint
from ..method.config import DeloraConfig
from ..method.state import load_delora_state_dict
from ..options import OptionError
from .config import AdapterConfig, Options

log = logging.getLogger(__name__)
#: What an adapter's file says of where it comes from that is worth keeping of the one before.
_KEPT = ("instance_prompt", "base_model", "steps", "seed")


def read_initial(options: Options) -> tuple[Options, Adapter | None]:
    """The adapter to go on from, if there is one; the strength then starts where it is, unless it is to ramp up.

    Raises:
        AdapterFileError: no adapter there, or one of another method (a LoRA), which is named.
        OptionError: an option that its own settings contradict.
    """
    asked = options.adapter
    if asked.initial_adapter is None:
        return options, None
    adapter = read_adapter(asked.initial_adapter)
    for config in adapter.configs.values():
        _check_options(asked, config)
    if asked.lambda_warmup_steps is None:
        options = replace(options, adapter=replace(asked, lambda_warmup_steps=0))
    return options, adapter


def _check_options(asked: AdapterConfig, config: DeloraConfig) -> None:
    """Refuse what differs from the adapter's own settings, which count."""
    usual = AdapterConfig()
    for option, own in (("rank", config.r), ("target_modules", config.target_modules), ("bias", config.bias)):
        value = getattr(asked, option)
        if value not in (getattr(usual, option), own):
            raise OptionError(
                f"{option} is {value}, and {own} in initial_adapter {asked.initial_adapter}; leave it out to go on "
                f"from that, or leave initial_adapter out"
            )


def check_parts(adapter: Adapter, *, absent: Sequence[str]) -> None:
    """Refuse an adapter with a part for one of the components `absent`, which are not trained.

    Raises:
        OptionError: naming these.
    """
    if unused := [name for name in adapter.tensors if name in absent]:
        raise OptionError(
            f"initial_adapter also adapts {' and '.join(unused)}, which would be lost; give train_text_encoder as well"
        )


def part_of(adapter: Adapter, component: str, module: nn.Module) -> Part:
    """Configuration and tensors of the adapter for one component, of which an outline is enough.

    Raises:
        AdapterFileError: it has none.
    """
    own = [name for name in adapter.tensors if name in (component, "")]
    if not own:
        raise AdapterFileError(f"initial_adapter is for {', '.join(adapter.tensors)}, and the base's is {component}")
    tensors, configs = ({name: one[name] for name in own} for one in (adapter.tensors, adapter.configs))
    return assign({component: module}, Adapter(tensors, configs))[component]  # type: ignore[arg-type]


def fill(module: nn.Module, part: Part, *, source: str | None) -> None:
    """Give an injected adapter the values of the one to go on from.

    Raises:
        OptionError: they do not fit, or belong to another base.
    """
    try:
        report = load_delora_state_dict(module, part[1])
    except ValueError as error:
        raise OptionError(f"cannot go on from initial_adapter {source}: {error}") from error
    log.info("goes on from %s: %d layers of rank %d, as strong as it is", source, report.layers, part[0].r)


def lineage(adapter: Adapter | None, source: str | None) -> dict[str, str]:
    """What an adapter's file says of those before it, the last first; nothing where there are none."""
    if adapter is None:
        return {}
    before: list[dict[str, Any]] = json.loads(adapter.provenance.get("continued_from", "[]"))
    told = {name: adapter.provenance[name] for name in _KEPT if adapter.provenance.get(name)}
    content = fingerprint(*(tensor for part in adapter.tensors.values() for tensor in part.values()))
    return {"continued_from": json.dumps([{"source": str(source), "content": content, **told}, *before])}
