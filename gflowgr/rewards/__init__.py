"""Rewards of trajectories."""

from .behaviour_aware import BehaviourAwareReward, RewardOutput

__all__ = ["BehaviourAwareReward", "RewardOutput"]
