"""Evaluation: full ranking, metrics with their rules, tables, reports and plots."""

from __future__ import annotations

from gflowgr.evaluation.evaluate import Evaluation, evaluate
from gflowgr.evaluation.recommender import Recommender, ScoringRecommender
from gflowgr.evaluation.report import (
    Example,
    Report,
    example_recommendations,
    machine_summary,
    write_report,
)
from gflowgr.evaluation.tables import TableRow, format_table

__all__ = [
    "Evaluation",
    "Example",
    "Recommender",
    "Report",
    "ScoringRecommender",
    "TableRow",
    "evaluate",
    "example_recommendations",
    "format_table",
    "machine_summary",
    "write_report",
]
