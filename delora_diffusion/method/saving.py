"""`save_pretrained` of a module that carries adapters: its weights as they are, or nothing, and never the adapters.

diffusers and transformers write whatever a module holds. With adapters beside the weights that would open as the base
again, without a word; with merged ones it would carry tensors that nothing reads.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..errors import DeloraError


def guard_saving(module: nn.Module) -> None:
    """Let `module.save_pretrained`, if it is the library's own, write the weights alone, or refuse."""
    own = getattr(type(module), "save_pretrained", None)
    writes_adapters = getattr(type(module), "_hf_peft_config_loaded", False)
    if own is None or writes_adapters or "save_pretrained" in module.__dict__:
        return

    @functools.wraps(own)  # pipelines look at its arguments
    def save_pretrained(self: nn.Module, *args: Any, **settings: Any) -> Any:
        if "state_dict" in settings:  # a trainer says itself what is to be written, and reads it again
            return own(self, *args, **settings)
        record: Any = self._delora
        beside = {name: None for _, layer in record.layers for name in layer.acting()}
        if beside:
            raise DeloraError(
                f"{', '.join(beside)} would not be in what {type(self).__name__}.save_pretrained writes: it acts "
                f"beside the weights. Put it into them first (fuse_delora, merge_delora); or disable it or take it "
                f"out, and write it by itself (save_delora_weights)"
            )
        without = self.register_state_dict_post_hook(_drop_adapters)  # type: ignore[no-untyped-call]
        try:
            return own(self, *args, **settings)
        finally:
            without.remove()

    module.save_pretrained = MethodType(save_pretrained, module)  # type: ignore[assignment]


def unguard_saving(module: nn.Module) -> None:
    """The inverse of `guard_saving`."""
    module.__dict__.pop("save_pretrained", None)


def _drop_adapters(module: nn.Module, state: dict[str, Tensor], prefix: str, local: Any) -> None:
    for name in [name for name in state if "delora" in name.split(".")]:
        del state[name]
