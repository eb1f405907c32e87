"""Metrics against loops that follow their definitions word by word."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gflowgr.evaluation import metrics as m

LISTS = st.integers(1, 6).flatmap(
    lambda k: st.lists(st.lists(st.integers(-1, 8), min_size=k, max_size=k), min_size=1, max_size=8)
)
# Few different values, so that ties are common; minus infinity stands for an excluded item.
SCORES = st.integers(1, 12).flatmap(
    lambda items: st.lists(
        st.lists(
            st.sampled_from([0.0, -0.0, 1.0, 2.5, -1.5, -(2.0**-130), -math.inf]),
            min_size=items,
            max_size=items,
        ),
        min_size=1,
        max_size=6,
    )
)


@given(LISTS, st.integers(1, 7), st.data())
def test_recall_and_ndcg(rows: list[list[int]], k: int, data: st.DataObject) -> None:
    targets = [data.draw(st.integers(0, 8)) for _ in rows]
    hits, gains = 0, 0.0
    for row, target in zip(rows, targets, strict=True):
        for place, item in enumerate(row[:k]):
            if item == target:
                hits += 1
                gains += 1 / math.log2(place + 2)
                break
    ranks = m.ranks_in_lists(np.array(rows), np.array(targets))
    assert m.recall(ranks, k) == pytest.approx(hits / len(rows))
    assert m.ndcg(ranks, k) == pytest.approx(gains / len(rows))


def test_known_values() -> None:
    ranks = np.array([0, 1, 4, m.MISS])
    assert m.recall(ranks, 1) == 0.25
    assert m.recall(ranks, 5) == 0.75
    assert m.ndcg(ranks, 5) == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(6)) / 4)
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        m.recall(ranks, 0)


@given(LISTS)
def test_drop_repeats(rows: list[list[int]]) -> None:
    expected = []
    for row in rows:
        kept = list(dict.fromkeys(item for item in row if item >= 0))
        expected.append(kept + [-1] * (len(row) - len(kept)))
    assert m.drop_repeats(np.array(rows)).tolist() == expected


@given(LISTS)
def test_coverage_and_entropy(rows: list[list[int]]) -> None:
    flat = [item for row in rows for item in row if item >= 0]
    counts = [flat.count(item) for item in set(flat)]
    expected = -sum(c / len(flat) * math.log(c / len(flat)) for c in counts)
    assert m.coverage(np.array(rows), 9) == pytest.approx(len(counts) / 9)
    assert m.entropy(np.array(rows)) == pytest.approx(expected, abs=1e-12)


def test_a_target_counts_by_its_value() -> None:
    ranks, values = np.array([0, 2, -1]), np.array([4.0, 1.0, 5.0])
    found = m.value_weighted_gains(ranks, values, 3)
    assert found.mean() == pytest.approx((4.0 * 1.0 + 1.0 * 0.5) / 10.0)
    alike = m.value_weighted_gains(ranks, np.full(3, 7.0), 3)
    assert alike == pytest.approx(m.gains(ranks, 3))
    for wrong in ([1.0, 2.0], [0.0, 0.0, 0.0], [1.0, -1.0, 2.0], [1.0, math.nan, 2.0]):
        with pytest.raises(ValueError, match="values must be 3 finite numbers >= 0"):
            m.value_weighted_gains(ranks, np.array(wrong), 3)


def test_entropy_of_extremes() -> None:
    assert m.entropy(np.array([[3], [3], [3]])) == 0.0
    assert m.entropy(np.arange(8)[:, None]) == pytest.approx(math.log(8))


@given(SCORES, st.data())
def test_rank_of_a_target_breaks_ties_by_item_id(
    rows: list[list[float]], data: st.DataObject
) -> None:
    targets = [data.draw(st.integers(0, len(row) - 1)) for row in rows]
    expected = []
    for row, target in zip(rows, targets, strict=True):
        order = sorted(range(len(row)), key=lambda item: (-row[item], item))
        expected.append(order.index(target))
    assert m.ranks_of_targets(torch.tensor(rows), torch.tensor(targets)).tolist() == expected
