"""A report as one HTML file that needs nothing else: images inside, no scripts, no fonts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .document import Block, Bullets, Code, Document, Paragraph, Picture, Section, Table

__all__ = ["to_html"]

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --quiet: #5b6470;
  --line: #d5dae0; --head: #f3f5f7; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #14171a; --quiet: #a3abb5;
  --line: #3a4149; --head: #20252a; --link: #7fb8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 70rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; }
h2 { margin-top: 3rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { margin-top: 2.2rem; }
a { color: var(--link); }
nav ul { padding-left: 1.2rem; margin: .2rem 0; }
nav > ul { columns: 18rem; padding: .8rem 1rem .8rem 2rem; border: 1px solid var(--line);
  border-radius: .4rem; }
.wide { overflow-x: auto; margin: 1.2rem 0 .4rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
thead th { background: var(--head); }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 400; }
tbody tr:hover { background: var(--head); }
.notes { color: var(--quiet); font-size: .82rem; margin: .3rem 0 1.4rem; max-width: 60rem; }
figure { margin: 1.6rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; padding: .5rem;
  border: 1px solid var(--line); border-radius: .4rem; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
pre { overflow-x: auto; padding: .8rem; background: var(--head); border-radius: .4rem;
  font-size: .82rem; }
"""


def to_html(document: Document, folder: Path) -> str:
    """The document as a page.

    Args:
        document: the report.
        folder: where the pictures' files are; they are put into the page.
    """
    toc = _contents(document.sections, "s")
    body = [f"<h1>{escape(document.title)}</h1>"]
    body += [_block(block, folder) for block in document.blocks]
    body.append(f'<nav aria-label="Contents">{toc}</nav>')
    for place, section in enumerate(document.sections, 1):
        body += _section(section, f"s{place}", 2, folder)
    title = escape(document.title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _contents(sections: Sequence[Section], prefix: str) -> str:
    if not sections:
        return ""
    entries = []
    for place, section in enumerate(sections, 1):
        anchor = f"{prefix}{place}"
        below = _contents(section.sections, anchor + "-")
        entries.append(f'<li><a href="#{anchor}">{escape(section.title)}</a>{below}</li>')
    return f"<ul>{''.join(entries)}</ul>"


def _section(section: Section, anchor: str, level: int, folder: Path) -> list[str]:
    parts = [f'<h{level} id="{anchor}">{escape(section.title)}</h{level}>']
    parts += [_block(block, folder) for block in section.blocks]
    for place, below in enumerate(section.sections, 1):
        parts += _section(below, f"{anchor}-{place}", level + 1, folder)
    return parts


def _block(block: Block, folder: Path) -> str:
    if isinstance(block, Paragraph):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Bullets):
        return f"<ul>{''.join(f'<li>{_termed(*entry)}</li>' for entry in block.entries)}</ul>"
    if isinstance(block, Code):
        text = escape(block.text)
        return f"<details><summary>{escape(block.title)}</summary><pre>{text}</pre></details>"
    if isinstance(block, Picture):
        data = base64.b64encode((folder / block.file).read_bytes()).decode()
        return (
            f"<figure><figcaption>{escape(block.title)}</figcaption>"
            f'<img src="data:image/png;base64,{data}" alt="{escape(block.alt)}"></figure>'
        )
    return _table(block)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in table.header)
    rows = []
    for first, *others in table.rows:
        texts = [f'<th scope="row">{escape(first.text)}</th>']
        for cell in others:
            text = escape(cell.text)
            texts.append(f"<td>{f'<strong>{text}</strong>' if cell.strong else text}</td>")
        rows.append(f"<tr>{''.join(texts)}</tr>")
    notes = " ".join(f"{_termed(*note)}." for note in table.notes)
    return (
        f'<div class="wide"><table><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        + (f'<p class="notes">{notes}</p>' if notes else "")
    )


def _termed(term: str, text: str) -> str:
    return f"<strong>{escape(term)}</strong>: {escape(text)}" if term else escape(text)
