"""Rewards of trajectories: signals, their fusion, and rewards of the whole catalogue."""

from .behaviour_aware import BehaviourAwareReward, RewardOutput
from .catalogue import CatalogueReward, CatalogueSignal, Seen
from .fusion import FusionMode, RewardFusion
from .signals import (
    SIGNALS,
    InteractionLevel,
    RewardSignal,
    SignalContext,
    check_signal_names,
    default_behaviour_values,
    make_signals,
)

__all__ = [
    "SIGNALS",
    "BehaviourAwareReward",
    "CatalogueReward",
    "CatalogueSignal",
    "FusionMode",
    "InteractionLevel",
    "RewardFusion",
    "RewardOutput",
    "RewardSignal",
    "Seen",
    "SignalContext",
    "check_signal_names",
    "default_behaviour_values",
    "make_signals",
]
