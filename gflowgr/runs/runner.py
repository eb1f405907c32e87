"""The runner of experiments: which cells there are to do, what came of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from gflowgr.progress import progress_bar

from .. import files
from .cells import Cell, cells_of, folders_of
from .config import ConfigError
from .pool import CellPool, log_of
from .processes import working_alone
from .same_inputs import check_same_inputs
from .spec import ExperimentSpec

__all__ = ["FACTS", "Outcome", "cell_states", "run_experiment", "select_cells"]

FACTS = "experiment.json"
"""File of an experiment's folder with its facts, written before any work."""


@dataclass
class Outcome:
    """How a call of :func:`run_experiment` went.

    Attributes:
        done: ids of the cells that this call completed.
        failed: ids of those that failed, with the files of what they said.
        left: ids of those that were not worked on, because one that they need failed.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, Path] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    @property
    def message(self) -> str:
        """What failed, and where to read why; empty if nothing did."""
        if not self.failed:
            return ""
        logs = "; ".join(f"{cell} (see {path})" for cell, path in self.failed.items())
        rest = f"; {len(self.left)} cells need them and were left" if self.left else ""
        return f"{len(self.failed)} cells failed: {logs}{rest}"


def select_cells(spec: ExperimentSpec, pattern: str | None) -> list[Cell]:
    """The cells whose id matches a shell pattern, and those that they need.

    Raises:
        ConfigError: none matches.
    """
    cells = cells_of(spec)
    if pattern is None:
        return cells
    wanted = {cell.id for cell in cells if fnmatch.fnmatchcase(cell.id, pattern)}
    if not wanted:
        raise ConfigError(f"--only {pattern!r} matches no cell, such as {cells[-1].id!r}")
    for cell in reversed(cells):  # each comes after those that it needs
        if cell.id in wanted:
            wanted.update(cell.needs)
    return [cell for cell in cells if cell.id in wanted]


def cell_states(cells: list[Cell], out: Path) -> dict[str, str]:
    """``"done"``, ``"begun"`` (it runs, was interrupted or failed) or ``"to do"``, by id."""
    states = {}
    for cell in cells:
        begun = "begun" if (out / cell.id / "log.txt").is_file() else "to do"
        states[cell.id] = "done" if cell.is_complete(out) else begun
    return states


def run_experiment(
    spec: ExperimentSpec,
    out: Path,
    pool: CellPool,
    *,
    only: str | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Outcome:
    """Carry an experiment out, or go on with it.

    Args:
        spec: what to do.
        out: where it goes.
        pool: works on the cells.
        only: a shell pattern of cells' ids.
        say: receives one line per cell.
        progress: show a progress bar.

    Raises:
        ConfigError: the folder holds results of other values.
        OutputError: the folder cannot be written, or another run works in it.
    """
    cells = select_cells(spec, only)
    with working_alone(out):
        check_same_inputs(out, folders_of(cells_of(spec)))
        files.write_json(out / FACTS, _facts(spec))
        return _work(spec.name, cells, out, pool, say, progress)


def _work(
    name: str,
    cells: list[Cell],
    out: Path,
    pool: CellPool,
    say: Callable[[str], None],
    progress: bool,
) -> Outcome:
    left = {cell.id: cell for cell in cells if not cell.is_complete(out)}
    bar = progress_bar(
        total=len(cells),
        initial=len(cells) - len(left),
        unit="cell",
        desc=name,
        smoothing=0.0,  # cells are few and end in bursts
        disable=not progress,
    )
    outcome = Outcome()
    with bar, closing(pool.work([*left.values()], out, bar.set_postfix_str)) as ends:
        for end in ends:
            cell = end.cell
            del left[cell.id]
            bar.update()
            if end.why is None:
                outcome.done.append(cell.id)
                say(f"{cell.id}: {_result(cell, out)}{end.seconds:.0f} s")
            else:
                outcome.failed[cell.id] = log_of(cell, out)
                say(f"{cell.id}: FAILED: {end.why}")
    outcome.left = [*left]
    return outcome


def _facts(spec: ExperimentSpec) -> dict[str, object]:
    """The facts of the experiment that its report reads."""
    return {
        "name": spec.name,
        "title": spec.title,
        "baseline": spec.baseline,
        "seeds": spec.seeds,
        "datasets": {
            name: {
                "identifiers": [
                    Path(variant.folder).name
                    for variant in spec.variants
                    if variant.dataset == name and variant.seed == spec.seeds[0]
                ]
            }
            for name in spec.datasets
        },
        "methods": [vars(method) | {"slug": method.slug} for method in spec.methods],
        "base": spec.base,
        "caveats": spec.caveats,
    }


def _result(cell: Cell, out: Path) -> str:
    """The cell's main number, if it has one."""
    path = out / cell.id / "evaluation" / "done.json"
    if not path.is_file():
        return ""
    return f"R@10 {files.read_json(path)['metrics']['R@10']:.4f}, "
