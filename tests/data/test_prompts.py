"""Prompt lists and the rare word."""

from __future__ import annotations

import doctest
import hashlib
from pathlib import Path

import pytest

from delora_diffusion.data import prompts
from delora_diffusion.data.image_files import DataError
from delora_diffusion.data.prompts import (
    DREAMBENCH_CLASSES,
    DREAMBENCH_LIVE,
    DREAMBENCH_PROMPTS,
    has_token,
    read_prompts,
    without_token,
)


def test_dreambench_has_30_subjects_and_25_prompts_of_each_kind() -> None:
    assert len(DREAMBENCH_CLASSES) == 30
    assert sum(word in DREAMBENCH_LIVE for word in DREAMBENCH_CLASSES.values()) == 9
    for kind in ("object", "live"):
        filled = [template.format("sks dog") for template in DREAMBENCH_PROMPTS[kind]]
        assert len(set(filled)) == 25 and all("sks dog" in prompt for prompt in filled)
    assert len(set(DREAMBENCH_PROMPTS["object"]) & set(DREAMBENCH_PROMPTS["live"])) == 15


@pytest.mark.parametrize(("kind", "content"), [("object", "2c50c3d81ae2214a"), ("live", "ce2fc4b55cb3ef38")])
def test_the_prompts_are_those_of_the_published_file(kind: str, content: str) -> None:
    """`content` was computed from prompts_and_classes.txt itself, its prompts sorted, {0} {1} written as {}."""
    told = "\n".join(sorted(DREAMBENCH_PROMPTS[kind]))
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == content


@pytest.mark.parametrize(
    ("prompt", "token", "plain"),
    [
        ("a sks dog", "sks", "a dog"),
        ("Sks dog, sks", "sks", "dog,"),
        ("a photo of <v1> cat", "<v1>", "a photo of cat"),
        ("a skshund", "sks", "a skshund"),
        ("a photo of  a dog", "sks", "a photo of a dog"),
    ],
)
def test_the_rare_word_goes_and_nothing_else(prompt: str, token: str, plain: str) -> None:
    assert without_token(prompt, token) == plain
    assert has_token(prompt, token) == (plain.split() != prompt.split())


def test_the_example_is_true() -> None:
    assert doctest.testmod(prompts).failed == 0


# ---- lists ------------------------------------------------------------------------------------------


def test_a_line_ends_where_an_editor_ends_it(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(
        "a dog\u2028in snow\r\n# no\n\n a cat \x85and\x0ca hat\na dog\u2028in snow".encode()
    )
    assert read_prompts([], str(tmp_path / "p.txt"), option="x") == ["a dog\u2028in snow", "a cat \x85and\x0ca hat"]


def test_a_prompt_that_ends_as_a_file_is_one_unless_the_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my list.txt").write_text("a cat\n")
    sign = "a dog with a sign that says readme.txt"
    with caplog.at_level("INFO"):
        assert read_prompts([sign, "~/my list.txt", str(tmp_path / "my list.txt")], option="x") == [sign, "a cat"]
    assert "is taken for a prompt" in caplog.text
    for missing in ("list.txt", str(tmp_path / "none.txt")):
        with pytest.raises(DataError, match="cannot read x"):
            read_prompts([missing], option="x")
