"""Reports as data: sections of paragraphs, lists, tables and pictures, written as Markdown.

All texts are plain: :func:`to_markdown` escapes what Markdown would interpret, and the page
(:func:`gflowgr.report.html.to_html`) is made from that Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gflowgr import files
from gflowgr.report.html import to_html
from gflowgr.report.tables import Table, escape_line_start, escape_markdown, render_table

__all__ = [
    "Block",
    "Bullets",
    "Code",
    "Document",
    "Paragraph",
    "Picture",
    "Section",
    "to_markdown",
    "write_document",
]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text, after a (possibly empty) term in bold."""

    text: str
    term: str = ""


@dataclass(frozen=True)
class Bullets:
    """A list; each entry is a (possibly empty) term in bold and a text."""

    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is, under ``title``."""

    title: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A PNG file, named relative to the report; ``alt`` says in words what it shows.

    ``title`` may be empty where the section's says it.
    """

    file: str
    title: str
    alt: str


Block = Paragraph | Bullets | Code | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading, its blocks, and its subsections."""

    title: str
    blocks: Sequence[Block] = ()
    sections: Sequence[Section] = ()


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    blocks: Sequence[Block] = ()
    sections: Sequence[Section] = field(default_factory=tuple)


def write_document(document: Document, folder: Path) -> Path:
    """Write ``report.md`` and ``report.html``, the same in one file; return the former's path.

    Args:
        document: the report.
        folder: where both go, and where the pictures already are.

    Raises:
        OutputError: the folder cannot be written.
    """
    text = to_markdown(document)
    files.write_text(folder / "report.html", to_html(text, folder))
    files.write_text(folder / "report.md", text)
    return folder / "report.md"


def to_markdown(document: Document) -> str:
    """The document as Markdown (GitHub's dialect)."""
    parts = [f"# {escape_markdown(document.title)}", *map(_block, document.blocks)]
    for section in document.sections:
        parts += _section(section, 2)
    return "\n\n".join(parts) + "\n"


def _section(section: Section, level: int) -> list[str]:
    parts = [f"{'#' * level} {escape_markdown(section.title)}", *map(_block, section.blocks)]
    for below in section.sections:
        parts += _section(below, level + 1)
    return parts


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return escape_line_start(_termed(block.term, block.text))
    if isinstance(block, Bullets):
        return "\n".join("- " + escape_line_start(_termed(*entry)) for entry in block.entries)
    if isinstance(block, Code):
        # A fence is closed by one as long: this one is longer than any in the text.
        ticks = max((len(run) for run in re.findall("`+", block.text)), default=0)
        fence = "`" * max(3, ticks + 1)
        title = escape_line_start(escape_markdown(block.title))
        return f"{title}:\n\n{fence}\n{block.text}\n{fence}"
    title = f"**{escape_markdown(block.title)}**\n\n" if block.title else ""
    if isinstance(block, Picture):
        return f"{title}![{escape_markdown(block.alt)}]({block.file})"
    text = title + render_table(block, "markdown")
    if block.notes:
        text += "\n\n" + escape_line_start(" ".join(_termed(*note) + "." for note in block.notes))
    return text


def _termed(term: str, text: str) -> str:
    return (
        f"**{escape_markdown(term)}**: {escape_markdown(text)}" if term else escape_markdown(text)
    )
