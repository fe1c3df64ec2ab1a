"""`DeloraModel`: any `nn.Module` with adapters, in PEFT's manner.

model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), DeloraConfig(r=32, delora_lambda=15))
model.print_trainable_parameters()
SFTTrainer(model=model, ...).train()                                  # or transformers' Trainer, or a loop
model.save_pretrained("my-adapter")                                   # a folder that PEFT opens as well
model = DeloraModel.from_pretrained(base, "my-adapter").merge_and_unload()
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.adapter import Adapter, write_adapter
from .adapters.assign import part_for
from .adapters.peft import PeftFormatError, check_expressible, check_kinds, not_linear
from .adapters.read import read_adapter
from .adapters.trainer_state import write_trainer_state
from .errors import DeloraError
from .export.peft_folder import write_peft
from .export.peft_lora import write_peft_lora
from .method import inject, state
from .method.block_weights import listed
from .method.config import DeloraConfig
from .method.delora import DeloraLayer
from .method.merge import MergeReport, merge_delora, unmerge_delora
from .method.raw_state import is_raw_adapter_state, load_raw_adapter_state
from .method.saving import unguard_saving
from .method.status import ModelStatus, model_status
from .method.targets import with_head, with_targets
from .reports.card import push_to_hub
from .reports.model_card import write_model_card
from .run_folder import CARD_NAME
from .same_module import in_front, rebuilt

log = logging.getLogger(__name__)


class DeloraModel(nn.Module):
    """A module with adapters, and the module's own class: isinstance(model, LlamaForCausalLM) holds if it held before.

    It shares every attribute with the module it is made of, which is changed in place as by `inject_delora`: the same
    parameters under the same names, hooks, `config`, `forward`, `generate`. `base_model` means what transformers means
    by it.

    So transformers' Trainer and trl's trainers take it for the model it is, whether PEFT is installed or not: they
    find the arguments of `forward`, the labels and the loss, save it by `save_pretrained`, which writes adapters
    alone, and train a quantised base, since it says that it has adapters. In a Trainer's own folders (`checkpoint-N`)
    there lies `model.safetensors` as well, the one file such a trainer resumes from: the adapters again, exactly, and
    none of the base's weights. `load_state_dict` knows it.
    """

    __slots__ = ("_same",)
    _same: nn.Module
    #: What transformers asks before it trains a quantised model, and before it lets gradients into frozen embeddings.
    _hf_peft_config_loaded = True

    def __new__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> DeloraModel:
        joined: DeloraModel = in_front(
            DeloraModel, model.get_base_model() if isinstance(model, DeloraModel) else model
        )
        unguard_saving(joined)  # it has a way of its own
        return joined

    def __init__(self, model: nn.Module, config: DeloraConfig, adapter_name: str = "default") -> None:
        """Adapt `model`; `config.target_modules` None stands for the layers PEFT would take for its model type."""
        self.add_adapter(adapter_name, config)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        source: str | Path | Adapter,
        adapter_name: str = "default",
        *,
        is_trainable: bool = False,
        config: DeloraConfig | None = None,
        revision: str | None = None,
        check_base: bool = True,
        device_map: str | torch.device | dict[str, Any] | None = None,
        low_cpu_mem_usage: bool = False,
    ) -> DeloraModel:
        """`model` with an adapter from a folder of ours or of PEFT's, a native file, or the Hub.

        Of a file for several components the part that fits is taken.

        Args:
            config: instead of the one that lies beside the tensors; they must fit it.
            device_map: where to move the model to, if it is one device; a model that is spread over several, or
                offloaded, keeps its places, and adapters are where their layers are.
            low_cpu_mem_usage: PEFT's; nothing here differs by it, an adapter is filled layer by layer either way.

        Raises:
            AdapterFileError: no adapter there, or none for this module.
            ValueError: tensors that do not fit, another base, or a map of several devices. `model` is as it was
                before the call.
        """
        device = device_map.get("") if isinstance(device_map, dict) and len(device_map) == 1 else device_map
        if isinstance(device, dict) or device in ("auto", "balanced", "balanced_low_0", "sequential"):
            raise DeloraError(
                f"device_map is {device_map!r}; give it to the base's from_pretrained, and here one device or none"
            )
        adapted: DeloraModel = cls.__new__(cls, model)
        adapter = source if isinstance(source, Adapter) else read_adapter(source, revision=revision)
        if config is not None:
            adapter = dataclasses.replace(adapter, configs=dict.fromkeys(adapter.configs, config))
        adapted.load_adapter(adapter, adapter_name, is_trainable=is_trainable, check_base=check_base)
        adapted.set_adapter(adapter_name, trainable=is_trainable)
        return adapted if device is None else adapted.to(device)

    # ---- files ----

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        selected_adapters: Sequence[str] | None = None,
        base_model: str | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> list[Path]:
        """Write each adapter as PEFT does, with a card: "default" into `directory`, others into a subfolder of their
        name.

        Args:
            base_model: what to name as the base; where `model` was loaded from if None.
            is_main_process: whether this process writes; others return an empty list.
            state_dict: the module's, where a trainer has gathered it from several processes.

        An adapter that PEFT cannot express is written as a native file, with a warning.

        Returns:
            The folders written.
        """
        if not is_main_process:
            return []
        folder = Path(directory)
        base = base_model or getattr(self, "name_or_path", None) or ""
        names = self.adapter_names if selected_adapters is None else selected_adapters
        adapters = {name: self._adapter(name, base, state_dict) for name in names}
        of = {name: folder / ("" if name == "default" else name) for name in adapters}
        written = [self._write_adapter(of[name], adapter) for name, adapter in adapters.items()]
        self._write_card(folder, base, list(adapters))
        write_trainer_state(self, folder, state_dict)
        return written

    def _adapter(self, name: str, base: str, state_dict: Mapping[str, Tensor] | None = None) -> Adapter:
        tensors = state.delora_state_dict(self, name, at_current_weight=True, gathered=state_dict)
        told = {"base_model": base, **not_linear({"": self}, {"": tensors})}
        return Adapter({"": tensors}, {"": inject.delora_config(self, name)}, told)

    def _write_adapter(self, folder: Path, adapter: Adapter) -> Path:
        """In PEFT's form, or, where that cannot hold it, as a native file: what was trained is never lost."""
        try:
            check_kinds(adapter)
            check_expressible(self, adapter.configs[""], adapter.tensors[""])
        except PeftFormatError as error:
            log.warning("%s. It is written as %s, which DeloraModel opens", error, write_adapter(folder, adapter))
            return folder
        return write_peft(folder, adapter, "", module=self._same)

    def save_lora(self, directory: str | Path, adapter_name: str = "default") -> Path:
        """Write one adapter as a LoRA in PEFT's form, with the same update; returns the folder."""
        adapter = self._adapter(adapter_name, getattr(self, "name_or_path", None) or "")
        return write_peft_lora(Path(directory), adapter, "", module=self._same)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; and the adapters alone, as they lie in a Trainer's checkpoint.

        Raises:
            ValueError: adapters of another configuration or another base.
        """
        if not is_raw_adapter_state(self, state_dict):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        load_raw_adapter_state(self, state_dict)
        return nn.modules.module._IncompatibleKeys([], [])

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write the card of the adapters into a folder; of a card that is there, only the front matter changes."""
        self._write_card(Path(output_dir), getattr(self, "name_or_path", None) or "", self.adapter_names)

    def _write_card(self, folder: Path, base: str, names: Sequence[str]) -> None:
        configs = {name: self.delora_configs[name] for name in names}
        tags = getattr(self, "model_tags", None) or ()
        write_model_card(folder / CARD_NAME, module=self._same, base_model=base, configs=configs, tags=tags)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the adapters and their card, not the base; returns the repository's address.

        Raises:
            HubError: the Hub refused.
        """
        with TemporaryDirectory() as aside:
            folder = Path(aside) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder)
            return push_to_hub(folder, repo_id, private=private)

    # ---- adapters ----

    def add_adapter(self, adapter_name: str, config: DeloraConfig) -> list[str]:
        """Add a new adapter, trainable, and make it the active one; returns the names of the adapted layers."""
        layers = inject.inject_delora(self, with_head(self, with_targets(self, config)), adapter_name)
        self.set_adapter(adapter_name, trainable=not config.inference_mode)
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
        """Load one more adapter, without making it active; returns the names of the adapted layers.

        An adapter that there is already gets the values from the file, if they fit it.
        """
        adapter = source if isinstance(source, Adapter) else read_adapter(source, revision=revision)
        config, tensors = part_for(self, adapter)
        if adapter_name in self.adapter_names:
            state.load_delora_state_dict(self, tensors, adapter_name, check_base=check_base)
            return list(inject.delora_adapters(self, adapter_name))
        had = self.adapter_names
        acting = {layer: layer.active for layer in self._layers()}
        enabled = inject.record_of(self).enabled if had else True
        with inject.complete_or_absent([self], adapter_name):
            state.check_fits(self, config, tensors)
            layers = inject.inject_delora(self, config, adapter_name)
            state.load_delora_state_dict(self, tensors, adapter_name, check_base=check_base)
        self.set_requires_grad(adapter_name, is_trainable)
        if had:
            for layer in self._layers():
                layer.active = acting.get(layer, ())
            inject.enable_delora(self, enabled)
        return layers

    def set_adapter(self, names: str | Sequence[str], *, trainable: bool = True) -> None:
        """Make exactly these adapters act, at strength 1; they are trained, and no others, unless not `trainable`."""
        inject.set_delora_adapters(self, names)
        acting = listed(names)
        for name in self.adapter_names:
            self.set_requires_grad(name, trainable and name in acting)

    def set_requires_grad(self, names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these adapters be trained, or not, whether they act or not."""
        for name in listed(names):
            for p in inject.parameters_of(self, name):
                p.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out; if it was the only one that acted, the first of those that remain acts."""
        inject.remove_delora(self, adapter_name)
        if self.adapter_names and not self.active_adapters:
            self.set_adapter(self.adapter_names[0])

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model for the length of a `with` block."""
        with inject.delora_disabled(self):
            yield

    def set_adapters(self, names: str | Sequence[str], weights: Any = 1.0) -> None:
        """Make exactly these adapters act, each at its strength (see `set_delora_adapters`): diffusers' verb."""
        inject.set_delora_adapters(self, names, weights)

    def disable_adapters(self) -> None:
        """Let no adapter act, until `enable_adapters`: transformers' and diffusers' verb."""
        inject.enable_delora(self, False)

    def enable_adapters(self) -> None:
        """Let the active adapters act again."""
        inject.enable_delora(self, True)

    @property
    def adapter_names(self) -> list[str]:
        """Names of all adapters."""
        return inject.delora_names(self)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        return inject.active_delora_adapters(self)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the adapter that acts, or the names of several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def delora_configs(self) -> dict[str, DeloraConfig]:
        """The configuration of each adapter."""
        return {name: inject.delora_config(self, name) for name in self.adapter_names}

    @property
    def peft_config(self) -> dict[str, DeloraConfig]:
        """The same by PEFT's name."""
        return self.delora_configs

    # ---- merging ----

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True, *, dequantize: bool = False
    ) -> MergeReport:
        """Add adapters (the active ones if None) to the weights, until `unmerge_adapter`.

        What would not be finite is never merged, whatever `safe_merge` says.

        Args:
            dequantize: as for `merge_delora`; without it a quantised layer is refused.
        """
        return merge_delora(self, adapter_names, dequantize=dequantize)

    def unmerge_adapter(self) -> None:
        """Restore the weights of the base, bit for bit."""
        unmerge_delora(self)

    def merge_and_unload(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True, *, dequantize: bool = False
    ) -> nn.Module:
        """The base model with the adapters (the active ones if None) in its weights, and without any adapter.

        Args:
            dequantize: as for `merge_delora`; without it a quantised layer is refused.
        """
        merge_delora(self, adapter_names, permanently=True, dequantize=dequantize)
        return self.get_base_model()

    def unload(self) -> nn.Module:
        """The base model, bit for bit as it was."""
        inject.remove_delora(self)
        return self.get_base_model()

    # ---- the module itself ----

    @property
    def base_model(self) -> nn.Module:
        """The model without its head, as transformers has it; of modules that do not know such a thing, the module."""
        own = self._modules.get("base_model")
        found = own if own is not None else getattr(super(), "base_model", None)
        return self._same if found is None or found is self else found

    def get_base_model(self) -> nn.Module:
        """The module that was adapted, by its own class (its adapters act)."""
        return self._same

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, of how many."""
        return state.count_parameters(self)

    def get_model_status(self) -> ModelStatus:
        """What is adapted, what acts and what is trained, for all layers together."""
        return model_status(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many."""
        state.print_trainable_parameters(self)

    def adapter_state_dict(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """The tensors of one adapter, without the base's."""
        return state.delora_state_dict(self, adapter_name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        head: Any = self.get_output_embeddings if kwargs.get("fused_lm_head") else None
        if head is not None and hasattr(head(), "delora"):
            raise DeloraError(
                "trl computes the loss from the weight of the output layer, past the layer and its adapter, which "
                "would not be trained; leave the output layer out of target_modules, or use transformers' Trainer"
            )
        return super().__call__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuilt, (DeloraModel, type(self._same)), self.__dict__

    def _layers(self) -> list[DeloraLayer]:
        return [layer for _, layer in inject.adapted_layers(self)]


def get_peft_model(model: nn.Module, peft_config: DeloraConfig, adapter_name: str = "default") -> DeloraModel:
    """`model` with a new adapter, trainable, and everything else frozen: PEFT's function of this name.

    Raises:
        TypeError: a configuration of PEFT's own, or of another method.
        DeloraConfigError: it fits nothing in `model`.
    """
    if not isinstance(peft_config, DeloraConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__module__}.{type(peft_config).__name__}; give a DeloraConfig of "
            f"delora_diffusion, or let PEFT's own get_peft_model adapt the model"
        )
    return DeloraModel(model, peft_config, adapter_name)
