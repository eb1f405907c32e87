"""Balanced assignment: every code takes about, or exactly, the same number of vectors."""

from __future__ import annotations

import numpy as np
import torch

from gflowgr.identifiers.quantisation import squared_distances


def sinkhorn_codes(
    distances: torch.Tensor, *, epsilon: float = 0.05, iterations: int = 50
) -> torch.Tensor:
    """Codes under which every code is used about equally often.

    The entropic transport plan between the vectors (mass 1 each) and the codes (mass n / K each):
    rows and columns of ``exp(-distances / epsilon)`` are scaled in turn until they have these sums
    (Cuturi 2013, "Sinkhorn Distances"); a vector takes the code with most of its mass.

    Args:
        distances: [n, K] squared distances of vectors to codes.
        epsilon: strength of the smoothing, in units of the mean of ``distances`` less each row's
            minimum; smaller is closer to the exact, and slower.
        iterations: scalings of rows and columns.

    Returns:
        int64 [n]; ties go to the smaller code.
    """
    cost = distances.double()
    # Constants per row or column change the scalings, not the plan. With both taken off, every row
    # and every column has an entry exp(0).
    cost = cost - cost.min(dim=1, keepdim=True).values
    unit = cost.mean().clamp(min=torch.finfo(torch.float64).tiny)
    cost = cost - cost.min(dim=0, keepdim=True).values
    # Bounded, so that all entries stay positive and the scalings converge, outliers or not.
    plan = torch.exp(-(cost / (epsilon * unit)).clamp(max=300.0))
    count, size = plan.shape
    columns = torch.ones(size, dtype=plan.dtype, device=plan.device)
    for _ in range(iterations):
        rows = 1.0 / (plan @ columns)
        columns = (count / size) / (rows @ plan)
    return (plan * columns).argmax(dim=1)


def balanced_clusters(
    vectors: np.ndarray, clusters: int, *, seed: int = 0, iterations: int = 10
) -> np.ndarray:
    """k-means with clusters of equal size (up to one), by exact assignment.

    Lloyd's iterations in which the assignment is the one of least total squared distance with
    ``n // clusters`` vectors per cluster, and one more in the first ``n % clusters``.

    Args:
        vectors: [n, d], n >= clusters.
        clusters: how many.
        seed: of the k-means++ start.
        iterations: at most; fewer when nothing changes.

    Returns:
        int32 [n], the cluster of each vector.

    Raises:
        ValueError: more clusters than vectors, or none.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import kmeans_plusplus

    count = len(vectors)
    if not 1 <= clusters <= count:
        raise ValueError(f"clusters must be from 1 to the {count} vectors; got {clusters}")
    centres = kmeans_plusplus(vectors.astype(np.float64), clusters, random_state=seed)[0]
    # Each cluster has as many slots as it takes vectors.
    slot_cluster = np.sort(np.arange(count) % clusters)
    assigned = np.full(count, -1, dtype=np.int32)
    for _ in range(iterations):
        cost = squared_distances(vectors, centres)[:, slot_cluster]
        items, slots = linear_sum_assignment(cost)
        now = np.empty(count, dtype=np.int32)
        now[items] = slot_cluster[slots]
        if np.array_equal(now, assigned):
            break
        assigned = now
        centres = np.stack([vectors[assigned == c].mean(axis=0) for c in range(clusters)])
    return assigned
