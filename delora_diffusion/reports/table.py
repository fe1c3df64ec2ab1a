"""Figures with their intervals as a table: Markdown, CSV and JSON, the protocol beside the numbers."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..atomic import complete_file


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Something that is measured on images, and how it is told. All there are: `evaluation.scores.METRICS`.

    Attributes:
        name: in logs, tables and files.
        title: in what people read.
        meaning: what a reader is told of it below a table.
        panel: where the plot of a run shows it; None for what previews are not measured by.
        brief: whether it is shown where there is room for a few.
        higher_is_better: or lower.
        scores: a score for each image or prompt from what was seen, and what they are of; None if that does not do.
    """

    name: str
    title: str
    meaning: str
    scores: Callable[[Any], Any]
    panel: str | None = None
    brief: bool = True
    higher_is_better: bool = True

    @property
    def in_a_row(self) -> str:
        """The title in a list that commas part."""
        return self.title.replace(",", "")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A mean, its 95 % interval, and how many scores it is the mean of."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: what was measured, at which adapter strength, on how many images."""

    name: str
    strength: float | None
    images: int
    figures: dict[str, Figure]


def markdown(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    """A Markdown table; columns without any figure are left out."""
    columns = _measured(metrics, [row.figures for row in rows])
    lines = [
        "| | strength | images | " + " | ".join(column.title for column in columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for row in rows:
        cells = [row.name.replace("|", r"\|"), "" if row.strength is None else f"{row.strength:g}", str(row.images)]
        lines.append("| " + " | ".join([*cells, *(_cell(row.figures.get(column.name)) for column in columns)]) + " |")
    return "\n".join(lines) + "\n"


def comma_separated(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    """CSV with four columns for each figure: value, low, high, count."""
    columns = [metric.name for metric in _measured(metrics, [row.figures for row in rows])]
    parts = ("value", "low", "high", "count")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = [column if part == "value" else f"{column}_{part}" for column in columns for part in parts]
    writer.writerow(["name", "strength", "images", *ends])
    for row in rows:
        figures = [row.figures.get(column) for column in columns]
        cells = [("" if figure is None else getattr(figure, part)) for figure in figures for part in parts]
        writer.writerow([row.name, "" if row.strength is None else row.strength, row.images, *cells])
    return text.getvalue()


def write_report(
    folder: Path, name: str, rows: Sequence[Row], protocol: Mapping[str, Any], metrics: Sequence[Metric]
) -> Path:
    """Write `folder`/`name`.json, .csv and .md; returns the last."""
    meanings = json.dumps({"protocol": protocol, "rows": [asdict(row) for row in rows]}, indent=2, ensure_ascii=False)
    pinned = "\n".join(f"* {line}" for line in protocol_lines(protocol))
    texts = {
        ".json": meanings + "\n",
        ".csv": comma_separated(rows, metrics),
        ".md": f"{markdown(rows, metrics)}\n{pinned}\n",
    }
    for suffix, text in texts.items():
        with complete_file(folder / f"{name}{suffix}") as aside:
            aside.write_text(text, encoding="utf-8")
    return folder / f"{name}.md"


def read_report(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows and protocol of a JSON file that `write_report` wrote."""
    meanings = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**row | {"figures": {k: Figure(**v) for k, v in row["figures"].items()}}) for row in meanings["rows"]]
    return rows, meanings["protocol"]


def mean_row(name: str, rows: Sequence[Row]) -> Row:
    """The mean over subjects, each counted once however many images it has.

    The interval is the normal one over subjects, 1.96 s / sqrt(n), where there are two or more; the count is n.
    """
    figures = {}
    for column in dict.fromkeys(name for row in rows for name in row.figures):
        values = [row.figures[column].value for row in rows if column in row.figures]
        mean = sum(values) / len(values)
        half = math.nan
        if len(values) > 1:
            half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
        figures[column] = Figure(value=mean, low=mean - half, high=mean + half, count=len(values))
    return Row(name=name, strength=rows[0].strength, images=sum(row.images for row in rows), figures=figures)


def protocol_lines(protocol: Mapping[str, Any]) -> list[str]:
    """The protocol as text, a line for each entry; long lists are counted, nested entries only named."""
    lines = []
    for name, value in protocol.items():
        if isinstance(value, Mapping) and all(isinstance(item, Mapping) for item in value.values()):
            shown = ", ".join(value)
        elif isinstance(value, Mapping):
            shown = ", ".join(f"{key} {_short(item)}" for key, item in value.items())
        else:
            shown = _short(value, between=", ")
        lines.append(f"{name}: {shown}")
    return lines


def _short(value: Any, *, between: str = " x ") -> str:
    if isinstance(value, (list, tuple)):
        return between.join(map(str, value)) if len(value) <= 3 else f"{len(value)} of them"
    return str(value)


def _measured(metrics: Sequence[Metric], figures: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """The metrics that there is any figure of."""
    return [metric for metric in metrics if any(metric.name in found for found in figures)]


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    value, low, high = (
        f"{number:.3f}".replace("-0.000", "0.000") for number in (figure.value, figure.low, figure.high)
    )
    return value if math.isnan(figure.low) else f"{value} [{low}, {high}]"


def figure_table(rows: Sequence[tuple[str, Mapping[str, float]]], metrics: Sequence[Metric], *, of: str) -> str:
    """A Markdown table of (what, its figures by name), and what they mean; `of` heads the first column; empty columns
    are left out."""
    columns = _measured(metrics, [figures for _, figures in rows])
    lines = [f"| {of} | " + " | ".join(column.title for column in columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for what, figures in rows:
        cells = [f"{figures[column.name]:.3f}" if column.name in figures else "" for column in columns]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    meanings = dict.fromkeys(column.meaning for column in columns)
    return "\n".join([*lines, "", "; ".join(meanings) + "."])
