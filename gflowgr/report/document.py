"""What a report consists of, for its writers: sections of paragraphs, lists, tables and figures.

:func:`to_markdown` is one writer, :func:`gflowgr.report.html.to_html` the other. All texts
are plain; the writers escape what their format would interpret.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .tables import align_table, escape_line_start

__all__ = [
    "Block",
    "Bullets",
    "Cell",
    "Code",
    "Document",
    "Paragraph",
    "Picture",
    "Section",
    "Table",
    "to_markdown",
]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list; each entry is a (possibly empty) term in bold and a text."""

    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is, foldable under ``title`` where the format can."""

    title: str
    text: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: what it shows.
        header: one text per column; all columns but the first hold numbers.
        rows: the cells.
        notes: (term, text) printed under it: the rules of its numbers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG file, named relative to the report; ``alt`` says in words what it shows."""

    file: str
    title: str
    alt: str


Block = Paragraph | Bullets | Code | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading, what stands under it, and the sections below it."""

    title: str
    blocks: Sequence[Block] = ()
    sections: Sequence[Section] = ()


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    blocks: Sequence[Block] = ()
    sections: Sequence[Section] = field(default_factory=tuple)


def to_markdown(document: Document) -> str:
    """The document as Markdown (GitHub's dialect)."""
    parts = [f"# {_escape(document.title)}", *map(_block, document.blocks)]
    for section in document.sections:
        parts += _section(section, 2)
    return "\n\n".join(parts) + "\n"


def _section(section: Section, level: int) -> list[str]:
    parts = [f"{'#' * level} {_escape(section.title)}", *map(_block, section.blocks)]
    for below in section.sections:
        parts += _section(below, level + 1)
    return parts


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return escape_line_start(_escape(block.text))
    if isinstance(block, Bullets):
        return "\n".join("- " + escape_line_start(_termed(*entry)) for entry in block.entries)
    if isinstance(block, Code):
        # A fence is closed by one as long: this one is longer than any in the text.
        ticks = max((len(run) for run in re.findall("`+", block.text)), default=0)
        fence = "`" * max(3, ticks + 1)
        return f"{escape_line_start(_escape(block.title))}:\n\n{fence}\n{block.text}\n{fence}"
    if isinstance(block, Picture):
        return f"**{_escape(block.title)}**\n\n![{_escape(block.alt)}]({block.file})"
    cells = [[_escape(text) for text in block.header]]
    for row in block.rows:
        cells.append([f"**{_escape(c.text)}**" if c.strong else _escape(c.text) for c in row])
    text = f"**{_escape(block.title)}**\n\n"
    text += align_table(cells, len(block.header) - 1, style="markdown")
    if block.notes:
        text += "\n\n" + escape_line_start(" ".join(_termed(*note) + "." for note in block.notes))
    return text


def _termed(term: str, text: str) -> str:
    return f"**{_escape(term)}**: {_escape(text)}" if term else _escape(text)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is; an underscore within a word needs no escape."""
    marks = r"([\\*`\[\]]|<(?=\S)|&(?=#?\w+;)|~(?=~))"
    text = re.sub(marks, r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
