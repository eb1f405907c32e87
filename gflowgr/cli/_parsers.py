"""Helpers that the commands' parsers share: common options and two-column output."""

from __future__ import annotations

import argparse
from typing import TypeAlias

__all__ = ["Commands", "add_model_and_data", "add_overrides", "add_split", "command"]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def command(
    commands: Commands,
    name: str,
    text: str,
    epilog: str = "",
) -> argparse.ArgumentParser:
    """A parser for ``name``; ``text``, in lower case, is its line in the list of commands."""
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Declare ``--set KEY=VALUE``, which gives ``overrides``, a list of such texts."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help=f"change one value, such as {example} (may be repeated)",
    )


def add_model_and_data(parser: argparse.ArgumentParser) -> None:
    """Declare the saved model, its dataset and the beams."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a saved model, such as RUN/gflowgr/model; a folder of a run or an experiment stands "
        "for its model of the method gflowgr, if there is exactly one",
    )
    parser.add_argument("--data", required=True, metavar="FOLDER", help="the dataset")
    parser.add_argument("--beams", type=int, default=20, help="beams (default: %(default)s)")


def add_split(parser: argparse.ArgumentParser) -> None:
    """Declare ``--split`` and ``--target-behaviour``; both are None where they are not given."""
    parser.add_argument(
        "--split",
        choices=("leave_one_out", "temporal"),
        help="leave_one_out: each user's last item is held out; temporal: the last period of time",
    )
    parser.add_argument(
        "--target-behaviour",
        metavar="NAME",
        help="held-out events are of this behaviour, such as purchase; all are learned from",
    )


def print_facts(facts: dict[str, object]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        if isinstance(value, list):
            value = "; ".join(str(entry) for entry in value)
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        print(f"  {name:<{width}}  {text}")
