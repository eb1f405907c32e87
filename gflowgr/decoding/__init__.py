"""Constrained decoding over the prefix tree."""

from .beam import BeamSearchOutput, constrained_beam_search
from .calibration import FlowCalibration, flow_calibration
from .graphed import GraphedSearch
from .sampling import SampledItems, sample_items
from .scoring import item_logprobs

__all__ = [
    "BeamSearchOutput",
    "FlowCalibration",
    "GraphedSearch",
    "SampledItems",
    "constrained_beam_search",
    "flow_calibration",
    "item_logprobs",
    "sample_items",
]
