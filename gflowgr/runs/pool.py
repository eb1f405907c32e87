"""Pools that work on an experiment's cells: the interface, and processes of this machine.

:mod:`.ray_pool` has the cluster's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..extensions import SEARCH_VARIABLE, search_path
from .cells import Cell
from .config import ConfigError

__all__ = ["CellEnd", "CellPool", "LocalPool", "Resources", "log_of"]

_POLL_SECONDS = 0.2
_WORK = (sys.executable, "-m", f"{__package__}.cell_process")


@dataclass(frozen=True)
class CellEnd:
    """How the work on a cell ended.

    Attributes:
        cell: which one.
        seconds: how long it was worked on.
        why: why it failed, in a line; None: it is complete.
    """

    cell: Cell
    seconds: float
    why: str | None = None


class CellPool(Protocol):
    """Where cells are worked on."""

    def work(
        self, cells: Sequence[Cell], out: Path, show: Callable[[str], None]
    ) -> Generator[CellEnd, None, None]:
        """Work on cells, and yield each as it ends.

        One that needs another of them begins when that is complete; if that failed, it is neither
        begun nor yielded. Closing the iterator interrupts what runs; another call goes on from its
        last checkpoint.

        Args:
            cells: none of them complete, each after those that it needs.
            out: the output folder, held by the caller (:func:`.processes.working_alone`).
            show: receives what is being worked on, as a progress bar shows it.
        """


def log_of(cell: Cell, out: Path) -> Path:
    """The file of what a cell says, of all calls that worked on it."""
    path = out / cell.id / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@dataclass(frozen=True)
class Resources:
    """What an experiment may use of this machine.

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
class _Running:
    cell: Cell
    process: subprocess.Popen[str]
    log: Path
    began: float


class LocalPool:
    """Cells in processes of this machine, several at a time: the embedded default."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources

    def work(
        self, cells: Sequence[Cell], out: Path, show: Callable[[str], None]
    ) -> Generator[CellEnd, None, None]:
        """See :meth:`CellPool.work`."""
        waiting = list(cells)
        incomplete = {cell.id for cell in cells}
        slots: list[_Running | None] = [None] * self.resources.workers
        try:
            while True:
                for slot, running in enumerate(slots):
                    if running is not None and running.process.poll() is not None:
                        slots[slot] = None
                        end = _end_of(running)
                        if end.why is None:
                            incomplete.remove(end.cell.id)
                        yield end
                for slot in (slot for slot, running in enumerate(slots) if running is None):
                    able = (cell for cell in waiting if incomplete.isdisjoint(cell.needs))
                    if (cell := next(able, None)) is not None:
                        waiting.remove(cell)
                        slots[slot] = self._start(cell, out, slot)
                busy = [running.cell.id for running in slots if running is not None]
                if not busy:
                    return
                show(", ".join(busy))
                time.sleep(_POLL_SECONDS)
        finally:
            still = [running.process for running in slots if running is not None]
            for process in still:
                process.terminate()
            for process in still:
                process.wait()

    def _start(self, cell: Cell, out: Path, slot: int) -> _Running:
        log, threads, gpus = log_of(cell, out), self.resources.threads, self.resources.gpus
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
        environment[SEARCH_VARIABLE] = search_path()
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        job = {"cell": cell.to_dict(), "out": str(out), "threads": threads}
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
        # It stays open: the cell's process ends when this one is gone.
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return _Running(cell, process, log, time.monotonic())


def _end_of(running: _Running) -> CellEnd:
    """What came of a process that has ended."""
    process, why = running.process, None
    assert process.stdin is not None
    process.stdin.close()
    if process.returncode < 0:
        why = f"killed by {signal.Signals(-process.returncode).name}"
    elif process.returncode > 0:
        lines = running.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = lines[-1] if lines else "it said nothing"
    return CellEnd(running.cell, time.monotonic() - running.began, why)
