"""Evaluation: splits, collision rule, seen-item rule, and recommenders that misbehave."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from gflowgr.collaborative import Popularity
from gflowgr.data import LeaveOneOut, load_dataset
from gflowgr.evaluation import Evaluation, Recommender, ScoringRecommender, evaluate


class Fixed:
    """Recommends the same ranking to everybody, and remembers what it was asked."""

    name = "fixed"

    def __init__(self, ranking: Sequence[int]) -> None:
        self.ranking = ranking
        self.histories: list[list[int]] = []
        self.lengths: list[int] = []

    def recommend(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        exclude: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        self.histories += [history.tolist() for history in histories]
        self.lengths.append(k)
        items = np.full((len(histories), k), -1)
        for row in range(len(histories)):
            barred = set() if exclude is None else set(exclude[row].tolist())
            left = [item for item in self.ranking if item not in barred][:k]
            items[row, : len(left)] = left
        return items, np.zeros((len(histories), k), np.float32)


def run(recommender: Recommender, split: LeaveOneOut, which: str, **options: object) -> Evaluation:
    return evaluate(recommender, split, which, progress=False, **options)  # type: ignore[arg-type]


def test_histories_targets_and_metrics(split: LeaveOneOut) -> None:
    fixed = Fixed([7, 3, 1, 0, 2, 4, 5, 6])
    result = run(fixed, split, "test", ks=(1, 3), batch_size=3)
    assert isinstance(fixed, Recommender)
    assert fixed.histories == [[1, 2], [5, 6], [7, 1], [4, 2]]
    # Targets 3, 0, 7, 5 stand at places 1, 3, 0 and 6.
    assert result.users.tolist() == [0, 1, 2, 4]
    assert result.ranks.tolist() == [1, -1, 0, -1]
    assert result.items.tolist() == [[7, 3, 1]] * 4
    assert result.metrics == {
        "R@1": 0.25,
        "R@3": 0.5,
        "N@1": 0.25,
        "N@3": pytest.approx((1 + 1 / math.log2(3)) / 4),
        "coverage": 3 / 8,
        "entropy": pytest.approx(math.log(3)),
        "num_users": 4.0,
    }


def test_validation_does_not_see_the_validation_item(split: LeaveOneOut) -> None:
    fixed = Fixed([2, 6, 1, 0, 3, 4, 5, 7])
    result = run(fixed, split, "valid", ks=(3,))
    assert fixed.histories == [[0, 1], [4, 5], [7, 7], [0, 4]]
    assert result.ranks.tolist() == [0, 1, 2, 0]


def test_seen_items_are_masked_only_on_demand(split: LeaveOneOut) -> None:
    ranking = [0, 1, 2, 3, 4, 5, 6, 7]
    plain = run(Fixed(ranking), split, "test", ks=(4,))
    masked = run(Fixed(ranking), split, "test", ks=(4,), mask_seen=True)
    assert plain.items[3].tolist() == [0, 1, 2, 3]
    # User 4 has 6, 0, 4 in training (more than the history holds) and 2 as validation item.
    assert masked.items[3].tolist() == [1, 3, 5, 7]
    # The target of user 2 was seen before: under this rule it cannot be recommended.
    assert masked.items[2].tolist() == [0, 2, 3, 4]
    assert "not masked" in plain.rules["Seen items"]
    assert masked.rules["Seen items"].startswith("masked")


def test_item_rule_tells_items_of_one_identifier_apart(split: LeaveOneOut) -> None:
    # 3 (the target of user 0) and 1 share an identifier; the recommender lists 1 first.
    result = run(Fixed([1, 3, 5, 0, 2, 4, 6, 7]), split, "test", ks=(1, 2), collision="item")
    assert result.ranks.tolist() == [1, -1, -1, -1]
    assert result.rules["Collisions"].startswith("item:")


def test_string_rule_compares_identifiers_and_drops_repeats(split: LeaveOneOut) -> None:
    leaf_of = np.array([0, 1, 2, 1, 3, 4, 4, 2])  # {1, 3}, {5, 6} and {2, 7} share identifiers
    fixed = Fixed([1, 3, 5, 6, 0, 2, 7, 4])
    result = run(fixed, split, "test", ks=(1, 3, 4), collision="string", leaf_of=leaf_of)
    # Distinct identifiers in order: 1 (items 1, 3), 4 (5, 6), 0, 2 (2, 7).
    assert result.items.tolist() == [[1, 5, 0, 2]] * 4
    # Targets 3, 0, 7, 5 have the identifiers 1, 0, 2, 4.
    assert result.ranks.tolist() == [0, 2, 3, 1]
    assert result.metrics["coverage"] == 4 / 5
    assert fixed.lengths == [4, 8]  # asked again, because repeats had left the lists too short
    assert result.rules["Collisions"].startswith("string:")


def test_string_rule_accepts_that_there_is_no_more(split: LeaveOneOut) -> None:
    leaf_of = np.zeros(8, np.int64)
    result = run(Fixed([1, 3]), split, "test", ks=(3,), collision="string", leaf_of=leaf_of)
    assert result.items.tolist() == [[1, -1, -1]] * 4
    assert result.ranks.tolist() == [0, 0, 0, 0]


def test_string_rule_without_shared_identifiers_equals_the_item_rule(split: LeaveOneOut) -> None:
    leaf_of = np.random.default_rng(0).permutation(8)
    ranking = [5, 2, 0, 7, 3, 1, 6, 4]
    by_string = run(Fixed(ranking), split, "test", collision="string", leaf_of=leaf_of)
    by_item = run(Fixed(ranking), split, "test", collision="item")
    assert by_string.metrics == by_item.metrics
    assert np.array_equal(by_string.ranks, by_item.ranks)


def test_subset_of_users_is_seeded_and_stated(split: LeaveOneOut) -> None:
    picks = [run(Fixed([0]), split, "test", max_users=2, seed=seed).users for seed in range(8)]
    again = run(Fixed([0]), split, "test", max_users=2, seed=0)
    assert np.array_equal(picks[0], again.users)
    assert len(again.users) == 2
    assert len({tuple(pick) for pick in picks}) > 1
    assert again.rules["Users"] == "2 of 4"
    assert run(Fixed([0]), split, "test", max_users=9).rules["Users"] == "4, all of them"


def test_true_utility(split: LeaveOneOut) -> None:
    truth = split.dataset.truth
    assert truth is not None
    result = run(Fixed([7, 6]), split, "test", ks=(3,), truth=truth)
    # Two places filled, the third counts as the user's worst item.
    users = truth[[0, 1, 2, 4]].astype(float)
    expected = ((users[:, 7] + users[:, 6] + users.min(1)) / 3).mean()
    assert result.metrics["utility@3"] == pytest.approx(expected)
    assert "Utility" in result.rules


def test_ndcg_by_the_value_of_the_targets(split: LeaveOneOut) -> None:
    fixed = Fixed([7, 3, 1, 0, 2, 4, 5, 6])
    result = run(fixed, split, "test", ks=(1, 3), target_values=np.array([5.0, 1.0, 3.0, 1.0]))
    assert result.ranks.tolist() == [1, -1, 0, -1]
    assert result.metrics["V@1"] == pytest.approx(3.0 / 10)
    assert result.metrics["V@3"] == pytest.approx((5.0 / math.log2(3) + 3.0) / 10)
    assert "1 to 5, mean 2.5" in result.rules["V@k"]
    some = run(
        fixed, split, "test", ks=(1, 3), max_users=2, target_values=np.array([5.0, 1.0, 3.0, 1.0])
    )
    assert some.values is not None
    worth = dict(zip(result.users.tolist(), (5.0, 1.0, 3.0, 1.0), strict=True))
    assert some.values.tolist() == [worth[user] for user in some.users.tolist()]
    with pytest.raises(ValueError, match=r"target_values must have shape \(4,\)"):
        run(fixed, split, "test", ks=(1,), target_values=np.ones(3))


def test_unbiased_recall_is_the_share_of_the_true_utility(split: LeaveOneOut) -> None:
    truth = split.dataset.truth
    assert truth is not None
    truth = truth.copy()
    truth[0] = 0  # nothing is of use to this user: whatever is shown, nothing is found
    result = run(Fixed([7, 6]), split, "test", ks=(3,), truth=truth)
    users = truth[[1, 2, 4]].astype(float)
    shares = (users[:, 7] + users[:, 6]) / users.sum(1)
    assert result.metrics["unbiased R@3"] == pytest.approx(shares.sum() / 4)
    assert "Unbiased recall" in result.rules


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"collision": "leaf"}, "collision must be 'item' or 'string'; got 'leaf'"),
        ({"collision": "string"}, "needs leaf_of"),
        ({"leaf_of": np.arange(7)}, r"leaf_of must have shape \(8,\)"),
        ({"ks": ()}, "ks must hold positive integers"),
        ({"ks": (0, 5)}, "ks must hold positive integers"),
        ({"max_users": 0}, "max_users must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"truth": np.zeros((2, 8))}, r"truth must have shape \(5, 8\)"),
    ],
)
def test_bad_arguments_are_named(
    split: LeaveOneOut, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(Fixed([0]), split, "test", **options)


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        ([0, 1, 0], "fixed recommended item 0 twice in one list"),
        ([0, 8], "fixed recommended item 8"),
        ([-2, 1], "lowest -2"),
    ],
)
def test_invalid_lists_are_refused(split: LeaveOneOut, ranking: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Fixed(ranking), split, "test")


class NaNModel:
    num_items = 8

    def score(self, histories: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        scores = torch.zeros(len(histories), 8)
        scores[1, 2] = float("nan")
        return scores


def test_nan_scores_are_refused(split: LeaveOneOut) -> None:
    with pytest.raises(ValueError, match=r"broken gave a score that is NaN for histories\[1\]"):
        run(ScoringRecommender("broken", NaNModel()), split, "test")


def test_scoring_recommender_excludes_and_pads() -> None:
    recommender = ScoringRecommender("pop", Popularity(np.array([5, 1, 5, 0])))
    histories = [np.array([1]), np.array([], np.int64)]
    items, scores = recommender.recommend(histories, 6, [np.array([0, 1]), np.array([], np.int64)])
    assert items.tolist() == [[2, 3, -1, -1, -1, -1], [0, 2, 1, 3, -1, -1]]
    assert np.isneginf(scores[0, 2:]).all()
    assert np.isfinite(scores[0, :2]).all()
    with pytest.raises(ValueError, match="exclude has 1 rows, histories 2"):
        recommender.recommend(histories, 3, [np.array([0])])


@pytest.mark.parametrize(
    ("mask_seen", "expected"),
    [(False, (0.0072, 0.0114, 0.0053)), (True, (0.0075, 0.0115, 0.0055))],
)
def test_popularity_on_beauty_reproduces_the_reference(
    data_root: Path, mask_seen: bool, expected: tuple[float, float, float]
) -> None:
    """The reference was measured independently: REFERENCE_RESULTS.md of the data bundle."""
    split = LeaveOneOut(load_dataset(data_root / "Beauty"))
    recommender = ScoringRecommender("popularity", Popularity(split.item_counts))
    result = run(recommender, split, "test", mask_seen=mask_seen, batch_size=2048)
    found = tuple(round(result.metrics[key], 4) for key in ("R@5", "R@10", "N@10"))
    assert found == expected
    assert result.metrics["num_users"] == 22363
    if not mask_seen:
        assert result.metrics["coverage"] == pytest.approx(10 / 12101)
        assert result.metrics["entropy"] == pytest.approx(math.log(10))


def test_rules_and_metrics_can_be_written_as_json(split: LeaveOneOut) -> None:
    result = run(Fixed([0, 1]), split, "test")
    assert json.loads(json.dumps(result.metrics)) == result.metrics
    assert set(result.rules) == {
        "Split",
        "Users",
        "Candidates",
        "Collisions",
        "Seen items",
        "Diversity",
    }
