"""diffusers' flags that have another name here, or none, and some of kohya's: what becomes of each.

Flags of diffusers' DreamBooth LoRA scripts that are options of the trainer mean the same under their own name. The
tables below hold all others: translated, without effect (the run says so once, and why), or refused with the way.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..data.kohya import concepts_in, options_of_toml
from ..options import OptionError

log = logging.getLogger(__name__)
Given = Mapping[str, Any]

#: Why nothing comes of a flag here -> such flags.
WITHOUT_EFFECT = {
    "photos are always encoded once, before training": "cache_latents cache_latents_to_disk",
    "prompts are always encoded once, unless the text encoder is trained": "pre_compute_text_embeddings",
    "what encodes is read in its turn, and has left the device before the denoiser comes": "offload "
    "remote_text_encoder fsdp_text_encoder",
    "the VAE encodes one photo at a time": "enable_vae_tiling",
    "nothing is loaded while training: everything is encoded before": "dataloader_num_workers",
    "the update depends on directions alone, not on lengths that decay could shrink": "adam_weight_decay "
    "adam_weight_decay_text_encoder prodigy_decouple",
    "the strength is relative_lambda (or delora_lambda), and the same at every rank": "lora_alpha network_alpha",
    "prompts are read as far as the base's own pipeline reads them, in training and in drawing": "max_sequence_length "
    "tokenizer_max_length",
    "masks are passed where the base's own pipeline passes them": "text_encoder_use_attention_mask",
    "torch's own attention is as sparing": "enable_xformers_memory_efficient_attention enable_npu_flash_attention",
    "class images are drawn with the base in the precision it is trained in": "prior_generation_precision",
    "the last pictures come from the pipeline that was trained, no second one is read": "skip_final_inference",
    "pictures are drawn by the base that is trained; `delora sample --pretrained_model_name_or_path` draws with "
    "another": "validation_model_path",
    "adapters are trained and written in fp32": "upcast_before_saving",
    "the precision is that of mixed_precision and base_dtype": "disable_training_autocast",
    "the launcher says which process this is": "local_rank",
    "the velocity is what flow matching is trained on": "precondition_outputs",
    "the result is also written as a LoRA for diffusers; `delora export --format kohya` writes kohya's "
    "names": "output_kohya_format",
    "it is about DeepFloyd IF": "class_labels_conditioning validation_images",
    "it is about HiDream": "pretrained_text_encoder_4_name_or_path pretrained_tokenizer_4_name_or_path",
    "it is about Ideogram": "prompt_enhancer_head_id upsample_prompt",
}
#: The way out -> flags that are refused with it.
REFUSED = {
    "training on pairs of pictures is not offered; leave it out to train on image_column and caption_column "
    "alone": "cond_image_column validation_image",
    "what is trained here is DeLoRA; leave it out": "use_dora use_blora",
    "a base keeps its own noise schedule; leave it out": "do_edm_style_training noise_offset",
    "the tokenizer is the base's own; put another into the base's folder": "tokenizer_name",
    "prompts are read as the base's own pipeline reads them; leave it out, and write what it says into the "
    "prompts": "complex_human_instruction system_prompt text_encoder_out_layers clip_skip",
    "latents are drawn from what the VAE gives, mean and deviation; leave it out": "vae_encode_mode",
    "new words are not trained; leave it out, and use a rare word (trigger_token)": "train_text_encoder_ti "
    "train_text_encoder_ti_frac token_abstraction num_new_tokens_per_abstraction initializer_concept enable_t5_ti",
    "everything is trained to the end; leave it out": "train_text_encoder_frac train_transformer_frac",
}


def _eight_bit(value: Any, given: Given) -> dict[str, Any]:
    asked = str(given.get("optimizer") or "adamw").lower()
    if not asked.startswith("adamw"):
        _say("use_8bit_adam: without effect, the optimizer is %s", asked)
        return {}
    return {"optimizer": "adamw8bit"}


def _layers(value: Any, given: Given) -> dict[str, Any]:
    """Names of layers with commas between them; with `lora_blocks` only those of these blocks."""
    names, blocks = (
        [part for part in re.split(r"[,\s]+", _text(given.get(name) or "")) if part]
        for name in ("lora_layers", "lora_blocks")
    )
    if not blocks:
        return {"target_modules": names}
    if wrong := [number for number in blocks if not number.isdigit()]:
        raise OptionError(f"lora_blocks has {wrong[0]!r}; give numbers of blocks with commas between them, e.g. 12,30")
    last = "|".join(map(re.escape, names)) or r"to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out"
    return {"target_modules": rf"transformer_blocks\.({'|'.join(blocks)})\.(.*\.)?({last})"}


def _weighting(value: Any, given: Given) -> dict[str, Any]:
    known = {"none": "uniform", "logit_normal": "logit_normal", "mode": "mode"}
    if value not in known:
        raise OptionError(
            f"weighting_scheme {value} is not offered; give one of {', '.join(known)}: logit_normal draws the noise "
            f"levels in the middle more often, as the others weigh them more"
        )
    return {"timestep_sampling": known[value]}


def _last_prompt(value: Any, given: Given) -> dict[str, Any]:
    shown = given.get("validation_prompt") or []
    return {"validation_prompt": [*([shown] if isinstance(shown, str) else shown), _text(value)]}


def _token(value: Any, given: Given) -> dict[str, Any]:
    os.environ["HF_TOKEN"] = _text(value)  # where huggingface_hub looks; options are written to files
    _say("hub_token: here it is HF_TOKEN in the run's environment, and in no file")
    return {}


def _buckets(value: Any, given: Given) -> dict[str, Any]:
    return {"aspect_ratio_buckets": given.get("aspect_ratio_buckets") or "auto"}


def _quantised(value: Any, given: Given) -> dict[str, Any]:
    """What a file for bitsandbytes' configuration asks for, of what there is here."""
    try:
        asked = json.loads(Path(_text(value)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read bnb_quantization_config_path {value}: {error}") from error
    if not isinstance(asked, dict) or not (asked.get("load_in_4bit") or asked.get("load_in_8bit")):
        raise OptionError(f"bnb_quantization_config_path {value} asks for neither load_in_4bit nor load_in_8bit")
    kind = asked.get("bnb_4bit_quant_type", "fp4")
    if asked.get("load_in_4bit") and kind != "nf4":
        raise OptionError(f"bnb_quantization_config_path {value}: bnb_4bit_quant_type {kind} is not offered; give nf4")
    return {"base_quantization": "nf4" if asked.get("load_in_4bit") else "int8"}


def _folders(value: Any, given: Given) -> dict[str, Any]:
    if not given.get("train_data_dir"):
        raise OptionError("reg_data_dir is for images of classes; give train_data_dir, the folders to learn from, too")
    return concepts_in(_text(given["train_data_dir"]), given.get("reg_data_dir"))


#: Flag -> the options it becomes, from its value and all that is given beside it; and what these are.
TRANSLATED: dict[str, tuple[Callable[[Any, Given], dict[str, Any]], str]] = {
    "use_8bit_adam": (_eight_bit, "`--optimizer adamw8bit`"),
    "lora_dropout": (lambda value, given: {"module_dropout": value}, "`--module_dropout`"),
    "lora_layers": (_layers, "`--target_modules`"),
    "lora_blocks": (_layers, "a regex in `--target_modules`: layers of these blocks"),
    "weighting_scheme": (_weighting, "`--timestep_sampling`; sigma_sqrt and cosmap are refused"),
    "use_aspect_ratio_buckets": (_buckets, "`--aspect_ratio_buckets auto`"),
    "final_validation_prompt": (_last_prompt, "one more `--validation_prompt`"),
    "hub_token": (_token, "HF_TOKEN in the run's environment, and is written to no file"),
    "do_fp8_training": (lambda value, given: {"base_quantization": "float8"}, "`--base_quantization float8`"),
    "bnb_quantization_config_path": (_quantised, "`--base_quantization` nf4 or int8, as the file says"),
    # kohya's
    "train_data_dir": (_folders, "`concepts`, one for each folder `10_sks dog` in it (and in `img`)"),
    "reg_data_dir": (_folders, "`concepts` with the role class"),
    "dataset_config": (lambda value, given: options_of_toml(value), "`concepts`, and options for its settings"),
    "network_weights": (lambda value, given: {"initial_adapter": value}, "`--initial_adapter`"),
    "network_dim": (lambda value, given: {"rank": value}, "`--rank`"),
    "network_dropout": (lambda value, given: {"module_dropout": value}, "`--module_dropout`"),
    "caption_dropout_rate": (lambda value, given: {"caption_dropout": value}, "`--caption_dropout`"),
    "flip_aug": (lambda value, given: {"random_flip": True}, "`--random_flip`"),
    "random_crop": (lambda value, given: {"center_crop": False}, "`--no-center_crop`"),
    "enable_bucket": (_buckets, "`--aspect_ratio_buckets auto`"),
}
#: Options that a translated flag adds to, or decides together with them.
SHARED = ("optimizer", "validation_prompt")
#: Of two options that say the same, the one that counts first.
PRECEDENCE = (("max_train_steps", "num_train_epochs"), ("validation_steps", "validation_epochs"))


class DiffusersFlags:
    """diffusers' names for the trainer's options; what becomes of each is said once."""

    def __init__(self) -> None:
        self.without_effect = {name: reason for reason, names in WITHOUT_EFFECT.items() for name in names.split()}
        self.refused = {name: way for way, names in REFUSED.items() for name in names.split()}

    @property
    def names(self) -> list[str]:
        """The names that are taken besides our own."""
        return [*TRANSLATED, *self.without_effect, *self.refused]

    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        """What was given in one place, by our names.

        Raises:
            OptionError: a flag of which nothing can come, with the way.
        """
        own = {name: value for name, value in given.items() if name not in self.names}
        foreign = {
            name: _single(value) for name, value in given.items() if name in self.names and value not in (None, False)
        }
        for name, value in foreign.items():
            if name in self.refused:
                raise OptionError(f"{name} is a flag of diffusers' scripts: {self.refused[name]}")
            if name in self.without_effect:
                _say("%s: without effect, %s", name, self.without_effect[name])
                continue
            if name == "reg_data_dir" and "train_data_dir" in foreign:
                continue  # its concepts come with the others
            for option, new in TRANSLATED[name][0](value, own | foreign).items():
                if own.get(option) is not None and name == "dataset_config":
                    _say("%s: its %s is without effect, %s %s is given", name, option, option, own[option])
                    continue
                if own.get(option) not in (None, new) and option not in SHARED:
                    raise OptionError(f"{name} is {option} {new} here, and {option} {own[option]} is given too")
                own[option] = new
                _say("%s: here it is %s %s", name, option, new)
        for first, second in PRECEDENCE:
            if own.get(first) is not None and own.get(second) is not None:
                _say("%s: without effect, %s is given", second, first)
                del own[second]
        return own


def to_table() -> str:
    """A Markdown table of all flags that are not options under their own name."""
    rows = [
        *((f"`--{name}`", f"becomes {meaning}") for name, (_, meaning) in TRANSLATED.items()),
        *((_flags(names), f"without effect: {reason}") for reason, names in WITHOUT_EFFECT.items()),
        *((_flags(names), f"refused: {way}") for way, names in REFUSED.items()),
    ]
    return "\n".join(["| flag | here |", "|---|---|", *(f"| {flags} | {text} |" for flags, text in rows)])


def _flags(names: str) -> str:
    return ", ".join(f"`--{name}`" for name in names.split())


def _single(value: Any) -> Any:
    """What follows a flag on the command line, nothing being true; a value in YAML as it is."""
    return value if not isinstance(value, list) or len(value) > 1 else value[0] if value else True


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _say(text: str, *values: Any) -> None:
    """Once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        log.info(text, *values)
