"""Whole runs and experiments: from one configuration to trained models, tables and a report."""

from .cells import Cell, cells_of
from .config import ConfigError, RunConfig
from .quickstart import quickstart_config
from .rehearsal import rehearsal_of
from .run import RunResult, run
from .run_report import run_and_report
from .runner import Outcome, Resources, cell_states, run_experiment, select_cells
from .spec import ExperimentSpec, Method, Track, shipped_specs

__all__ = [
    "Cell",
    "ConfigError",
    "ExperimentSpec",
    "Method",
    "Outcome",
    "Resources",
    "RunConfig",
    "RunResult",
    "Track",
    "cell_states",
    "cells_of",
    "quickstart_config",
    "rehearsal_of",
    "run",
    "run_and_report",
    "run_experiment",
    "select_cells",
    "shipped_specs",
]
