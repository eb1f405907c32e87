"""``gflowgr info``: what is installed, built and used."""

from __future__ import annotations

import argparse
import json

from ._parsers import Commands, command

__all__ = ["add_info"]


def add_info(commands: Commands) -> None:
    """Declare ``gflowgr info``."""
    parser = command(
        commands, "info", "print versions, devices, and which backends are built and used"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> int:
    from ..report.info import collect_info, format_info

    info = collect_info()
    if args.json:
        print(json.dumps(info, indent=2, default=str))
    else:
        print(format_info(info))
    return 0
