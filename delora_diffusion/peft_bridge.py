"""The one place that imports PEFT, and only when asked: a configuration of PEFT's own class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import MissingExtraError


def peft_config(values: Mapping[str, Any]) -> Any:
    """A `peft.DeloraConfig` of these fields.

    Raises:
        MissingExtraError: PEFT is not installed, or is older than its DeLoRA.
    """
    try:
        from peft import DeloraConfig
    except ImportError as error:
        raise MissingExtraError(
            f"to_peft needs peft>=0.18, which has DeLoRA ({error}); pip install delora_diffusion[language]"
        ) from error
    return DeloraConfig(**values)
