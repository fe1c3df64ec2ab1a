"""Teach a diffusion model a subject with DeLoRA: the public names."""

from .adapter_file import Adapter, AdapterFileError, read_adapter, write_adapter
from .inject import (
    active_delora_adapters,
    delora_disabled,
    inject_delora,
    remove_delora,
    set_delora_adapters,
)
from .lora_file import ExportReport, export_lora
from .lora_names import LoraError
from .merge import MergeReport, merge_delora, unmerge_delora
from .model import DeloraModel
from .peft_file import export_peft
from .peft_format import PeftFormatError
from .pipeline import (
    LoadReport,
    delete_adapters,
    disable_delora,
    enable_delora,
    fuse_delora,
    get_active_adapters,
    load_delora_weights,
    load_pipeline,
    save_delora_weights,
    set_adapters,
    unfuse_delora,
    unload_delora_weights,
)
from .state import StateReport, delora_state_dict, load_delora_state_dict, print_trainable_parameters, update_norms
from .targets import DeloraConfig, DeloraConfigError
from .verify import VerifyReport, verify_lora

__all__ = [
    "Adapter",
    "AdapterFileError",
    "DeloraConfig",
    "DeloraConfigError",
    "DeloraModel",
    "ExportReport",
    "LoadReport",
    "LoraError",
    "MergeReport",
    "PeftFormatError",
    "StateReport",
    "VerifyReport",
    "active_delora_adapters",
    "delete_adapters",
    "delora_disabled",
    "delora_state_dict",
    "disable_delora",
    "enable_delora",
    "export_peft",
    "export_lora",
    "fuse_delora",
    "get_active_adapters",
    "inject_delora",
    "load_delora_state_dict",
    "load_delora_weights",
    "load_pipeline",
    "merge_delora",
    "print_trainable_parameters",
    "read_adapter",
    "remove_delora",
    "save_delora_weights",
    "set_adapters",
    "set_delora_adapters",
    "unfuse_delora",
    "unload_delora_weights",
    "unmerge_delora",
    "update_norms",
    "verify_lora",
    "write_adapter",
]
