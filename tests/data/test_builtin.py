"""The built-in shop: reproducible, leak-free, and its true utilities explain its clicks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gflowgr.data import Dataset, LeaveOneOut, generate_builtin, load_dataset, save_dataset


@pytest.fixture(scope="module")
def shop() -> Dataset:
    return generate_builtin(seed=3, num_users=600, num_items=400)


def hit_rate(scores: np.ndarray, targets: np.ndarray, k: int = 10) -> float:
    at_target = np.take_along_axis(scores, targets[:, None], axis=1)
    return float(((scores > at_target).sum(axis=1) < k).mean())


def test_sizes_and_parts(shop: Dataset) -> None:
    assert (shop.num_users, shop.num_items) == (600, 400)
    lengths = shop.sequences.lengths
    assert lengths.min() >= 5
    assert lengths.max() <= 40
    assert 8 < lengths.mean() < 12
    assert shop.behaviour_names == ("click", "purchase")
    assert shop.behaviours is not None
    assert 0.1 < shop.behaviours.mean() < 0.5  # bought among the events
    assert shop.times is not None
    assert len(shop.side["impression"].values) > shop.num_interactions
    # Recorded before the validation event and never engaged with: nothing was left to drop.
    assert shop.side_dropped == {"impression": 0}


def test_the_same_seed_gives_the_same_shop(shop: Dataset) -> None:
    again = generate_builtin(seed=3, num_users=600, num_items=400)
    np.testing.assert_array_equal(shop.sequences.values, again.sequences.values)
    np.testing.assert_array_equal(shop.behaviours, again.behaviours)
    np.testing.assert_array_equal(shop.truth, again.truth)
    assert shop.texts == again.texts
    other = generate_builtin(seed=4, num_users=600, num_items=400)
    assert not np.array_equal(shop.sequences.values[:500], other.sequences.values[:500])


def test_users_do_not_engage_with_an_item_twice(shop: Dataset) -> None:
    assert all(len(set(row.tolist())) == len(row) for row in shop.sequences)
    for user in range(shop.num_users):
        shown = shop.side["impression"].row(user)
        assert not set(shown.tolist()) & set(shop.sequences.row(user).tolist())


def test_identifiers_are_unique_and_follow_the_categories(shop: Dataset) -> None:
    identifiers = shop.identifiers("hierarchy")
    assert identifiers.num_unique() == shop.num_items
    assert identifiers.codes.shape == (400, 4)
    assert identifiers.level_sizes[:3] == [8, 4, 4]
    assert identifiers.level_sizes[3] <= 64
    assert shop.texts is not None
    path_of: dict[tuple[int, ...], str] = {}
    for codes, text in zip(identifiers.codes, shop.texts, strict=True):
        assert (
            path_of.setdefault(tuple(codes[:3].tolist()), text["categories"]) == text["categories"]
        )
    assert len(set(path_of.values())) == len(path_of)


def test_titles_can_be_read_and_told_apart(shop: Dataset) -> None:
    assert shop.texts is not None
    titles = [text["title"] for text in shop.texts]
    assert len(set(titles)) == shop.num_items
    assert all(title[0].isupper() and "#" in title for title in titles)


def test_truth_is_an_expected_reward(shop: Dataset) -> None:
    assert shop.truth is not None
    assert shop.truth.shape == (600, 400)
    truth = shop.truth.astype(np.float64)
    assert truth.min() >= 0
    assert truth.max() <= 10
    split = LeaveOneOut(shop, max_history=100)
    for user, history in zip(split.eval_users("test"), split.histories("test"), strict=True):
        assert (truth[user, history] == 0).all()


def test_truth_predicts_the_test_event_far_better_than_popularity(shop: Dataset) -> None:
    assert shop.truth is not None
    split = LeaveOneOut(shop)
    targets = split.targets("test")
    popularity = np.tile(split.item_counts, (len(targets), 1))
    by_popularity = hit_rate(popularity, targets)
    by_truth = hit_rate(shop.truth.astype(np.float32), targets)
    assert by_popularity < 0.15
    assert by_truth > 0.5


def test_recent_events_say_more_than_old_ones(shop: Dataset) -> None:
    # Session interest drifts: the category of the last item agrees more with the latest events.
    category = shop.identifiers("hierarchy").codes[:, :2] @ np.array([10, 1])
    rows = [row for row in shop.sequences if len(row) >= 8]
    assert len(rows) > 200
    last = np.mean([category[row[-1]] == category[row[-2]] for row in rows])
    old = np.mean([category[row[-1]] == category[row[0]] for row in rows])
    assert last > old + 0.1


def test_round_trip_through_a_folder(shop: Dataset, tmp_path: Path) -> None:
    save_dataset(shop, tmp_path / "shop")
    again = load_dataset(tmp_path / "shop")
    np.testing.assert_array_equal(shop.sequences.values, again.sequences.values)
    np.testing.assert_array_equal(shop.behaviours, again.behaviours)
    np.testing.assert_array_equal(shop.times, again.times)
    np.testing.assert_array_equal(shop.truth, again.truth)
    np.testing.assert_array_equal(shop.side["impression"].values, again.side["impression"].values)
    assert again.index_names() == ["hierarchy"]
    np.testing.assert_array_equal(
        shop.identifiers("hierarchy").codes, again.identifiers("hierarchy").codes
    )


@pytest.mark.parametrize(
    ("sizes", "message"), [({"num_users": 0}, "num_users"), ({"num_items": 199}, "num_items")]
)
def test_sizes_that_are_too_small(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_builtin(**sizes)


def test_popularity_bias_decides_what_is_shown_and_not_what_is_liked() -> None:
    shops = [
        generate_builtin(seed=3, num_users=300, num_items=400, popularity_bias=bias)
        for bias in (0.0, 1.0, 4.0)
    ]
    shares = []
    for shop in shops:
        counts = np.bincount(shop.side["impression"].values, minlength=400)
        shares.append(np.sort(counts)[-40:].sum() / counts.sum())
    assert shares[0] < shares[1] < shares[2]
    one, other = (shop.identifiers("hierarchy").codes for shop in (shops[0], shops[2]))
    np.testing.assert_array_equal(one, other)  # the catalogue stays


@pytest.mark.parametrize("bias", [-0.1, float("nan"), float("inf")])
def test_a_popularity_bias_that_is_no_weight(bias: float) -> None:
    with pytest.raises(ValueError, match=r"popularity_bias must be finite and >= 0; got"):
        generate_builtin(popularity_bias=bias)
