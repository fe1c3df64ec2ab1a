"""Patterns from files: the same answers as Python's `re`, in bounded time whatever they are."""

from __future__ import annotations

import random
import re

import pytest

from delora_diffusion import DeloraConfig, DeloraConfigError
from delora_diffusion.method import patterns
from delora_diffusion.method.config import ATTENTION, ATTENTION_FF
from delora_diffusion.method.patterns import PatternError, compiled

ATOMS = ["a", "b", ".", r"\.", r"\d", r"\W", r"\S", "[ab]", "[^a]", "[a-c1]", r"[^\w]", "1", "^", "$", r"\b", r"\B"]
ATOMS += [r"\A", r"\Z"]
REPEATS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}", "{2,}"]
AROUND = ["(?={})", "(?!{})", "(?<=a)", "(?<!b)", "(?<=a.)"]


def expression(source: random.Random, depth: int = 0) -> str:
    """A random regular expression of a few parts."""

    def part() -> str:
        kind = 0.0 if depth > 3 else source.random()
        if kind < 0.45:
            return source.choice(ATOMS)
        inner = expression(source, depth + 1)
        if kind < 0.6:
            return f"(?:{inner}|{expression(source, depth + 1)})"
        if kind < 0.85:
            return source.choice(["a", "b", ".", f"({inner})", f"(?:{inner})"]) + source.choice(REPEATS)
        return source.choice(AROUND).format(inner)

    return "".join(part() for _ in range(source.randint(1, 3)))


def test_all_ways_at_once_give_what_re_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_MANY_WAYS", -1)  # nothing goes to re
    compiled.cache_clear()
    source, compared, matching = random.Random(0), 0, 0
    while compared < 4000:
        pattern = expression(source)
        try:
            oracle, ours = re.compile(pattern), compiled(pattern)
        except re.error:  # such as a repeated anchor
            continue
        for _ in range(4):
            text = "".join(source.choice("ab.1") for _ in range(source.randint(0, 7)))
            start = source.randint(0, len(text))
            for span in ((), (start,), (start, source.randint(start, len(text)))):
                expected = oracle.fullmatch(text, *span) is not None
                assert bool(ours.fullmatch(text, *span)) is expected, (pattern, text, span)
                compared, matching = compared + 1, matching + expected
    compiled.cache_clear()
    assert matching > 300


NAME = "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_q"


@pytest.mark.parametrize(
    "pattern, text, matches",
    [
        ("(a+)+$", "a" * 60 + "b", False),
        ("(a|a)*b", "a" * 60, False),
        ("(.*)*x", NAME, False),
        ("(.*a){20}", "a" * 60, True),
        ("(x+x+)+y", "x" * 60, False),
        (".*.*.*.*.*.*.*.*.*x", NAME, False),
        ("a?" * 40 + "a" * 40, "a" * 40, True),
        ("(a|b|ab)*c", "ab" * 40, False),
        (r"((\w+\.)+)+to_q", NAME, True),
        ("(" * 9 + "a" + "*)" * 9 + "*b", "a" * 60, False),
        ("(a{0,60000}){60000}", "a" * 60, True),
        ("(?=(.*)*x).*", NAME, False),
        (r"(?!.*ff).*\.(attn\d\.)*(.*)*to_[qkv]", NAME, True),
    ],
)
def test_patterns_that_re_would_not_end_with(pattern: str, text: str, matches: bool) -> None:
    assert bool(compiled(pattern).fullmatch(text)) is matches


def test_usual_patterns_are_left_to_re() -> None:
    usual = [ATTENTION, ATTENTION_FF, r".*attn\d\.to_(q|k)", "|".join(re.escape(f"{NAME}{n}") for n in range(100))]
    assert [isinstance(compiled(pattern), re.Pattern) for pattern in usual] == [True] * 4


@pytest.mark.parametrize(
    "pattern, said",
    [
        ("(", "is not a regular expression"),
        ("(" * 3000, "is not a regular expression"),
        ("a{99999999999999999999}", "is not a regular expression"),
        ("a" * 300_000, "no text of up to 200,000 characters"),
        (r"(.*)(.*)(.*)\1", "can match in very many ways; write it without groupref"),
        ("(?i)(.*)*x", "can match in very many ways; write it shorter, and without flags"),
        ("(a*)*" * 500, "can match in very many ways; write it shorter"),
    ],
    ids=["open", "deep", "large count", "long", "referring back", "flags", "long and branching"],
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save"])
def test_what_is_no_pattern_is_refused_by_every_field(pattern: str, said: str, field: str) -> None:
    values = {"rank_pattern": {pattern: 2}, "modules_to_save": [pattern]}
    with pytest.raises(DeloraConfigError, match=re.escape(said)) as refused:
        DeloraConfig(**{field: values.get(field, pattern)})  # type: ignore[arg-type]
    assert len(str(refused.value)) < 300


def test_a_pattern_that_only_shows_its_length_on_a_name_is_stopped() -> None:
    with pytest.raises(PatternError, match=r"takes too long on .*; write it simpler"):
        compiled("((a|bc)*.?)*x").fullmatch("ab" * 200)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"rank_pattern": [1]}, "rank_pattern is [1]; it must be {name: number}"),
        ({"lambda_pattern": {"a": True}}, "lambda of 'a' is True"),
        ({"delora_lambda": 10**400}, "lambda of 'delora_lambda' is a number of hundreds of digits"),
        ({"module_dropout": 10**400}, "module_dropout is a number of hundreds of digits"),
        ({"delora_lambda": float("nan")}, "lambda of 'delora_lambda' is nan"),
        ({"target_modules": [1]}, "target_modules is [1]; it must be a list of names"),
        ({"target_modules": {"a": 1}}, "target_modules is {'a': 1}; it must be a list of names"),
        ({"exclude_modules": 3}, "exclude_modules is 3"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head'; it must be a list of names"),
        ({"modules_to_save": [["a"]]}, "modules_to_save is [['a']]"),
        ({"target_modules": ["a"], "layers_to_transform": ["1"]}, "layers_to_transform is ['1']"),
        ({"target_modules": ["a"], "layers_to_transform": 1, "layers_pattern": [2]}, "layers_pattern is [2]"),
        ({"bias": ["all"]}, "bias is ['all']"),
        ({"init_weights": {}}, "init_weights is {}"),
    ],
    ids=str,
)
def test_values_of_another_kind_are_refused_by_name(fields: dict[str, object], said: str) -> None:
    with pytest.raises(DeloraConfigError, match=re.escape(said)):
        DeloraConfig(**fields)  # type: ignore[arg-type]
