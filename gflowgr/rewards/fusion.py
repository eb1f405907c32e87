"""Fusion of a trajectory's reward signals into one: a sum, learned weights, or a small network.

R > 0 by construction: signals are checked to be >= 0, a sum of them is floored at 1e-6, and the
network ends in a softplus plus 1e-6.

Training of a learned fusion (the paper does not say how; this choice is ours). Its parameters get
the gradient of the flow loss through the target ``beta * log R``: the fusion moves the reward to
where the policy can follow. Alone that would collapse, since the cheapest reward to follow is a
constant one. Two things prevent it: weights are normalised to a mean of 1 (their sum is the number
of signals, so the reward's scale cannot shrink), and the flow loss of each trajectory is joined by

    anchor * (log R - log R_sum)^2,

with R_sum the plain sum, which is also where both learned fusions start. A constant reward would
pay the anchor times the whole variance of log R_sum; and a policy that can realise R_sum exactly
has its least loss at R = R_sum.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..full_precision import FullPrecision, at_least_float32, in_float32

__all__ = ["FusionMode", "RewardFusion"]

FusionMode = Literal["sum", "weighted", "mlp"]
_TINY = 1e-6


class RewardFusion(FullPrecision):
    """Fuses K signals per trajectory into log R.

    ``sum``: their sum; ``weighted``: ``sum_k w_k r_k`` with learned ``w >= 0`` (a softplus) of
    mean 1, all 1 at the start; ``mlp``: ``softplus(softplus^-1(sum) + net(log(1 + r)))`` with a
    network whose last layer starts at zero, so that it starts as the sum. Parameters and arithmetic
    are float32, whatever the backbone's precision.

    Args:
        num_signals: K.
        mode: ``"sum"`` (no parameter), ``"weighted"`` or ``"mlp"``.
        width: hidden units of ``"mlp"``.

    Raises:
        ValueError: an unknown mode, or no signal.
    """

    def __init__(self, num_signals: int, mode: FusionMode = "sum", *, width: int = 16) -> None:
        super().__init__()
        if mode not in get_args(FusionMode):
            raise ValueError(f"fusion must be one of {get_args(FusionMode)}; got {mode!r}")
        if num_signals < 1:
            raise ValueError(f"num_signals must be >= 1; got {num_signals}")
        self.mode = mode
        self.num_signals = num_signals
        self.raw: nn.Parameter | None = None
        self.net: nn.Sequential | None = None
        if mode == "weighted":
            self.raw = nn.Parameter(torch.full((num_signals,), math.log(math.expm1(1.0))))
        elif mode == "mlp":
            # The last layer has no bias: log Z already learns what all rewards have in common.
            last = nn.Linear(width, 1, bias=False)
            nn.init.zeros_(last.weight)
            self.net = nn.Sequential(nn.Linear(num_signals, width), nn.GELU(), last)

    @property
    def learned(self) -> bool:
        """Whether there is anything to train."""
        return self.mode != "sum"

    def weights(self) -> Tensor:
        """Weight of each signal [K], of mean 1; all 1 unless the mode is ``"weighted"``."""
        if self.raw is None:
            return torch.ones(self.num_signals)
        positive = nn.functional.softplus(at_least_float32(self.raw))
        return self.num_signals * positive / positive.sum()

    def forward(self, signals: Tensor) -> Tensor:
        """log R [B, N], in float32 or wider, of signals [B, N, K], each >= 0."""
        if signals.shape[-1] != self.num_signals:
            raise ValueError(
                f"signals must have {self.num_signals} components; got {signals.shape[-1]}"
            )
        signals = at_least_float32(signals)
        if self.raw is not None:
            signals = signals * self.weights().to(signals)
        total = signals.sum(-1).clamp_min(_TINY)
        if self.net is None:
            return total.log()
        change = in_float32(self.net, signals.log1p()).squeeze(-1).to(total)
        inverse = total + torch.log(-torch.expm1(-total))
        return (nn.functional.softplus(inverse + change) + _TINY).log()

    def departure(self, signals: Tensor, log_reward: Tensor) -> Tensor:
        """``(log R - log R_sum)^2`` [B, N], which the anchor weighs."""
        total = at_least_float32(signals).sum(-1)
        return (log_reward - total.clamp_min(_TINY).log()).square()
