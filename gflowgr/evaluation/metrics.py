"""Ranking metrics: pure functions over ranks and recommended lists.

One target per user, so Recall equals the hit rate, and the ideal DCG is 1.
"""

from __future__ import annotations

import numpy as np
import torch

MISS = -1
"""Rank of a target that is not in the list."""


def recall(ranks: np.ndarray, k: int) -> float:
    """Mean of :func:`hits` over users, 0 without users."""
    return float(hits(ranks, k).mean()) if len(ranks) else 0.0


def ndcg(ranks: np.ndarray, k: int) -> float:
    """Mean of :func:`gains` over users, 0 without users."""
    return float(gains(ranks, k).mean()) if len(ranks) else 0.0


def hits(ranks: np.ndarray, k: int) -> np.ndarray:
    """Whether each user's target is among the first ``k``, bool [n].

    Args:
        ranks: int [n], 0-based, -1 = not in the list.
        k: length of the list that counts.

    Raises:
        ValueError: ``k`` below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    return (ranks >= 0) & (ranks < k)


def gains(ranks: np.ndarray, k: int) -> np.ndarray:
    """Discounted gain of each user, ``1 / log2(rank + 2)`` for a hit, else 0; float64 [n].

    Arguments and errors as those of :func:`hits`.
    """
    return np.where(hits(ranks, k), 1.0 / np.log2(np.maximum(ranks, 0) + 2.0), 0.0)


def value_weighted_gains(ranks: np.ndarray, values: np.ndarray, k: int) -> np.ndarray:
    """:func:`gains` of each user times the value of their target over the mean value, float64 [n].

    Its mean is the value-weighted NDCG, ``sum of v gain / sum of v``: what is lost on a target that
    is worth much costs more.

    Args:
        ranks: int [n], 0-based, -1 = not in the list.
        values: of the targets [n], >= 0, one of them above 0.
        k: length of the list that counts.

    Raises:
        ValueError: ``k`` below 1, or values of another number, negative, or all 0.
    """
    values = np.asarray(values, np.float64)
    good = values.shape == ranks.shape and bool(np.isfinite(values).all() and (values >= 0).all())
    if not (good and values.any()):
        raise ValueError(
            f"values must be {len(ranks)} finite numbers >= 0, one of them > 0; got "
            f"{np.array2string(values, threshold=10)}"
        )
    return gains(ranks, k) * (values / values.mean())


def ranks_in_lists(lists: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """0-based place of each target in its list, int64 [n]; -1 = miss.

    Args:
        lists: int64 [n, k], best first, -1 = nothing.
        targets: int64 [n].
    """
    found = lists == targets[:, None]
    return np.where(found.any(1), found.argmax(1), MISS).astype(np.int64)


def ranks_of_targets(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """0-based rank of each target among all items, int64 [n]; ties by ascending item id.

    Args:
        scores: float [n, num_items].
        targets: int64 [n].
    """
    own = scores.gather(1, targets[:, None])
    ids = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > own) | ((scores == own) & (ids < targets[:, None]))
    return ahead.sum(1)


def drop_repeats(lists: np.ndarray) -> np.ndarray:
    """Keep the first occurrence of each id in a row, close the gaps, fill the end with -1.

    Args:
        lists: int64 [n, k]; entries of -1 are dropped too.
    """
    keep = lists >= 0
    for column in range(1, lists.shape[1]):
        keep[:, column] &= (lists[:, :column] != lists[:, column : column + 1]).all(1)
    order = np.argsort(~keep, axis=1, kind="stable")
    closed = np.take_along_axis(np.where(keep, lists, -1), order, axis=1)
    return np.ascontiguousarray(closed)


def coverage(lists: np.ndarray, catalogue: int) -> float:
    """Share of the ``catalogue`` (number of items) that occurs in any list."""
    return len(np.unique(lists[lists >= 0])) / catalogue


def entropy(lists: np.ndarray) -> float:
    """Shannon entropy, in nats, of the distribution of recommended items.

    0 when everybody gets the same single item, log(catalogue) when all are recommended equally
    often.
    """
    counts = np.unique(lists[lists >= 0], return_counts=True)[1]
    shares = counts / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())
