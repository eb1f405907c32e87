"""``gflowgr data``: datasets are made, converted and inspected."""

from __future__ import annotations

import argparse

from ._parsers import Commands, command, print_facts
from .converting import add_convert, add_overwrite

__all__ = ["add_data"]


def add_data(commands: Commands) -> None:
    """Declare ``gflowgr data``."""
    parser = command(commands, "data", "make, convert and inspect datasets")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    builtin = command(actions, "builtin", "generate the built-in dataset (simulated, seeded)")
    builtin.add_argument("--out", required=True, metavar="FOLDER", help="where it goes")
    builtin.add_argument("--seed", type=int, default=42)
    builtin.add_argument("--users", type=int, default=3000)
    builtin.add_argument("--items", type=int, default=1200)
    builtin.add_argument(
        "--popularity-bias",
        type=float,
        default=1.0,
        metavar="BETA",
        help="how far popular items are shown rather than those that a user likes (default: 1)",
    )
    add_overwrite(builtin)
    builtin.set_defaults(run=_data_builtin)

    show = command(actions, "inspect", "check a dataset and print what is in it")
    show.add_argument("folder", metavar="FOLDER")
    show.set_defaults(run=_data_inspect)

    add_convert(actions)


def _data_builtin(args: argparse.Namespace) -> int:
    from ..data import generate_builtin, save_dataset

    dataset = generate_builtin(
        seed=args.seed,
        num_users=args.users,
        num_items=args.items,
        popularity_bias=args.popularity_bias,
    )
    save_dataset(dataset, args.out, overwrite=args.overwrite)
    print_facts(dataset.summary())
    print(f"written to {args.out}")
    return 0


def _data_inspect(args: argparse.Namespace) -> int:
    from ..data import LeaveOneOut, load_dataset

    dataset = load_dataset(args.folder)
    print_facts(dataset.summary())
    for name in dataset.index_names():
        identifiers = dataset.identifiers(name)
        print(
            f"identifiers {name}: {identifiers.num_unique():,} distinct for "
            f"{identifiers.num_items:,} items, codes per level {identifiers.level_sizes}"
        )
    print("\nleave-one-out split:")
    print_facts(LeaveOneOut(dataset).report())
    return 0
