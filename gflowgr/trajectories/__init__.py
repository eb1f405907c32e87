"""Trajectory samplers."""

from .samplers import (
    CandidatePool,
    CurriculumSampler,
    RandomSampler,
    SampleRequest,
    TrajectorySampler,
    TrajectorySet,
)

__all__ = [
    "CandidatePool",
    "CurriculumSampler",
    "RandomSampler",
    "SampleRequest",
    "TrajectorySampler",
    "TrajectorySet",
]
