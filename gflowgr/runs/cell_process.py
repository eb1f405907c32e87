"""One cell in a process of its own: ``python -m gflowgr.runs.cell_process``.

The first line of standard input is the job, in JSON. The process ends with 0 when the cell is
complete, and otherwise with a traceback; it is ended when standard input is closed before.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from .. import files
from ..evaluation import analyse, measure_calibration
from ..rewards import BehaviourAwareReward, CatalogueReward, make_signals
from ..training.cross_fitting import calibrate_temperature
from .cells import Cell
from .config import ConfigError
from .processes import quiet_transformers
from .stages import Console
from .work import CellInputs, CellWork, prepare_inputs, run_cell

__all__ = ["analyse_cell", "end_with_caller", "work_on_cell"]

_CALIBRATION_USERS = 32


def main() -> int:
    """Work on the cell that standard input describes."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_caller, args=(sys.stdin.fileno(),), daemon=True).start()
    work_on_cell(Cell.from_dict(job["cell"]), Path(job["out"]), job["threads"])
    return 0


def end_with_caller(standard_input: int) -> None:
    """End this process when the one that started it is gone, however it ended.

    Nobody but the caller has the pipe's other end. Otherwise the next call for the same folder
    would work on the same cell at the same time.
    """
    while os.read(standard_input, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def work_on_cell(cell: Cell, out: Path, threads: int) -> None:
    """Do a cell's work and analyse its results, or go on with it; what is said is printed.

    Args:
        cell: what to do; the cells that it needs must be complete.
        out: the output folder.
        threads: CPU threads of this process.
    """
    torch.set_num_threads(threads)
    console = Console(_say, progress=False)
    quiet_transformers()
    inputs = prepare_inputs(cell, out, console)
    work = run_cell(cell, inputs, out, console)
    analyse_cell(cell, inputs, work, out, console)


def _say(text: str) -> None:
    print(text, flush=True)


def analyse_cell(
    cell: Cell, inputs: CellInputs, work: CellWork, out: Path, console: Console
) -> None:
    """Write ``analysis.json`` beside each evaluation, which completes the cell."""
    tokens = None if inputs.catalogue is None else inputs.catalogue.tokens
    for name, folder in cell.evaluations.items():
        evaluation, calibration = work.evaluations[name], None
        if work.trained is not None:
            console.say("Stage: calibration")
            calibration = measure_calibration(
                work.trained.model,
                inputs.split,
                _common_reward(cell, inputs),
                inputs.collaborative,
                users=min(_CALIBRATION_USERS, len(evaluation.users)),
                progress=False,
            )
        analysis = analyse(evaluation, inputs.split, tokens, calibration)
        files.write_json(out / folder / "analysis.json", analysis.to_dict(), indent=None)


def _common_reward(cell: Cell, inputs: CellInputs) -> BehaviourAwareReward | CatalogueReward:
    """The reward of all methods' calibration, independent of their training."""
    if cell.config.evaluation.calibration == "scores":
        if inputs.collaborative is None:
            raise ConfigError(
                "evaluation.calibration must be 'signals' without a collaborative model; got "
                "'scores'"
            )
        seen = cell.config.flow.seen_items
        found = calibrate_temperature(
            inputs.collaborative, inputs.split, seen=seen, seed=cell.config.seed
        )
        return CatalogueReward(temperature=found.temperature, seen=seen)
    names = ["r_a", "r_yhat", "r_sim"] if inputs.collaborative is not None else ["r_a", "r_sim"]
    signals = make_signals(
        names,
        behaviour_values=cell.config.method_arguments.get("behaviour_values"),
        behaviour_names=inputs.split.dataset.behaviour_names,  # stars have names there only
    )
    return BehaviourAwareReward(signals)


if __name__ == "__main__":
    sys.exit(main())
