"""One run: ``gflowgr train``.

The cells of :func:`.cells.cells_of_run`, worked on one after the other in this process, or in the
processes of one ``torchrun``; nothing is spawned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..data import Split
from ..evaluation import Evaluation
from .cells import cells_of_run, folders_of
from .config import ConfigError, RunConfig
from .processes import first_process_first, is_first_process, quiet_transformers, working_alone
from .same_inputs import check_same_inputs
from .stages import Console
from .work import prepare_inputs, run_cell

__all__ = ["RunResult", "TableEntry", "run"]


@dataclass(frozen=True)
class TableEntry:
    """One row of the final table.

    Attributes:
        name: the method.
        evaluation: its metrics on the test users.
        training: optimiser steps, seconds and so on; empty for what is not trained.
    """

    name: str
    evaluation: Evaluation
    training: dict[str, Any]


@dataclass(frozen=True)
class RunResult:
    """The results of a run that its report needs.

    Attributes:
        config: the configuration.
        split: data and split.
        identifiers_name: which identifiers.
        rows: one per method.
        histories: training logs by stage, as the Trainer keeps them.
    """

    config: RunConfig
    split: Split
    identifiers_name: str
    rows: list[TableEntry]
    histories: dict[str, list[dict[str, Any]]]


def run(
    config: RunConfig, *, say: Callable[[str], None] = print, progress: bool = True
) -> RunResult:
    """Carry a configuration out, or go on with it.

    Args:
        config: what to do.
        say: receives one line per stage.
        progress: show progress bars.

    Raises:
        ConfigError: ``flow.objective`` is "sft", ``config.output_dir`` holds a run of another
            configuration or other data, or the data have a behaviour without a reward.
        DataError: the data are damaged, or do not fit the identifiers.
        OutputError: the folder cannot be written, or another run works in it.
    """
    if config.flow.objective == "sft":
        raise ConfigError("flow.objective is 'sft': there is nothing to fine-tune with")
    quiet_transformers()
    with working_alone(Path(config.output_dir)):
        return _run(config, say, progress)


def _run(config: RunConfig, say: Callable[[str], None], progress: bool) -> RunResult:
    output = Path(config.output_dir)
    console = Console(say, progress) if is_first_process() else Console(_silent, False)
    cells = cells_of_run(config)
    with first_process_first():
        check_same_inputs(output, folders_of(cells))
        if is_first_process():
            files.write_json(output / "config.json", config.to_dict())
    console.say(f"Output: {output}")
    inputs = prepare_inputs(cells[-1], output, console)
    generators: list[TableEntry] = []
    references: list[TableEntry] = []
    histories: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        work = run_cell(cell, inputs, output, console)
        training, rows = {}, references
        if work.trained is not None:
            training, rows = work.trained.training, generators
            histories[cell.label] = work.trained.history
        rows += [TableEntry(name, each, training) for name, each in work.evaluations.items()]
    assert inputs.catalogue is not None
    name = inputs.catalogue.identifiers_name
    return RunResult(config, inputs.split, name, generators + references, histories)


def _silent(text: str) -> None:
    """``say`` in the first process; the others print nothing."""
