"""Tables of results, as aligned text for a terminal or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

_FIRST = ("R@5", "R@10", "N@5", "N@10")
_DECIMALS = {"entropy": 3, "num_users": 0}


class Measured(Protocol):
    """What a row is made of, such as a :class:`gflowgr.evaluation.Evaluation`."""

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
        style: "text" (aligned for a terminal; the best of a column is marked \\*) or "markdown"
            (the best is bold). A metric that a row does not have is shown as "-".

    Raises:
        ValueError: unknown style, or no rows.
    """
    if style not in ("text", "markdown"):
        raise ValueError(f"style must be 'text' or 'markdown', got {style!r}")
    if not rows:
        raise ValueError("rows must not be empty")
    shown = metric_columns(rows) if columns is None else list(columns)
    best = {key: _best(rows, key) for key in shown}
    cells = [["method", *shown]]
    for row in rows:
        line = [row.name]
        for key in shown:
            text = _number(row, key)
            if text == best[key] and len(rows) > 1:
                text = f"**{text}**" if style == "markdown" else f"{text}*"
            line.append(text)
        cells.append(line)
    if any(row.note for row in rows):
        for line, note in zip(cells, ["note", *(row.note for row in rows)], strict=True):
            line.append(note)
    return align_table(cells, len(shown), style=style)


def align_table(cells: list[list[str]], numeric: int, *, style: str = "text") -> str:
    """Lay out a table of texts.

    Args:
        cells: the header, then one list per row.
        numeric: how many columns after the first are aligned to the right.
        style: "text" or "markdown", as in :func:`format_table`.
    """
    return _markdown(cells, numeric) if style == "markdown" else _text(cells, numeric)


def escape_line_start(text: str) -> str:
    """A line whose beginning Markdown would take for a heading, a list, a rule or a quotation."""
    text = re.sub(r"^(\d{1,9})(?=[.)](?:\s|$))", r"\1\\", text)
    return re.sub(r"^(?=#{1,6}(?:\s|$)|[-+](?:\s|$)|>|=+$|-+$|~)", r"\\", text)


def metric_columns(rows: Sequence[TableRow]) -> list[str]:
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


def _text(cells: list[list[str]], numeric: int) -> str:
    # The mark of the best value stands in a column of its own, so that the digits line up.
    padded = [
        [
            text if not 1 <= place <= numeric or text.endswith("*") else text + " "
            for place, text in enumerate(line)
        ]
        for line in cells
    ]
    widths = [max(len(line[place]) for line in padded) for place in range(len(padded[0]))]
    lines = []
    for line in padded:
        aligned = [
            text.rjust(width) if 1 <= place <= numeric else text.ljust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def _markdown(cells: list[list[str]], numeric: int) -> str:
    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    rule = ["---:" if 1 <= place <= numeric else "---" for place in range(len(cells[0]))]
    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])
