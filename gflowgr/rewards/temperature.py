"""Temperature of a softmax over scores: of the least NLL of observed items, or of an entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["mean_entropy", "mean_nll", "temperature_of_entropy", "temperature_of_nll"]

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def mean_nll(scores: Tensor, targets: Tensor, temperature: float) -> float:
    """Mean of ``-log softmax(scores / temperature)[target]`` in nats.

    Args:
        scores: [B, items]; -inf for items at 0.
        targets: item ids [B].
        temperature: > 0.
    """
    log_p = F.log_softmax(scores.float() / temperature, dim=-1)
    return -float(log_p.gather(1, targets[:, None]).double().mean())


def mean_entropy(scores: Tensor, temperature: float) -> float:
    """Mean entropy in nats of ``softmax(scores / temperature)``; scores as in :func:`mean_nll`."""
    log_p = F.log_softmax(scores.float() / temperature, dim=-1)
    return -float(torch.special.xlogy(log_p.exp(), log_p.exp()).sum(1).double().mean())


def temperature_of_nll(
    scores: Tensor,
    targets: Tensor,
    *,
    low: float = 0.3,
    high: float = 3.0,
    tolerance: float = 0.005,
) -> float:
    """The temperature in [low, high] with the least :func:`mean_nll`.

    By golden-section search in log T, which finds the least value because the NLL is convex in
    1 / T (a log-sum-exp of linear functions). About 15 passes over the scores.

    Args:
        scores: [B, items]; -inf for items at 0. The targets must not be among those.
        targets: item ids [B].
        low, high: bounds of the search.
        tolerance: relative precision of the result.

    Raises:
        ValueError: bounds or tolerance out of order, or no target, or one at -inf.
    """
    if not (0 < low < high < math.inf and 0 < tolerance < 1):
        raise ValueError(
            "low, high and tolerance must be 0 < low < high and 0 < tolerance < 1; "
            f"got {low}, {high} and {tolerance}"
        )
    if len(targets) == 0 or not math.isfinite(mean_nll(scores, targets, high)):
        raise ValueError(f"targets must be items with finite scores; got {len(targets)} targets")
    begin, end = math.log(low), math.log(high)
    left, right = end - _GOLDEN * (end - begin), begin + _GOLDEN * (end - begin)
    at_left = mean_nll(scores, targets, math.exp(left))
    at_right = mean_nll(scores, targets, math.exp(right))
    while end - begin > tolerance:
        if at_left < at_right:
            end, right, at_right = right, left, at_left
            left = end - _GOLDEN * (end - begin)
            at_left = mean_nll(scores, targets, math.exp(left))
        else:
            begin, left, at_left = left, right, at_right
            right = begin + _GOLDEN * (end - begin)
            at_right = mean_nll(scores, targets, math.exp(right))
    return math.exp((begin + end) / 2.0)


def temperature_of_entropy(
    scores: Tensor,
    entropy: float,
    *,
    low: float = 1e-3,
    high: float = 1e3,
    tolerance: float = 1e-3,
) -> float:
    """The temperature at which :func:`mean_entropy` is ``entropy`` nats, by bisection in log T.

    The entropy of a softmax never falls as the temperature rises.

    Args:
        scores: [B, items]; -inf for items at 0.
        entropy: the wanted mean, in nats.
        low, high: bounds of the search.
        tolerance: relative precision of the temperature.

    Raises:
        ValueError: the entropy is not reached between the bounds.
    """
    least, most = mean_entropy(scores, low), mean_entropy(scores, high)
    if not least <= entropy <= most:
        raise ValueError(
            f"entropy must be between {least:.3f} and {most:.3f} nats for these scores; "
            f"got {entropy}"
        )
    begin, end = math.log(low), math.log(high)
    while end - begin > tolerance:
        middle = (begin + end) / 2.0
        if mean_entropy(scores, math.exp(middle)) < entropy:
            begin = middle
        else:
            end = middle
    return math.exp((begin + end) / 2.0)
