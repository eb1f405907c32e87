"""The real data sets: counts as their sources state them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gflowgr.data import LeaveOneOut, load_dataset


def test_beauty(data_root: Path) -> None:
    data = load_dataset(data_root / "Beauty")
    assert (data.num_users, data.num_items, data.num_interactions) == (22363, 12101, 198502)
    split = LeaveOneOut(data)
    assert len(split.train) == 131413
    assert split.train.lengths.max() == 20
    report = split.report()
    assert report["users whose test item is also in their history (repeat)"] == 0
    assert report["items seen only as a target"] == 33
    identifiers = data.identifiers("letter_official")
    assert identifiers.codes.shape == (12101, 4)
    assert identifiers.level_sizes == [197, 256, 256, 256]
    assert identifiers.num_unique() == 12088
    assert identifiers.strings(0) == ["<a_183>", "<b_70>", "<c_232>", "<d_6>"]
    assert data.title(0) == "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce"

    # Popularity of the training part, full ranking, seen items not masked: the published R@10.
    top = np.argsort(-split.item_counts, kind="stable")[:10]
    assert np.isin(split.targets("test"), top).mean() == pytest.approx(0.0114, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "users", "items", "events", "repeats"),
    [("Instruments", 24772, 9922, 206153, 0), ("Yelp", 30431, 20033, 316354, 2027)],
)
def test_instruments_and_yelp(
    data_root: Path, name: str, users: int, items: int, events: int, repeats: int
) -> None:
    data = load_dataset(data_root / name)
    assert (data.num_users, data.num_items, data.num_interactions) == (users, items, events)
    report = LeaveOneOut(data).report()
    assert report["users whose test item is also in their history (repeat)"] == repeats
    assert "letter_official" in data.index_names()
    assert data.identifiers("letter_official").num_items == items


def test_taobao_carts_lose_the_pairs_that_give_the_answer_away(data_root: Path) -> None:
    data = load_dataset(data_root / "TaobaoCartBuy")
    assert (data.num_users, data.num_items, data.num_interactions) == (48749, 39493, 259771)
    # 8,326 test items and 8,101 valid items are in their user's cart list.
    assert data.side_dropped == {"cart": 8326 + 8101}
    assert len(data.side["cart"].values) == 193747 - 8326 - 8101
    split = LeaveOneOut(data)
    for which in ("valid", "test"):
        for user, target in zip(split.eval_users(which), split.targets(which), strict=True):
            assert target not in data.side["cart"].row(user)


def test_movielens_ratings_and_times_are_parallel(data_root: Path) -> None:
    data = load_dataset(data_root / "MovieLensLatestSmall")
    assert (data.num_users, data.num_items, data.num_interactions) == (610, 3650, 90274)
    assert data.ratings is not None
    assert data.times is not None
    stars, counts = np.unique(data.ratings, return_counts=True)
    assert dict(zip(stars.tolist(), counts.tolist(), strict=True)) == {
        0.5: 1110, 1.0: 2362, 1.5: 1389, 2.0: 6419, 2.5: 4702,
        3.0: 18000, 3.5: 11527, 4.0: 24549, 4.5: 7765, 5.0: 12451,
    }  # fmt: skip
    assert data.times.min() > 8e8  # Unix seconds
    assert LeaveOneOut(data).report()["times checked (oldest first)"] is True
