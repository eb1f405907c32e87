"""Means, spread over seeds, and paired differences with a bootstrap over users, Holm-corrected.

The unit of the bootstrap is the user: each draw takes n of the n users with replacement, the same
ones for both methods, for all seeds and for all pairs of methods. What is averaged is the user's
difference, mean over seeds. So an interval says how far the difference could be another one with
other users of the same kind, given these trained models; how it varies with training is said by
the spread over seeds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..evaluation.metrics import gains, hits, value_weighted_gains

__all__ = [
    "DRAWS",
    "METRICS",
    "STATISTICS_RULES",
    "Difference",
    "compare",
    "holm",
    "mean_and_spread",
    "paired_bootstrap",
    "per_user",
    "ranking_metrics",
    "user_differences",
]

METRICS = ("R@5", "R@10", "N@5", "N@10")
"""What is measured unless other lengths of the lists are asked for."""
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
    "<= 0 and >= 0, one added to both counts and to the draws, at most 1; blind to how results "
    "vary with the training seed",
    "Holm": "p-values shown are corrected for the number of comparisons by Holm's method: over all "
    "methods and metrics of a table of differences together",
}


@dataclass(frozen=True)
class Difference:
    """A mean difference, its interval and its p-values; see :data:`STATISTICS_RULES`.

    Attributes:
        mean: of the differences.
        low, high: the interval's ends.
        p: of this comparison alone.
        p_holm: corrected for the comparisons beside it; ``p`` where there are none.
    """

    mean: float
    low: float
    high: float
    p: float
    p_holm: float


def ranking_metrics(names: Iterable[str]) -> tuple[str, ...]:
    """Of an evaluation's metrics "R@k", then "N@k", then "V@k", k ascending, without N@1, which is
    R@1."""
    found = {name for name in names if name[:2] in ("R@", "N@", "V@")} - {"N@1"}
    return tuple(sorted(found, key=lambda name: ("RNV".index(name[0]), int(name[2:]))))


def per_user(
    ranks: np.ndarray, metrics: Sequence[str] = METRICS, values: np.ndarray | None = None
) -> np.ndarray:
    """Each metric for each user, float64 [n, metrics]; their means are the metrics.

    Args:
        ranks: int [n], 0-based place of the user's one target, -1 = not in the list.
        metrics: "R@k" and "N@k", and "V@k" with values.
        values: what each user's target is worth [n].

    Raises:
        ValueError: a metric "V@k" without values.
    """
    if values is None and any(metric.startswith("V@") for metric in metrics):
        raise ValueError(f"values must be given for {list(metrics)}; got None")

    def of(metric: str) -> np.ndarray:
        k = int(metric[2:])
        if metric.startswith("V@"):
            assert values is not None
            return value_weighted_gains(ranks, values, k)
        return {"R": hits, "N": gains}[metric[0]](ranks, k)

    return np.stack([of(metric) for metric in metrics], axis=1).astype(np.float64)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation with n - 1 (None for a single value)."""
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


def user_differences(
    method: Sequence[np.ndarray],
    baseline: Sequence[np.ndarray],
    metrics: Sequence[str] = METRICS,
    values: np.ndarray | None = None,
) -> np.ndarray:
    """Per-user differences, mean over seeds, float64 [n, metrics].

    Args:
        method: ranks [n] of the method, one array per seed, users in the same order in all.
        baseline: the same of the other method, for the same seeds.
        metrics, values: as of :func:`per_user`.

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
    total = sum(
        (
            per_user(ours, metrics, values) - per_user(other, metrics, values)
            for ours, other in pairs
        ),
        np.zeros(()),
    )
    return np.asarray(total / len(method))


def compare(
    ranks: Mapping[str, Mapping[int, np.ndarray]],
    pairs: Mapping[tuple[str, str], Hashable],
    metrics: Sequence[str] = METRICS,
    values: np.ndarray | None = None,
) -> dict[tuple[str, str], tuple[list[int], dict[str, Difference]]]:
    """Differences of pairs of methods over the seeds that both have, from one set of draws.

    Args:
        ranks: method to seed to ranks [n], users in the same order in all.
        pairs: (method, other) to the family whose comparisons are corrected together.
        metrics, values: as of :func:`per_user`.

    Returns:
        for each pair with a common seed: those seeds, and the difference of each metric.
    """
    common = {
        (name, other): [seed for seed in ranks[name] if seed in ranks.get(other, {})]
        for name, other in pairs
        if name != other
    }
    common = {pair: seeds for pair, seeds in common.items() if seeds}
    if not common:
        return {}
    columns = [
        user_differences(
            [ranks[name][seed] for seed in seeds],
            [ranks[other][seed] for seed in seeds],
            metrics,
            values,
        )
        for (name, other), seeds in common.items()
    ]
    drawn = iter(paired_bootstrap(np.concatenate(columns, axis=1)))
    found = {pair: [next(drawn) for _ in metrics] for pair in common}
    for family in dict.fromkeys(pairs[pair] for pair in common):
        members = [pair for pair in common if pairs[pair] == family]
        corrected = iter(holm([each.p for pair in members for each in found[pair]]))
        for pair in members:
            found[pair] = [replace(each, p_holm=next(corrected)) for each in found[pair]]
    return {
        pair: (seeds, dict(zip(metrics, found[pair], strict=True)))
        for pair, seeds in common.items()
    }


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the same order (Holm, Scand. J. Statist. 6, 1979).

    The i-th smallest of m is multiplied by m + 1 - i; none is below a smaller one's, or above 1.
    """
    corrected, least = [0.0] * len(p), 0.0
    for place, at in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, (len(p) - place) * p[at]))
        corrected[at] = least
    return corrected


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
    columns_of = zip(observed, low, high, p, p, strict=True)
    return [Difference(*map(float, values)) for values in columns_of]
