"""Intervals of numbers, written as in mathematics: "[0, 1)" is at least 0 and below 1, "(0, inf)" is positive."""

from __future__ import annotations

import math
import re

_FORM = re.compile(r"([\[(])(\S+), (\S+)([\])])")


def contains(interval: str, value: float) -> bool:
    """Whether a number is in an interval; what is no number is in none."""
    opening, low, high, closing = _parts(interval)
    return (value > low or (opening == "[" and value == low)) and (value < high or (closing == "]" and value == high))


def in_words(interval: str) -> str:
    """What a number must be to be in an interval: "at least 0 and below 1"."""
    opening, low, high, closing = _parts(interval)
    words = [f"at least {low}" if opening == "[" else "positive" if low == 0 else f"above {low}"]
    words += [f"at most {high}" if closing == "]" else f"below {high}"]
    return " and ".join(word for word in words if not word.endswith("inf"))


def _parts(interval: str) -> tuple[str, float, float, str]:
    opening, low, high, closing = _FORM.fullmatch(interval).groups()  # type: ignore[union-attr]
    return opening, _number(low), _number(high), closing


def _number(text: str) -> float:
    """Whole numbers stay whole: seeds go beyond what a float holds."""
    return int(text) if text.lstrip("-").isdigit() else math.inf if text == "inf" else float(text)
