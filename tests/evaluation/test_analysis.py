"""What lies behind an evaluation, against plain definitions."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gflowgr.data import Dataset, LeaveOneOut, Ragged, generate_builtin
from gflowgr.evaluation import Evaluation, analyse
from gflowgr.evaluation import metrics as m
from gflowgr.evaluation.analysis import (
    BY_HISTORY,
    BY_INTERACTIONS,
    BY_POPULARITY,
    cold_start_groups,
)

TOKENS = np.array([[0, 2], [0, 3], [1, 2], [1, 4], [1, 5], [0, 5], [1, -1], [0, -1]])


def a_dataset(sequences: list[list[int]]) -> Dataset:
    return Dataset(
        name="tiny",
        user_ids=[f"u{i}" for i in range(len(sequences))],
        sequences=Ragged.from_lists(sequences),
        num_items=max(max(row) for row in sequences) + 1,
    )


@pytest.fixture(scope="module")
def tiny_split() -> LeaveOneOut:
    return LeaveOneOut(a_dataset([[0, 1, 2, 3], [4, 5, 6, 0], [7, 7, 1, 7], [2, 5], [6, 0, 4, 2]]))


def an_evaluation(split: LeaveOneOut, users: np.ndarray, items: np.ndarray) -> Evaluation:
    everyone = split.eval_users("test")
    targets = split.targets("test")[np.searchsorted(everyone, users)]
    ranks = m.ranks_in_lists(items, targets)
    k = items.shape[1]
    metrics = {f"R@{k}": m.recall(ranks, k), f"N@{k}": m.ndcg(ranks, k)}
    return Evaluation("random", "test", metrics, {}, users, ranks, items)


def analysed(split: LeaveOneOut, lists: list[list[int]]) -> dict[str, Any]:
    """Of lists for the first evaluated users, as read back from the file."""
    users = split.eval_users("test")[: len(lists)]
    evaluation = an_evaluation(split, users, np.array(lists))
    return json.loads(json.dumps(analyse(evaluation, split, TOKENS).to_dict()))


def plain_entropy(values: list[int]) -> float:
    shares = [count / len(values) for count in Counter(values).values()]
    return -sum(share * math.log(share) for share in shares)


lists_of_items = st.lists(
    st.permutations(range(8)).flatmap(
        lambda order: st.integers(0, 4).map(lambda n: [*order[:n], *[-1] * (4 - n)])
    ),
    min_size=1,
    max_size=4,
)


@given(lists=lists_of_items)
def test_diversity_is_as_defined(tiny_split: LeaveOneOut, lists: list[list[int]]) -> None:
    diversity = analysed(tiny_split, lists)["diversity"]
    items = [item for row in lists for item in row if item >= 0]
    assert diversity["coverage"] == len(set(items)) / 8
    assert diversity["item_entropy"] == pytest.approx(plain_entropy(items), abs=1e-12)
    counts = [items.count(item) for item in range(8)]
    differences = sum(abs(a - b) for a, b in itertools.product(counts, counts))
    assert diversity["gini"] == pytest.approx(differences / (2 * 8 * max(1, len(items))))
    codes = [[int(TOKENS[i, level]) for i in items if TOKENS[i, level] >= 0] for level in (0, 1)]
    assert diversity["code_entropy"] == pytest.approx([plain_entropy(c) for c in codes], abs=1e-12)
    training = [item for row in tiny_split.train_sequences for item in row.tolist()]
    popularity = sum(training.count(item) for item in items) / max(1, len(items))
    assert diversity["mean_popularity"] == pytest.approx(popularity)


@given(lists=lists_of_items)
def test_intra_list_distance_is_a_mean_over_pairs(
    tiny_split: LeaveOneOut, lists: list[list[int]]
) -> None:
    means = []
    for row in lists:
        shares = []
        for a, b in itertools.combinations([item for item in row if item >= 0], 2):
            positions = [p for p in zip(TOKENS[a], TOKENS[b], strict=True) if max(p) >= 0]
            shares.append(sum(x != y for x, y in positions) / len(positions))
        if shares:
            means.append(sum(shares) / len(shares))
    expected = sum(means) / len(means) if means else 0.0
    found = analysed(tiny_split, lists)["diversity"]["intra_list_distance"]
    assert found == pytest.approx(expected)


def test_each_user_is_in_one_group_and_the_groups_make_up_the_whole() -> None:
    split = LeaveOneOut(generate_builtin(seed=0, num_users=300, num_items=200), max_history=8)
    rng = np.random.default_rng(0)
    users = np.sort(rng.choice(split.eval_users("test"), 250, replace=False))
    items = np.stack([rng.permutation(200)[:40] for _ in users])
    evaluation = an_evaluation(split, users, items)
    assert 0 < evaluation.metrics["R@40"] < 1
    breakdown = analyse(evaluation, split, None).breakdown
    assert list(breakdown) == [BY_POPULARITY, BY_INTERACTIONS, BY_HISTORY]
    for groups in breakdown.values():
        assert len(groups) >= 2
        assert all(group.users > 0 for group in groups)
        assert sum(group.users for group in groups) == 250
        for name, value in evaluation.metrics.items():
            mean = sum(group.users * group.metrics[name] for group in groups) / 250
            assert mean == pytest.approx(value)


def test_targets_are_grouped_by_their_interactions_in_training() -> None:
    """Ten items occur in training: the two most popular are the head (20 %), the next three (30 %)
    in the middle. Item 10 occurs as a target only."""
    training = [item for item in range(10) for _ in range(item + 1)]
    targets = [0, 4, 5, 7, 8, 9, 10]
    split = LeaveOneOut(a_dataset([[*training, 0, 0]] + [[0, 0, t] for t in targets[1:]]))
    assert split.item_counts.tolist() == [7, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0]
    items = np.array([[target] for target in targets])
    items[3] = 9  # the user whose target is item 7, of the middle, gets another
    groups = analyse(an_evaluation(split, np.arange(7), items), split, None).breakdown
    assert [(g.name, g.users, g.metrics["R@1"]) for g in groups[BY_POPULARITY]] == [
        ("new", 1, 1.0),  # item 10
        ("tail", 2, 1.0),  # items 4, 5
        ("mid", 2, 0.5),  # items 0, 7
        ("head", 2, 1.0),  # items 8, 9
    ]


def test_targets_are_grouped_from_cold_to_warm() -> None:
    training = [0] * 20 + [1] * 5 + [2] * 4 + [3]
    targets = [0, 1, 2, 3, 4, 4]
    split = LeaveOneOut(a_dataset([[*training, 0, 0]] + [[0, 0, t] for t in targets[1:]]))
    items = np.array([[target] for target in targets])
    items[5] = 0  # the last user gets another
    evaluation = an_evaluation(split, np.arange(6), items)
    wanted = [
        ("none", 2, 0.5),  # item 4
        ("1 to 4", 2, 1.0),  # items 2, 3
        ("5 to 19", 1, 1.0),
        ("20 or more", 1, 1.0),
    ]
    groups = analyse(evaluation, split, None).breakdown[BY_INTERACTIONS]
    assert [(g.name, g.users, g.metrics["R@1"]) for g in groups] == wanted
    # Items from number 2 on came after the training, whatever the split's training part has.
    later = cold_start_groups(evaluation, split, trained_items=2)
    assert [(g.name, g.users) for g in later] == [("none", 4), ("5 to 19", 1), ("20 or more", 1)]
    with pytest.raises(ValueError, match="trained_items must be 0 to 5; got 6"):
        cold_start_groups(evaluation, split, 6)


def test_items_of_equal_popularity_are_in_one_group() -> None:
    split = LeaveOneOut(a_dataset([[0, 1, 2, 3, 0, 3], [1, 1], [2, 2]]))
    assert split.item_counts.tolist() == [1, 3, 3, 1]
    groups = analyse(an_evaluation(split, np.array([0]), np.array([[3]])), split, None).breakdown
    assert [group.name for group in groups[BY_POPULARITY]] == ["tail"]


def test_users_are_grouped_by_their_whole_history() -> None:
    rows = [[0] * length for length in (3, 5, 6, 10, 11, 20, 21)]
    split = LeaveOneOut(a_dataset(rows), max_history=2)
    items = np.array([[0]] * 7)
    groups = analyse(an_evaluation(split, np.arange(7), items), split, None).breakdown[BY_HISTORY]
    assert [(group.name, group.users) for group in groups] == [
        ("up to 4", 2),
        ("5 to 9", 2),
        ("10 to 19", 2),
        ("20 or more", 1),
    ]


def test_without_identifiers_what_needs_them_is_left_open(tiny_split: LeaveOneOut) -> None:
    evaluation = an_evaluation(tiny_split, np.array([0]), np.array([[3, 1]]))
    diversity = analyse(evaluation, tiny_split, None).diversity
    assert diversity.code_entropy is None
    assert diversity.intra_list_distance is None
    assert diversity.coverage == 2 / 8


def test_an_evaluation_of_other_data_is_refused(tiny_split: LeaveOneOut) -> None:
    evaluation = an_evaluation(tiny_split, np.array([0]), np.array([[3, 1]]))
    with pytest.raises(ValueError, match=r"item_tokens must be \[items, L\] with 8 items"):
        analyse(evaluation, tiny_split, TOKENS[:5])
    other = LeaveOneOut(a_dataset([[0, 1], [0, 1, 2]]))
    with pytest.raises(ValueError, match=r"evaluation\.users holds 0, for whom tiny has no target"):
        analyse(evaluation, other, None)
    other = LeaveOneOut(a_dataset([[0, 1, 2]]))
    with pytest.raises(ValueError, match=r"evaluation\.items holds 3; tiny has 3 items"):
        analyse(evaluation, other, None)
