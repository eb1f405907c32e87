"""The behaviour-aware reward R = fuse(r_a, r_yhat, r_sim) (GFlowGR, reward section)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import validation_enabled
from .fusion import RewardFusion
from .signals import RewardSignal, SignalContext

__all__ = ["BehaviourAwareReward", "RewardOutput"]


@dataclass(frozen=True)
class RewardOutput:
    """Rewards of a batch of trajectories.

    Attributes:
        log_reward: log R [B, N]; 0 at padding trajectories.
        parts: each signal by name [B, N], not in logs, before fusion; 0 at padding trajectories.
    """

    log_reward: Tensor
    parts: dict[str, Tensor]


class BehaviourAwareReward:
    """Signals of trajectories, and the reward that they make.

    Args:
        signals: see :func:`gflowgr.rewards.make_signals`.
        fusion: makes one number of them; default: their sum.

    Raises:
        ValueError: the fusion is of another number of signals.
    """

    def __init__(self, signals: Sequence[RewardSignal], fusion: RewardFusion | None = None) -> None:
        self.signals = list(signals)
        self.names = [signal.name for signal in self.signals]
        self.fusion = RewardFusion(len(self.signals)) if fusion is None else fusion
        if self.fusion.num_signals != len(self.signals):
            raise ValueError(
                f"fusion is of {self.fusion.num_signals} signals; there are {len(self.signals)}"
            )

    def measure(self, context: SignalContext) -> Tensor:
        """All signals [B, N, K] in float32, 0 at padding trajectories; what the fusion takes.

        Raises:
            ValueError: a signal is of a wrong shape, negative, NaN or infinite (values are looked
                at while data checks are on, see :func:`gflowgr.ops.set_validation`; a bad value
                that is not checked becomes NaN, and so does the loss).
        """
        absent = context.items < 0
        values = []
        for signal in self.signals:
            value = signal(context)
            if value.shape != context.items.shape:
                raise ValueError(
                    f"the signal {signal.name!r} must be [B, N] = {tuple(context.items.shape)}; "
                    f"got {tuple(value.shape)}"
                )
            values.append(value.detach().float().masked_fill(absent, 0.0))
        measured = torch.stack(values, dim=-1)
        good = (measured >= 0) & (measured < math.inf)  # not so for NaN
        if not validation_enabled():
            return measured.masked_fill(~good, math.nan)
        if not bool(good.all()):
            b, n, k = (~good).nonzero()[0].tolist()
            raise ValueError(
                f"the signal {self.names[k]!r} is {measured[b, n, k].item()} at [{b}, {n}]; "
                "signals must be finite and >= 0 (are the collaborative model's scores finite?)"
            )
        return measured

    def __call__(self, context: SignalContext) -> RewardOutput:
        """Rewards of trajectories; errors as in :meth:`measure`."""
        measured = self.measure(context)
        log_reward = self.fusion(measured).masked_fill(context.items < 0, 0.0)
        return RewardOutput(log_reward, dict(zip(self.names, measured.unbind(-1), strict=True)))
