"""``gflowgr data convert``: raw public formats to a dataset, with every option of the importers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ._parsers import Commands, command, print_facts

__all__ = ["FORMATS", "Format", "add_convert", "add_overwrite", "import_arguments"]


class Format(NamedTuple):
    """A format that is converted.

    Attributes:
        importer: ``gflowgr.data.import_<importer>``.
        text: its line of help.
        several: whether it takes several files.
        fixed: arguments of the importer that go without saying.
    """

    importer: str
    text: str
    several: bool = False
    fixed: Mapping[str, object] = MappingProxyType({})


def _amazon(release: int, text: str) -> Format:
    return Format("amazon", f"{text}; --meta: metadata", True, {"release": release})


FORMATS = {
    "amazon2023": _amazon(2023, "reviews, NAME.jsonl.gz or ratings as .csv with a header"),
    "amazon2018": _amazon(2018, "reviews, NAME_5.json.gz"),
    "amazon2014": _amazon(2014, "reviews, reviews_NAME_5.json.gz"),
    "yelp": Format("yelp", "review JSON lines; --meta: the businesses", True),
    "movielens": Format(
        "movielens", "ratings.csv, ratings.dat, u.data or their folder; --meta: movies"
    ),
    "recbole": Format("recbole", "NAME.inter or its folder; --meta: NAME.item"),
    "table": Format(
        "table", "CSV, TSV, Parquet or a folder of parts, with user, item and time", True
    ),
}
_COMMON = ("k_core", "duplicates", "max_bad_fraction", "name")
_COLUMNS = ("user", "item", "time", "behaviour", "value")
# The importers' parameters besides their files and what a format fixes, in the order of the help.
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "amazon": (*_COMMON, "progress"),
    "yelp": ("start", "end", *_COMMON, "progress"),
    "movielens": (*_COMMON, "progress"),
    "recbole": (*_COLUMNS, "side_behaviours", *_COMMON),
    "table": (
        *_COLUMNS,
        *("side_behaviours", "time_format", "separator", "encoding", "columns", "decimal"),
        *_COMMON,
    ),
}
_DEFAULTS: dict[tuple[str, str], object] = {
    ("amazon", "duplicates"): "first",
    ("recbole", "user"): "user_id",
    ("recbole", "item"): "item_id",
    ("recbole", "time"): "timestamp",
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "user": {"default": "user", "help": "column of the user"},
    "item": {"default": "item", "help": "column of the item"},
    "time": {"default": "time", "help": "column of the time"},
    "behaviour": {"help": "column of the behaviour, if any"},
    "value": {"help": "column of a number such as a rating, if any"},
    "side_behaviours": {
        "nargs": "+",
        "default": (),
        "metavar": "NAME",
        "help": "behaviours that are no events of the sequence, such as cart",
    },
    "time_format": {"metavar": "FORMAT", "help": "of times given as text, such as %%d.%%m.%%Y"},
    "separator": {
        "metavar": "CHARACTER",
        "type": lambda text: "\t" if text in ("\\t", "tab") else text,
        "help": "between fields of text; tab may be spelled out (default: found in the header)",
    },
    "encoding": {"help": "of text (default: UTF-8, UTF-16 by its mark, else Latin-1)"},
    "columns": {
        "nargs": "+",
        "default": (),
        "metavar": "NAME",
        "help": "names of all columns, for a file without a header line",
    },
    "decimal": {"choices": (".", ","), "help": "what begins the fraction of values given as text"},
    "start": {"metavar": "DAY", "help": "first day that counts, such as 2019-01-01"},
    "end": {"metavar": "DAY", "help": "last day that counts"},
    "k_core": {
        "type": int,
        "default": 5,
        "help": "keep users and items with at least this many interactions",
    },
    "duplicates": {
        "choices": ("all", "first", "last"),
        "default": "all",
        "help": "which events of one user with one item count",
    },
    "max_bad_fraction": {
        "type": float,
        "default": 0.01,
        "help": "give up if more than this share of the lines is bad",
    },
    "name": {"help": "what reports call it (default: the folder's name)"},
}


def add_convert(actions: Commands) -> None:
    """Declare ``gflowgr data convert``."""
    lines = "\n".join(f"  {name:<11} {form.text}" for name, form in FORMATS.items())
    parser = command(
        actions, "convert", "make a dataset of a raw public format", f"formats:\n{lines}"
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, form in FORMATS.items():
        kind = form.importer
        importer = command(formats, name, f"convert {form.text}")
        many: dict[str, Any] = {"nargs": "+"} if form.several else {}
        importer.add_argument("source", metavar="FILE", help="the interactions", **many)
        importer.add_argument("--meta", metavar="FILE", help="texts of the items", **many)
        importer.add_argument("--out", required=True, metavar="FOLDER", help="where it goes")
        for parameter in _PARAMETERS[kind]:
            if parameter == "progress":
                importer.add_argument("--no-progress", dest="progress", action="store_false")
                continue
            options = dict(_OPTIONS[parameter])
            options["default"] = _DEFAULTS.get((kind, parameter), options.get("default"))
            if options["default"] not in (None, ()):
                options["help"] += " (default: %(default)s)"
            column = "-column" if parameter in _COLUMNS else ""
            flag = f"--{parameter.replace('_', '-')}{column}"
            importer.add_argument(flag, dest=parameter, **options)
        importer.add_argument(
            "--items-of",
            metavar="FOLDER",
            help="an earlier dataset, whose items keep their numbers; new ones come after them",
        )
        add_overwrite(importer)
        importer.set_defaults(run=_run)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Declare ``--overwrite``."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the dataset in --out, with every .json.gz file of that folder",
    )


def import_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments for the importer of ``args.format``, besides its files."""
    form = FORMATS[args.format]
    given = {parameter: getattr(args, parameter) for parameter in _PARAMETERS[form.importer]}
    return {**given, **form.fixed}


def _run(args: argparse.Namespace) -> int:
    from ..data import check_target, importers, load_dataset, save_dataset, with_items_of

    check_target(args.out, overwrite=args.overwrite)  # before the hours that an import may take
    earlier = None if args.items_of is None else load_dataset(args.items_of)
    options = import_arguments(args)
    options["name"] = args.name or Path(args.out).name
    load = getattr(importers, f"import_{FORMATS[args.format].importer}")
    dataset, report = load(args.source, args.meta, **options)
    if earlier is not None:
        dataset = with_items_of(dataset, earlier)
    save_dataset(dataset, args.out, overwrite=args.overwrite)
    print(report)
    print_facts(dataset.summary())
    print(f"written to {args.out}")
    return 0
