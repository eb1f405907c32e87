"""``{command-help}``: the help of ``gflowgr`` and of each of its commands, from its own parser."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from gflowgr.cli.command_line import _parser as make_parser

WIDTH = 96


def helps() -> Iterator[tuple[str, str]]:
    """Each command, such as ``gflowgr data convert``, and the text that ``--help`` prints."""
    with mock.patch.dict(os.environ, COLUMNS=str(WIDTH)):
        yield from _helps(make_parser())


def _helps(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    yield parser.prog, parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in dict.fromkeys(action.choices.values()):
                yield from _helps(sub)


class CommandHelp(SphinxDirective):
    """A section with a literal block for each command."""

    def run(self) -> list[nodes.Node]:
        """The sections."""
        made: list[nodes.Node] = []
        for name, text in helps():
            section = nodes.section(ids=[nodes.make_id(name)], names=[name])
            section += nodes.title(text=name)
            section += nodes.literal_block(text.rstrip(), text.rstrip(), language="text")
            made.append(section)
        return made


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
