"""Means, spread over seeds, and paired differences with a bootstrap over users.

The unit of the bootstrap is the user: each draw takes n of the n users with replacement, the same
ones for both methods, for all seeds and for all pairs of methods. What is averaged is the user's
difference, mean over seeds. So an interval says how far the difference could be another one with
other users of the same kind, given these trained models; how it varies with training is said by
the spread over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..evaluation.metrics import gains, hits

__all__ = [
    "DRAWS",
    "METRICS",
    "STATISTICS_RULES",
    "Difference",
    "mean_and_spread",
    "paired_bootstrap",
    "per_user",
    "user_differences",
]

METRICS = ("R@5", "R@10", "N@5", "N@10")
DRAWS = 10_000
"""Draws of users per interval."""
STATISTICS_SEED = 0
"""Seed of the draws; all intervals of as many users come from the same draws."""
LEVEL = 0.95
_BLOCK = 4_000_000  # users drawn at a time: 32 MB of counts

STATISTICS_RULES = {
    "±": "standard deviation over seeds (n - 1); none for a single seed",
    "Difference": "mean over users and seeds of the method's value less the other's, on the same "
    "users and seeds; a seed that one of the two lacks is left out of both",
    "Interval": f"{LEVEL:.0%} percentile interval of {DRAWS:,} bootstrap draws of users, drawn "
    f"together for both methods and all seeds (seed {STATISTICS_SEED})",
    "p": "two-sided, of no difference: twice the smaller of the shares of draws with a difference "
    "<= 0 and >= 0, one added to both counts and to the draws, at most 1; not corrected for the "
    "number of comparisons, and blind to how results vary with the training seed",
}


@dataclass(frozen=True)
class Difference:
    """A mean difference, its interval and its p-value; see :data:`STATISTICS_RULES`."""

    mean: float
    low: float
    high: float
    p: float


def per_user(ranks: np.ndarray) -> np.ndarray:
    """Each metric of :data:`METRICS` for each user, float64 [n, 4]; their means are the metrics.

    Args:
        ranks: int [n], 0-based place of the user's one target, -1 = not in the list.
    """
    of = {"R": hits, "N": gains}
    columns = [of[metric[0]](ranks, int(metric[2:])) for metric in METRICS]
    return np.stack(columns, axis=1).astype(np.float64)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation with n - 1 (None for a single value)."""
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


def user_differences(method: Sequence[np.ndarray], baseline: Sequence[np.ndarray]) -> np.ndarray:
    """Per-user differences, mean over seeds, float64 [n, 4].

    Args:
        method: ranks [n] of the method, one array per seed, users in the same order in all.
        baseline: the same of the other method, for the same seeds.

    Raises:
        ValueError: no seed, or not the same numbers of seeds or users.
    """
    shapes = {ranks.shape for ranks in (*method, *baseline)}
    if not len(method) == len(baseline) > 0 or len(shapes) != 1:
        raise ValueError(
            f"method and baseline must have the same seeds (at least one) and users; got "
            f"{len(method)} and {len(baseline)} seeds with shapes {sorted(shapes)}"
        )
    pairs = zip(method, baseline, strict=True)
    total = sum((per_user(ours) - per_user(other) for ours, other in pairs), np.zeros(()))
    return np.asarray(total / len(method))


def paired_bootstrap(
    differences: np.ndarray, *, draws: int = DRAWS, seed: int = STATISTICS_SEED
) -> list[Difference]:
    """Intervals and p-values of the columns' means, rows (users) being drawn with replacement.

    How often each user is drawn is counted, and a block of draws is then one matrix product, so
    22,000 users and 80 columns take seconds.

    Args:
        differences: float [n, columns], one row per user.
        draws: number of draws.
        seed: of the draws.

    Raises:
        ValueError: no users, or no draws.
    """
    count, columns = differences.shape
    if count == 0 or draws < 1:
        raise ValueError(
            f"users (rows of differences) and draws must be at least 1; got {count} and {draws}"
        )
    rng = np.random.default_rng(seed)
    # Users without any difference (most: targets that no method finds) share the first column.
    active = differences.any(axis=1)
    width = int(active.sum()) + 1
    column = np.where(active, np.cumsum(active), 0)
    means = np.empty((draws, columns))
    block = max(1, _BLOCK // count)
    for first in range(0, draws, block):
        size = min(block, draws - first)
        drawn = column[rng.integers(count, size=(size, count), dtype=np.int32)]
        drawn += (np.arange(size) * width)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * width).reshape(size, width)
        means[first : first + size] = counts[:, 1:].astype(np.float64) @ differences[active]
    means /= count
    # A mean that is 0 in exact arithmetic is counted on both sides of the p-value.
    means[np.abs(means) < 1e-12] = 0.0
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, (tail, 1 - tail), axis=0)
    smaller = np.minimum((means <= 0).sum(0), (means >= 0).sum(0))
    p = np.minimum(1.0, 2.0 * (smaller + 1) / (draws + 1))
    observed = differences.mean(axis=0)
    return [Difference(*map(float, values)) for values in zip(observed, low, high, p, strict=True)]
