"""The ``gflowgr`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .errors import GFlowGRError

__all__ = ["main"]

_EPILOG = """\
first steps:
  gflowgr quickstart                     the whole job on a built-in dataset, in minutes
  gflowgr quickstart --data FOLDER       the same on your data
  gflowgr train --config run.yaml        a run of your own (see examples/)
  gflowgr recommend RUN/gflowgr/model --data FOLDER --user 17

A run that was interrupted goes on when the same command is given again.
Exit codes: 0 done, 1 failed, 2 wrong usage or bad input, 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _quiet_libraries()
        return int(args.run(args) or 0)
    except BrokenPipeError:
        # The reader (head, less) has enough. Nothing can be flushed to it at exit, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (GFlowGRError, OSError, ValueError) as error:
        # Bad input, with a message that says what to do; a traceback would only hide it.
        if args.debug:
            raise
        print(f"gflowgr: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"gflowgr: training failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ngflowgr: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _quiet_libraries() -> None:
    """Keep libraries' chatter out of the output, and never touch the network unasked."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gflowgr",
        description="Fine-tune generative recommenders as GFlowNets (GFlowGR, arXiv 2506.16114).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gflowgr {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of bad input, too")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_quickstart,
        _add_train,
        _add_evaluate,
        _add_recommend,
        _add_data,
        _add_bench,
        _add_info,
    ):
        add(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    epilog: str = "",
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


# ---- quickstart, train ----


def _add_quickstart(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "quickstart",
        "train and compare SASRec, SFT, continued SFT and GFlowGR-TB in a few minutes",
        "Writes checkpoints, results.json, report.md and plots to --output-dir. The built-in\n"
        "dataset is simulated, with known true utilities; no download is made.",
    )
    parser.add_argument("--data", metavar="FOLDER", help="your dataset instead of the built-in one")
    parser.add_argument("--identifiers", metavar="NAME", help="which index.NAME.json.gz of FOLDER")
    parser.add_argument(
        "--output-dir",
        default="runs/quickstart",
        metavar="FOLDER",
        help="where everything goes (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed (default: %(default)s)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    parser.set_defaults(run=_quickstart)


def _quickstart(args: argparse.Namespace) -> int:
    from .pipeline import quickstart_config, run_and_report

    config = quickstart_config(
        args.output_dir, data=args.data, identifiers=args.identifiers, seed=args.seed
    )
    run_and_report(config, progress=not args.no_progress)
    return 0


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "train",
        "carry out a run described by a YAML file, or go on with it",
        "example:\n  GFLOWGR_DATA=/data gflowgr train --config examples/beauty_tiger.yaml "
        "--set seed=43 --set flow.beta=0.5",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run (YAML)")
    parser.add_argument("--output-dir", metavar="FOLDER", help="instead of the file's output_dir")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change one value, such as sft.max_steps=200 (may be repeated)",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from .pipeline import RunConfig, run_and_report

    overrides = list(args.overrides)
    if args.output_dir:
        overrides.append(f"output_dir={json.dumps(args.output_dir)}")  # quoted: never a number
    run_and_report(RunConfig.load(args.config, overrides), progress=not args.no_progress)
    return 0


# ---- evaluate, recommend ----


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a saved model, such as RUN/gflowgr/model")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="the dataset")
    parser.add_argument("--beams", type=int, default=20, help="beams (default: %(default)s)")


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands, "evaluate", "rank the full catalogue for held-out items and print the metrics"
    )
    _add_model_and_data(parser)
    parser.add_argument(
        "--part", choices=("valid", "test"), default="test", help="held-out part (default: test)"
    )
    parser.add_argument(
        "--collision",
        choices=("item", "string"),
        default="item",
        help="how items that share an identifier are scored (default: %(default)s)",
    )
    parser.add_argument("--mask-seen", action="store_true", help="never recommend the history")
    parser.add_argument("--max-users", type=int, help="a fixed random subset of the users")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from .pipeline.inference import evaluate_checkpoint

    evaluate_checkpoint(
        args.model,
        args.data,
        part=args.part,
        num_beams=args.beams,
        collision=args.collision,
        mask_seen=args.mask_seen,
        max_users=args.max_users,
        progress=not args.no_progress,
    )
    return 0


def _add_recommend(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "recommend",
        "recommend items to users, or for histories",
        'Without --user and --history, reads JSON lines from standard input: {"user": "17"} or\n'
        '{"history": [3, 14, 15]}, and writes one JSON line for each.',
    )
    _add_model_and_data(parser)
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
    from .pipeline.inference import recommend_from_checkpoint

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


# ---- data ----


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "data", "make, import and inspect datasets")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    builtin = _command(actions, "builtin", "generate the built-in dataset (simulated, seeded)")
    builtin.add_argument("--out", required=True, metavar="FOLDER", help="where it goes")
    builtin.add_argument("--seed", type=int, default=42)
    builtin.add_argument("--users", type=int, default=3000)
    builtin.add_argument("--items", type=int, default=1200)
    _add_overwrite(builtin)
    builtin.set_defaults(run=_data_builtin)

    show = _command(actions, "inspect", "check a dataset and print what is in it")
    show.add_argument("folder", metavar="FOLDER")
    show.set_defaults(run=_data_inspect)

    importer = _command(
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
    from .data import generate_builtin, save_dataset

    dataset = generate_builtin(seed=args.seed, num_users=args.users, num_items=args.items)
    save_dataset(dataset, args.out, overwrite=args.overwrite)
    _print_facts(dataset.summary())
    print(f"written to {args.out}")
    return 0


def _data_inspect(args: argparse.Namespace) -> int:
    from .data import LeaveOneOut, load_dataset

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
    from .data import check_target, importers, save_dataset

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


# ---- bench ----


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from .benchmarking import command

    command.add_arguments(_command(commands, "bench", command.SUMMARY, command.EPILOG))


# ---- info ----


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands, "info", "print versions, devices, and which backends are built and used"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> int:
    from .info import collect_info, format_info

    info = collect_info()
    if args.json:
        print(json.dumps(info, indent=2, default=str))
    else:
        print(format_info(info))
    return 0
