"""The subcommands of ``gflowgr``: one ``add_...(commands)`` each, which declares its arguments and
what runs. Imported with the command line, so nothing heavy is imported before a command runs."""

from __future__ import annotations

from .data import add_data
from .evaluate import add_evaluate
from .experiment import add_experiment
from .export import add_export
from .identifiers import add_identifiers
from .info import add_info
from .recommend import add_recommend
from .runs import add_quickstart, add_train
from .serve import add_serve

__all__ = ["COMMANDS"]

COMMANDS = (
    add_quickstart,
    add_train,
    add_experiment,
    add_evaluate,
    add_recommend,
    add_serve,
    add_export,
    add_data,
    add_identifiers,
    add_info,
)
"""In the order of the help."""
