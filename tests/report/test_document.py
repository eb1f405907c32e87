"""Documents as Markdown and as a page: every text is shown as it is."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from gflowgr.report.document import (
    Block,
    Bullets,
    Code,
    Document,
    Paragraph,
    Picture,
    Section,
    to_markdown,
    write_document,
)
from gflowgr.report.html import to_html
from gflowgr.report.tables import Table, TableCell

PNG = b"\x89PNG made up"


def test_markdown_shows_texts_as_they_are() -> None:
    text = to_markdown(Document("r_a * 2", [Paragraph("a <b> [c] 1 < 2"), Bullets([("t", "_x_")])]))
    assert text == "# r_a \\* 2\n\na \\<b> \\[c\\] 1 < 2\n\n- **t**: \\_x\\_\n"


@pytest.mark.parametrize("text", ["x\n```\n# out", "````\n~~~", "```", "a ``` b ````` c"])
def test_a_code_block_ends_where_its_text_ends(text: str) -> None:
    (token,) = [t for t in _parsed([Code("Config", text)]) if t.type == "fence"]
    assert token.content == text + "\n"
    assert [t.type for t in _parsed([Code("Config", text), Paragraph("after")])][-3:] == [
        *("paragraph_open", "inline", "paragraph_close")
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("# a", "- a", "+ a", "> a", "1. a", "12) a", "---", "===", "~~~", "```", "&lt;b&gt;"),
        *("~~a~~", "<img src=x onerror=alert(1)>", "[a](b)", "a\n# b", "**a**", "__a__", "\\"),
    ],
)
def test_a_text_stays_one_paragraph_of_that_text(text: str) -> None:
    for block, around in ((Paragraph(text), ""), (Bullets([("", text)]), "bullet_list")):
        tokens = _parsed([block])
        others = {"heading_open", "fence", "hr", "html_block", "blockquote_open"}
        assert [t.type for t in tokens if t.type in others] == ["heading_open"], "only the title's"
        assert [t.type for t in tokens if t.type.endswith("list_open")] == (
            [f"{around}_open"] if around else []
        )
        inline = [t for t in tokens if t.type == "inline"][-1]
        assert {child.type for child in inline.children or ()} <= {"text", "text_special"}
        assert "".join(child.content for child in inline.children or ()) == " ".join(text.split())


def _parsed(blocks: Sequence[Block]) -> list[Token]:
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return markdown.parse(to_markdown(Document("Title", blocks)))


def test_a_page_holds_its_pictures_whatever_their_names(tmp_path: Path) -> None:
    name = "figures/Büro_2=x.y.png"
    (tmp_path / "figures").mkdir()
    (tmp_path / name).write_bytes(PNG)
    alt = 'r_a of "Büro" [2] <b> *x*'
    path = write_document(Document("T", [Picture(name, "", alt)]), tmp_path)
    assert path.read_text().endswith(f"]({name})\n")
    (image,) = re.findall(r"<img [^>]*>", (tmp_path / "report.html").read_text())
    assert base64.b64encode(PNG).decode() in image
    assert 'alt="r_a of &quot;Büro&quot; [2] &lt;b&gt; *x*"' in image


@pytest.mark.parametrize("source", ["../secret.png", "/secret.png", "http://x.y/z.png", "a.svg"])
def test_a_page_takes_no_other_files(source: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    with pytest.raises(ValueError, match=r"a picture must be a PNG file within .*; got '"):
        to_html(f"# T\n\n![x]({source})\n", tmp_path / "report")


def test_nothing_can_be_brought_into_a_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> <img src=x onerror=alert(1)> [a](javascript:alert(1))"
    table = Table(evil, [evil, "b"], [[TableCell(evil), TableCell(evil, strong=True)]])
    blocks = [Paragraph(evil), Bullets([(evil, evil)]), Code(evil, f"```\n{evil}"), table]
    document = Document(evil, blocks, [Section(evil, [Paragraph(evil, evil)])])
    # Also where the Markdown is not from a document.
    for text in (to_markdown(document), f"# T\n\n{evil}\n\n<div onclick=x>\n{evil}\n</div>\n"):
        page = to_html(text, tmp_path)
        assert not re.search(r"<(script|img|div onclick)", page)
        assert not re.search(r'(href|src)="(?!#)', page)
    assert "&lt;script&gt;" in page


def test_a_page_scrolls_wide_tables_and_heads_rows_and_columns(tmp_path: Path) -> None:
    table = Table("Title", ["method", "R@5"], [[TableCell("SFT"), TableCell("0.1", strong=True)]])
    document = Document("T", (), [Section("A", [table], [Section("B")]), Section("C", [table])])
    page = to_html(to_markdown(document), tmp_path)
    assert page.count('<div class="wide" tabindex="0"><table>') == page.count("</table>") == 2
    assert re.search(r'<th scope="row">SFT</th>\s*<td style="text-align:right"><strong>0.1', page)
    assert '<th scope="col">method</th>' in page
    # What holds a page to the width of a phone.
    assert re.search(r"\.wide \{[^}]*overflow-x: auto", page)
    assert re.search(r"img \{[^}]*max-width: 100%", page)
    assert '<meta name="viewport" content="width=device-width' in page
    # There, pictures keep a size at which they can be read, and scroll in a box of their own.
    assert "p:has(> img:only-child) { overflow-x: auto; }" in page
    links = '<ul><li><a href="#s1">A</a><ul><li><a href="#s1-1">B</a></li></ul></li><li>'
    assert f'{links}<a href="#s2">C</a></li></ul>' in page
    for anchor in ("s1", "s1-1", "s2"):
        assert f'id="{anchor}"' in page
