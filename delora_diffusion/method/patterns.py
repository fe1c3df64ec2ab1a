"""Regular expressions that come with a file, matched in bounded time.

Python's `re` tries one way after another, and some expressions have more ways than there is time. So the ways are
counted first, and where they may be many all are followed at once: a set of places in the text is one whole number, a
bit for each place, and every part of an expression takes the places where it may begin to those where it may end.
"""

from __future__ import annotations

import functools
import importlib
import operator
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ..errors import DeloraError

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_MANY_WAYS = 25_000  # one after another: a few milliseconds
_LONGEST, _LONGEST_BRANCHING = 200_000, 2_000  # characters: a name for each layer of the largest models, and by hand
_ROUNDS = 500  # of repeats that have no shortcut, in one name; what people write takes a few dozen
_LONG_REPEAT = 100  # about the length of a layer's name: no repeat ends at more places


class PatternError(DeloraError):
    """A regular expression that is none, or that cannot be matched in bounded time."""


class Matcher(Protocol):
    """What `compiled` gives: a `re.Pattern`, or something that answers as one."""

    def fullmatch(self, string: str, pos: int = 0, endpos: int = sys.maxsize) -> object:
        """Whether string[pos:endpos] matches as a whole; not None or False if so."""


@functools.lru_cache(maxsize=10_000)
def compiled(pattern: str) -> Matcher:
    """A matcher that takes no longer than names of layers are worth.

    Raises:
        PatternError: no regular expression, or one of many ways that also refers back, is atomic or has flags.
    """
    if not isinstance(pattern, str) or len(pattern) > _LONGEST:
        raise PatternError(f"{str(pattern)[:60]!r} is no text of up to {_LONGEST:,} characters")
    try:
        plain = re.compile(pattern)
        if not re.search(r"[*+?{(]", pattern):  # plain names, of which there can be thousands
            return plain
        tree = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"{_short(pattern)} is not a regular expression: {error}") from error
    if _ways(tree) <= _MANY_WAYS:
        return plain
    if tree.state.flags & ~int(re.UNICODE) or len(pattern) > _LONGEST_BRANCHING:
        raise PatternError(f"{_short(pattern)} can match in very many ways; write it shorter, and without flags")
    return _AllWays(pattern, _sequence(tree, pattern))


def starts_of(name: str) -> list[int]:
    """Where the parts of a dotted name start."""
    return [0, *(found.end() for found in re.finditer(r"\.", name))]


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else f"{pattern[:77]}...")


def _ways(tree: Iterable[tuple[Any, Any]]) -> float:
    """How many ways there are at most to match a text, before the next is tried: infinity for repeats in repeats."""
    total = 1.0
    for kind, argument in tree:
        name = str(kind)
        if name == "BRANCH":
            total *= sum(_ways(branch) for branch in argument[1])
        elif name.endswith("REPEAT"):
            least, most, inner = argument
            ways = _ways(inner)
            counts = min(int(most), least + _LONG_REPEAT) - least + 1
            total *= counts if ways == 1 else ways + counts - 1 if int(most) == 1 else float("inf")
        elif name == "GROUPREF_EXISTS":
            total *= _ways(argument[1]) + _ways(argument[2] or ())
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            total *= _ways(argument[-1])
        elif name == "ATOMIC_GROUP":
            total *= _ways(argument)
    return total


# ---- all ways at once ----------------------------------------------------------------------------


class _Text:
    """A text, and at which of its places something is: bit i stands for the place before character i."""

    def __init__(self, text: str) -> None:
        self.text, self.rounds = text, 0
        self.places = (1 << len(text) + 1) - 1
        self._of: dict[str, int] = {}
        self._where: dict[Callable[[str], bool], int] = {}
        for place, character in enumerate(text):
            self._of[character] = self._of.get(character, 0) | 1 << place

    def where(self, accepts: Callable[[str], bool]) -> int:
        """The places in front of characters that are accepted."""
        if accepts not in self._where:
            self._where[accepts] = sum(at for character, at in self._of.items() if accepts(character))
        return self._where[accepts]


_Part = Callable[[int, _Text], int]


class _AllWays:
    def __init__(self, pattern: str, part: _Part) -> None:
        self.pattern, self.part = pattern, part

    def fullmatch(self, string: str, pos: int = 0, endpos: int = sys.maxsize) -> bool:
        text = _Text(string[:endpos])
        try:
            return bool(self.part(1 << pos, text) >> len(text.text) & 1)
        except OverflowError as error:
            raise PatternError(f"{_short(self.pattern)} takes too long on {string!r}; write it simpler") from error


def _sequence(tree: Iterable[tuple[Any, Any]], pattern: str) -> _Part:
    parts = [_part(str(kind), argument, pattern) for kind, argument in tree]
    return lambda at, text: functools.reduce(lambda places, part: part(places, text) if places else 0, parts, at)


def _part(name: str, argument: Any, pattern: str) -> _Part:
    if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        accepts = _accepting(name, argument)
        return lambda at, text: (at & text.where(accepts)) << 1
    if name == "AT":
        edge = re.compile(_EDGES[str(argument)])
        return lambda at, text: at & sum(1 << found.start() for found in edge.finditer(text.text))
    if name == "BRANCH":
        branches = [_sequence(branch, pattern) for branch in argument[1]]
        return lambda at, text: functools.reduce(operator.or_, (branch(at, text) for branch in branches))
    if name == "SUBPATTERN" and not (argument[1] or argument[2]):
        return _sequence(argument[-1], pattern)
    if name in ("MAX_REPEAT", "MIN_REPEAT"):
        return _repeat(int(argument[0]), int(argument[1]), list(argument[2]), pattern)
    if name in ("ASSERT", "ASSERT_NOT"):
        return _looking(argument[0] > 0, _sequence(argument[1], pattern), wanted=name == "ASSERT")
    raise PatternError(f"{_short(pattern)} can match in very many ways; write it without {name.lower()}")


def _repeat(least: int, most: int, tree: list[tuple[Any, Any]], pattern: str) -> _Part:
    inner = _sequence(tree, pattern)
    kind = str(tree[0][0]) if len(tree) == 1 else ""
    accepts = _accepting(kind, tree[0][1]) if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN") else None

    def run(at: int, text: _Text) -> int:
        for _ in range(least):
            before, at = at, _round(inner, at, text)
            if at == before:  # as it will be however often
                break
        if accepts is not None and most >= len(text.text):
            run_of = text.where(accepts)  # a carry runs through characters that are all accepted
            return at | ((at & run_of) + run_of ^ run_of)
        found = new = at
        for _ in range(most - least):
            new = _round(inner, new, text) & ~found
            if not new:
                break
            found |= new
        return found

    return run


def _round(inner: _Part, at: int, text: _Text) -> int:
    text.rounds += 1
    if text.rounds > _ROUNDS:
        raise OverflowError
    return inner(at, text)


def _looking(ahead: bool, inner: _Part, *, wanted: bool) -> _Part:
    """(?=...), (?!...), (?<=...) and (?<!...): the places that stay."""

    def run(at: int, text: _Text) -> int:
        if ahead:
            found = sum(1 << i for i in range(len(text.text) + 1) if at >> i & 1 and inner(1 << i, text))
        else:
            found = inner(text.places, text)
        return at & found if wanted else at & ~found

    return run


_EDGES = {
    "AT_BEGINNING": "^", "AT_BEGINNING_STRING": r"\A", "AT_END": "$", "AT_END_STRING": r"\Z",
    "AT_BOUNDARY": r"\b", "AT_NON_BOUNDARY": r"\B",
}  # fmt: skip
_CATEGORIES = {f"CATEGORY_{name}": letter for name, letter in (("DIGIT", "d"), ("SPACE", "s"), ("WORD", "w"))}
_CATEGORIES |= {f"CATEGORY_NOT_{name[9:]}": letter.upper() for name, letter in _CATEGORIES.items()}


def _accepting(name: str, argument: Any) -> Callable[[str], bool]:
    """Whether one part of an expression accepts a character; remembered for each."""

    def accepts(character: str) -> bool:
        if name == "ANY":
            return character != "\n"
        if name != "IN":
            return (ord(character) == argument) is (name == "LITERAL")
        fits, negated = False, False
        for kind, value in argument:
            if str(kind) == "NEGATE":
                negated = True
            elif str(kind) == "CATEGORY":
                fits |= re.match("\\" + _CATEGORIES[str(value)], character) is not None
            else:
                low, high = value if str(kind) == "RANGE" else (value, value)
                fits |= low <= ord(character) <= high
        return fits is not negated

    return functools.cache(accepts)
