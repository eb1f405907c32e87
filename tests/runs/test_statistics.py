"""Per-user metrics, spread, and the paired bootstrap, against definitions of their own."""

from __future__ import annotations

import statistics as standard

import numpy as np
import pytest

from gflowgr.evaluation.metrics import ndcg, recall
from gflowgr.runs.statistics import (
    METRICS,
    compare,
    holm,
    mean_and_spread,
    paired_bootstrap,
    per_user,
    ranking_metrics,
    user_differences,
)


def test_metrics_per_user_average_to_those_of_the_evaluation() -> None:
    ranks = np.random.default_rng(0).integers(-1, 10, 200)
    expected = [recall(ranks, 5), recall(ranks, 10), ndcg(ranks, 5), ndcg(ranks, 10)]
    assert per_user(ranks).mean(axis=0) == pytest.approx(np.array(expected))
    assert per_user(np.array([2])) == pytest.approx(np.array([[1, 1, 0.5, 0.5]]))
    assert not per_user(np.array([-1])).any()


def test_users_count_by_the_value_of_their_targets() -> None:
    ranks, values = np.array([0, 2, -1]), np.array([4.0, 1.0, 5.0])
    found = per_user(ranks, ("N@5", "V@5"), values)
    assert found.mean(axis=0) == pytest.approx(np.array([1.5 / 3, 4.5 / 10]))
    ours, other = [ranks], [np.array([-1, 0, -1])]
    differences = user_differences(ours, other, ("V@5",), values)
    assert differences.mean() == pytest.approx((4.5 - 1.0) / 10)
    pair = ("a", "b")
    compared = compare({"a": {1: ours[0]}, "b": {1: other[0]}}, {pair: 0}, ("V@5",), values)
    assert compared[pair][1]["V@5"].mean == pytest.approx(0.35)
    with pytest.raises(ValueError, match="values must be given"):
        per_user(ranks, ("V@5",))


def test_spread_is_the_sample_deviation_and_none_for_one_seed() -> None:
    values = [0.31, 0.35, 0.30]
    assert mean_and_spread(values) == pytest.approx((standard.mean(values), standard.stdev(values)))
    assert mean_and_spread([0.5]) == (0.5, None)


def test_differences_are_paired_by_user_and_averaged_over_seeds() -> None:
    ours = [np.array([0, -1, 5]), np.array([0, 0, -1])]
    other = [np.array([-1, -1, 5]), np.array([0, -1, 4])]
    assert user_differences(ours, other)[:, METRICS.index("R@10")].tolist() == [0.5, 0.5, -0.5]
    with pytest.raises(ValueError, match="2 and 1 seeds"):
        user_differences(ours, other[:1])
    with pytest.raises(ValueError, match="users"):
        user_differences(ours[:1], [np.array([1, 2])])


def test_bootstrap_equals_resampling_written_out() -> None:
    rng = np.random.default_rng(1)
    values = np.where(rng.random((40, 2)) < 0.5, 0.0, rng.normal(size=(40, 2)))
    drawn = np.random.default_rng(3).integers(40, size=(500, 40), dtype=np.int32)
    for column, found in enumerate(paired_bootstrap(values, draws=500, seed=3)):
        means = np.array([values[rows, column].mean() for rows in drawn])
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))))
        assert found.mean == pytest.approx(values[:, column].mean())
        smaller = min((means <= 0).sum(), (means >= 0).sum())
        assert found.p == pytest.approx(min(1.0, 2 * (smaller + 1) / 501))


def test_interval_is_that_of_the_normal_law_for_many_users() -> None:
    values = np.random.default_rng(5).normal(0.1, 1.0, size=(2500, 1))
    (found,) = paired_bootstrap(values, draws=4000)
    half = 1.96 * values.std() / 50
    assert found.low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.08 * half)


def test_p_is_uniform_where_there_is_no_difference() -> None:
    # 400 experiments, whose users are independent, in one call.
    values = np.random.default_rng(7).normal(size=(150, 400))
    p = np.array([found.p for found in paired_bootstrap(values, draws=1000)])
    assert 0.02 < (p < 0.05).mean() < 0.09
    # Kolmogorov and Smirnov's distance to the uniform law; at 1 % it is 1.63 / sqrt(n).
    distance = np.abs(np.sort(p) - (np.arange(400) + 0.5) / 400).max()
    assert distance < 1.63 / 20


def test_p_of_clear_and_of_no_differences() -> None:
    values = np.stack([np.ones(50), np.zeros(50), -np.ones(50)], axis=1)
    above, equal, below = paired_bootstrap(values, draws=999)
    assert above.p == below.p == pytest.approx(2 / 1000)
    assert (equal.p, equal.low, equal.high) == (1.0, 0.0, 0.0)


def test_holms_correction_is_that_of_the_textbook() -> None:
    # Smallest first: 4 x .01, 3 x .013, 2 x .014, 1 x .19, none below the one before.
    assert holm([0.19, 0.01, 0.014, 0.013]) == pytest.approx([0.19, 0.04, 0.04, 0.04])
    assert holm([0.4, 0.6]) == [0.8, 0.8]
    assert holm([]) == []


def test_comparisons_are_corrected_family_by_family() -> None:
    rng = np.random.default_rng(4)
    luck = rng.random(300)
    ranks = {
        name: {seed: np.where(luck < chance, rng.integers(0, 10, 300), -1) for seed in seeds}
        for name, chance, seeds in (("a", 0.5, (1, 2)), ("b", 0.45, (2, 3)), ("c", 0.3, (1, 2)))
    }
    pairs = {("a", "c"): "x", ("b", "c"): "x", ("b", "a"): "y", ("c", "c"): "x"}
    found = compare(ranks, pairs, ("R@10", "N@10"))
    assert {pair: seeds for pair, (seeds, _) in found.items()} == {
        ("a", "c"): [1, 2],
        ("b", "c"): [2],
        ("b", "a"): [2],
    }
    of_x = [d for pair in (("a", "c"), ("b", "c")) for d in found[pair][1].values()]
    assert [d.p_holm for d in of_x] == holm([d.p for d in of_x])
    of_y = list(found["b", "a"][1].values())
    assert [d.p_holm for d in of_y] == holm([d.p for d in of_y])
    assert found["a", "c"][1]["R@10"].mean == pytest.approx(0.2, abs=0.03)


def test_metrics_of_any_length_stand_in_order() -> None:
    assert ranking_metrics(["V@10", "N@10", "R@10", "V@1"]) == ("R@10", "N@10", "V@1", "V@10")
    names = ["N@50", "coverage", "R@50", "R@5", "N@1", "R@1", "utility@10", "N@5"]
    assert ranking_metrics(names) == ("R@1", "R@5", "R@50", "N@5", "N@50")
    ranks = np.array([0, 7, 30, -1])
    assert per_user(ranks, ("R@1", "R@50"))[:, 1].tolist() == [1, 1, 1, 0]


def test_draws_do_not_depend_on_what_else_is_compared() -> None:
    values = np.random.default_rng(2).normal(size=(60, 3))
    (alone,) = paired_bootstrap(values[:, :1], draws=300)
    beside = paired_bootstrap(values, draws=300)[0]
    assert vars(beside) == pytest.approx(vars(alone))
    with pytest.raises(ValueError, match=r"users .* must be at least 1; got 0"):
        paired_bootstrap(values[:0])
