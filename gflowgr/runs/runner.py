"""The runner of experiments: every cell in its own process, several at a time."""

from __future__ import annotations

import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gflowgr.progress import progress_bar

from .. import files
from ..extensions import SEARCH_VARIABLE, search_path
from .cells import BUSY, Cell, cells_of, folders_of, locked
from .config import ConfigError
from .same_inputs import check_same_inputs
from .spec import ExperimentSpec

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Outcome", "Resources", "cell_states", "run_experiment", "select_cells"]

_POLL_SECONDS = 0.2
_FACTS = "experiment.json"
_WORK = (sys.executable, "-m", f"{__package__}.cell_process")


@dataclass(frozen=True)
class Resources:
    """What an experiment may use.

    Attributes:
        workers: cells at a time.
        threads: CPU threads of each.
        gpus: values of ``CUDA_VISIBLE_DEVICES``, dealt out to the workers; empty: none is set.
    """

    workers: int
    threads: int
    gpus: tuple[str, ...] = ()

    @classmethod
    def of_machine(cls, workers: int | None = None, threads: int | None = None) -> Resources:
        """One worker per GPU, or one in all; the cores shared among them.

        Raises:
            ConfigError: a number below 1.
        """
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        gpus = tuple(shown.split(",")[:count] if shown else map(str, range(count)))
        workers = max(1, count) if workers is None else workers
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // max(1, workers)) if threads is None else threads
        for name, value in (("workers", workers), ("threads", threads)):
            if value < 1:
                raise ConfigError(f"{name} must be >= 1; got {value}")
        return cls(workers, threads, gpus)


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


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[str]
    log: Path
    began: float


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
    """``"done"``, ``"running"`` (here or on another machine) or ``"to do"``, by id."""
    states = {}
    for cell in cells:
        if cell.is_complete(out):
            states[cell.id] = "done"
            continue
        with locked(cell, out) as mine:
            states[cell.id] = "to do" if mine else "running"
    return states


def run_experiment(
    spec: ExperimentSpec,
    out: Path,
    resources: Resources,
    *,
    only: str | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Outcome:
    """Carry an experiment out, or go on with it, alone or beside others in the same folder.

    Args:
        spec: what to do.
        out: where it goes.
        resources: what may be used.
        only: a shell pattern of cells' ids.
        say: receives one line per cell.
        progress: show a progress bar.

    Raises:
        ConfigError: the folder holds results of other values.
        OutputError: the folder cannot be written.
    """
    cells = select_cells(spec, only)
    files.ensure_writable(out)
    check_same_inputs(out, folders_of(cells_of(spec)))
    files.write_json(out / _FACTS, _facts(spec))
    return _Scheduler(spec, cells, out, resources, say).run(progress)


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


class _Scheduler:
    def __init__(
        self,
        spec: ExperimentSpec,
        cells: list[Cell],
        out: Path,
        resources: Resources,
        say: Callable[[str], None],
    ) -> None:
        self.spec, self.out, self.resources, self.say = spec, out, resources, say
        self.open = {cell.id: cell for cell in cells}
        self.total = len(cells)
        self.slots: list[_Running | None] = [None] * resources.workers
        self.elsewhere: set[str] = set()
        self.outcome = Outcome()

    def run(self, progress: bool) -> Outcome:
        bar = progress_bar(
            total=self.total,
            initial=sum(cell.is_complete(self.out) for cell in self.open.values()),
            unit="cell",
            desc=self.spec.name,
            smoothing=0.0,  # cells are few and end in bursts
            disable=not progress,
        )
        with bar:
            try:
                while self._step(bar):
                    time.sleep(_POLL_SECONDS)
            finally:
                self._stop()
        return self.outcome

    def _step(self, bar: tqdm[None]) -> bool:
        """Take what has ended, start what can be; false when nothing is left."""
        for slot, running in enumerate(self.slots):
            if running is not None and running.process.poll() is not None:
                self._ended(running)
                self.slots[slot] = None
        self.open = {id_: cell for id_, cell in self.open.items() if not self._settled(cell)}
        bar.update(self.total - len(self.open) - bar.n)
        for slot, running in enumerate(self.slots):
            if running is None and (cell := self._next()) is not None:
                self.slots[slot] = self._start(cell, slot)
        busy = [running.cell.id for running in self.slots if running is not None]
        bar.set_postfix_str(", ".join(busy) or "waiting for cells that run elsewhere")
        return bool(self.open)

    def _settled(self, cell: Cell) -> bool:
        """Whether nothing is left to do about a cell."""
        if cell.is_complete(self.out):
            return not self._is_running(cell)
        if cell.id in self.outcome.failed:
            return True
        if any(need in self.outcome.failed or need in self.outcome.left for need in cell.needs):
            self.outcome.left.append(cell.id)
            return True
        return False

    def _is_running(self, cell: Cell) -> bool:
        return any(slot is not None and slot.cell.id == cell.id for slot in self.slots)

    def _next(self) -> Cell | None:
        """The first cell that can be worked on here."""
        for cell in self.open.values():
            if self._is_running(cell) or any(need in self.open for need in cell.needs):
                continue
            with locked(cell, self.out) as mine:
                if mine:
                    return cell
        return None

    def _start(self, cell: Cell, slot: int) -> _Running:
        log = self.out / cell.id / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ, OMP_NUM_THREADS=str(self.resources.threads))
        environment[SEARCH_VARIABLE] = search_path()
        if self.resources.gpus:
            gpus = self.resources.gpus
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        job = {
            "cell": cell.to_dict(),
            "out": str(self.out),
            "threads": self.resources.threads,
        }
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                _WORK,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which stops them in order
            )
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(json.dumps(job))
        return _Running(cell, process, log, time.monotonic())

    def _ended(self, running: _Running) -> None:
        cell, status = running.cell, running.process.returncode
        if status == BUSY:
            return  # another machine has the cell; its result will appear
        if status == 0:
            self.outcome.done.append(cell.id)
            seconds = time.monotonic() - running.began
            self.say(f"{cell.id}: {_result(cell, self.out)}{seconds:.0f} s")
            return
        self.outcome.failed[cell.id] = running.log
        lines = running.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = lines[-1] if lines else "it said nothing"
        if status < 0:
            why = f"killed by {signal.Signals(-status).name}"
        self.say(f"{cell.id}: FAILED: {why}")

    def _stop(self) -> None:
        """Interrupt what still runs; it goes on from its last checkpoint in another call."""
        running = [slot.process for slot in self.slots if slot is not None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _result(cell: Cell, out: Path) -> str:
    """The cell's main number, if it has one."""
    path = out / cell.id / "evaluation" / "done.json"
    if not path.is_file():
        return ""
    return f"R@10 {files.read_json(path)['metrics']['R@10']:.4f}, "
