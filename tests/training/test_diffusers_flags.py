"""diffusers' flags and commands: every flag of its scripts is known here, and what becomes of it is true.

diffusers_scripts.json holds the flags of the DreamBooth LoRA scripts and the commands of their READMEs, as data.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from delora_diffusion.data.config import RESAMPLINGS, DataConfig
from delora_diffusion.data.photos import instance_examples
from delora_diffusion.options import parse
from delora_diffusion.training.check import in_steps
from delora_diffusion.training.config import GROUPS, Options
from delora_diffusion.training.diffusers_flags import TRANSLATED, DiffusersFlags

from .. import tiny_pipelines
from ..runs import Run, arguments, load_script, same, tensors
from ..test_options import as_flags, companions, other

SCRIPTS = json.loads(Path(__file__).with_name("diffusers_scripts.json").read_text(encoding="utf-8"))
FIELDS = {field.name: (group, field) for group in GROUPS for field in dataclasses.fields(group)}
NEEDED = ["--pretrained_model_name_or_path=base", "--instance_data_dir=photos"]

#: Flags with which a command of the READMEs is refused.
REFUSED = {"cond_image_column"}
#: Flag that is translated -> what is given, beside what, and what it becomes.
EXAMPLES: dict[str, tuple[list[str], list[str], dict[str, Any]]] = {
    "use_8bit_adam": ([], ["--optimizer=AdamW"], {"optimizer": "adamw8bit"}),
    "lora_dropout": (["0.1"], [], {"module_dropout": 0.1}),
    "lora_layers": (["attn.to_k,attn.to_q"], [], {"target_modules": ["attn.to_k", "attn.to_q"]}),
    "lora_blocks": (
        ["3,12"],
        ["--lora_layers=attn.to_k"],
        {"target_modules": r"transformer_blocks\.(3|12)\.(.*\.)?(attn\.to_k)"},
    ),
    "weighting_scheme": (["mode"], [], {"timestep_sampling": "mode"}),
    "use_aspect_ratio_buckets": ([], [], {"aspect_ratio_buckets": "auto"}),
    "final_validation_prompt": (["a dog"], ["--validation_prompt=a cat"], {"validation_prompt": ["a cat", "a dog"]}),
    "hub_token": (["hf_abc"], [], {}),
    "do_fp8_training": ([], [], {"base_quantization": "float8"}),
    "network_weights": (["runs/dog"], [], {"initial_adapter": "runs/dog"}),
    "network_dim": (["8"], [], {"rank": 8}),
    "network_dropout": (["0.1"], [], {"module_dropout": 0.1}),
    "caption_dropout_rate": (["0.1"], [], {"caption_dropout": 0.1}),
    "flip_aug": ([], [], {"random_flip": True}),
    "random_crop": ([], [], {"center_crop": False}),
    "enable_bucket": ([], [], {"aspect_ratio_buckets": "auto"}),
}
#: These read files, and are tried with some.
OF_FILES = {"train_data_dir", "reg_data_dir", "dataset_config", "bnb_quantization_config_path"}


def resolved(*argv: str) -> dict[str, Any]:
    """Every option by name, as the trainer gets them."""
    configs = parse([*NEEDED, *argv], *GROUPS, prog="train", description="", translation=DiffusersFlags())
    return {name: value for config in configs for name, value in vars(config).items()}


def flags_called(kind: str) -> list[str]:
    table = DiffusersFlags()
    kinds = {
        "same": FIELDS, "translated": TRANSLATED, "no effect": table.without_effect, "refused": table.refused
    }  # fmt: skip
    return sorted(set(SCRIPTS["flags"]) & set(kinds[kind]))


def test_every_flag_of_the_scripts_is_in_one_place_of_the_table() -> None:
    kinds = [flags_called(kind) for kind in ("same", "translated", "no effect", "refused")]
    assert sorted(chain(*kinds)) == SCRIPTS["flags"], "none is missing, none is twice"
    assert len(SCRIPTS["flags"]) == 116 and len(SCRIPTS["scripts"]) == 16
    assert not set(DiffusersFlags().names) & set(FIELDS), "our own names are our own"
    assert set(EXAMPLES) | OF_FILES == set(TRANSLATED)


@pytest.mark.parametrize("name", flags_called("same"))
def test_a_flag_called_the_same_changes_the_configuration(name: str) -> None:
    group, field = FIELDS[name]
    value = other(group, field)
    values = companions(group, name) | {name: value}
    assert resolved()[name] != resolved(*as_flags(values))[name] == value


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_translated_flag_becomes_what_the_table_says_and_says_so(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    given, beside, expected = EXAMPLES[name]
    before = resolved(*beside)
    caplog.set_level(logging.INFO)
    caplog.clear()
    after = resolved(*beside, f"--{name}", *given)
    changed = {key: after[key] for key in after if after[key] != before[key]}
    assert changed == expected
    assert changed or (os.environ["HF_TOKEN"] == "hf_abc" and "hf_abc" not in caplog.text)
    assert sum(record.message.startswith(f"{name}: here it is ") for record in caplog.records) == 1


@pytest.mark.parametrize("name", flags_called("no effect"))
def test_a_flag_without_effect_changes_nothing_and_says_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    before = resolved()
    caplog.set_level(logging.INFO)
    assert resolved(f"--{name}", "1") == resolved(f"--{name}") == before
    assert [r.message.startswith(f"{name}: without effect, ") for r in caplog.records] == [True, True]


@pytest.mark.parametrize("name", flags_called("refused"))
def test_a_flag_that_is_refused_is_named_with_the_way(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        resolved(f"--{name}", "x")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and f" {name} is a flag of diffusers' scripts: " in message
    assert message.count("\n") == 1 and DiffusersFlags().refused[name] in message


def test_a_yaml_file_may_use_the_same_names(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text("use_8bit_adam: true\ncache_latents: true\nuse_dora: false\nlora_dropout: 0.2\n")
    found = resolved("--config", str(path), "--lora_dropout", "0.1")
    assert (found["optimizer"], found["module_dropout"]) == ("adamw8bit", 0.1)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lora_dropout=0.1", "--module_dropout=0.2"], "lora_dropout is module_dropout 0.1 here"),
        (["--weighting_scheme=cosmap"], "cosmap is not offered; give one of none, logit_normal, mode"),
        (["--lora_blocks=a"], "lora_blocks has 'a'; give numbers of blocks"),
        (["--lr_power=2"], "lr_power 2.0 does nothing with lr_scheduler constant; give lr_scheduler polynomial"),
        (["--prodigy_beta3=0.5"], "prodigy_beta3 0.5 does nothing with optimizer adamw"),
        (["--use_9bit_adam"], "unknown option --use_9bit_adam; did you mean --use_8bit_adam?"),
    ],
)
def test_what_cannot_be_meant_is_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        resolved(*argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked, kind",
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"), ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True}, "bnb_4bit_quant_type fp4 is not offered"), ({}, "asks for neither"),
        ([1], "asks for neither"), (None, "cannot read bnb_quantization_config_path"),
    ],
)  # fmt: skip
def test_a_file_for_bitsandbytes_names_a_quantisation(
    asked: Any, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    if asked is not None:
        path.write_text(json.dumps(asked))
    if kind in ("nf4", "int8"):
        assert resolved(f"--bnb_quantization_config_path={path}")["base_quantization"] == kind
        return
    with pytest.raises(SystemExit):
        resolved(f"--bnb_quantization_config_path={path}")
    assert kind in capsys.readouterr().err


def test_eight_bits_are_for_adam_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert resolved("--optimizer=prodigy", "--use_8bit_adam")["optimizer"] == "prodigy"
    assert "use_8bit_adam: without effect, the optimizer is prodigy" in caplog.text


def test_steps_win_over_passes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = resolved("--num_train_epochs=3", "--max_train_steps=7", "--validation_epochs=2", "--validation_steps=5")
    assert (found["num_train_epochs"], found["max_train_steps"]) == (None, 7)
    assert (found["validation_epochs"], found["validation_steps"]) == (None, 5)
    assert "num_train_epochs: without effect, max_train_steps is given" in caplog.text


def test_passes_become_steps_and_the_rate_is_scaled_once_the_photos_are_counted() -> None:
    argv = ["--num_train_epochs=3", "--validation_epochs=2", "--train_batch_size=2", "--gradient_accumulation_steps=2",
            "--scale_lr", "--learning_rate=0.5"]  # fmt: skip
    configs = parse([*NEEDED, *argv], *GROUPS, prog="train", description="", translation=DiffusersFlags())
    names = ("model", "adapter", "data", "training", "validation")
    options = in_steps(Options(**dict(zip(names, configs, strict=True))), photos=9, processes=2)
    assert (options.training.max_train_steps, options.validation.validation_steps) == (6, 4), "9 photos, 8 a step"
    assert options.training.learning_rate == 4.0
    again = in_steps(options, photos=9, processes=2)
    assert again == options, "nothing is counted twice when config.yaml repeats the run"


@pytest.mark.parametrize("command", SCRIPTS["commands"], ids=lambda words: words[0] + words[1][-16:])
def test_a_command_of_the_readmes_parses_with_the_script_changed(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if not flags_of(command) & REFUSED:
        assert parse(command[1:], *GROUPS, prog="train", description="", translation=DiffusersFlags())
        return
    with pytest.raises(SystemExit):
        parse(command[1:], *GROUPS, prog="train", description="", translation=DiffusersFlags())
    message = capsys.readouterr().err
    assert any(f"{name} is a flag of" in message or f"unknown option --{name}" in message for name in REFUSED)


def flags_of(command: list[str]) -> set[str]:
    return {word.lstrip("-").partition("=")[0] for word in command if word.startswith("--")}


def test_a_run_in_passes_with_another_vae(
    base: Path, photos: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipelines.vae(4).save_pretrained(tmp_path / "vae")
    given = [word for word in arguments(base, photos, tmp_path / "run") if "max_train_steps" not in word]
    given += ["--num_train_epochs=2", "--allow_tf32", "--logging_dir=logs", "--cache_latents"]
    assert load_script().main([*given, f"--pretrained_vae_model_name_or_path={tmp_path / 'vae'}"]) == 0
    assert "2 passes over 3 photos are 4 steps" in capsys.readouterr().err
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (kept["max_train_steps"], kept["num_train_epochs"]) == (4, None)
    own = run("own", "--max_train_steps=4", "--allow_tf32")
    assert not same(tensors(tmp_path / "run"), tensors(own))


def test_a_vae_that_does_not_fit_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("none", f"--pretrained_vae_model_name_or_path={tmp_path}", code=1)
    assert f"cannot load pretrained_vae_model_name_or_path {tmp_path}" in capsys.readouterr().err
    tiny_pipelines.vae(8).save_pretrained(tmp_path / "vae")
    run("wide", f"--pretrained_vae_model_name_or_path={tmp_path / 'vae'}", code=1)
    assert "with latents of 8 channels, and the base's have 4" in capsys.readouterr().err


def test_photos_are_resized_as_asked(photos: Path) -> None:
    views = {}
    for how in RESAMPLINGS:
        config = DataConfig(instance_data_dir=str(photos), instance_prompt="a dog", resolution=16,
                            image_interpolation_mode=how)  # fmt: skip
        example = instance_examples(config, seed=0)[0]
        views[example.key(example.views[0])] = example.pixels(example.views[0])
    assert len(views) == len(RESAMPLINGS), "latents of one are not taken for another's"
    assert all(not torch.equal(a, b) for a, b in combinations(views.values(), 2))
