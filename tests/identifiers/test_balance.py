"""Balanced assignment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from gflowgr.identifiers.balance import balanced_clusters, sinkhorn_codes


def test_sinkhorn_uses_all_codes_about_equally() -> None:
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(640, 4, generator=rng)
    centres = torch.randn(32, 4, generator=rng) * 0.2 + 1.0  # all to one side: nearest is uneven
    distances = torch.cdist(vectors, centres).square()
    nearest = torch.bincount(distances.argmin(dim=1), minlength=32)
    balanced = torch.bincount(sinkhorn_codes(distances), minlength=32)
    assert nearest.max() > 100
    assert nearest.min() == 0
    assert 8 <= balanced.min() <= balanced.max() <= 40  # 20 each


def test_sinkhorn_costs_little_more_than_the_exact_balanced_assignment() -> None:
    rng = torch.Generator().manual_seed(1)
    distances = torch.rand(60, 6, generator=rng)
    slots = distances.repeat_interleave(10, dim=1).numpy()
    exact = slots[linear_sum_assignment(slots)].sum()
    ours = distances.gather(1, sinkhorn_codes(distances)[:, None]).sum().item()
    assert ours <= exact * 1.05


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_sinkhorn_of_extreme_distances(scale: float) -> None:
    distances = torch.rand(9, 4, generator=torch.Generator().manual_seed(2)).double() * scale
    distances[0, 0] = scale * 1e6
    codes = sinkhorn_codes(distances)
    assert codes.min() >= 0
    assert codes.max() < 4


@given(st.integers(1, 8), st.integers(0, 12), st.integers(0, 99))
def test_clusters_are_of_equal_size(clusters: int, more: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(clusters + more, 2)).astype(np.float32)
    found = balanced_clusters(vectors, clusters, seed=seed)
    sizes = np.bincount(found, minlength=clusters)
    assert sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(found, balanced_clusters(vectors, clusters, seed=seed))


def test_clusters_of_equal_size_are_found_where_they_are() -> None:
    rng = np.random.default_rng(0)
    vectors = np.repeat([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], 7, axis=0) + rng.normal(size=(21, 2))
    found = balanced_clusters(vectors.astype(np.float32), 3).reshape(3, 7)
    assert (found == found[:, :1]).all()
    assert len(set(found[:, 0].tolist())) == 3


def test_more_clusters_than_vectors() -> None:
    with pytest.raises(ValueError, match="clusters must be from 1 to the 3 vectors; got 4"):
        balanced_clusters(np.zeros((3, 2), np.float32), 4)
