"""Rewards of trajectories."""

from .behaviour_aware import BehaviourAwareReward, RewardOutput, default_behaviour_values

__all__ = ["BehaviourAwareReward", "RewardOutput", "default_behaviour_values"]
