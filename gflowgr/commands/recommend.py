"""``gflowgr recommend``: items for users and histories."""

from __future__ import annotations

import argparse
import sys

from ._parsers import Commands, add_model_and_data, command

__all__ = ["add_recommend"]


def add_recommend(commands: Commands) -> None:
    """Declare ``gflowgr recommend``."""
    parser = command(
        commands,
        "recommend",
        "recommend items to users, or for histories",
        'Without --user and --history, reads JSON lines from standard input: {"user": "17"} or\n'
        '{"history": [3, 14, 15]}, and writes one JSON line for each.',
    )
    add_model_and_data(parser)
    parser.add_argument(
        "--user",
        action="append",
        default=[],
        metavar="ID",
        help="a user of the dataset; the whole sequence is the history (may be repeated)",
    )
    parser.add_argument(
        "--history",
        action="append",
        default=[],
        metavar="ITEMS",
        help="items, oldest first, such as 3,14,15 (may be repeated)",
    )
    parser.add_argument("-k", type=int, default=10, help="items per user (default: %(default)s)")
    parser.add_argument("--with-seen", action="store_true", help="seen items may come again")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.set_defaults(run=_recommend)


def _recommend(args: argparse.Namespace) -> int:
    from ..pipeline.inference import recommend_from_checkpoint

    lines = None if args.user or args.history else sys.stdin
    recommend_from_checkpoint(
        args.model,
        args.data,
        users=args.user,
        histories=args.history,
        lines=lines,
        k=args.k,
        num_beams=args.beams,
        exclude_seen=not args.with_seen,
        as_json=args.json or lines is not None,
    )
    return 0
