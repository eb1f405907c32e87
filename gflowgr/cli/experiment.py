"""``gflowgr experiment``: a whole comparison, cell by cell."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ._parsers import Commands, add_overrides, command

if TYPE_CHECKING:
    from ..runs import CellPool, ExperimentSpec

__all__ = ["add_experiment", "carry_out"]

_EPILOG = """\
examples:
  gflowgr experiment smoke --out runs/smoke             the built-in data, minutes on two cores
  GFLOWGR_DATA=/data gflowgr experiment small --out runs/small --workers 2
  gflowgr experiment small --out runs/small --only '*/seed_42/*'
  gflowgr experiment small --out runs/small --rehearse  minutes, before the hours
  gflowgr experiment small --out runs/small --dry-run   what is done and what is left
  gflowgr experiment --out runs/small --report          the report of what is there
  gflowgr experiment small --out /shared/small --ray auto    on all machines of a Ray cluster

A cell is one training with its evaluation, in a process and a folder of its own. The same command
goes on where an earlier one stopped, also with other workers or on another cluster."""


def add_experiment(commands: Commands) -> None:
    """Declare ``gflowgr experiment``."""
    parser = command(
        commands,
        "experiment",
        "compare methods on datasets, identifiers and seeds, and report",
        _EPILOG,
    )
    parser.add_argument(
        "spec", nargs="?", metavar="SPEC", help="a YAML file, or the name of a shipped experiment"
    )
    parser.add_argument("--list", action="store_true", help="list the shipped experiments")
    parser.add_argument("--out", metavar="FOLDER", help="where everything goes")
    parser.add_argument("--workers", type=int, metavar="K", help="cells at a time (default: GPUs)")
    parser.add_argument("--threads", type=int, metavar="T", help="CPU threads of each cell")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="work on the cells on this Ray cluster, or auto: the one that this machine is in; the "
        "folder is at the same place on all its machines",
    )
    parser.add_argument(
        "--gpus",
        type=float,
        metavar="G",
        help="with --ray: GPUs of each cell, such as 0.5 (default: 1 if the cluster has any)",
    )
    parser.add_argument("--only", metavar="PATTERN", help="cells whose id matches, and their needs")
    add_overrides(parser, "base.sft.max_steps=200")
    parser.add_argument("--dry-run", action="store_true", help="show the cells; do nothing")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="only four steps of every cell, in FOLDER/rehearsal: does anything fail?",
    )
    parser.add_argument("--report", action="store_true", help="write the report; run nothing")
    parser.add_argument(
        "--publish",
        metavar="FOLDER",
        help="copy what the report is made from, and write it there; run nothing",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=_experiment)


def _experiment(args: argparse.Namespace) -> int:
    from ..runs import (
        ConfigError,
        ExperimentSpec,
        cell_states,
        rehearsal_of,
        select_cells,
        shipped_specs,
    )
    from ..runs.publish import publish

    if args.list:
        for name, path in shipped_specs().items():
            print(f"{name:<16}{ExperimentSpec.title_of(path)}")
        return 0
    run_nothing = args.report or args.publish
    for name in ("out",) if run_nothing else ("spec", "out"):
        if getattr(args, name) is None:
            raise ConfigError(f"{'--out' if name == 'out' else 'SPEC'} is missing; see --help")
    out = Path(args.out)
    if run_nothing:
        if args.publish:
            publish(out, Path(args.publish))
        _report(Path(args.publish or out))
        return 0
    spec = ExperimentSpec.load(args.spec, args.overrides)
    if args.rehearse:
        spec, out = rehearsal_of(spec), out / "rehearsal"
    if args.dry_run:
        states = cell_states(select_cells(spec, args.only), out)
        for cell, state in states.items():
            print(f"{state:<8}{cell}")
        print(", ".join(f"{count} {state}" for state, count in Counter(states.values()).items()))
        return 0
    pool = _pool(args.ray, args.workers, args.threads, args.gpus)
    return carry_out(spec, out, pool, only=args.only, progress=not args.no_progress)


def _pool(
    ray: str | None, workers: int | None, threads: int | None, gpus: float | None
) -> CellPool:
    """Processes of this machine, or a Ray cluster.

    Raises:
        ConfigError: an option is out of range, or is for the other one.
    """
    from ..runs import ConfigError, LocalPool, Resources

    if ray is None:
        if gpus is not None:
            raise ConfigError(f"--gpus must come with --ray; got --gpus {gpus:g} without it")
        return LocalPool(Resources.of_machine(workers, threads))
    from ..runs.ray_pool import RayPool

    if workers is not None:
        raise ConfigError(
            "--workers must be left out with --ray, which starts as many cells as the cluster has "
            f"room for; got {workers}"
        )
    return RayPool(ray, threads=1 if threads is None else threads, gpus=gpus)


def carry_out(
    spec: ExperimentSpec,
    out: Path,
    pool: CellPool,
    *,
    only: str | None = None,
    progress: bool = True,
) -> int:
    """Run an experiment, write and show its report; the exit status."""
    from ..runs import run_experiment

    outcome = run_experiment(spec, out, pool, only=only, say=_say, progress=progress)
    _report(out)
    if outcome.failed:
        print(f"gflowgr: failed: {outcome.message}", file=sys.stderr)
        return 1
    return 0


def _report(out: Path) -> None:
    from ..runs.report import write_report

    path, summary = write_report(out)
    print(f"\n{summary}\n\nReport: {path} and {path.with_suffix('.html').name}")


def _say(text: str) -> None:
    """A line above the progress bar."""
    from tqdm.auto import tqdm

    tqdm.write(text)
