"""One cell in a process of its own: ``python -m gflowgr.runs.cell_process < job.json``.

The process ends with 0 when the cell is complete, with :data:`.cells.BUSY` when another has it, and
otherwise with a traceback.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from .. import files
from ..evaluation import analyse, measure_calibration
from ..rewards import BehaviourAwareReward, CatalogueReward, make_signals
from ..training.cross_fitting import calibrate_temperature
from .cells import BUSY, Cell, locked
from .config import ConfigError
from .processes import quiet_transformers
from .stages import Console
from .work import CellInputs, CellWork, prepare_inputs, run_cell

__all__ = ["analyse_cell"]

_CALIBRATION_USERS = 32


def main() -> int:
    """Work on the cell that standard input describes."""
    job = json.load(sys.stdin)
    cell, out = Cell.from_dict(job["cell"]), Path(job["out"])
    torch.set_num_threads(job["threads"])
    console = Console(_say, progress=False)
    with locked(cell, out) as mine:
        if not mine:
            return BUSY
        if not cell.is_complete(out):
            quiet_transformers()
            inputs = prepare_inputs(cell, out, console)
            work = run_cell(cell, inputs, out, console)
            analyse_cell(cell, inputs, work, out, console)
    return 0


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
