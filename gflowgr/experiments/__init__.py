"""Experiments: datasets x identifiers x seeds x methods, from one description to one report."""

from .cells import Cell, cells_of
from .rehearsal import rehearsal_of
from .runner import Outcome, Resources, cell_states, run_experiment, select_cells
from .spec import ExperimentSpec, Method, Track, shipped_specs

__all__ = [
    "Cell",
    "ExperimentSpec",
    "Method",
    "Outcome",
    "Resources",
    "Track",
    "cell_states",
    "cells_of",
    "rehearsal_of",
    "run_experiment",
    "select_cells",
    "shipped_specs",
]
