"""Frozen dataclasses as options: one definition becomes command-line flags, YAML keys and a table of them.

A field is declared with `option(default, help)`; its name is the flag and the YAML key. Precedence: default, then the
YAML files given with `--config`, the later before the earlier, then the command line. Unknown keys and wrong types are
errors that say what to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import yaml

from .errors import DeloraError
from .yaml_text import as_text, from_yaml, to_yaml_text

#: Words for true and false; of YAML 1.1, which many people know, too.
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class OptionError(DeloraError):
    """An option that cannot be used; the message names it, says what was found and what to do."""


class Translation(Protocol):
    """Options by the names of other programs, and what becomes of them."""

    @property
    def names(self) -> Collection[str]:
        """The names that are taken besides our own."""

    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        """What was given in one place (a file, the command line), by our names; raises OptionError."""


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    within: str | None = None,
    path: bool = False,
    resume: Literal["same", "free"] = "same",
    figures: Literal["same", "free"] = "same",
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: a value, or a list or dict that is copied.
        within: the interval of numbers it may be, e.g. "[0, 1)"; see `option_checks.check_ranges`.
        path: whether it names a file or folder: ~ and environment variables stand for what they mean.
        resume: "free" where a run may be continued with another value: it does not change what a step computes, or
            what it stands for (base, photos) is compared by content.
        figures: "free" where figures measured with another value can be compared.
    """
    metadata = {
        "help": help, "choices": choices, "within": within, "path": path, "resume": resume, "figures": figures
    }  # fmt: skip
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(
    argv: Sequence[str], *groups: type, prog: str, description: str, translation: Translation | None = None
) -> list[Any]:
    """Read the command line (and the YAML files it names) into one instance of each dataclass in `groups`.

    Args:
        translation: of other programs' names, which are taken as well.

    Raises:
        SystemExit: after printing help, or one line about what is wrong (exit code 2, argparse's convention).
    """
    parser = _Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument(
        "--config",
        metavar="FILE",
        nargs="+",
        action="extend",
        help="YAML files of options; a later file overrides an earlier one, the command line all of them",
    )
    for group in groups:
        section = parser.add_argument_group((group.__doc__ or group.__name__).splitlines()[0].rstrip("."))
        for field in dataclasses.fields(group):
            _add_flag(section, group, field)
    for name in translation.names if translation else ():
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    if foreign := next((text for text in argv if not text.isascii() and _has_raw_bytes(text)), None):
        parser.error(
            f"{foreign!r} holds letters that {sys.getfilesystemencoding()}, the terminal's encoding, cannot tell; set "
            f"LANG=C.UTF-8 or PYTHONUTF8=1"
        )
    given = vars(parser.parse_args(list(argv)))
    try:
        paths = given.pop("config", [])
        fields = _fields(groups)
        given = translation(given) if translation else given
        given = {key: _coerce(*fields[key], _given(fields[key][1], value)) for key, value in given.items()}
        values: dict[str, Any] = {}
        for path in paths:
            values |= read_yaml(path, *groups, translation=translation)
        values |= given
        return [build(group, values) for group in groups]
    except ValueError as error:
        parser.error(str(error))


def read_yaml(path: str | Path, *groups: type, translation: Translation | None = None) -> dict[str, Any]:
    """The options in a YAML file, checked against `groups`.

    Raises:
        OptionError: no such file, not YAML, not a mapping, an unknown key (with the nearest known one), a wrong type.
    """
    try:
        values = from_yaml(Path(expanded(str(path), "config")).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OptionError(f"cannot read --config {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"cannot read --config {path}: {error}; save it as UTF-8 text") from error
    except yaml.YAMLError as error:
        raise OptionError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values or {}, dict):
        raise OptionError(f"{path} holds a {type(values).__name__}; it must be a list of `option: value` lines")
    fields, known = _fields(groups), dict.fromkeys(translation.names if translation else ())
    for key in values or {}:
        if key not in fields and key not in known:
            raise OptionError(f"{path}: unknown option {key!r}{_suggestion(as_text(key), fields)}")
    values = translation(values or {}) if translation else values or {}
    return {key: _coerce(*fields[key], value, source=f"{path}: ") for key, value in values.items()}


def build(group: type, values: dict[str, Any]) -> Any:
    """An instance of the dataclass `group` from those of `values` that are its fields, each checked."""
    chosen = {f.name: _coerce(group, f, values[f.name]) for f in dataclasses.fields(group) if f.name in values}
    return group(**chosen)


def to_yaml(*configs: Any) -> str:
    """Every option of the given instances as a YAML file that `parse` reads back to the same values."""
    parts = []
    for config in configs:
        title = (type(config).__doc__ or type(config).__name__).splitlines()[0].rstrip(".")
        parts.append(f"# {title}\n" + to_yaml_text(dataclasses.asdict(config)))
    return "\n".join(parts)


def to_table(*groups: type) -> str:
    """A Markdown table of all options."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for group in groups:
        for field in dataclasses.fields(group):
            default = default_of(field)
            value = to_yaml_text(default, flow=True).splitlines()[0]
            shown = "" if default in (None, "", [], {}) else f"`{value}`"
            meaning = _meaning(field).replace("|", r"\|")  # a bare | would end the cell
            lines.append(f"| `--{field.name}` | {shown} | {meaning} |")
    return "\n".join(lines)


def options_with(*groups: type, **properties: str) -> set[str]:
    """Names of the options that were declared with these properties, e.g. `resume="free"`."""
    fields = [field for group in groups for field in dataclasses.fields(group)]
    return {f.name for f in fields if all(f.metadata[name] == value for name, value in properties.items())}


def _fields(groups: Sequence[type]) -> dict[str, tuple[type, dataclasses.Field[Any]]]:
    return {field.name: (group, field) for group in groups for field in dataclasses.fields(group)}


class _Parser(argparse.ArgumentParser):
    """argparse, with a suggestion for an unknown flag."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            flags = {flag.lstrip("-"): None for flag in self._option_string_actions}
            hint = _suggestion(name.lstrip("-"), flags, "--") if name.startswith("-") else "; quote values with spaces"
            self.error(f"unknown option {name}{hint}")
        return known

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class _OneOrMore(argparse.Action):
    """One value stays a value, several become a list (`--target_modules all-linear`, `--target_modules to_q to_k`)."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def _has_raw_bytes(text: str) -> bool:
    """Whether Python could not decode a part of the command line, and kept its bytes as half of a pair."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else "; see --help for all options"


def default_of(field: dataclasses.Field[Any]) -> Any:
    """What an option is when it is not given."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _meaning(field: dataclasses.Field[Any]) -> str:
    choices = field.metadata["choices"]
    return str(field.metadata["help"]) + (f" ({', '.join(choices)})" if choices else "")


def _add_flag(section: argparse._ArgumentGroup, group: type, field: dataclasses.Field[Any]) -> None:
    kinds, is_list = _kinds(group, field)
    default = default_of(field)
    text = _meaning(field).replace("%", "%%") + ("" if default in (None, [], {}, "") else f" [{default}]")
    flag = f"--{field.name}"
    if bool in kinds:
        section.add_argument(flag, nargs="?", const=True, metavar="true|false", help=text)
        section.add_argument(f"--no-{field.name}", dest=field.name, action="store_false", help=argparse.SUPPRESS)
    elif is_list:
        action = _OneOrMore if _also_plain(group, field) else "store"
        section.add_argument(flag, nargs="+", action=action, metavar=field.name.upper(), help=text)
    else:
        section.add_argument(flag, metavar=field.name.upper(), help=text)


def _kinds(group: type, field: dataclasses.Field[Any]) -> tuple[set[type], bool]:
    """The plain types a field accepts (None left out), and whether it is a list of them."""
    hint = typing.get_type_hints(group)[field.name]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    lists = [o for o in options if typing.get_origin(o) is list]
    kinds = {k for o in lists for k in typing.get_args(o)} | {
        typing.get_origin(o) or o for o in options if o not in lists
    }
    return kinds - {type(None)}, bool(lists)


def _coerce(group: type, field: dataclasses.Field[Any], value: Any, source: str = "") -> Any:
    """`value` as the field's type, or an OptionError that says what was expected."""
    if value is None:
        return None if default_of(field) is None else default_of(field)
    kinds, is_list = _kinds(group, field)
    choices = field.metadata["choices"]
    if choices and isinstance(value, str) and value not in choices:  # AdamW is adamw
        value = next((choice for choice in choices if choice.lower() == value.lower()), value)
    parsed: Any
    if dict in kinds:
        parsed = _mapping(group, field, value, source)
    elif is_list and kinds <= {int, float}:
        parsed = [_scalar(kinds, item, field.name, source) for item in _numbers(value, field.name, source)]
    elif is_list and isinstance(value, (list, tuple)):
        parsed = [_scalar(kinds, item, field.name, source) for item in value]
    else:
        parsed = _scalar(kinds, value, field.name, source)
        parsed = [parsed] if is_list and not _also_plain(group, field) else parsed
    if field.metadata["path"]:
        full = [expanded(item, field.name, source) for item in (parsed if isinstance(parsed, list) else [parsed])]
        return full if isinstance(parsed, list) else full[0]
    for item in parsed if isinstance(parsed, list) else [parsed]:
        if choices and item not in choices:
            hint = _suggestion(str(item), choices) if isinstance(item, str) else ""
            raise OptionError(
                f"{source}{field.name} is {item!r}; choose one of {', '.join(choices)}{hint.split('; see')[0]}"
            )
    return parsed


def _also_plain(group: type, field: dataclasses.Field[Any]) -> bool:
    """Whether the field takes a single value as well as a list (`str | list[str]`)."""
    hint = typing.get_type_hints(group)[field.name]
    return isinstance(hint, types.UnionType) and str in typing.get_args(hint)


def _mapping(group: type, field: dataclasses.Field[Any], value: Any, source: str) -> dict[str, Any]:
    """A `dict[str, ...]` from a mapping, or from text in YAML as the command line gives it."""
    return _mapped(typing.get_args(typing.get_type_hints(group)[field.name])[1], value, field.name, source)


def _mapped(kind: Any, value: Any, name: str, source: str) -> dict[str, Any]:
    """The same for one level of it; `kind` is the type of its values, which may be a mapping again."""
    try:
        parsed = from_yaml(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        parsed = None
    if not isinstance(parsed, dict):
        raise OptionError(f"{source}{name} is {value!r}; it must be a mapping {{name: value}}")
    if typing.get_origin(kind) is dict:
        inner = typing.get_args(kind)[1]
        return {as_text(key): _mapped(inner, item, f"{name}[{key}]", source) for key, item in parsed.items()}
    return {as_text(key): _scalar({kind}, item, f"{name}[{key}]", source) for key, item in parsed.items()}


def _numbers(value: Any, name: str, source: str) -> list[Any]:
    """The items of a list of numbers, which may be written with commas and with a range: `0,0.25,...,1.5`.

    A range goes on in the step between the two numbers before `...`, to the number after it, which it must reach.
    """
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    items: list[Any] = []
    for item in given:
        items += [part.strip() for part in item.split(",") if part.strip()] if isinstance(item, str) else [item]
    while "..." in items:
        place = items.index("...")
        try:
            first, second, last = (Decimal(str(items[i])) for i in (place - 2, place - 1, place + 1))
            count = (last - second) / (second - first)
            whole = place >= 2 and 1 <= count <= 10_000 and count == int(count)
        except (IndexError, ArithmeticError):  # no number, or a step of 0
            whole = False
        if not whole:
            shown = ",".join(map(str, items))
            raise OptionError(
                f"{source}{name} is {shown}; a range is written first,second,...,last, a whole number of steps long, "
                f"such as 0,0.25,...,1.5"
            )
        items[place : place + 1] = [str(second + (second - first) * step) for step in range(1, int(count))]
    return items


def _scalar(kinds: set[type], value: Any, name: str, source: str) -> Any:
    if bool in kinds:
        if isinstance(value, bool):
            return value
        if str(value).lower() in _TRUTH:
            return _TRUTH[str(value).lower()]
    elif int in kinds or float in kinds:
        for kind in (int, float):
            if kind in kinds and not isinstance(value, bool):
                try:
                    parsed = kind(value)
                except (TypeError, ValueError, OverflowError):
                    continue
                if math.isfinite(parsed) and (kind is float or not isinstance(value, float) or parsed == value):
                    return parsed
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return as_text(value)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    expected = " or ".join(sorted(words[kind] for kind in kinds))
    raise OptionError(f"{source}{name} is {value!r}; it must be {expected}")


def expanded(path: str, name: str, source: str = "") -> str:
    """A path with ~ and environment variables filled in, unless there is a file or folder of the name as it stands.

    Raises:
        OptionError: no such user or variable; the message names the option `name`.
    """
    if not path.startswith("~") and os.path.lexists(path):
        return path
    full = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$(\w+|\{\w+\})", full)
    if unset or full.startswith("~"):
        missing = f"environment variable {unset[1].strip('{}')}" if unset else f"user {full.partition('/')[0][1:]}"
        raise OptionError(f"{source}{name} is {path!r}, and there is no {missing}; write the path out")
    return full


def _given(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value of the command line, where None, as Python writes it, stands for nothing as it does in YAML."""
    return None if value == "None" and default_of(field) is None else value
