"""Collaborative models: anything that scores items for a user's history.

They serve three purposes: a baseline row in every table, the curriculum of the trajectory
sampler, and the estimated-score signal of the reward. All are optional.
"""

from __future__ import annotations

from gflowgr.collaborative.base import CollaborativeModel
from gflowgr.collaborative.embedding import EmbeddingScorer
from gflowgr.collaborative.popularity import Popularity
from gflowgr.collaborative.sasrec import SASRec, SASRecConfig

__all__ = [
    "CollaborativeModel",
    "EmbeddingScorer",
    "Popularity",
    "SASRec",
    "SASRecConfig",
]
