"""Refusals that options share: a value out of its range, one that does nothing, one that is given twice."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from .interval import contains, in_words
from .options import OptionError, default_of


def check_ranges(config: object) -> None:
    """Refuse options outside of the interval they were declared with; None passes, of lists and mappings each item.

    Raises:
        OptionError: the first such option.
    """
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        within: str = field.metadata.get("within") or ""
        for name, number in _numbers(field.name, getattr(config, field.name)) if within else ():
            if number is not None and not contains(within, number):
                raise OptionError(f"{name} is {number}; it must be {in_words(within)}")


def unused(config: object, beside: str, *names: str, at: Any = None) -> list[str]:
    """Options that were given, that is, are not their default, and do nothing beside another as that is: what to say.

    Args:
        beside: the option that they act with.
        at: the value of it that they act with; None: any but false, nothing and empty.
    """
    found = getattr(config, beside)
    if found == at if at is not None else found:
        return []
    fields = [field for field in dataclasses.fields(config) if field.name in names]  # type: ignore[arg-type]
    given = {f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != default_of(f)}
    if at is None:
        return [f"{name} does nothing without {beside}; add it, or leave this out" for name in given]
    return [
        f"{name} {value} does nothing with {beside} {found}; give {beside} {at}, or leave it out"
        for name, value in given.items()
    ]


def refuse_unused(config: object, beside: str, *names: str, at: Any = None) -> None:
    """Refuse options that do nothing, see `unused`.

    Raises:
        OptionError: the first of `names` that was given.
    """
    for message in unused(config, beside, *names, at=at):
        raise OptionError(message)


def refuse_repeats(config: object, *names: str) -> None:
    """Refuse lists that hold something twice.

    Raises:
        OptionError: the first of `names` that does.
    """
    for name in names:
        values = getattr(config, name)
        if again := [value for place, value in enumerate(values) if value in values[:place]]:
            raise OptionError(f"{name} has {again[0]} twice; give it once")


def refuse_same_folder(folders: Mapping[str, str | None]) -> None:
    """Refuse folders that must differ and do not, also through links and relative paths.

    Args:
        folders: option -> its folder; None passes.

    Raises:
        OptionError: the first two that are one.
    """
    seen: dict[str, str] = {}
    for name, folder in folders.items():
        if folder and (other := seen.setdefault(os.path.realpath(folder), name)) != name:
            raise OptionError(f"{name} and {other} are the same folder, {folder}; give each its own")


def _numbers(name: str, value: Any) -> list[tuple[str, Any]]:
    """The numbers in an option, each with what it is called."""
    if isinstance(value, dict):
        return [(f"{name}[{key}]", item) for key, item in value.items()]
    return [(name, item) for item in (value if isinstance(value, list) else [value])]
