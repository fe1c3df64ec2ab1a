"""transformers' Trainer and trl's SFTTrainer around a `DeloraModel`: what they do to PEFT's they do to ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from delora_diffusion import DeloraConfig, DeloraConfigError, DeloraModel, get_peft_model
from delora_diffusion.method.inject import delora_adapters

from .tiny_language import language_base, llama, sentences, word_tokenizer

TEXTS = datasets.Dataset.from_dict({"text": sentences(12)})
_IDS = word_tokenizer()(sentences(12))["input_ids"]
TOKENS = datasets.Dataset.from_dict({"input_ids": _IDS, "labels": _IDS})
COMMON = {"use_cpu": True, "report_to": "none", "logging_steps": 1, "per_device_train_batch_size": 2,
          "learning_rate": 1e-2, "disable_tqdm": True, "max_steps": 3, "save_strategy": "no"}  # fmt: skip
CONFIG = DeloraConfig(r=4, delora_lambda=15)


def theirs(base: nn.Module) -> peft.PeftModel:
    """PEFT's model from the start that ours has."""
    ours, model = DeloraModel(copy.deepcopy(base), CONFIG), peft.get_peft_model(base, peft.DeloraConfig(r=4))
    values = {k.replace("base_model.model.", ""): p for k, p in model.named_parameters()}
    for layer, adapter in delora_adapters(ours).items():
        for leaf in ("delora_A", "delora_B", "delora_lambda"):
            with torch.no_grad():
                values[f"{layer}.{leaf}.default"].copy_(getattr(adapter, leaf))
    return model


def ours(base: nn.Module) -> DeloraModel:
    return get_peft_model(base, CONFIG)


def trainer(model: Any, out: Path, **options: Any) -> Trainer:
    tokenizer, plain = word_tokenizer(), TOKENS.remove_columns("labels")
    return Trainer(
        model, TrainingArguments(str(out), **{**COMMON, **options}), train_dataset=plain, eval_dataset=plain,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), processing_class=tokenizer,
    )  # fmt: skip


def sft(model: Any, out: Path, peft_config: Any = None, **options: Any) -> SFTTrainer:
    settings = {"bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}, **COMMON, **options}
    return SFTTrainer(
        model, SFTConfig(str(out), **settings), train_dataset=TOKENS, eval_dataset=TOKENS,
        processing_class=word_tokenizer(), peft_config=peft_config,
    )  # fmt: skip


MAKERS = {"Trainer": trainer, "SFTTrainer": sft}


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


REENTRANT, AGAIN = (
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": kind}}
    for kind in (True, False)
)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (trainer, {}),
        (trainer, REENTRANT),
        (trainer, AGAIN | {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}),
        (trainer, {"bf16": True}),
        (sft, {"gradient_checkpointing": False}),
        (sft, REENTRANT),
        (sft, AGAIN | {"bf16": True}),
    ],
    ids=["plain", "reentrant", "smoothed", "bf16", "trl", "trl-reentrant", "trl-bf16"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_losses_are_pefts(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    runs = [make(adapt(llama()), tmp_path / adapt.__name__, **options) for adapt in (ours, theirs)]
    for run in runs:
        torch.manual_seed(7)
        run.train()
    assert len(losses(runs[0])) == 3 and losses(runs[0])[0] != losses(runs[0])[-1]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=2e-2 if "bf16" in options else 2e-4)
    found = [run.evaluate()["eval_loss"] for run in runs]
    assert found[0] == pytest.approx(found[1], abs=2e-2 if "bf16" in options else 2e-4)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_checkpoints_hold_the_adapter_alone_and_resume_exactly(make: Any, tmp_path: Path) -> None:
    often = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    config = DeloraConfig(r=4, init_weights="residual", module_dropout=0.1)
    whole = make(get_peft_model(llama(), config), tmp_path / "out", **often, load_best_model_at_end=True)
    start = trained(whole.model)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    for name in ("adapter_model.safetensors", "model.safetensors"):
        with safe_open(checkpoint / name, "pt") as file:
            assert all("delora_" in key for key in file.keys())  # noqa: SIM118
    assert whole.state.best_model_checkpoint is not None
    assert whole.evaluate()["eval_loss"] == pytest.approx(whole.state.best_metric, abs=1e-6)
    ends = make(get_peft_model(llama(), config), tmp_path / "again", **often)
    assert all(torch.equal(value, start[name]) for name, value in trained(ends.model).items())
    ends.train(resume_from_checkpoint=str(checkpoint))
    straight = make(get_peft_model(llama(), config), tmp_path / "straight", eval_strategy="steps", eval_steps=1)
    straight.train()
    expected = trained(straight.model)
    assert all(torch.equal(value, expected[name]) for name, value in trained(ends.model).items())


def test_a_checkpoint_of_another_adapter_or_base_is_refused(tmp_path: Path) -> None:
    trainer(ours(llama()), tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    other = trainer(get_peft_model(llama(), DeloraConfig(r=3)), tmp_path)
    with pytest.raises(ValueError, match="of another shape"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="trained on another base"):
        trainer(ours(llama(seed=1)), tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_quick_start_of_the_seed(tmp_path: Path) -> None:
    """Word for word but for the import, the folder, the data, and what a machine without a GPU asks for."""
    base = language_base(tmp_path / "base")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token_id = tokenizer.eos_token_id
    model = get_peft_model(model, DeloraConfig(r=32, delora_lambda=15))
    model.print_trainable_parameters()
    settings = SFTConfig(
        dataset_text_field="text", max_length=128, use_cpu=True, bf16=False, output_dir=str(tmp_path / "out"),
        report_to="none", disable_tqdm=True, max_steps=2,
    )  # fmt: skip
    SFTTrainer(model=model, args=settings, train_dataset=TEXTS, processing_class=tokenizer).train()
    model.save_pretrained(tmp_path / "delora-llama")
    tokens = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        logits = model(tokens).logits
        for opened in (peft.PeftModel, DeloraModel):
            again = opened.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "delora-llama"))
            torch.testing.assert_close(again(tokens).logits, logits, rtol=0, atol=1e-5)
    files = {path.name for path in (tmp_path / "delora-llama").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_trl_and_an_adapted_output_layer(tmp_path: Path) -> None:
    run = sft(get_peft_model(llama(), DeloraConfig(r=2, target_modules=["lm_head"])), tmp_path)
    with pytest.raises(ValueError, match="leave the output layer out of target_modules"):
        run.train()


def test_what_is_pushed_is_the_adapter_and_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(ours(llama()), tmp_path / "out", save_strategy="steps", save_steps=1, max_steps=1)
    run.train()
    sent: list[str] = []

    class Hub:
        def create_repo(self, *args: Any, **kwargs: Any) -> Any:
            return type("Url", (str,), {"repo_id": "me/words"})("https://hub/me/words")

        def upload_folder(self, *, folder_path: str, ignore_patterns: list[str], **kwargs: Any) -> None:
            sent.extend(p.name for p in Path(folder_path).iterdir() if p.is_file())

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    (tmp_path / "out" / "model.safetensors").write_bytes(
        (tmp_path / "out" / "checkpoint-1" / "model.safetensors").read_bytes()
    )  # as hub_strategy="every_save" copies it
    run.hub_model_id = "me/words"
    run.push_to_hub()
    assert "adapter_model.safetensors" in sent and "adapter_config.json" in sent and "README.md" in sent
    assert "model.safetensors" not in sent
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and "delora" in card


def test_a_configuration_becomes_pefts_own_and_says_whose_method_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = DeloraConfig(
        r=3, delora_lambda=4.5, target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 2}, init_weights="kaiming"
    )
    found = config.to_peft()
    assert "runs PEFT's implementation" in caplog.text and isinstance(found, peft.DeloraConfig)
    assert (found.r, found.delora_lambda, found.init_weights) == (3, 4.5, False)
    run = sft(llama(), tmp_path, peft_config=found)
    assert isinstance(run.model, peft.PeftModel)
    assert run.model.base_model.model.model.layers[0].self_attn.o_proj.r == {"default": 2}
    for wrong in ({"relative_lambda": 0.1}, {"init_weights": "residual"}):
        with pytest.raises(DeloraConfigError, match="or adapt the model with get_peft_model of delora_diffusion"):
            DeloraConfig(**wrong).to_peft()
    with pytest.raises(TypeError, match="give a DeloraConfig of delora_diffusion"):
        get_peft_model(llama(), found)
