"""``gflowgr data``: datasets are made, imported and inspected."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._parsers import Commands, command

__all__ = ["add_data"]


def add_data(commands: Commands) -> None:
    """Declare ``gflowgr data``."""
    parser = command(commands, "data", "make, import and inspect datasets")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    builtin = command(actions, "builtin", "generate the built-in dataset (simulated, seeded)")
    builtin.add_argument("--out", required=True, metavar="FOLDER", help="where it goes")
    builtin.add_argument("--seed", type=int, default=42)
    builtin.add_argument("--users", type=int, default=3000)
    builtin.add_argument("--items", type=int, default=1200)
    _add_overwrite(builtin)
    builtin.set_defaults(run=_data_builtin)

    show = command(actions, "inspect", "check a dataset and print what is in it")
    show.add_argument("folder", metavar="FOLDER")
    show.set_defaults(run=_data_inspect)

    importer = command(
        actions,
        "import",
        "import raw public formats",
        "formats:\n"
        "  amazon     review JSON lines of 2014, 2018 or 2023 (.gz too); --meta: metadata\n"
        "  yelp       review JSON lines; --meta: the businesses\n"
        "  movielens  ratings.csv or ratings.dat; --meta: movies.csv or movies.dat\n"
        "  table      CSV, TSV or Parquet with columns for user, item and time",
    )
    importer.add_argument("format", choices=("amazon", "yelp", "movielens", "table"))
    importer.add_argument("source", metavar="FILE", help="the interactions")
    importer.add_argument("--meta", metavar="FILE", help="texts of the items")
    importer.add_argument("--out", required=True, metavar="FOLDER", help="where the dataset goes")
    importer.add_argument("--name", help="what reports call it (default: the folder's name)")
    importer.add_argument(
        "--k-core",
        type=int,
        default=5,
        help="keep users and items with at least this many interactions (default: %(default)s)",
    )
    importer.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        help="give up if more than this share of the lines is bad (default: %(default)s)",
    )
    for column, default in (("user", "user"), ("item", "item"), ("time", "time")):
        importer.add_argument(
            f"--{column}-column",
            default=default,
            help=f"table: column of the {column} (default: %(default)s)",
        )
    for column in ("behaviour", "value"):
        importer.add_argument(f"--{column}-column", help=f"table: column of the {column}, if any")
    _add_overwrite(importer)
    importer.set_defaults(run=_data_import)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the dataset in --out, with every .json.gz file of that folder",
    )


def _data_builtin(args: argparse.Namespace) -> int:
    from ..data import generate_builtin, save_dataset

    dataset = generate_builtin(seed=args.seed, num_users=args.users, num_items=args.items)
    save_dataset(dataset, args.out, overwrite=args.overwrite)
    _print_facts(dataset.summary())
    print(f"written to {args.out}")
    return 0


def _data_inspect(args: argparse.Namespace) -> int:
    from ..data import LeaveOneOut, load_dataset

    dataset = load_dataset(args.folder)
    _print_facts(dataset.summary())
    for name in dataset.index_names():
        identifiers = dataset.identifiers(name)
        print(
            f"identifiers {name}: {identifiers.num_unique():,} distinct for "
            f"{identifiers.num_items:,} items, codes per level {identifiers.level_sizes}"
        )
    print("\nleave-one-out split:")
    _print_facts(LeaveOneOut(dataset).report())
    return 0


def _data_import(args: argparse.Namespace) -> int:
    from ..data import check_target, importers, save_dataset

    check_target(args.out, overwrite=args.overwrite)  # before the hours that an import may take
    options = {
        "k_core": args.k_core,
        "max_bad_fraction": args.max_bad_fraction,
        "name": args.name or Path(args.out).name,
    }
    if args.format == "table":
        for column in ("user", "item", "time", "behaviour", "value"):
            options[column] = getattr(args, f"{column}_column")
    load = getattr(importers, f"import_{args.format}")
    dataset, report = load(args.source, args.meta, **options)
    save_dataset(dataset, args.out, overwrite=args.overwrite)
    print(report)
    _print_facts(dataset.summary())
    print(f"written to {args.out}")
    return 0


def _print_facts(facts: dict[str, object]) -> None:
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        if isinstance(value, list):
            value = "; ".join(str(entry) for entry in value)
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        print(f"  {name:<{width}}  {text}")
