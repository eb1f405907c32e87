"""Weights of supervised targets by what their behaviours are worth: reward-weighted regression."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import Split
from ..models.settings import FlowSettings
from ..rewards.signals import InteractionLevel
from ..transfer import to_device
from .config import GFlowGRConfig

__all__ = ["TargetWeights"]


class TargetWeights:
    """``exp((v / v_max - 1) / temperature)`` of targets, v being the value of their behaviour.

    Source: reward-weighted regression (Peters & Schaal 2007), with r_a as the reward. The largest
    weight is 1, so that the scale of the loss does not grow with a small temperature.

    Args:
        temperature: of the exponential, > 0.
        args: values of behaviours.
        split: has their names.

    Raises:
        ValueError: a behaviour has no value, or none has one above 0.
    """

    def __init__(self, temperature: float, args: GFlowGRConfig, split: Split) -> None:
        self.temperature = temperature
        self._level = InteractionLevel(
            args.behaviour_values,
            split.dataset.behaviour_names,
            default_value=args.default_behaviour_value,
        )
        self._level.check_largest()

    @classmethod
    def of(cls, settings: FlowSettings, args: GFlowGRConfig, split: Split) -> TargetWeights | None:
        """Those that the settings ask for, if any."""
        temperature = settings.behaviour_temperature
        return None if temperature is None else cls(temperature, args, split)

    def __call__(self, behaviours: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The model's input ``target_weights`` [B] for behaviour codes [B] on the host."""
        weights = ((self._level.shares(behaviours) - 1.0) / self.temperature).exp()
        return {"target_weights": to_device(weights, device)}
