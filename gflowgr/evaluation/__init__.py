"""Evaluation: full ranking, metrics with their rules, analysis, tables, reports and plots."""

from __future__ import annotations

from gflowgr.evaluation.analysis import Analysis, analyse
from gflowgr.evaluation.calibration import Calibration, measure_calibration
from gflowgr.evaluation.evaluate import Evaluation, evaluate
from gflowgr.evaluation.recommender import Recommender, ScoringRecommender
from gflowgr.evaluation.report import (
    Example,
    Report,
    command_as_typed,
    example_recommendations,
    machine_summary,
    write_report,
)
from gflowgr.evaluation.tables import TableRow, format_table

__all__ = [
    "Analysis",
    "Calibration",
    "Evaluation",
    "Example",
    "Recommender",
    "Report",
    "ScoringRecommender",
    "TableRow",
    "analyse",
    "command_as_typed",
    "evaluate",
    "example_recommendations",
    "format_table",
    "machine_summary",
    "measure_calibration",
    "write_report",
]
