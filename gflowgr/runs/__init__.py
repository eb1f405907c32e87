"""Whole runs and experiments: from one configuration to trained models, tables and a report.

**Cells.** The work is divided into cells (:class:`Cell`): the collaborative model, the supervised
start, each fine-tuning. ``gflowgr train`` is a run with the few cells of one configuration, worked
on in one process, or in those of ``torchrun`` (:func:`run`); ``gflowgr experiment`` has one for
every dataset, seed, set of identifiers and method (:func:`run_experiment`), each in a process of
its own, several at a time: a pool starts them on this machine (:class:`LocalPool`) or on a Ray
cluster (:class:`.ray_pool.RayPool`). What is done for a cell is the same (:mod:`.work`).

**Stages.** A cell prepares its data, trains, and evaluates; each of these leaves a folder and, last
of all, a file that says that it is complete (:mod:`.stages`). The same command again reads what is
complete, and goes on with a training from its last complete checkpoint.

**Same inputs.** Each folder records what it was made from. A run of another configuration, or on
other data, is refused there, and told which folders to delete (:mod:`.same_inputs`).

**Locks.** All go with their process, however that ends. A run or an experiment has its whole output
folder to itself: a second one is refused (:func:`.processes.working_alone`). What cells share is
prepared by one while the others wait (:func:`.processes.alone`).
"""

from .cells import Cell, cells_of
from .config import ConfigError, RunConfig
from .pool import CellPool, LocalPool, Resources
from .quickstart import quickstart_resources, quickstart_spec
from .rehearsal import rehearsal_of
from .run import RunResult, run
from .run_report import run_and_report
from .runner import Outcome, cell_states, run_experiment, select_cells
from .spec import ExperimentSpec, Method, Variant, shipped_specs

__all__ = [
    "Cell",
    "CellPool",
    "ConfigError",
    "ExperimentSpec",
    "LocalPool",
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
