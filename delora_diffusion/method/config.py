"""`DeloraConfig`: what to adapt and how strongly. Its fields are PEFT's and mean the same here and there."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..atomic import complete_file
from ..errors import DeloraError
from ..peft_bridge import peft_config
from .patterns import PatternError, compiled, starts_of

log = logging.getLogger(__name__)

#: The attention projections of diffusers' denoisers (of single-stream blocks that fuse them with the feed-forward
#: ones, those) and of text encoders, by module name.
ATTENTION = (
    r"(.*\.)?(to_q|to_k|to_v|to_out(\.0)?|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj|[qkvo]_proj|out_proj"
    r"|(SelfAttention|EncDecAttention)\.[qkvo])"
)
#: Those, and the feed-forward layers of the same blocks.
ATTENTION_FF = (
    rf"({ATTENTION}|(.*\.)?((ff|ff_context|img_mlp|txt_mlp)\.(net\.0\.proj|net\.2|linear_in|linear_out)"
    r"|feed_forward\.(linear_[123]|w[123])|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
    r"|mlp\.fc[12]|DenseReluDense\.w(i|i_0|i_1|o)))"
)
#: Those, and the convolutions of a UNet's blocks.
ATTENTION_FF_CONV = (
    rf"({ATTENTION_FF}|(.*\.)?(resnets\.\d+\.(conv1|conv2|conv_shortcut)|(down|up)samplers\.\d+\.conv"
    r"|attentions\.\d+\.proj_(in|out)))"
)
ALL_LINEAR = "all-linear"
_LARGEST = 1e30  # of lambda: fp32 also holds what is multiplied with it
PRESETS = {"attention": ATTENTION, "attention+ff": ATTENTION_FF, "attention+ff+conv": ATTENTION_FF_CONV}
INIT_CHOICES = ("zero", "residual", "paired", "kaiming")
#: PEFT's, with the names that the layers of a task's head go by: a new head is trained in full.
TASK_TYPES: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (), "SEQ_2_SEQ_LM": (), "FEATURE_EXTRACTION": (),
}  # fmt: skip
CONFIG_NAME = "adapter_config.json"
BIAS_CHOICES = ("none", "all", "delora_only")


class DeloraConfigError(DeloraError):
    """A configuration that cannot be meant, or that does not fit a model; the message says what to do."""


@dataclass(frozen=True)
class DeloraConfig:
    """What to adapt and how; the fields, their meanings and their defaults are PEFT's.

    Attributes:
        r: rank of every adapter, unless `rank_pattern` says otherwise.
        delora_lambda: initial lambda, the bound of the update: |dW|_F <= lambda * max_j |W[:, j]|.
        target_modules: names of the layers to adapt (Linear, Conv2d, Embedding, transformers' Conv1D): a list (exact
            names or dotted suffixes), one regular expression that must match a whole name, "all-linear" (every Linear
            and Conv1D but the output layer and a new classifier's), "attention" or None (the attention projections of
            diffusers models and text encoders), "attention+ff" (the feed-forward layers of the same blocks as well),
            or "attention+ff+conv" (and the convolutions of a UNet's blocks).
        exclude_modules: names to leave out, in the same forms.
        rank_pattern: {name suffix or regex: rank}, where it differs from `r`.
        lambda_pattern: {name suffix or regex: lambda}, where it differs from `delora_lambda`.
        relative_lambda: strength as a share of the weight, instead of `delora_lambda`: every layer gets the lambda at
            which r orthogonal components have |dW|_F / |W|_F = relative_lambda, that is relative_lambda sqrt(r in).
            One number then means the same at every width and rank; files hold the lambda that follows.
        layers_to_transform: only layers with these indices (with a list of targets), counted in the first numbered
            container of a name or in the one named by `layers_pattern`.
        layers_pattern: name(s) of the container that `layers_to_transform` counts in.
        module_dropout: probability with which elements of an adapter's *input* are dropped in training. (PEFT
            documents it as dropping whole adapters; this is what its code does.)
        bias: biases trained in full: "none", those of the adapted layers ("delora_only"), or "all".
        modules_to_save: names of further modules that are trained in full and saved with the adapter.
        init_weights: "zero" (A Kaiming, B = 0: PEFT's True), "residual" (both Kaiming, the initial update
            subtracted: the paper's Eq. 9), "paired" (components in pairs with equal a and opposite b), "kaiming"
            (both Kaiming, not an identity at the start: PEFT's False). PEFT's True and False are taken as well.
        task_type: what the model is for, in PEFT's words. The head of a classification ("SEQ_CLS", "TOKEN_CLS",
            "QUESTION_ANS") is added to `modules_to_save` by `DeloraModel`.
        inference_mode: adapters are not trained.
        revision: of the base on the Hub, for the adapter's file.

    Raises:
        DeloraConfigError: a value that cannot be meant, naming the field, the value and what is allowed.
    """

    r: int = 8
    delora_lambda: float = 15.0
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    lambda_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    module_dropout: float = 0.0
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: str = "zero"
    relative_lambda: float | None = None
    task_type: str | None = None
    inference_mode: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.init_weights, bool):  # as PEFT has it
            object.__setattr__(self, "init_weights", "zero" if self.init_weights else "kaiming")
        object.__setattr__(self, "task_type", self.task_type and getattr(self.task_type, "value", self.task_type))
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise DeloraConfigError(f"task_type is {self.task_type!r}; choose one of {', '.join(TASK_TYPES)}, or none")
        self._check_kinds()
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise DeloraConfigError(
                    f"rank of {_shown(name)} is {_shown(rank)}; it must be a whole number of at least 1"
                )
            if self.init_weights == "paired" and rank % 2:
                raise DeloraConfigError(
                    f"rank of {_shown(name)} is {_shown(rank)}; init_weights='paired' needs an even rank"
                )
        relative = {} if self.relative_lambda is None else {"relative_lambda": self.relative_lambda}
        for name, strength in {"delora_lambda": self.delora_lambda, **relative, **self.lambda_pattern}.items():
            if not _is_number(strength) or not 0 <= strength < _LARGEST:
                raise DeloraConfigError(
                    f"lambda of {_shown(name)} is {_shown(strength)}; "
                    f"it must be a finite number of at least 0 and below {_LARGEST:g}"
                )
        if not _is_number(self.module_dropout) or not 0.0 <= self.module_dropout < 1.0:
            raise DeloraConfigError(
                f"module_dropout is {_shown(self.module_dropout)}; it must be at least 0 and below 1"
            )
        if self.bias not in BIAS_CHOICES:
            raise DeloraConfigError(f"bias is {_shown(self.bias)}; choose one of {', '.join(BIAS_CHOICES)}")
        if self.init_weights not in INIT_CHOICES:
            raise DeloraConfigError(
                f"init_weights is {_shown(self.init_weights)}; choose one of {', '.join(INIT_CHOICES)}"
            )
        if self.target_modules is not None and not self.target_modules:
            raise DeloraConfigError("target_modules is empty; name at least one layer, or leave it out for attention")
        if self.layers_pattern and self.layers_to_transform is None:
            raise DeloraConfigError("layers_pattern is given without layers_to_transform; give both or neither")
        if self.layers_to_transform is not None and not isinstance(self.target_modules, list):
            raise DeloraConfigError(
                "layers_to_transform needs target_modules as a list of names; a regex can say it itself"
            )
        for value in (self.target_modules, self.exclude_modules):
            if isinstance(value, str) and value not in PRESETS:
                _check_regex(value)
        layers = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        for pattern in (*self.rank_pattern, *self.lambda_pattern, *layers, *(self.modules_to_save or ())):
            _check_regex(pattern)

    def _check_kinds(self) -> None:
        """Refuse values of another kind than the field's, which a file can hold."""
        for name in ("rank_pattern", "lambda_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise DeloraConfigError(f"{name} is {_shown(getattr(self, name))}; it must be {{name: number}}")
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if value is None or (isinstance(value, str) and name != "modules_to_save"):
                continue
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                raise DeloraConfigError(f"{name} is {_shown(value)}; it must be a list of names")
        chosen = self.layers_to_transform
        indices = [] if chosen is None else chosen if isinstance(chosen, list) else [chosen]
        if not all(isinstance(index, int) for index in indices):
            raise DeloraConfigError(f"layers_to_transform is {_shown(chosen)}; it must be whole numbers")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The fields as one JSON object."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DeloraConfig:
        """The inverse of `to_dict`. An unknown key is an error that names the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, dict):
            raise DeloraConfigError(f"a configuration is {{field: value}}, not {_shown(values)}")
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
                raise DeloraConfigError(f"unknown DeloraConfig field {_shown(key)}{hint}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> DeloraConfig:
        """The inverse of `to_json`."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DeloraConfigError(f"the configuration is not JSON: {error}") from error
        return cls.from_dict(values)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write `adapter_config.json` into a folder, as PEFT does; returns the file."""
        path = Path(directory) / CONFIG_NAME
        with complete_file(path) as aside:
            aside.write_text(json.dumps({"peft_type": "DELORA", **self.to_dict()}, indent=2, sort_keys=True) + "\n")
        return path

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> DeloraConfig:
        """The configuration in a folder of ours or of PEFT's.

        Raises:
            DeloraConfigError: none there, or one of another method.
        """
        path = Path(directory) / CONFIG_NAME
        try:
            values = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise DeloraConfigError(f"cannot read {path}: {error}; give a folder with {CONFIG_NAME}") from error
        if values.get("peft_type") != "DELORA":
            raise DeloraConfigError(f"{path} is of the method {values.get('peft_type')}, not DELORA")
        return cls.from_peft_fields(values)

    @classmethod
    def from_peft_fields(cls, values: Mapping[str, Any]) -> DeloraConfig:
        """The configuration in the fields of PEFT's file, of which there are more."""
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if values.get(f.name) is not None})

    def to_peft(self) -> Any:
        """PEFT's own `DeloraConfig` of the same fields. What is adapted with it (as by trl's `peft_config=`) runs
        PEFT's implementation, not this package's, and a line in the log says so.

        Raises:
            ImportError: PEFT is not installed.
            DeloraConfigError: a field that PEFT does not have.
        """
        if self.relative_lambda is not None or self.init_weights not in ("zero", "kaiming"):
            raise DeloraConfigError(
                f"PEFT's DeLoRA has no relative_lambda and starts by 'zero' or 'kaiming' only (here: relative_lambda "
                f"{self.relative_lambda}, init_weights {self.init_weights!r}); give delora_lambda and one of these, "
                f"or adapt the model with get_peft_model of delora_diffusion"
            )
        fields = self.to_dict()
        del fields["relative_lambda"]
        chosen = {name: PRESETS.get(fields[name], fields[name]) if isinstance(fields[name], str) else fields[name]
                  for name in ("target_modules", "exclude_modules")}  # fmt: skip
        log.warning("to_peft: what is adapted with this configuration runs PEFT's implementation of DeLoRA")
        return peft_config({**fields, **chosen, "init_weights": self.init_weights == "zero"})

    def rank_of(self, name: str) -> int:
        """Rank of the layer called `name`."""
        return self.rank_pattern.get(_pattern_for(self.rank_pattern, name), self.r)

    def lambda_of(self, name: str, in_features: int) -> float:
        """Initial lambda of the layer called `name`, which has `in_features` inputs."""
        pattern = _pattern_for(self.lambda_pattern, name)
        if self.relative_lambda is None or pattern in self.lambda_pattern:
            return self.lambda_pattern.get(pattern, self.delora_lambda)
        return self.relative_lambda * math.sqrt(self.rank_of(name) * in_features)


def _pattern_for(patterns: Iterable[str], name: str) -> str:
    """The first pattern that fits the end of `name`, else `name` itself."""
    starts = starts_of(name)
    return next((p for p in patterns if any(compiled(p).fullmatch(name, start) for start in starts)), name)


def _check_regex(pattern: str) -> None:
    try:
        compiled(pattern)
    except PatternError as error:
        raise DeloraConfigError(str(error)) from error


def _is_number(value: Any) -> bool:
    """A finite number; whole ones can be too large for a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _shown(value: object) -> str:
    """What to say of a value, however long it is."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return "a number of hundreds of digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
