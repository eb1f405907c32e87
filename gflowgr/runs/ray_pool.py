"""An experiment's cells as the tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..ray_cluster import call_by_name, caller_facts, connected, gpus_of_cluster
from .cell_process import work_on_cell
from .cells import Cell
from .config import ConfigError
from .pool import CellEnd, log_of

__all__ = ["RayPool", "work_in_task"]

_POLL_SECONDS = 1.0
_RETRIES = 3
"""Of a cell whose process or machine is lost; each goes on from the cell's last checkpoint."""


class RayPool:
    """Cells as Ray tasks: one process each, with its CPUs and GPUs, on any machine of a cluster.

    A task gets the references of the tasks that it needs, so that their order is Ray's. The output
    folder is a shared one: tasks write their results there, and return the seconds they took.
    """

    def __init__(self, address: str, *, threads: int = 1, gpus: float | None = None) -> None:
        """A pool of a cluster, which is connected to when there is work.

        Args:
            address: ``HOST:PORT``, or ``"auto"``.
            threads: CPU threads of a cell, and the CPUs that its task demands.
            gpus: GPUs that it demands; None: one, if the cluster has any.

        Raises:
            ConfigError: a number is out of range.
        """
        if threads < 1:
            raise ConfigError(f"threads must be >= 1; got {threads}")
        if gpus is not None and not 0 <= gpus < float("inf"):
            raise ConfigError(f"gpus must be >= 0 and finite; got {gpus}")
        self.address, self.threads, self.gpus = address, threads, gpus

    def work(
        self, cells: Sequence[Cell], out: Path, show: Callable[[str], None]
    ) -> Generator[CellEnd, None, None]:
        """See :meth:`.pool.CellPool.work`."""
        if not cells:
            return
        import ray
        from ray.exceptions import RayError

        with connected(self.address):
            tasks = self._submit(cells, out.resolve())
            running = {task: cell for cell, task in zip(cells, tasks.values(), strict=True)}
            try:
                while running:
                    show(f"{len(running)} cells with Ray")
                    for task in ray.wait([*running], timeout=_POLL_SECONDS)[0]:
                        cell = running.pop(task)
                        try:
                            yield CellEnd(cell, ray.get(task))
                        except RayError as error:
                            needs = [tasks[need] for need in cell.needs if need in tasks]
                            # The error of a cell that it needs is that cell's own.
                            if not any(map(_has_failed, needs)):
                                yield CellEnd(cell, 0.0, _reason(error))
            finally:
                for task in running:
                    ray.cancel(task, force=True)

    def _submit(self, cells: Sequence[Cell], out: Path) -> dict[str, Any]:
        """Hand all cells to Ray: the references of their tasks, by id."""
        import ray

        gpus = min(1.0, gpus_of_cluster()) if self.gpus is None else self.gpus
        # A process does one task and ends, so that its memory, also on the GPU, is given back.
        work = ray.remote(num_cpus=self.threads, num_gpus=gpus, max_calls=1, max_retries=_RETRIES)(
            call_by_name
        )
        facts = caller_facts()
        tasks: dict[str, Any] = {}
        for cell in cells:
            needs = [tasks[need] for need in cell.needs if need in tasks]
            job = (cell.to_dict(), str(out), self.threads)
            tasks[cell.id] = work.options(name=cell.id).remote(
                facts, __name__, work_in_task.__name__, job, *needs
            )
        return tasks


def work_in_task(values: dict[str, Any], out: str, threads: int) -> float:
    """Work on a cell in this process, which says everything into the cell's log.

    Args:
        values: :meth:`.cells.Cell.to_dict`.
        out: the output folder.
        threads: CPU threads.

    Returns:
        the seconds that it took.

    Raises:
        FileNotFoundError: the folder is not the one that the experiment was started in.
    """
    began, cell, folder = time.monotonic(), Cell.from_dict(values), Path(out)
    if not (folder / "experiment.json").is_file():
        raise FileNotFoundError(
            f"{folder} must be a folder that all machines of the cluster share; got none with the "
            f"experiment's files on {socket.gethostname()}"
        )
    with _output_to(log_of(cell, folder)):
        work_on_cell(cell, folder, threads)
    return time.monotonic() - began


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Append standard output and error, also those of C++, and a traceback if there is one."""
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with log.open("ab") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        yield
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in enumerate(kept, 1):
            os.dup2(old, number)
            os.close(old)


def _has_failed(task: Any) -> bool:
    import ray
    from ray.exceptions import RayError

    if not ray.wait([task], timeout=0)[0]:
        return False
    try:
        ray.get(task)
    except RayError:
        return True
    return False


def _reason(error: Exception) -> str:
    """Why a task failed, in a line: its own exception, or what became of its process."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or ["it said nothing"]
    return f"{type(cause).__name__}: {lines[0]}"
