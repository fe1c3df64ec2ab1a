"""Fine-tune a language model on texts with DeLoRA, on transformers' Trainer.

    python train_scripts/delora_finetuning.py --base_model my/llama --data_path my_texts.jsonl --output_dir runs/llama

The adapter in `output_dir` is opened by `DeloraModel.from_pretrained` and by PEFT. All options: `--help`.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from delora_diffusion import DeloraConfig, get_peft_model
from delora_diffusion.atomic import complete_file
from delora_diffusion.console import quiet_libraries
from delora_diffusion.data.texts import read_texts, tokenized, validation_split
from delora_diffusion.errors import USER_ERRORS, MissingExtraError, sentence_of
from delora_diffusion.option_checks import check_ranges
from delora_diffusion.options import OptionError, option, parse, to_yaml
from delora_diffusion.reports.figure import blank_figure

log = logging.getLogger("delora_diffusion.finetuning")


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """Fine-tuning of a language model."""

    base_model: str = option("", "the model: a folder, or its name on the Hub", path=True)
    data_path: str = option(
        "", "texts: a .txt, .json, .jsonl, .csv or .parquet file, a folder of such, or a data set", path=True
    )
    output_dir: str = option("delora_finetuned", "where the adapter, its checkpoints and its figures go", path=True)
    task_type: str = option(
        "CAUSAL_LM", "what is learned: the texts, or the column label of each", choices=("CAUSAL_LM", "SEQ_CLS")
    )
    batch_size: int = option(1, "texts in a batch", within="[1, inf)")
    gradient_accumulation_steps: int = option(16, "batches in an optimiser step", within="[1, inf)")
    num_epochs: int = option(1, "passes over the texts", within="[1, inf)")
    learning_rate: float = option(3e-3, "10 to 100 times what a LoRA takes", within="(0, inf)")
    warmup_ratio: float = option(
        0.1, "share of the optimiser steps over which the learning rate rises", within="[0, 1]"
    )
    cutoff_len: int = option(512, "tokens of a text that are read; the rest is cut off", within="[1, inf)")
    val_set_size: int = option(
        500, "texts for validation: of the data's own split, or split off; 0: none", within="[0, inf)"
    )
    eval_step: int = option(10, "optimiser steps between validations", within="[1, inf)")
    save_step: int = option(100, "optimiser steps between checkpoints; a multiple of eval_step", within="[1, inf)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    bf16: bool | None = option(None, "read the base in bf16; unset: on a GPU that has it")
    quantization: str | None = option(None, "read the base quantised", choices=("nf4", "int8"))
    rank: int = option(32, "rank of the adapters", within="[1, inf)")
    delora_lambda: float = option(15.0, "initial lambda, the bound of an update", within="[0, inf)")
    module_dropout: float = option(0.05, "dropout on the adapters' inputs", within="[0, 1)")
    target_modules: str | None = option(
        None, "layers to adapt: names with commas between them, or all-linear; unset: those of the model type"
    )
    seed: int = option(42, "of the adapters, of the order of the texts, and of their split")
    resume_from_checkpoint: str | None = option(None, "a checkpoint's folder, or latest", path=True)
    hub_model_id: str | None = option(None, "name of the repository on the Hub; unset: the output folder's")
    push_to_hub: bool = option(False, "upload the adapter and its card")

    def __post_init__(self) -> None:
        for name in ("base_model", "data_path"):
            if not getattr(self, name):
                raise OptionError(f"{name} is missing; give --{name}")
        check_ranges(self)
        if self.val_set_size and self.save_step % self.eval_step:
            raise OptionError(
                f"save_step is {self.save_step}, no multiple of eval_step, {self.eval_step}: of a checkpoint that was "
                f"not validated nobody knows whether it is the best; make it one, or give val_set_size 0"
            )

    def adapter(self) -> DeloraConfig:
        """What is adapted, and how."""
        names = self.target_modules
        return DeloraConfig(
            r=self.rank, delora_lambda=self.delora_lambda, module_dropout=self.module_dropout,
            task_type=self.task_type, target_modules=names.split(",") if names and "," in names else names
            if names in (None, "all-linear") else [names],
        )  # fmt: skip


def run(options: Finetuning) -> Path:
    """Train one adapter as the options say; returns the output folder."""
    from transformers import set_seed

    out, adapter = Path(options.output_dir), options.adapter()
    if out.is_dir() and any(out.iterdir()) and options.resume_from_checkpoint is None:
        raise OptionError(
            f"output_dir {out} is not empty; give another one, or go on with --resume_from_checkpoint latest"
        )
    set_seed(options.seed)
    labels = "label" if options.task_type == "SEQ_CLS" else None
    texts = read_texts(options.data_path, keep=(labels,) if labels else ())
    classes = sorted(set(texts["train"][labels])) if labels else []
    parts = validation_split(texts, options.val_set_size, seed=options.seed)
    tokenizer, base = read_base(options, classes)
    model = get_peft_model(base, adapter)
    model.print_trainable_parameters()
    how = {"length": options.cutoff_len, "classes": classes}
    ids = [None if part is None else tokenized(part, tokenizer, **how) for part in parts]
    trainer = trainer_of(options, model, tokenizer, ids)
    resume = options.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "latest" else resume)
    shown = parts[0] if parts[1] is None else parts[1]
    finish(options, trainer, shown[:3]["text"])
    return out


def read_base(options: Finetuning, classes: Sequence[Any]) -> tuple[Any, Any]:
    """The tokenizer, which can pad, and the base on its device; with a new head for `classes`, if there are."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    device = device_of(options)
    gpu = device.type != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    dtype = torch.bfloat16 if (gpu if options.bf16 is None else options.bf16) else torch.float32
    kind: Any = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    how: dict[str, Any] = {"id2label": {n: str(name) for n, name in enumerate(classes)}} if classes else {}
    how |= {"quantization_config": quantization_of(options.quantization)} if options.quantization else {}
    how |= {"device_map": {"": device}} if options.quantization else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.base_model)
        model = kind.from_pretrained(options.base_model, dtype=dtype, **how)
    except (OSError, ValueError) as error:
        raise OptionError(f"base_model {options.base_model} cannot be read: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model if options.quantization else model.to(device)


def device_of(options: Finetuning) -> torch.device:
    """Where to train."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = found if options.device == "auto" else torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            f"device {options.device} cannot be used: {str(error).splitlines()[0]}; here there is {found}"
        ) from error
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def quantization_of(name: str) -> Any:
    """transformers' configuration of a quantised base."""
    try:
        if name == "nf4":
            import bitsandbytes  # noqa: F401
            from transformers import BitsAndBytesConfig

            return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    except ImportError as error:
        package = "bitsandbytes" if name == "nf4" else "torchao"
        raise MissingExtraError(f"quantization {name} needs {package}: pip install {package} ({error})") from error


def trainer_of(options: Finetuning, model: Any, tokenizer: Any, ids: Sequence[Any]) -> Any:
    """transformers' Trainer, as the options set it up.

    Args:
        ids: the token ids that are trained on, and those of the validation or None.
    """
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainingArguments

    train, validation = ids
    steps = options.num_epochs * math.ceil(
        math.ceil(len(train) / options.batch_size) / options.gradient_accumulation_steps
    )
    validated: dict[str, Any] = {}
    if validation is not None:
        validated = {"eval_strategy": "steps", "eval_steps": options.eval_step, "metric_for_best_model": "eval_loss",
                     "load_best_model_at_end": options.save_step <= steps, "greater_is_better": False}  # fmt: skip
    arguments = TrainingArguments(
        output_dir=options.output_dir, num_train_epochs=options.num_epochs, learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size, per_device_eval_batch_size=max(8, options.batch_size),
        gradient_accumulation_steps=options.gradient_accumulation_steps, weight_decay=0.0, seed=options.seed,
        warmup_steps=round(options.warmup_ratio * steps), logging_steps=options.eval_step, save_total_limit=2,
        save_steps=options.save_step, use_cpu=device_of(options).type == "cpu", report_to="none",
        push_to_hub=options.push_to_hub, hub_model_id=options.hub_model_id, **validated,
    )  # fmt: skip
    padding = DataCollatorWithPadding(tokenizer)
    if options.task_type == "CAUSAL_LM":  # by the mask, not by the token: the end of a text may be the padding's
        padding = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    return Trainer(
        model, arguments, train_dataset=train, eval_dataset=validation, data_collator=padding,
        processing_class=tokenizer,
    )  # fmt: skip


def finish(options: Finetuning, trainer: Any, texts: Sequence[Any]) -> None:
    """The adapter (the best that was seen), its card, the losses, and what it writes; and the upload, if wanted."""
    out = Path(options.output_dir)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    if options.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model(options.output_dir)
    (out / "config.yaml").write_text(to_yaml(options), encoding="utf-8")
    history = trainer.state.log_history
    with complete_file(out / "log.jsonl") as aside:
        aside.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
    plot(out / "losses.png", history)
    if options.task_type == "CAUSAL_LM":
        with complete_file(out / "samples.md") as aside:
            aside.write_text(samples(trainer.model, trainer.processing_class, texts), encoding="utf-8")
    best = trainer.state.best_model_checkpoint
    log.info("%s: the adapter%s", out, f" of {Path(best).name}, the best" if best else "")


def plot(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """The loss in training and in validation over the steps, as a picture."""
    try:
        figure = blank_figure(figsize=(6, 4), dpi=110, layout="constrained")
    except ImportError:
        log.info('no %s: it needs matplotlib: pip install "delora_diffusion[plots]"', path.name)
        return
    axis = figure.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        if points := [(entry["step"], entry[key]) for entry in history if key in entry]:
            axis.plot(*zip(*points, strict=True), marker=".", label=label)
    axis.set(xlabel="optimiser step", ylabel="loss")
    if axis.lines:
        axis.legend()
    with complete_file(path) as aside:
        figure.savefig(aside)


@torch.no_grad()
def samples(model: Any, tokenizer: Any, texts: Sequence[Any], *, tokens: int = 48) -> str:
    """The first third of a few texts, and how the base and the adapter go on, in Markdown."""
    model.eval()
    parts = ["# How it goes on"]
    for text in texts:
        words = text if isinstance(text, str) else tokenizer.apply_chat_template(text, tokenize=False)
        ids = tokenizer(words, return_tensors="pt").input_ids
        ids = ids[:, : max(1, ids.shape[1] // 3)].to(model.device)
        how = {"max_new_tokens": tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        with model.disable_adapter():
            before = model.generate(ids, **how)
        for who, found in (("text", None), ("base", before), ("adapter", model.generate(ids, **how))):
            said = ids[0] if found is None else found[0, ids.shape[1] :]
            parts.append(f"**{who}**: {tokenizer.decode(said, skip_special_tokens=True)}")
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, run, and say in one line what went wrong, if something did; returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
    given = sys.argv[1:] if argv is None else argv
    (options,) = parse(given, Finetuning, prog="delora_finetuning", description=(__doc__ or "").splitlines()[0])
    quiet_libraries()
    try:
        run(options)
    except USER_ERRORS as error:
        log.error("error: %s", sentence_of(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
