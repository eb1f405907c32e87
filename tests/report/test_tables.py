"""Tables of results, for a terminal and as Markdown."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
from markdown_it import MarkdownIt

from gflowgr.report.tables import Table, TableCell, TableRow, format_table, render_table

ROWS = [
    TableRow("SFT", {"R@5": 0.0413, "N@10": 0.0343, "entropy": 7.2, "num_users": 10.0}),
    TableRow("GFlowGR-TB", {"R@5": 0.0433, "N@10": 0.0363, "num_users": 10.0}, {"R@5": 0.0011}),
]


def test_text_table_is_aligned_and_marks_the_best() -> None:
    lines = format_table(ROWS).splitlines()
    assert lines[0].split() == ["method", "R@5", "N@10", "entropy"]
    assert set(lines[1]) == {"-"}
    assert lines[2].split() == ["SFT", "0.0413", "0.0343", "7.200*"]
    assert lines[3].split() == ["GFlowGR-TB", "0.0433", "±", "0.0011*", "0.0363*", "-"]
    assert lines[2].index("0.0343") == lines[3].index("0.0363")
    assert lines[4:] == ["* the best of a column"]
    assert "*" not in format_table(ROWS[:1])


def test_markdown_table() -> None:
    rows = [*ROWS, TableRow("a|b", {"R@5": 0.1}, note="paper")]
    lines = format_table(rows, style="markdown").splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | --- |"
    assert lines[2] == "| SFT | 0.0413 | 0.0343 | **7.200** |  |"
    assert lines[4] == "| a\\|b | **0.1000** | - | - | paper |"
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in lines)


def test_table_errors() -> None:
    with pytest.raises(ValueError, match="style must be 'text' or 'markdown'; got 'html'"):
        format_table(ROWS, style="html")
    with pytest.raises(ValueError, match="rows must not be empty"):
        format_table([])


@dataclass(frozen=True)
class Result:
    """An evaluation, as far as a row needs it."""

    name: str
    metrics: dict[str, float]
    rules: str = "all users"


def test_row_of_several_seeds_has_mean_and_spread() -> None:
    values = [0.2, 0.3, 0.7]
    results = [Result("random", {"N@10": value, "R@10": 0.5}) for value in values]
    row = TableRow.of(*results, name="three seeds", note="published")
    assert row.name == "three seeds"
    assert row.metrics == {"N@10": pytest.approx(np.mean(values)), "R@10": 0.5}
    assert row.spread == {"N@10": pytest.approx(np.std(values, ddof=1)), "R@10": 0.0}
    assert TableRow.of(results[0]) == TableRow("random", results[0].metrics)
    with pytest.raises(ValueError, match="different rules"):
        TableRow.of(results[0], Result("random", results[1].metrics, "seen items masked"))
    with pytest.raises(ValueError, match="evaluations must not be empty"):
        TableRow.of()


@pytest.mark.parametrize(
    "text", ["a|b", "a\\|b", "**a**", "_a_", "~a~", "`|`", "<b>", "[a](b)", "\\"]
)
def test_a_cell_shows_its_text(text: str) -> None:
    table = Table("", [text, "x"], [[TableCell(text), TableCell(text, strong=True)]])
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(render_table(table, "markdown"))
    shown = [
        "".join(child.content for child in token.children or ())
        for token in tokens
        if token.type == "inline"
    ]
    assert shown == [text, "x", text, text]
