"""Tables, as aligned text for a terminal or as Markdown, and the tables of ranking metrics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

__all__ = [
    "Table",
    "TableCell",
    "TableRow",
    "escape_line_start",
    "escape_markdown",
    "format_table",
    "markdown_table",
    "render_table",
    "results_table",
]

_FIRST = ("R@5", "R@10", "N@5", "N@10")
_DECIMALS = {"entropy": 3, "num_users": 0}
_LEGEND = "* the best of a column"


@dataclass(frozen=True)
class TableCell:
    """A cell: plain text, emphasised if ``strong``."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: what it shows; may be empty.
        header: one text per column.
        rows: the cells.
        notes: (term, text) printed under it in a document: the rules of its numbers.
        align: one letter per column, "l" (left) or "r" (right); empty: all but the first right.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    notes: Sequence[tuple[str, str]] = ()
    align: str = ""

    @property
    def columns(self) -> str:
        """``align``, one letter per column."""
        return self.align or "l" + "r" * (len(self.header) - 1)


class Measured(Protocol):
    """The interface of a row's source, such as a :class:`gflowgr.evaluation.Evaluation`."""

    @property
    def name(self) -> str:
        """The method."""

    @property
    def metrics(self) -> dict[str, float]:
        """Metric to value."""

    @property
    def rules(self) -> object:
        """How it was measured; two can only be averaged under equal rules."""


@dataclass(frozen=True)
class TableRow:
    """One method.

    Attributes:
        name: the method.
        metrics: metric to value (the mean, where there are several seeds).
        spread: metric to sample standard deviation over seeds; empty for one run.
        note: shown in a last column, such as a source or the seeds.
    """

    name: str
    metrics: dict[str, float]
    spread: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def of(cls, *evaluations: Measured, name: str = "", note: str = "") -> TableRow:
        """The row of one evaluation, or the mean and spread of several (one per seed).

        Raises:
            ValueError: none given, or evaluations under different rules.
        """
        if not evaluations:
            raise ValueError("evaluations must not be empty")
        if any(other.rules != evaluations[0].rules for other in evaluations):
            raise ValueError("evaluations were made under different rules; they have no mean")
        keys = list(evaluations[0].metrics)
        values = np.array([[e.metrics[key] for key in keys] for e in evaluations])
        spread = {}
        if len(evaluations) > 1:
            spread = dict(zip(keys, values.std(0, ddof=1).tolist(), strict=True))
        means = dict(zip(keys, values.mean(0).tolist(), strict=True))
        return cls(name or evaluations[0].name, means, spread, note)


def format_table(
    rows: Sequence[TableRow], *, columns: Sequence[str] | None = None, style: str = "text"
) -> str:
    """Rows of results, one method each.

    Args:
        rows: the methods, in the order shown.
        columns: metrics to show; by default all, without the number of users (a rule).
        style: "text" (aligned for a terminal; the best of a column is marked \\*, as a last line
            says) or "markdown" (the best is bold). A metric that a row does not have is "-".

    Raises:
        ValueError: unknown style, or no rows.
    """
    table = results_table(rows, columns=columns)
    text = render_table(table, style)
    marked = any(cell.strong for row in table.rows for cell in row)
    return f"{text}\n{_LEGEND}" if marked and style == "text" else text


def results_table(rows: Sequence[TableRow], *, columns: Sequence[str] | None = None) -> Table:
    """The table that :func:`format_table` shows, for a document.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows must not be empty")
    shown = _metric_columns(rows) if columns is None else list(columns)
    best = {key: _best(rows, key) for key in shown}
    header, align = ["method", *shown], "l" + "r" * len(shown)
    cells = []
    for row in rows:
        texts = {key: _number(row, key) for key in shown}
        numbers = [TableCell(t, t == best[key] and len(rows) > 1) for key, t in texts.items()]
        cells.append([TableCell(row.name), *numbers])
    if any(row.note for row in rows):
        header.append("note")
        align += "l"
        for line, row in zip(cells, rows, strict=True):
            line.append(TableCell(row.note))
    return Table("", header, cells, align=align)


def render_table(table: Table, style: str) -> str:
    """The header and rows of a table.

    Args:
        table: the table; its title and notes are not shown.
        style: "text" (aligned for a terminal; strong cells end with \\*) or "markdown" (bold).

    Raises:
        ValueError: unknown style.
    """
    if style not in ("text", "markdown"):
        raise ValueError(f"style must be 'text' or 'markdown'; got {style!r}")
    if style == "markdown":
        lines = [[escape_markdown(text) for text in table.header]]
        for row in table.rows:
            texts = [(escape_markdown(cell.text), cell.strong) for cell in row]
            lines.append([f"**{text}**" if strong else text for text, strong in texts])
        return markdown_table(lines, table.columns)
    rows = [[cell.text + "*" * cell.strong for cell in row] for row in table.rows]
    return _aligned([list(table.header), *rows], table.columns)


def markdown_table(lines: Sequence[Sequence[str]], align: str) -> str:
    """Lines of a Markdown table: the only writer of ``| a | b |``.

    Args:
        lines: the header, then the rows, as Markdown; ``|`` is escaped here.
        align: one letter per column, "l" or "r".
    """
    written = [_markdown_row([text.replace("|", "\\|") for text in line]) for line in lines]
    written.insert(1, _markdown_row(["---:" if side == "r" else "---" for side in align]))
    return "\n".join(written)


def escape_markdown(text: str) -> str:
    """One line that Markdown shows as it is; an underscore within a word needs no escape."""
    marks = r"([\\*`\[\]~]|<(?=\S)|&(?=#?\w+;))"
    text = re.sub(marks, r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def escape_line_start(text: str) -> str:
    """A line whose beginning Markdown would take for a heading, a list, a rule or a quotation."""
    text = re.sub(r"^(\d{1,9})(?=[.)](?:\s|$))", r"\1\\", text)
    return re.sub(r"^(?=#{1,6}(?:\s|$)|[-+](?:\s|$)|>|=+$|-+$|~)", r"\\", text)


def _markdown_row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _metric_columns(rows: Sequence[TableRow]) -> list[str]:
    """All metrics of the rows, recall and NDCG first, without the number of users."""
    found = {key: None for row in rows for key in row.metrics if key != "num_users"}
    first = [key for key in _FIRST if key in found]
    return first + [key for key in found if key not in first]


def _number(row: TableRow, key: str) -> str:
    if key not in row.metrics:
        return "-"
    decimals = _DECIMALS.get(key, 4)
    text = f"{row.metrics[key]:.{decimals}f}"
    if key in row.spread:
        text += f" ± {row.spread[key]:.{decimals}f}"
    return text


def _best(rows: Sequence[TableRow], key: str) -> str:
    having = [row for row in rows if key in row.metrics]
    return _number(max(having, key=lambda row: row.metrics[key]), key) if having else ""


def _aligned(lines: list[list[str]], align: str) -> str:
    # The mark of the best value stands in a column of its own, so that the digits line up.
    padded = [
        [
            text + " " if side == "r" and not text.endswith("*") else text
            for text, side in zip(line, align, strict=True)
        ]
        for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    texts = []
    for line in padded:
        places = zip(line, widths, align, strict=True)
        cells = [t.rjust(width) if side == "r" else t.ljust(width) for t, width, side in places]
        texts.append("  ".join(cells).rstrip())
    texts.insert(1, "-" * max(map(len, texts)))
    return "\n".join(texts)
