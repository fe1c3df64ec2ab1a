"""Teach a diffusion model a subject with DeLoRA: the public names."""

from .adapters.adapter import Adapter, write_adapter
from .adapters.peft import PeftFormatError
from .adapters.read import read_adapter
from .adapters.safetensors_file import AdapterFileError
from .export.lora import ExportReport, export_lora
from .export.lora_names import LoraError
from .export.peft_folder import export_peft
from .export.verify import VerifyReport, verify_lora
from .method.config import DeloraConfig, DeloraConfigError
from .method.inject import active_delora_adapters, delora_disabled, inject_delora, remove_delora, set_delora_adapters
from .method.merge import MergeReport, merge_delora, unmerge_delora
from .method.state import (
    StateReport,
    delora_state_dict,
    load_delora_state_dict,
    print_trainable_parameters,
    update_norms,
)
from .model import DeloraModel, get_peft_model
from .pipeline import (
    LoadReport,
    delete_adapters,
    disable_delora,
    enable_delora,
    fuse_delora,
    get_active_adapters,
    get_fused_adapters,
    get_list_adapters,
    load_delora_weights,
    load_pipeline,
    save_delora_weights,
    set_adapters,
    set_adapters_to_device,
    unfuse_delora,
    unload_delora_weights,
)

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
    "get_fused_adapters",
    "get_list_adapters",
    "get_peft_model",
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
    "set_adapters_to_device",
    "set_delora_adapters",
    "unfuse_delora",
    "unload_delora_weights",
    "unmerge_delora",
    "update_norms",
    "verify_lora",
    "write_adapter",
]
