"""Options: one set of names for flags, YAML keys and fields, the precedence of their sources, and every refusal."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from delora_diffusion.base.config import ModelConfig
from delora_diffusion.data.config import DataConfig
from delora_diffusion.evaluation.config import BenchmarkConfig, EvaluationConfig, MeasuringConfig, Subject
from delora_diffusion.export.config import (
    ExportConfig,
    InspectionConfig,
    LoraConfig,
    MergingConfig,
    PushConfig,
    VerifyConfig,
)
from delora_diffusion.options import OptionError, build, option, parse, read_yaml, to_table, to_yaml
from delora_diffusion.sampling.config import DrawingConfig, SamplingConfig
from delora_diffusion.training.config import AdapterConfig, Options, TrainingConfig, ValidationConfig

TRAINING = (ModelConfig, AdapterConfig, DataConfig, TrainingConfig, ValidationConfig)
SAMPLING = (SamplingConfig, DrawingConfig)
MEASURING = (MeasuringConfig, EvaluationConfig, BenchmarkConfig, Subject)
FILES = (LoraConfig, ExportConfig, VerifyConfig, MergingConfig, InspectionConfig, PushConfig)
EVERY_GROUP = (*TRAINING, *SAMPLING, *MEASURING, *FILES)
REQUIRED: dict[type, dict[str, Any]] = {
    ModelConfig: {"pretrained_model_name_or_path": "base"},
    DataConfig: {"instance_data_dir": "photos"},
    SamplingConfig: {"prompts": ["a dog"], "adapter": ["out"]},
}
PRIOR = {"with_prior_preservation": True, "class_data_dir": "class", "class_prompt": "a dog"}
MEASURED = {"validation_prompt": ["a sks dog"], "validation_clip": "clip"}
BESIDE: dict[str, dict[str, Any]] = {
    "blocks_to_swap": {"gradient_checkpointing": True},
    "lr_num_cycles": {"lr_scheduler": "cosine_with_restarts"}, "lr_power": {"lr_scheduler": "polynomial"},
    "prodigy_beta3": {"optimizer": "prodigy"}, "prodigy_use_bias_correction": {"optimizer": "prodigy"},
    "prodigy_safeguard_warmup": {"optimizer": "prodigy"}, "keep_tokens": {"shuffle_caption": True},
    "num_caption_orders": {"shuffle_caption": True},
    **{name: {"instance_data_dir": "", "dataset_name": "set"}
       for name in ("dataset_name", "dataset_config_name", "image_column", "caption_column")},
    "concepts": {"instance_data_dir": ""},
    "num_crops": {"center_crop": False},
    "text_encoder_rank": {"train_text_encoder": True}, "text_encoder_lambda": {"train_text_encoder": True},
    "ema_decay": {"use_ema": True}, "validation_negative_prompt": {"validation_prompt": ["a dog"]},
    "base_preservation_weight": {"with_base_preservation": True, "class_prompt": "a dog"},
}  # fmt: skip
NEED_FIGURES = (
    "validation_clip", "validation_dino", "validation_holdout_dir", "keep_best", "patience", "strength_sheet"
)  # fmt: skip
FIELDS = [
    pytest.param(group, field, id=f"{group.__name__}.{field.name}")
    for group in (*TRAINING, *SAMPLING)
    for field in dataclasses.fields(group)
]

# ---- helpers -------------------------------------------------------------------------------------


def read(*argv: str, groups: tuple[type, ...] = TRAINING) -> dict[str, Any]:
    """All options by name, as the trainer gets them from the command line `argv`."""
    configs = parse(argv, *groups, prog="train", description="")
    assert [type(config) for config in configs] == list(groups)
    return {name: value for config in configs for name, value in vars(config).items()}


def train(*argv: str, yaml_file: Path | None = None) -> dict[str, Any]:
    """The same, with what the trainer cannot do without."""
    config = ["--config", str(yaml_file)] if yaml_file else []
    return read("--pretrained_model_name_or_path", "base", "--instance_data_dir", "photos", *config, *argv)


def written(folder: Path, text: str) -> Path:
    path = folder / "options.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a command line is refused with."""
    with pytest.raises(SystemExit) as stop:
        train(*argv)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert printed.err.count("\n") == 1 or "YAML" in printed.err, "one line, unless the YAML parser says where"
    return printed.err


def default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def other(group: type, field: dataclasses.Field[Any]) -> Any:
    """A valid value of a field that is not its default, with letters that YAML could trip over."""
    now, hint = default(field), get_type_hints(group)[field.name]
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if choices := field.metadata["choices"]:
        return next(choice for choice in choices if choice != now)
    if field.name == "aspect_ratio_buckets":
        return "64,96;96,64"
    if field.name == "device":
        return "cuda:1"
    number = now if isinstance(now, (int, float)) else 0
    values = {
        bool: not now, int: number + 8, float: number / 2 + 0.25, str: "ünï: #1 'no'",
        list[str]: ["a, b", "null", "1e-3"], list[int]: [3, 5], list[float]: [0.5, 2.0],
        dict[str, dict[str, str]]: {"dog": {"folder": "ünï: #1", "trigger": "sks"}},
        dict[str, int]: {"to_q": 3, ".*\\.1": 5}, dict[str, float]: {"to_q": 1e-7, "b": 2.0},
    }  # fmt: skip
    return values[hint if hint in values else kinds[0]]


def companions(group: type, name: str) -> dict[str, Any]:
    """What else must be given for `group` to be valid with the option `name`."""
    measured = MEASURED if group is ValidationConfig and name in NEED_FIGURES else {}
    beside = BESIDE.get(name, {})
    more = PRIOR if name in PRIOR else {"class_prompt": "a dog"} if name == "with_base_preservation" else {}
    return REQUIRED.get(group, {}) | more | measured | beside


def as_flags(values: dict[str, Any]) -> list[str]:
    """Options as a command line."""
    argv = []
    for name, value in values.items():
        if isinstance(value, bool):
            argv += [f"--{name}" if value else f"--no-{name}"]
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            argv += [f"--{name}", yaml.safe_dump(value, default_flow_style=True)]
        else:
            argv += [f"--{name}", str(value)]
    return argv


# ---- every option ---------------------------------------------------------------------------------


@pytest.mark.parametrize("group, field", FIELDS)
def test_every_option_round_trips_through_yaml(group: type, field: dataclasses.Field[Any], tmp_path: Path) -> None:
    value = other(group, field)
    config = build(group, companions(group, field.name) | {field.name: value})
    assert getattr(config, field.name) == value != default(field)
    (again,) = parse(["--config", str(written(tmp_path, to_yaml(config)))], group, prog="train", description="")
    assert again == config


@pytest.mark.parametrize("group, field", FIELDS)
def test_every_option_is_a_flag_that_gives_the_same_as_yaml(group: type, field: dataclasses.Field[Any]) -> None:
    values = companions(group, field.name) | {field.name: other(group, field)}
    (config,) = parse(as_flags(values), group, prog="train", description="")
    assert config == build(group, values)


def test_a_whole_run_round_trips_through_one_yaml_file(tmp_path: Path) -> None:
    configs = [build(group, REQUIRED.get(group, {})) for group in TRAINING]
    path = written(tmp_path, to_yaml(*configs))
    assert parse(["--config", str(path)], *TRAINING, prog="train", description="") == configs


@pytest.mark.parametrize(
    "name, in_yaml, flags, on_command_line",
    [
        ("rank", 8, ["--rank", "4"], 4),
        ("learning_rate", 0.5, ["--learning_rate=1e-4"], 1e-4),
        ("instance_prompt", "from yaml", ["--instance_prompt", "from flag"], "from flag"),
        ("center_crop", False, ["--center_crop"], True),
        ("random_flip", True, ["--no-random_flip"], False),
        ("snr_gamma", 5.0, ["--snr_gamma", "3"], 3.0),
        ("validation_prompt", ["a", "b"], ["--validation_prompt", "c"], ["c"]),
        ("target_modules", ["to_q"], ["--target_modules", "all-linear"], "all-linear"),
        ("rank_pattern", {"to_q": 2}, ["--rank_pattern", "{to_k: 3}"], {"to_k": 3}),
    ],
)
def test_the_command_line_wins_over_yaml_and_yaml_over_the_default(
    name: str, in_yaml: Any, flags: list[str], on_command_line: Any, tmp_path: Path
) -> None:
    path = written(tmp_path, yaml.safe_dump({name: in_yaml}))
    assert train()[name] not in (in_yaml, on_command_line) or isinstance(in_yaml, bool)
    assert train(yaml_file=path)[name] == in_yaml
    assert train(*flags, yaml_file=path)[name] == train(*flags)[name] == on_command_line


@pytest.mark.parametrize("files", [["{0}", "{1}"], ["{0}", "--config", "{1}"]], ids=["one flag", "two flags"])
def test_a_later_yaml_file_wins_over_an_earlier_one_and_the_command_line_over_both(
    files: list[str], tmp_path: Path
) -> None:
    (tmp_path / "subject.yaml").write_text("instance_prompt: a sks dog\nrank: 8\nvalidation_prompt: [a, b]\n")
    (tmp_path / "card.yaml").write_text("rank: 4\nmixed_precision: bf16\n")
    paths = [str(tmp_path / name) for name in ("subject.yaml", "card.yaml")]
    found = train("--config", *(file.format(*paths) for file in files))
    chosen = {name: found[name] for name in ("instance_prompt", "rank", "validation_prompt", "mixed_precision")}
    assert chosen == {"instance_prompt": "a sks dog", "rank": 4, "validation_prompt": ["a", "b"],
                      "mixed_precision": "bf16"}  # fmt: skip
    assert train("--config", *(file.format(*reversed(paths)) for file in files))["rank"] == 8
    assert train("--rank=2", "--config", *(file.format(*paths) for file in files))["rank"] == 2


def test_every_yaml_file_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.yaml").write_text("rank: 4\n")
    (tmp_path / "bad.yaml").write_text("rnk: 4\n")
    message = refusal(capsys, "--config", str(tmp_path / "bad.yaml"), str(tmp_path / "good.yaml"))
    assert "bad.yaml: unknown option 'rnk'; did you mean rank?" in message
    message = refusal(capsys, "--config", str(tmp_path / "good.yaml"), str(tmp_path / "missing.yaml"))
    assert "cannot read --config" in message and "missing.yaml" in message


def test_an_empty_yaml_file_and_null_values_mean_the_defaults(tmp_path: Path) -> None:
    assert train(yaml_file=written(tmp_path, "# nothing yet\n")) == train()
    assert train(yaml_file=written(tmp_path, "rank: null\nsnr_gamma:\nvalidation_prompt: ~\n")) == train()


def test_two_configs_never_share_a_default_list_or_dict() -> None:
    first, second = train(), train()
    first["validation_prompt"].append("x")
    first["rank_pattern"]["x"] = 1
    assert second["validation_prompt"] == train()["validation_prompt"] == []
    assert second["rank_pattern"] == train()["rank_pattern"] == {}


# ---- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),  # text to YAML 1.1
        ("learning_rate: 1", "learning_rate", 1.0),
        ("rank: '4'", "rank", 4),
        ("rank: 4.0", "rank", 4),
        ("instance_prompt: 42", "instance_prompt", "42"),
        ("mixed_precision: no", "mixed_precision", "no"),  # false to YAML 1.1
        ("output_dir: 2024_11_25", "output_dir", "2024_11_25"),  # a number to YAML 1.1
        ("output_dir: 2024-11-25", "output_dir", "2024-11-25"),  # a date
        ("output_dir: 0123", "output_dir", "0123"),
        ("output_dir: 1.10", "output_dir", "1.10"),
        ("trigger_token: 1e3", "trigger_token", "1e3"),
        ("instance_prompt: 1:30", "instance_prompt", "1:30"),  # 90 to YAML 1.1
        ("instance_prompt: no", "instance_prompt", "no"),
        ("instance_prompt: 0x1F", "instance_prompt", "0x1F"),
        ("validation_prompt: [1.0, 007]", "validation_prompt", ["1.0", "007"]),
        ("rank_pattern: {1.10: 4}", "rank_pattern", {"1.10": 4}),
        ("seed: 0123", "seed", 123),  # 83 to YAML 1.1
        ("seed: 0o17", "seed", 15),
        ("max_train_steps: 1_000", "max_train_steps", 1000),
        ("max_train_steps: 1e3", "max_train_steps", 1000),
        ("cache_dir: None", "cache_dir", None),
        ("cache_dir: 'None'", "cache_dir", "None"),
        ("random_flip: off", "random_flip", False),
        ("\ufeffrank: 8", "rank", 8),  # editors on Windows put a mark in front
        ("random_flip: yes", "random_flip", True),
        ("random_flip: 'True'", "random_flip", True),
        ("validation_prompt: a dog", "validation_prompt", ["a dog"]),
        ("target_modules: to_q", "target_modules", "to_q"),
        ("target_modules: [to_q, to_k]", "target_modules", ["to_q", "to_k"]),
        ("lambda_pattern: {to_q: 1e-3, 1: 2}", "lambda_pattern", {"to_q": 1e-3, "1": 2.0}),
        ("rank_pattern: {to_q: '8'}", "rank_pattern", {"to_q": 8}),
    ],
)
def test_yaml_values_become_the_options_type(text: str, name: str, value: Any, tmp_path: Path) -> None:
    found = train(yaml_file=written(tmp_path, text))[name]
    assert found == value and type(found) is type(value)
    if isinstance(value, dict):
        assert [type(v) for v in found.values()] == [type(v) for v in value.values()]


@pytest.mark.parametrize(
    "flags, value",
    [
        (["--target_modules", "to_q", "to_k"], ["to_q", "to_k"]),
        (["--target_modules", r".*attn1.*to_(q|k)"], r".*attn1.*to_(q|k)"),
        (["--target_modules", "all-linear"], "all-linear"),
        ([], None),
    ],
)
def test_target_modules_is_one_regex_or_a_list_of_names(flags: list[str], value: Any) -> None:
    assert train(*flags)["target_modules"] == value


WRONG = [
    ("rank: four", "rank is 'four'", "a whole number"),
    ("rank: 4.5", "rank is 4.5", "a whole number"),
    ("rank: true", "rank is True", "a whole number"),
    ("rank: [4]", "rank is [4]", "a whole number"),
    ("rank: .inf", "rank is inf", "a whole number"),
    ("learning_rate: fast", "learning_rate is 'fast'", "a number"),
    ("learning_rate: .nan", "learning_rate is nan", "a number"),
    ("learning_rate: yes", "learning_rate is 'yes'", "a number"),
    ("learning_rate: true", "learning_rate is True", "a number"),
    ("seed: 1:30", "seed is '1:30'", "a whole number"),
    ("train_text_encoder: 3", "train_text_encoder is 3", "true or false"),
    ("instance_prompt: [a, b]", "instance_prompt is ['a', 'b']", "text"),
    ("instance_prompt: true", "instance_prompt is True", "text"),
    ("validation_prompt: [[a]]", "validation_prompt is ['a']", "text"),
    ("rank_pattern: 3", "rank_pattern is 3", "a mapping"),
    ("rank_pattern: {to_q: four}", "rank_pattern[to_q] is 'four'", "a whole number"),
    ("lambda_pattern: [to_q]", "lambda_pattern is ['to_q']", "a mapping"),
]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["0,0.5,1"], [0, 0.5, 1]),
        (["0,0.25,...,1.5"], [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]),
        (["0.1,0.2,...,0.7"], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        (["0", "0.5", "...", "2", "5"], [0, 0.5, 1, 1.5, 2, 5]),
        (["0,", "0.5"], [0, 0.5]),
        (["1.5,1,...,0"], [1.5, 1, 0.5, 0]),
        (["0,1,...,2,4,...,8"], [0, 1, 2, 4, 6, 8]),
        (["1,2,...,3"], [1, 2, 3]),
    ],
)
def test_numbers_may_have_commas_and_ranges(words: list[str], values: list[float], tmp_path: Path) -> None:
    given = ["--prompts", "a dog", "--adapter", "out"]
    assert read(*given, "--strengths", *words, groups=SAMPLING)["strengths"] == values
    text = f"prompts: a dog\nadapter: out\nstrengths: '{','.join(words)}'\n"
    _, config = parse(["--config", str(written(tmp_path, text))], *SAMPLING, prog="sample", description="")
    assert config.strengths == values and all(isinstance(value, float) for value in config.strengths)


def test_a_range_may_be_a_yaml_list(tmp_path: Path) -> None:
    path = written(tmp_path, "prompts: a dog\nadapter: out\nstrengths: [0, 0.5, ..., 1.5]\n")
    assert read("--config", str(path), groups=SAMPLING)["strengths"] == [0, 0.5, 1, 1.5]


def test_a_range_of_seeds_is_whole_numbers() -> None:
    given = ["--prompts", "a dog, on a mat", "--adapter", "out", "--seeds", "0,1,...,4"]
    values = read(*given, groups=SAMPLING)
    assert values["seeds"] == [0, 1, 2, 3, 4] and values["prompts"] == ["a dog, on a mat"], "text keeps its commas"


@pytest.mark.parametrize(
    "words", ["0,0.25,...", "...,1", "0,...,1", "0,0.3,...,1", "0,0,...,1", "0,1,...,-3", "a,b,...,c", "0,1e-9,...,1"]
)
def test_a_range_that_does_not_end_is_refused_with_an_example(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read("--prompts", "a dog", "--adapter", "out", f"--strengths={words}", groups=SAMPLING)
    assert "such as 0,0.25,...,1.5" in capsys.readouterr().err


@pytest.mark.parametrize("text, found, expected", WRONG)
def test_a_wrong_type_in_yaml_names_file_option_value_and_what_to_give(
    text: str, found: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, text)
    message = refusal(capsys, "--config", str(path))
    assert f"{path}: {found}; it must be {expected}" in message


@pytest.mark.parametrize(
    "flags, found, expected",
    [
        (["--rank", "four"], "rank is 'four'", "a whole number"),
        (["--rank", "4.5"], "rank is '4.5'", "a whole number"),
        (["--learning_rate=fast"], "learning_rate is 'fast'", "a number"),
        (["--rank_pattern", "8"], "rank_pattern is '8'", "a mapping"),
        (["--rank_pattern", "{to_q"], "rank_pattern is '{to_q'", "a mapping"),
        (["--rank_pattern", "{to_q: x}"], "rank_pattern[to_q] is 'x'", "a whole number"),
    ],
)
def test_a_wrong_type_on_the_command_line_is_refused(
    flags: list[str], found: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"train: error: {found}; it must be {expected}" in refusal(capsys, *flags)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--init_weights", "pared"], "init_weights is 'pared'; choose one of zero, residual, paired, kaiming"),
        (["--init_weights", "pared"], "did you mean paired?"),
        (["--mixed_precision", "float64"], "mixed_precision is 'float64'; choose one of no, fp16, bf16"),
        (["--lr_scheduler", "cosin"], "did you mean cosine?"),
    ],
)
def test_a_bad_choice_lists_the_choices(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(capsys, *flags)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--resolution", "500"], "resolution is 500; it must be a multiple of 8, e.g. 496"),
        (["--resolution", "4"], "a multiple of 8, e.g. 8"),
        (["--max_train_steps", "0"], "max_train_steps is 0; it must be at least 1"),
        (["--learning_rate", "-1"], "learning_rate is -1.0; it must be at least 0"),
        (["--text_encoder_lr", "-1"], "text_encoder_lr is -1.0; it must be at least 0"),
        (["--adam_beta1", "1.5"], "adam_beta1 is 1.5; it must be at least 0 and below 1"),
        (["--adam_beta2", "1"], "adam_beta2 is 1.0; it must be at least 0 and below 1"),
        (["--instance_prompt", "a caf\udcc3\udca9"], "the terminal's encoding, cannot tell; set LANG=C.UTF-8"),
        (["--checkpoints_total_limit", "0"], "checkpoints_total_limit is 0; it must be at least 1"),
        (["--ema_decay", "1"], "ema_decay is 1.0; it must be at least 0 and below 1"),
        (["--snr_gamma", "0"], "snr_gamma is 0.0; it must be positive"),
        (["--lambda_warmup_steps", "-5"], "lambda_warmup_steps is -5; it must be at least 0"),
        (["--adam_beta1", "1.5"], "adam_beta1 is 1.5; it must be at least 0 and below 1"),
        (["--adam_epsilon", "-1"], "adam_epsilon is -1.0; it must be positive and at most 1"),
        (["--learning_rate", "1e38"], "learning_rate is 1e+38; it must be at least 0 and at most 10"),
        (["--relative_lambda", "15"], "relative_lambda is 15.0; it must be positive and at most 10"),
        (["--rank_pattern", "{to_q: 0}"], "rank_pattern[to_q] is 0; it must be at least 1"),
        (["--text_encoder_rank", "4"], "text_encoder_rank does nothing without train_text_encoder; add it"),
        (["--ema_decay", "0.9"], "ema_decay does nothing without use_ema; add it, or leave this out"),
        (["--num_crops", "2"], "num_crops 2 does nothing with center_crop True; give center_crop False"),
        (["--logit_std", "2", "--timestep_sampling", "mode"], "logit_std 2.0 does nothing with timestep_sampl"),
        (["--base_preservation_weight", "2"], "does nothing without with_base_preservation"),
        (["--validation_negative_prompt", "blur"], "does nothing without validation_prompt"),
        (["--delora_lambda", "9", "--relative_lambda", "0.1"], "relative_lambda 0.1 does nothing with delora_lam"),
        (["--strength_sheet", "1", "1", "--validation_prompt", "x"], "strength_sheet has 1.0 twice; give it once"),
        (["--validation_steps", "0"], "validation_steps is 0; it must be at least 1"),
        (["--with_prior_preservation"], "needs class_data_dir"),
        (["--class_prompt", "a dog"], "does nothing without with_prior_preservation or with_base_preservation"),
        (["--class_data_dir", "dogs"], "does nothing without with_prior_preservation"),
        (["--with_base_preservation"], "needs class_prompt"),
        (["--base_preservation_weight", "-1"], "base_preservation_weight is -1.0; it must be at least 0"),
        (["--num_crops", "0"], "num_crops is 0; it must be at least 1"),
        (["--prior_loss_weight", "-0.5"], "prior_loss_weight is -0.5; it must be at least 0"),
    ],
)
def test_values_and_combinations_that_cannot_be_meant_are_refused(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(capsys, *flags)


#: Numbers that may be anything; resolution has a check of its own.
FREE = {"logit_mean", "strengths", "weights", "resolution"}
NUMBERS = [
    pytest.param(group, field, id=f"{group.__name__}.{field.name}")
    for group in EVERY_GROUP
    for field in dataclasses.fields(group)
    if re.search(r"\b(int|float)\b", str(field.type)) and field.name not in FREE
]


@pytest.mark.parametrize("group, field", NUMBERS)
def test_every_number_has_a_range_and_is_refused_outside_of_it(group: type, field: dataclasses.Field[Any]) -> None:
    bounds = re.fullmatch(r"([\[(])(.+), (.+)([\])])", field.metadata["within"])
    assert bounds
    opening, low, high, closing = bounds.groups()
    step = 1 if re.search(r"\bint\b", str(field.type)) else 1e-9
    for edge, outwards, included in ((low, -step, opening == "["), (high, step, closing == "]")):
        if edge == "inf":
            continue
        at = float(edge) if "." in edge else int(edge)
        wrong = at + outwards if included else at
        value = {"key": wrong} if "dict" in str(field.type) else [wrong] if "list" in str(field.type) else wrong
        with pytest.raises(OptionError, match=rf"{field.name}(\[key\])? is .*; it must be"):
            group(**companions(group, field.name) | {field.name: value})


def options_with_changes(changes: dict[type, dict[str, Any]]) -> Options:
    groups = [build(group, REQUIRED.get(group, {}) | changes.get(group, {})) for group in TRAINING]
    return Options(**dict(zip(("model", "adapter", "data", "training", "validation"), groups, strict=True)))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({TrainingConfig: {"text_encoder_lr": 1e-3}}, "text_encoder_lr does nothing without train_text_encoder"),
        ({TrainingConfig: {"learning_rate": 0.0}}, "are 0, so nothing is trained"),
        ({TrainingConfig: {"learning_rate": 0.0, "lambda_learning_rate": 1e-3}}, None),
    ],
)  # fmt: skip
def test_options_of_different_groups_must_fit(changes: dict[type, dict[str, Any]], said: str | None) -> None:
    with pytest.raises(OptionError, match=said) if said else contextlib.nullcontext():
        options_with_changes(changes)


@pytest.mark.parametrize(
    "group, name, value, beside",
    [
        (TrainingConfig, "lr_warmup_steps", 100, "lr_scheduler"),
        (TrainingConfig, "mode_scale", 1.0, "timestep_sampling"),
        (TrainingConfig, "hub_model_id", "you/dog", "push_to_hub"),
        (TrainingConfig, "logging_dir", "logs", "report_to"),
        (DataConfig, "num_class_images", 200, "with_prior_preservation"),
        (ValidationConfig, "num_validation_images", 2, "validation_prompt"),
    ],
)
def test_what_commands_of_diffusers_give_without_effect_is_told(
    group: type, name: str, value: Any, beside: str
) -> None:
    (told,) = options_with_changes({group: {name: value}}).doubts()
    assert told.startswith(name) and "does nothing with" in told and beside in told
    assert options_with_changes({}).doubts() == []


@pytest.mark.parametrize("group, name", [(AdapterConfig, "lambda_warmup_steps"), (TrainingConfig, "lr_warmup_steps")])
def test_a_warm_up_longer_than_the_run_is_told(group: type, name: str) -> None:
    schedule = {"lr_scheduler": "cosine"} if group is TrainingConfig else {}
    (told,) = options_with_changes({group: {name: 501} | schedule}).doubts()
    assert told == f"{name} is 501, and the run ends at max_train_steps 500, before what it leads up to"
    assert options_with_changes({group: {name: 500} | schedule}).doubts() == []


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"seeds": [2**64]}, "seeds is 18446744073709551616; it must be at least 0 and below"),
        ({"height": 0}, "height is 0; it must be at least 8"),
        ({"device": "the fast one"}, "device is 'the fast one'; give cuda"),
    ],
)
def test_drawing_options_that_cannot_be_meant_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        DrawingConfig(**changes)


@pytest.mark.parametrize("missing", ["pretrained_model_name_or_path", "instance_data_dir"])
def test_a_missing_base_or_folder_is_named(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {name: value for values in REQUIRED.values() for name, value in values.items() if name != missing}
    flags = as_flags(
        {name: given[name] for name in ("pretrained_model_name_or_path", "instance_data_dir") if name in given}
    )
    with pytest.raises(SystemExit):
        read(*flags)
    assert f"{missing} is missing; give the folder" in capsys.readouterr().err


# ---- unknown options and bad files ----------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--learning_rte", "1"], "unknown option --learning_rte; did you mean --learning_rate?"),
        (["--learning-rate=1"], "unknown option --learning-rate; did you mean --learning_rate?"),
        (["--lambda_learning_rat", "1"], "did you mean --lambda_learning_rate?"),
        (["--no-centre_crop"], "unknown option --no-centre_crop; did you mean --no-center_crop?"),
        (["--validation_stepz", "50"], "did you mean --validation_steps?"),
        (["--zzzzzz"], "unknown option --zzzzzz; see --help"),
        (["--instance_prompt", "a", "photo"], "unknown option photo; quote values with spaces"),
        (["--rank"], "argument --rank: expected one argument"),
        (["--learn", "1"], "unknown option --learn"),  # no abbreviations: they would change meaning with new options
    ],
)
def test_an_unknown_flag_suggests_the_nearest(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(capsys, *flags)


@pytest.mark.parametrize(
    "text, said",
    [
        ("learning_rte: 1", "unknown option 'learning_rte'; did you mean learning_rate?"),
        ("Rank: 1", "unknown option 'Rank'; did you mean rank?"),
        ("qqqqqq: 1", "unknown option 'qqqqqq'; see --help"),
        ("1: 2", "unknown option 1; see --help"),
        ("- rank\n- 4", "holds a list; it must be"),
        ("just text", "holds a str; it must be"),
        ("rank: [4", "is not valid YAML"),
        ("rank: 4\n\tlearning_rate: 1", "is not valid YAML"),
        ("rank: 4\nseed: 1\nrank: 8", "'rank' is given twice"),
        ("rank_pattern: {a: 4, a: 8}", "'a' is given twice"),
        ("[" * 5000, "is not valid YAML: it is nested too deep"),
        ("seed: !!int x", "is not valid YAML"),
    ],
)
def test_a_bad_yaml_file_is_named_with_what_is_wrong(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, text)
    message = refusal(capsys, "--config", str(path))
    assert str(path) in message and said in message


def test_a_missing_yaml_file_and_a_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.yaml"
    assert f"cannot read --config {missing}: No such file" in refusal(capsys, "--config", str(missing))
    assert f"cannot read --config {tmp_path}: " in refusal(capsys, "--config", str(tmp_path))


def test_a_yaml_file_that_is_not_utf8_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.yaml").write_bytes("instance_prompt: süß".encode("latin-1"))
    message = refusal(capsys, "--config", str(tmp_path / "latin.yaml"))
    assert f"cannot read --config {tmp_path / 'latin.yaml'}: " in message and "save it as UTF-8" in message


def test_none_on_the_command_line_is_nothing_where_nothing_is_possible() -> None:
    assert train("--cache_dir", "None", "--snr_gamma", "None") == train()
    assert train("--instance_prompt", "None of them")["instance_prompt"] == "None of them"


# ---- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["output_dir", "cache_dir", "instance_data_dir", "pretrained_model_name_or_path"])
@pytest.mark.parametrize(
    "given, path", [("~/runs", "/home/me/runs"), ("$DOGS/a", "/data/dogs/a"), ("${DOGS}2/~", "/data/dogs2/~")]
)
def test_a_path_may_have_the_home_folder_and_variables(
    name: str, given: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DOGS", "/data/dogs")
    assert train(f"--{name}={given}")[name] == path
    assert read_yaml(written(tmp_path, f"{name}: {given}"), *TRAINING) == {name: path}


def test_lists_of_paths_and_config_files_are_filled_in_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, "adapter: [~/a, you/dog]\nprompts: [$5 note]\n")
    values = read("--config", "~/options.yaml", groups=SAMPLING)
    assert values["adapter"] == [str(tmp_path / "a"), "you/dog"] and values["prompts"] == ["$5 note"]


def test_a_path_with_a_variable_or_user_that_is_not_there_is_refused_unless_it_exists_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "output_dir is '$NOT_SET/a', and there is no environment variable NOT_SET" in refusal(
        capsys, "--output_dir", "$NOT_SET/a"
    )
    assert "there is no user nobody_of_this_name" in refusal(capsys, "--output_dir", "~nobody_of_this_name/a")
    (tmp_path / "cash$money").mkdir()
    assert train("--output_dir", str(tmp_path / "cash$money"))["output_dir"] == str(tmp_path / "cash$money")


#: Options whose help speaks of files or folders, and which name none.
NO_PATHS = {
    "validation_prompt", "validation_world_prompt", "variant", "component", "format", "lora_dtype", "overwrite",
    "overwrite_output_dir", "dtype", "subjects", "repo", "masks", "concepts",
}  # fmt: skip


@pytest.mark.parametrize("group", EVERY_GROUP, ids=lambda group: group.__name__)
def test_every_option_that_names_a_file_or_folder_is_a_path(group: type) -> None:
    fields = dataclasses.fields(group)
    speaking = {f.name for f in fields if re.search(r"\b(file|folder|script|PNG|sheet of)s?\b", f.metadata["help"])}
    paths = {field.name for field in fields if field.metadata["path"]}
    assert speaking - NO_PATHS <= paths <= speaking | {"adapter", "cache_dir"}


def test_read_yaml_raises_what_the_trainer_reports(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean rank"):
        read_yaml(written(tmp_path, "rnk: 4"), AdapterConfig)
    assert read_yaml(written(tmp_path, "rank: 4"), AdapterConfig) == {"rank": 4}


# ---- names ----------------------------------------------------------------------------------------

DIFFUSERS_FLAGS = """
    pretrained_model_name_or_path instance_data_dir instance_prompt class_data_dir class_prompt
    with_prior_preservation prior_loss_weight num_class_images resolution train_text_encoder train_batch_size
    gradient_accumulation_steps gradient_checkpointing learning_rate lr_scheduler lr_warmup_steps max_train_steps
    checkpointing_steps checkpoints_total_limit resume_from_checkpoint validation_prompt num_validation_images
    snr_gamma mixed_precision seed report_to push_to_hub hub_model_id output_dir
"""
OUR_FLAGS = """
    rank delora_lambda lambda_learning_rate module_dropout target_modules rank_pattern lambda_pattern init_weights
"""


@pytest.mark.parametrize("name", [*DIFFUSERS_FLAGS.split(), *OUR_FLAGS.split()])
def test_the_promised_names_exist(name: str) -> None:
    assert name in train()


def test_no_two_configs_of_the_trainer_have_an_option_in_common() -> None:
    names = [field.name for group in TRAINING for field in dataclasses.fields(group)]
    assert len(names) == len(set(names)) and "config" not in names


def test_a_command_of_diffusers_dreambooth_script_parses() -> None:
    options = read(
        "--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5", "--instance_data_dir=dog",
        "--output_dir=out", "--instance_prompt=a photo of sks dog", "--resolution=512", "--train_batch_size=1",
        "--gradient_accumulation_steps=2", "--checkpointing_steps=100", "--learning_rate=1e-4", "--report_to=wandb",
        "--lr_scheduler=constant", "--lr_warmup_steps=0", "--max_train_steps=800", "--with_prior_preservation",
        "--prior_loss_weight=0.5", "--class_data_dir=dogs", "--class_prompt=a photo of dog", "--num_class_images=200",
        "--validation_prompt=A photo of sks dog in a bucket", "--seed=0", "--push_to_hub", "--train_text_encoder",
        "--gradient_checkpointing", "--mixed_precision=fp16", "--snr_gamma=5.0",
    )  # fmt: skip
    expected = {
        "instance_prompt": "a photo of sks dog", "resolution": 512, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-4, "max_train_steps": 800, "with_prior_preservation": True, "prior_loss_weight": 0.5,
        "num_class_images": 200, "validation_prompt": ["A photo of sks dog in a bucket"], "seed": 0,
        "push_to_hub": True, "train_text_encoder": True, "gradient_checkpointing": True, "mixed_precision": "fp16",
        "snr_gamma": 5.0, "class_prompt": "a photo of dog", "report_to": "wandb",
    }  # fmt: skip
    assert {name: options[name] for name in expected} == expected


# ---- what is shown --------------------------------------------------------------------------------


def test_help_shows_every_option_with_its_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read("--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for group in TRAINING:
        for field in dataclasses.fields(group):
            assert f"--{field.name}" in shown
            for choice in field.metadata["choices"] or ():
                assert choice in re.sub(r"\s+", " ", shown)


def test_the_table_has_one_row_of_three_cells_for_every_option() -> None:
    groups = (*TRAINING, *SAMPLING)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in to_table(*groups).splitlines()]
    assert {len(row) for row in rows} == {3}
    shown = [row[0].strip(" `") for row in rows[2:]]
    assert shown == [f"--{field.name}" for group in groups for field in dataclasses.fields(group)]
    by_name = dict(zip(shown, rows[2:], strict=True))
    assert by_name["--rank"][1].strip() == "`16`" and by_name["--report_to"][1].strip() == ""
    assert by_name["--seeds"][1].strip() == "`[0]`" and by_name["--random_flip"][1].strip() == "`false`"
    assert "paired" in by_name["--init_weights"][2]


def test_a_mapping_of_mappings_comes_from_a_file_or_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclasses.dataclass(frozen=True)
    class Nested:
        """Nested."""

        rooms: dict[str, dict[str, int]] = option({}, "rooms")

    path = written(tmp_path, "rooms: {hall: {doors: 2}, 3: {}}")
    assert read(f"--config={path}", groups=(Nested,)) == {"rooms": {"hall": {"doors": 2}, "3": {}}}
    assert read("--rooms", "{hall: {doors: 2}}", groups=(Nested,)) == {"rooms": {"hall": {"doors": 2}}}
    for text, message in (
        ("{hall: two}", "rooms[hall] is 'two'; it must be a mapping"),
        ("{hall: {doors: two}}", "rooms[hall][doors] is 'two'; it must be a whole number"),
    ):
        with pytest.raises(SystemExit):
            read("--rooms", text, groups=(Nested,))
        assert message in capsys.readouterr().err


def test_a_percent_sign_in_a_help_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Shares:
        """Shares."""

        share: float = option(0.1, "drop 10 % of them")

    with pytest.raises(SystemExit):
        parse(["--help"], Shares, prog="x", description="")
    assert "drop 10 % of them [0.1]" in capsys.readouterr().out
