"""The script that fine-tunes a language model, by the seed's own command line, on a tiny Llama and local texts."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from delora_diffusion import DeloraModel
from delora_diffusion.data.texts import TextError, read_texts, tokenized, validation_split

from .tiny_language import language_base, sentences, word_tokenizer

SCRIPT = Path(__file__).parents[1] / "train_scripts" / "delora_finetuning.py"
IDS = torch.tensor([[1, 5, 6, 7]])


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("delora_finetuning", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_base(tmp_path_factory.mktemp("language"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def arguments(base: Path, data: Path, out: Path, **changes: Any) -> list[str]:
    """The command line of the seed's page, word for word but for the paths and the Hub."""
    given = {
        "base_model": base, "data_path": data, "output_dir": out, "batch_size": 1, "num_epochs": 3,
        "learning_rate": 3e-3, "cutoff_len": 512, "val_set_size": 500, "eval_step": 10, "save_step": 100,
        "device": "auto", "rank": 32, "delora_lambda": 15, "module_dropout": 0.1, "target_modules": "q_proj,v_proj",
        **changes,
    }  # fmt: skip
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


def test_the_seeds_command_line(script: ModuleType, base: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "texts.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(540)))
    assert script.main(arguments(base, data, out, device="cpu")) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = 3 * 3  # 40 texts to train on, 16 in a step
    assert log[-1]["step"] == steps and "eval_loss" in log[-1]
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(out))
    ours = DeloraModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), out)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(LlamaForCausalLM.from_pretrained(base)))
    assert {"README.md", "config.yaml", "losses.png", "samples.md"} <= {path.name for path in out.iterdir()}
    assert (out / "samples.md").read_text().count("**adapter**:") == 3
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        assert file.get_slice(next(key for key in file.keys() if key.endswith("delora_A"))).get_shape()[0] == 32  # noqa: SIM118
    assert script.main(arguments(base, data, out, device="cpu")) == 1, "what is there is not written over"


def test_best_checkpoints_resuming_and_warm_up(script: ModuleType, base: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    data.write_text("\n\n".join(sentences(24)))
    often = {"val_set_size": 4, "eval_step": 1, "save_step": 2, "gradient_accumulation_steps": 10, "warmup_ratio": 0.5,
             "device": "cpu", "delora_lambda": 2.5, "target_modules": "all-linear", "rank": 2}  # fmt: skip
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert script.main(arguments(base, data, whole, **often)) == 0  # 20 texts, 6 steps, warm-up over 3
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    assert len(rates) == 6 and max(rates) == rates[3] == pytest.approx(3e-3) and rates[0] == 0
    evaluated = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(evaluated) == 7 and evaluated[-1] == pytest.approx(min(evaluated[1:-1:2]), abs=1e-6)
    assert script.main([*arguments(base, data, half, **often), "--num_epochs", "1"]) == 0
    assert [path.name for path in half.glob("checkpoint-*")] == ["checkpoint-2"]
    assert script.main([*arguments(base, data, half, **often), "--resume_from_checkpoint", "latest"]) == 0
    again = [json.loads(line) for line in (half / "log.jsonl").read_text().splitlines()]
    assert again[-1]["step"] == 6 and [entry["step"] for entry in again if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_a_classification_trains_its_head(script: ModuleType, base: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": "long" if len(text) > 25 else "short"} for text in sentences(12)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    out = tmp_path / "out"
    changes = {"val_set_size": 4, "num_epochs": 1, "gradient_accumulation_steps": 2, "task_type": "SEQ_CLS",
               "device": "cpu", "bf16": "true"}  # fmt: skip
    assert script.main(arguments(base, tmp_path / "rows.parquet", out, **changes)) == 0
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        assert file.get_slice("base_model.model.score.weight").get_shape() == [2, 16]
    opened = DeloraModel.from_pretrained(LlamaForSequenceClassification.from_pretrained(base, num_labels=2), out)
    assert logits(opened).shape == (1, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"save_step": 15}, "save_step is 15, no multiple of eval_step, 10"),
        ({"val_set_size": 12}, "val_set_size is 12, and there are 12 texts"),
        ({"data_path": "none.pdf"}, "cannot read texts from none.pdf"),
        ({"base_model": "no/such_model"}, "base_model no/such_model cannot be read"),
        ({"device": "cuda:9"}, "device cuda:9 cannot be used"),
        ({"target_modules": "nothing"}, r"target_modules \['nothing'\] matched none"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], said: str, script: ModuleType, base: Path, tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(sentences(12)))
    given = arguments(
        base, tmp_path / "texts.txt", tmp_path / "out", **{"val_set_size": 2, "device": "cpu", **changes}
    )
    try:
        code = script.main(given)
    except SystemExit as stop:
        code = stop.code
    found = capfd.readouterr().err.replace("\n", " ")
    assert code in (1, 2) and re.search(said, found), found
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("ending", ["txt", "json", "jsonl", "csv", "parquet", "saved"])
def test_every_kind_of_file_gives_the_same_texts(ending: str, tmp_path: Path) -> None:
    texts, path = sentences(5), tmp_path / f"x.{ending}"
    data = datasets.Dataset.from_dict({"sentence": texts, "number": list(range(5))})
    if ending == "txt":
        path.write_text("\n".join(texts) + "\n\n")
    elif ending == "saved":
        data.save_to_disk(str(path))
    elif ending == "json":
        path.write_text(json.dumps(data.to_list()))
    else:
        getattr(data, {"jsonl": "to_json"}.get(ending, f"to_{ending}"))(str(path))
    assert read_texts(path)["train"]["text"][:] == texts


def test_splits_columns_conversations_and_the_end_of_a_text(tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("test", 1)):
        (tmp_path / f"{name}.txt").write_text("\n".join(sentences(6, seed)))
    found = read_texts(tmp_path)
    train, held = validation_split(found, 3, seed=0)
    assert len(train) == 6 and held is not None and set(held["text"]) < set(sentences(6, 1))
    ids = tokenized(train, word_tokenizer(), length=6)
    assert all(len(row) <= 6 and (len(row) == 6 or row[-1] == 2) for row in ids["labels"])
    assert any(row[-1] == 2 for row in ids["labels"]) and ids["labels"][:] == ids["input_ids"][:]
    two = tmp_path / "two.jsonl"
    two.write_text(json.dumps({"question": "a", "answer": "b"}))
    with pytest.raises(TextError, match="it is not clear which holds the texts; call it text"):
        read_texts(two)
    two.write_text(json.dumps({"text": " "}))
    with pytest.raises(TextError, match="holds no text"):
        read_texts(two)
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "the cat sits"}]}))
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    (row,) = tokenized(read_texts(chat)["train"], tokenizer, length=9)["input_ids"]
    assert tokenizer.decode(row).split() == ["<s>", "the", "cat", "sits", "</s>"]
