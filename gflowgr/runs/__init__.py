"""Whole runs and experiments: from one configuration to trained models, tables and a report.

**Cells.** The work is divided into cells (:class:`Cell`): the collaborative model, the supervised
start, each fine-tuning. ``gflowgr train`` is a run with the few cells of one configuration, worked
on in one process, or in those of ``torchrun`` (:func:`run`); ``gflowgr experiment`` has one for
every dataset, seed, set of identifiers and method, each in a process of its own, several at a time
(:func:`run_experiment`). What is done for a cell is the same (:mod:`.work`).

**Stages.** A cell prepares its data, trains, and evaluates; each of these leaves a folder and, last
of all, a file that says that it is complete (:mod:`.stages`). The same command again reads what is
complete, and goes on with a training from its last complete checkpoint.

**Same inputs.** Each folder records what it was made from. A run of another configuration, or on
other data, is refused there, and told which folders to delete (:mod:`.same_inputs`).

**Locks.** All go with their process, however that ends. A run has its whole output folder to
itself: a second one is refused (:func:`.processes.working_alone`). In an experiment's folder
several callers work, also on several machines: each cell is locked by who works on it, and the
others take another (:func:`.cells.locked`); what cells share is prepared by one while they wait
(:func:`.cells.alone`).
"""

from .cells import Cell, cells_of
from .config import ConfigError, RunConfig
from .quickstart import quickstart_resources, quickstart_spec
from .rehearsal import rehearsal_of
from .run import RunResult, run
from .run_report import run_and_report
from .runner import Outcome, Resources, cell_states, run_experiment, select_cells
from .spec import ExperimentSpec, Method, Variant, shipped_specs

__all__ = [
    "Cell",
    "ConfigError",
    "ExperimentSpec",
    "Method",
    "Outcome",
    "Resources",
    "RunConfig",
    "RunResult",
    "Variant",
    "cell_states",
    "cells_of",
    "quickstart_resources",
    "quickstart_spec",
    "rehearsal_of",
    "run",
    "run_and_report",
    "run_experiment",
    "select_cells",
    "shipped_specs",
]
