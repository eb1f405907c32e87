"""Collaborative models: anything that scores items for a user's history.

They serve three purposes: a baseline row in every table, the curriculum of the trajectory
sampler, and the estimated-score signal of the reward. All are optional.
"""

from __future__ import annotations

from gflowgr.collaborative.base import (
    CollaborativeModel,
    score_positions,
    score_training_prompts,
)
from gflowgr.collaborative.embedding import EmbeddingScorer
from gflowgr.collaborative.ensemble import AverageModel, CrossFitted
from gflowgr.collaborative.popularity import Popularity
from gflowgr.collaborative.sasrec import SASRec, SASRecConfig
from gflowgr.collaborative.saved import is_collaborative, load_collaborative

__all__ = [
    "AverageModel",
    "CollaborativeModel",
    "CrossFitted",
    "EmbeddingScorer",
    "Popularity",
    "SASRec",
    "SASRecConfig",
    "is_collaborative",
    "load_collaborative",
    "score_positions",
    "score_training_prompts",
]
