"""Constrained decoding over the prefix tree."""

from .beam import BeamSearchOutput, constrained_beam_search
from .recommender import GenerativeRecommender
from .sampling import SampledItems, sample_items
from .scoring import item_logprobs

__all__ = [
    "BeamSearchOutput",
    "GenerativeRecommender",
    "SampledItems",
    "constrained_beam_search",
    "item_logprobs",
    "sample_items",
]
