"""Whole runs: from a configuration to trained models, a table and a report."""

from .config import ConfigError, RunConfig
from .quickstart import quickstart_config
from .report import run_and_report
from .run import RunResult, run

__all__ = [
    "ConfigError",
    "RunConfig",
    "RunResult",
    "quickstart_config",
    "run",
    "run_and_report",
]
