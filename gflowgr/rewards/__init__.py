"""Rewards of trajectories: signals, their fusion, and the two together."""

from .behaviour_aware import BehaviourAwareReward, RewardOutput
from .fusion import FusionMode, RewardFusion
from .signals import (
    SIGNALS,
    RewardSignal,
    SignalContext,
    check_signal_names,
    default_behaviour_values,
    make_signals,
)

__all__ = [
    "SIGNALS",
    "BehaviourAwareReward",
    "FusionMode",
    "RewardFusion",
    "RewardOutput",
    "RewardSignal",
    "SignalContext",
    "check_signal_names",
    "default_behaviour_values",
    "make_signals",
]
