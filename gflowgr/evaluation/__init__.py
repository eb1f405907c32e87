"""Evaluation: full ranking, metrics with their rules, diversity, breakdowns and calibration."""

from __future__ import annotations

from gflowgr.evaluation.analysis import Analysis, analyse
from gflowgr.evaluation.calibration import Calibration, measure_calibration
from gflowgr.evaluation.evaluate import Evaluation, evaluate
from gflowgr.evaluation.recommender import Recommender, ScoringRecommender
from gflowgr.evaluation.summed import SummedRecommender

__all__ = [
    "Analysis",
    "Calibration",
    "Evaluation",
    "Recommender",
    "ScoringRecommender",
    "SummedRecommender",
    "analyse",
    "evaluate",
    "measure_calibration",
]
