"""`DeloraModel`: any `nn.Module` with adapters, in PEFT's manner.

model = DeloraModel(AutoModelForCausalLM.from_pretrained(name), DeloraConfig(r=16, delora_lambda=8.0))
model.print_trainable_parameters()
... train it; it is called as the model it wraps ...
model.save_pretrained("my-adapter")                                   # a folder that PEFT opens as well
model = DeloraModel.from_pretrained(base, "my-adapter").merge_and_unload()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapters.adapter import Adapter
from .adapters.assign import part_for
from .adapters.peft import check_expressible
from .adapters.read import read_adapter
from .export.peft_folder import write_peft
from .method import inject, state
from .method.block_weights import listed
from .method.config import DeloraConfig
from .method.delora import DeloraLayer
from .method.merge import MergeReport, merge_delora, unmerge_delora
from .method.targets import with_targets


class DeloraModel(nn.Module):
    """A module with adapters: `base_model` is the module itself, changed in place as by `inject_delora`.

    What is not found here (`config`, `generate`, `device`, ...) is looked up in the wrapped module.
    """

    def __init__(self, model: nn.Module, config: DeloraConfig, adapter_name: str = "default") -> None:
        """Adapt `model`; `config.target_modules` None stands for the layers PEFT would take for its model type."""
        super().__init__()
        self.base_model = model
        self.add_adapter(adapter_name, config)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        source: str | Path | Adapter,
        adapter_name: str = "default",
        *,
        is_trainable: bool = False,
        revision: str | None = None,
        check_base: bool = True,
    ) -> DeloraModel:
        """`model` with an adapter from a folder of ours or of PEFT's, a native file, or the Hub.

        Of a file for several components the part that fits is taken.

        Raises:
            AdapterFileError: no adapter there, or none for this module.
            ValueError: tensors that do not fit, or another base. `model` is as it was before the call.
        """
        wrapped = cls.__new__(cls)
        nn.Module.__init__(wrapped)
        wrapped.base_model = model
        wrapped.load_adapter(source, adapter_name, is_trainable=is_trainable, revision=revision, check_base=check_base)
        wrapped.set_adapter(adapter_name, trainable=is_trainable)
        return wrapped

    def save_pretrained(
        self, directory: str | Path, *, selected_adapters: Sequence[str] | None = None, base_model: str | None = None
    ) -> list[Path]:
        """Write each adapter as PEFT does: "default" into `directory`, others into a subfolder of their name.

        Args:
            base_model: what to name as the base; where `model` was loaded from if None.

        Returns:
            The folders written.

        Raises:
            PeftFormatError: an adapter that PEFT cannot express; nothing is written.
        """
        module = self.get_base_model()
        base = base_model or getattr(module, "name_or_path", None) or ""
        adapters = {}
        for name in self.adapter_names if selected_adapters is None else selected_adapters:
            config = inject.delora_config(module, name)
            tensors = state.delora_state_dict(module, name, at_current_weight=True)
            check_expressible(module, config, tensors)
            adapters[name] = Adapter({"": tensors}, {"": config}, {"base_model": base})
        folders = {name: Path(directory) / ("" if name == "default" else name) for name in adapters}
        return [write_peft(folders[name], adapter, "", module=module) for name, adapter in adapters.items()]

    # ---- adapters ----

    def add_adapter(self, adapter_name: str, config: DeloraConfig) -> list[str]:
        """Add a new adapter, trainable, and make it the active one; returns the names of the adapted layers."""
        module = self.base_model
        layers = inject.inject_delora(module, with_targets(module, config), adapter_name)
        self.set_adapter(adapter_name)
        return layers

    def load_adapter(
        self,
        source: str | Path | Adapter,
        adapter_name: str,
        *,
        is_trainable: bool = False,
        revision: str | None = None,
        check_base: bool = True,
    ) -> list[str]:
        """Load one more adapter, without making it active; returns the names of the adapted layers."""
        module = self.base_model
        adapter = source if isinstance(source, Adapter) else read_adapter(source, revision=revision)
        config, tensors = part_for(module, adapter)
        had = self.adapter_names
        acting = {layer: layer.active for layer in self._layers()}
        enabled = inject.record_of(module).enabled if had else True
        with inject.complete_or_absent([module], adapter_name):
            state.check_fits(module, config, tensors)
            layers = inject.inject_delora(module, config, adapter_name)
            state.load_delora_state_dict(module, tensors, adapter_name, check_base=check_base)
        for p in self._parameters_of(adapter_name):
            p.requires_grad_(is_trainable)
        if had:
            for layer in self._layers():
                layer.active = acting.get(layer, ())
            inject.enable_delora(module, enabled)
        return layers

    def set_adapter(self, names: str | Sequence[str], *, trainable: bool = True) -> None:
        """Make exactly these adapters act, at strength 1; they are trained, and no others, unless not `trainable`."""
        inject.set_delora_adapters(self.base_model, names)
        acting = listed(names)
        for name in self.adapter_names:
            for p in self._parameters_of(name):
                p.requires_grad_(trainable and name in acting)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out."""
        inject.remove_delora(self.base_model, adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model for the length of a `with` block."""
        with inject.delora_disabled(self.base_model):
            yield

    @property
    def adapter_names(self) -> list[str]:
        """Names of all adapters."""
        return inject.delora_names(self.base_model)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        return inject.active_delora_adapters(self.base_model)

    @property
    def delora_configs(self) -> dict[str, DeloraConfig]:
        """The configuration of each adapter."""
        return {name: inject.delora_config(self.base_model, name) for name in self.adapter_names}

    # ---- merging ----

    def merge_adapter(self, adapter_names: Sequence[str] | None = None) -> MergeReport:
        """Add adapters (the active ones if None) to the weights, until `unmerge_adapter`."""
        return merge_delora(self.base_model, adapter_names)

    def unmerge_adapter(self) -> None:
        """Restore the weights of the base, bit for bit."""
        unmerge_delora(self.base_model)

    def merge_and_unload(self, adapter_names: Sequence[str] | None = None) -> nn.Module:
        """The base model with the adapters (the active ones if None) in its weights, and without any adapter."""
        merge_delora(self.base_model, adapter_names, permanently=True)
        return self.base_model

    def unload(self) -> nn.Module:
        """The base model, bit for bit as it was."""
        inject.remove_delora(self.base_model)
        return self.base_model

    # ---- the wrapped module ----

    def get_base_model(self) -> nn.Module:
        """The wrapped module (its adapters act)."""
        return self.base_model

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many."""
        state.print_trainable_parameters(self.base_model)

    def adapter_state_dict(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """The tensors of one adapter, without the base's."""
        return state.delora_state_dict(self.base_model, adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module returns."""
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def _layers(self) -> list[DeloraLayer]:
        return [layer for _, layer in inject.adapted_layers(self.base_model)]

    def _parameters_of(self, name: str) -> list[nn.Parameter]:
        adapters = inject.delora_adapters(self.base_model, name).values()
        full = inject.record_of(self.base_model).trained_in_full[name].values()
        return [*(p for adapter in adapters for p in adapter.parameters()), *full]
