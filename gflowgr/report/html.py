"""A report's Markdown as one self-contained HTML file: embedded images, no scripts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

__all__ = ["to_html"]

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --quiet: #5b6470;
  --line: #d5dae0; --head: #f3f5f7; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #14171a; --quiet: #a3abb5;
  --line: #3a4149; --head: #20252a; --link: #7fb8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 70rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1rem; } }
h1 { font-size: 1.8rem; line-height: 1.2; }
h2 { margin-top: 3rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { margin-top: 2.2rem; }
a { color: var(--link); }
nav ul { padding-left: 1.2rem; margin: .2rem 0; }
nav > ul { columns: 18rem; padding: .8rem 1rem .8rem 2rem; border: 1px solid var(--line);
  border-radius: .4rem; }
.wide { overflow-x: auto; margin: .4rem 0; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
th, td[style] { white-space: nowrap; }
td { min-width: 6rem; }
td[style] { min-width: 0; }
thead th { background: var(--head); }
thead th:empty { padding: 0; }
tbody th { font-weight: 400; background: var(--paper); }
.wide th:first-child { position: sticky; left: 0; }
tbody tr:hover { background: var(--head); }
.wide + p:has(> strong:first-child) { color: var(--quiet); font-size: .82rem; max-width: 60rem;
  margin: .3rem 0 1.4rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; padding: .5rem;
  border: 1px solid var(--line); border-radius: .4rem; }
p:has(> img:only-child) { overflow-x: auto; }
@media (max-width: 40rem) { p > img:only-child { width: 44rem; max-width: none; } }
pre { overflow-x: auto; padding: .8rem; background: var(--head); border-radius: .4rem;
  font-size: .82rem; overflow-wrap: normal; }
"""


def to_html(markdown: str, folder: Path) -> str:
    """The Markdown as a page with a table of contents.

    HTML in the Markdown is shown as text, so that no text of a report can bring any along.

    Args:
        markdown: the report, beginning with its title.
        folder: where the pictures' files are; they are put into the page.

    Raises:
        ValueError: a picture that is not a PNG file within ``folder``.
    """
    parser = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False}).enable("table")
    parser.add_render_rule("table_open", _table_open)
    parser.add_render_rule("table_close", _table_close)
    parser.add_render_rule("fence", _fence)
    tokens = parser.parse(markdown)
    _mark_row_headers(tokens)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                child.attrSet("src", _data_uri(str(child.attrs["src"]), folder))
    title, contents = _number_headings(tokens)
    is_section = (token.type == "heading_open" and token.tag == "h2" for token in tokens)
    first = next((place for place, found in enumerate(is_section) if found), len(tokens))
    before, after = (
        parser.renderer.render(part, parser.options, {})
        for part in (tokens[:first], tokens[first:])
    )
    nav = f'<nav aria-label="Contents">{contents}</nav>\n' if contents else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"{before}{nav}{after}</main>\n</body>\n</html>\n"
    )


def _number_headings(tokens: Sequence[Token]) -> tuple[str, str]:
    """Give h2 and h3 an id; the title's text, and the contents as nested lists."""
    title = ""
    entries: list[tuple[str, list[str]]] = []  # of each h2 its link and those of the h3 below
    for token, inline in pairwise(tokens):
        if token.type != "heading_open":
            continue
        text = "".join(child.content for child in inline.children or ())
        if token.tag == "h1":
            title = text
        elif token.tag == "h2":
            entries.append((_link(token, f"s{len(entries) + 1}", text), []))
        elif token.tag == "h3" and entries:
            below = entries[-1][1]
            below.append(_link(token, f"s{len(entries)}-{len(below) + 1}", text))
    return title, _list([link + _list(below) for link, below in entries])


def _link(token: Token, anchor: str, text: str) -> str:
    token.attrSet("id", anchor)
    return f'<a href="#{anchor}">{escape(text)}</a>'


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>" if items else ""


def _mark_row_headers(tokens: Sequence[Token]) -> None:
    """Make the first cell of each body row the row's header, for screen readers."""
    waiting = False  # for the end of such a cell
    for before, token in pairwise(tokens):
        if token.type == "th_open":
            token.attrSet("scope", "col")
        elif token.type == "td_open" and before.type == "tr_open":
            token.tag, waiting = "th", True
            token.attrSet("scope", "row")
        elif token.type == "td_close" and waiting:
            token.tag, waiting = "th", False


def _data_uri(source: str, folder: Path) -> str:
    path = (folder / unquote(source)).resolve()
    inside = path.is_relative_to(folder.resolve())
    if path.suffix != ".png" or not inside or not path.is_file():
        raise ValueError(f"a picture must be a PNG file within {folder}; got {source!r}")
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


# Rules of the renderer; what they return stands in place of the token.


def _table_open(
    renderer: RendererHTML, tokens: Sequence[Token], place: int, options: Any, _: Any
) -> str:
    # Wide tables scroll by themselves, also by keyboard, and not the page with them.
    return '<div class="wide" tabindex="0">' + renderer.renderToken(tokens, place, options, {})


def _table_close(
    renderer: RendererHTML, tokens: Sequence[Token], place: int, options: Any, _: Any
) -> str:
    return renderer.renderToken(tokens, place, options, {}) + "</div>\n"


def _fence(_: RendererHTML, tokens: Sequence[Token], place: int, __: Any, ___: Any) -> str:
    text = escape(tokens[place].content)
    return f"<details><summary>Show</summary><pre>{text}</pre></details>\n"
