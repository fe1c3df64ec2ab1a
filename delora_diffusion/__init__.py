"""Teach a diffusion model a subject with DeLoRA: the public names."""

from .inject import (
    active_delora_adapters,
    delora_disabled,
    inject_delora,
    remove_delora,
    set_delora_adapters,
)
from .merge import MergeReport, merge_delora, unmerge_delora
from .state import delora_state_dict, load_delora_state_dict, print_trainable_parameters, update_norms
from .targets import DeloraConfig

__all__ = [
    "DeloraConfig",
    "MergeReport",
    "active_delora_adapters",
    "delora_disabled",
    "delora_state_dict",
    "inject_delora",
    "load_delora_state_dict",
    "merge_delora",
    "print_trainable_parameters",
    "remove_delora",
    "set_delora_adapters",
    "unmerge_delora",
    "update_norms",
]
