"""Trajectory samplers: they choose the other items that a prompt is trained with."""

from .base import (
    AUGMENTED,
    NOT_RECORDED,
    SHOWN,
    Candidates,
    SampleRequest,
    TrajectorySampler,
    TrajectorySet,
)
from .mixture import MixtureSampler
from .on_policy import ConfidenceSampler, OnPolicySampler
from .pool import CandidatePool, Exclude
from .proposer import BackboneProposer, Proposals, Proposer
from .replay import ReplayBuffer, ReplaySampler
from .schedules import Schedule
from .settings import MakeSampler, SamplerSettings, make_sampler
from .strategies import (
    CurriculumSampler,
    ImpressionSampler,
    LogSampler,
    PopularitySampler,
    RandomSampler,
)
from .teacher import TeacherSampler

__all__ = [
    "AUGMENTED",
    "NOT_RECORDED",
    "SHOWN",
    "BackboneProposer",
    "CandidatePool",
    "Candidates",
    "ConfidenceSampler",
    "CurriculumSampler",
    "Exclude",
    "ImpressionSampler",
    "LogSampler",
    "MakeSampler",
    "MixtureSampler",
    "OnPolicySampler",
    "PopularitySampler",
    "Proposals",
    "Proposer",
    "RandomSampler",
    "ReplayBuffer",
    "ReplaySampler",
    "SampleRequest",
    "SamplerSettings",
    "Schedule",
    "TeacherSampler",
    "TrajectorySampler",
    "TrajectorySet",
    "make_sampler",
]
