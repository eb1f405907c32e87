"""``gflowgr evaluate``: the metrics of a saved model."""

from __future__ import annotations

import argparse

from ._parsers import Commands, add_model_and_data, add_split, command

__all__ = ["add_evaluate"]


def add_evaluate(commands: Commands) -> None:
    """Declare ``gflowgr evaluate``."""
    parser = command(
        commands, "evaluate", "rank the full catalogue for held-out items and print the metrics"
    )
    add_model_and_data(parser)
    parser.add_argument(
        "--part", choices=("valid", "test"), default="test", help="held-out part (default: test)"
    )
    add_split(parser)
    parser.add_argument(
        "--held-out-share",
        type=float,
        default=0.1,
        help="temporal: share of the events in each of the last two periods (default: %(default)s)",
    )
    parser.add_argument(
        "--collision",
        choices=("item", "string"),
        default="item",
        help="how items that share an identifier are scored (default: %(default)s)",
    )
    parser.add_argument("--mask-seen", action="store_true", help="never recommend the history")
    parser.add_argument(
        "--index",
        metavar="FILE",
        help="index.NAME.json.gz of gflowgr identifiers extend: the dataset may then have items "
        "that came after the training",
    )
    parser.add_argument("--max-users", type=int, help="a fixed random subset of the users")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from ..serving.load import evaluate_checkpoint

    evaluate_checkpoint(
        args.model,
        args.data,
        part=args.part,
        split=args.split or "leave_one_out",
        held_out_share=args.held_out_share,
        target_behaviour=args.target_behaviour,
        num_beams=args.beams,
        collision=args.collision,
        mask_seen=args.mask_seen,
        max_users=args.max_users,
        progress=not args.no_progress,
        index=args.index,
    )
    return 0
