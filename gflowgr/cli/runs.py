"""``gflowgr quickstart`` and ``gflowgr train``: whole runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ._parsers import Commands, add_overrides, add_split, command
from .experiment import carry_out

if TYPE_CHECKING:
    from ..runs import RunConfig

__all__ = ["add_quickstart", "add_train"]


def add_quickstart(commands: Commands) -> None:
    """Declare ``gflowgr quickstart``."""
    parser = command(
        commands,
        "quickstart",
        "train and compare SASRec, SFT, continued SFT and GFlowGR in a few minutes",
        "Writes models, results.json, report.html (one file), report.md and plots to\n"
        "--output-dir. The built-in dataset is simulated, with known true utilities; nothing is\n"
        "downloaded. It is the experiment gflowgr/runs/specs/quickstart.yaml, a file to copy for\n"
        "gflowgr experiment FILE. The same command goes on where an earlier one stopped.",
    )
    parser.add_argument("--data", metavar="FOLDER", help="your dataset instead of the built-in one")
    parser.add_argument("--identifiers", metavar="NAME", help="which index.NAME.json.gz of FOLDER")
    parser.add_argument(
        "--output-dir",
        default="runs/quickstart",
        metavar="FOLDER",
        help="where everything goes (default: %(default)s)",
    )
    _add_events(parser)
    parser.add_argument("--seed", type=int, default=42, help="seed (default: %(default)s)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=_quickstart)


def _quickstart(args: argparse.Namespace) -> int:
    from ..data import load_dataset
    from ..runs import LocalPool, quickstart_resources, quickstart_spec

    spec = quickstart_spec(
        data=args.data,
        identifiers=args.identifiers,
        seed=args.seed,
        split=args.split,
        target_behaviour=args.target_behaviour,
        behaviour_values=dict(args.behaviour_values),
    )
    out = Path(args.output_dir)
    pool = LocalPool(quickstart_resources())
    status = carry_out(spec, out, pool, progress=not args.no_progress)
    if status == 0:
        (name,) = spec.datasets
        data = args.data or out / name / "data"
        user = load_dataset(data).user_ids[0]
        print(f"Use it: gflowgr recommend {out} --data {data} --user {user}")
    return status


def add_train(commands: Commands) -> None:
    """Declare ``gflowgr train``."""
    parser = command(
        commands,
        "train",
        "carry out a run described by a YAML file, or go on with it",
        "Writes models, results.json, report.html (one file), report.md and plots to the run's\n"
        "output_dir.\n\nexample:\n"
        "  GFLOWGR_DATA=/data gflowgr train --config examples/beauty_tiger.yaml "
        "--set seed=43 --set flow.beta=0.5",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run (YAML)")
    parser.add_argument("--output-dir", metavar="FOLDER", help="instead of the file's output_dir")
    _add_events(parser)
    add_overrides(parser, "sft.max_steps=200")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from ..runs import RunConfig, run_and_report

    overrides = list(args.overrides)
    if args.output_dir:
        overrides.append(f"output_dir={json.dumps(args.output_dir)}")  # quoted: never a number
    config = _with_events(RunConfig.load(args.config, overrides), args)
    run_and_report(config, progress=not args.no_progress)
    return 0


def _add_events(parser: argparse.ArgumentParser) -> None:
    """Declare what says how the events of the data are held out and rewarded."""
    add_split(parser)
    parser.add_argument(
        "--behaviour-values",
        nargs="+",
        default=[],
        type=_named_number,
        metavar="NAME=NUMBER",
        help="reward of events of a behaviour, such as view=1 purchase=10 (known names have a "
        "default)",
    )


def _named_number(text: str) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        equals = ""
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=NUMBER, such as view=1; got {text!r}")
    return name, value


def _with_events(config: RunConfig, args: argparse.Namespace) -> RunConfig:
    """The configuration with what :func:`_add_events` declares in place of its own values."""
    chosen = {"split": args.split, "target_behaviour": args.target_behaviour}
    given = {name: value for name, value in chosen.items() if value is not None}
    data = dataclasses.replace(config.data, **given)
    finetune = config.finetune
    if args.behaviour_values:
        values = {**(finetune.get("behaviour_values") or {}), **dict(args.behaviour_values)}
        finetune = {**finetune, "behaviour_values": values}
    return dataclasses.replace(config, data=data, finetune=finetune)
