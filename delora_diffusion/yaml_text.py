"""YAML as people mean it: the core schema of YAML 1.2, in which no, 2024_11_25 and 1:30 are texts and 0123 is 123.

Numbers remember how they were written, for options that are texts. A name that is given twice is an error, and None,
as Python writes it, is null.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

#: Plain scalars that are no texts, by tag (YAML 1.2.2, section 10.3.2), and the letters they can start with.
_CORE = (
    ("null", r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


class WrittenInt(int):
    """A whole number, and its text in the file."""

    text: str


class WrittenFloat(float):
    """A number, and its text in the file."""

    text: str


def as_text(value: Any) -> str:
    """A scalar as it was written, where that is known."""
    return str(getattr(value, "text", value))


def from_yaml(text: str) -> Any:
    """What a YAML document holds.

    Raises:
        yaml.YAMLError: it is none, gives a name twice, or is nested too deep.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deep") from error
    except (ValueError, LookupError, AttributeError) as error:  # a tag on what is not of its kind, a number too long
        raise yaml.YAMLError(f"it holds what cannot be read: {error}") from error


def to_yaml_text(values: Any, *, flow: bool = False) -> str:
    """Values as a YAML document that `from_yaml`, and readers of YAML 1.1, read back to the same.

    Args:
        flow: on one line, with brackets.
    """
    text: str = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=10_000
    )
    return text


class _Loader(yaml.SafeLoader):
    """The core schema, and no name twice."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  PyYAML's own way

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and not key.tag.endswith(":merge"):
                raise yaml.composer.ComposerError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes texts that either version of YAML would take for something else."""


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> WrittenInt:
    text = loader.construct_scalar(node)
    number = WrittenInt(text, 0 if text[:2] in ("0o", "0x") else 10)
    number.text = text
    return number


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> WrittenFloat:
    text = loader.construct_scalar(node)
    number = WrittenFloat(loader.construct_yaml_float(node))
    number.text = text
    return number


for _tag, _pattern, _first in _CORE:
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Dumper.add_representer(WrittenInt, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:int", value.text))
_Dumper.add_representer(
    WrittenFloat, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:float", value.text)
)
