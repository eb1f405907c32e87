"""Collaborative models cross-fitted by user, and the temperature of their softmax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gflowgr.collaborative import Popularity, SASRecConfig
from gflowgr.data import Dataset, LeaveOneOut, Ragged, pad_histories
from gflowgr.training import calibrate_temperature, train_cross_fitted, train_sasrec

NUM_ITEMS = 30
CONFIG = SASRecConfig(num_items=NUM_ITEMS, d_model=8, num_layers=1, d_ff=8, max_length=8)
OPTIONS: dict[str, Any] = {"epochs": 1, "batch_size": 16, "progress": False}


def make_split(seed: int = 3) -> LeaveOneOut:
    """Even users know the lower half of the items, odd ones the upper half."""
    rng = np.random.default_rng(seed)
    half = NUM_ITEMS // 2
    rows = [
        (rng.integers(half, size=rng.integers(4, 12)) + half * (user % 2)).tolist()
        for user in range(40)
    ]
    users = [str(user) for user in range(40)]
    return LeaveOneOut(Dataset("halves", users, Ragged.from_lists(rows), NUM_ITEMS))


def test_training_on_some_users_reads_no_other(tmp_path: Path) -> None:
    split = make_split()
    even = train_sasrec(split, CONFIG, tmp_path, users=np.arange(0, 40, 2), **OPTIONS)
    shares = even.empty_scores.exp()
    assert shares[NUM_ITEMS // 2 :].unique().numel() == 1  # no item of an odd user was counted
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
    with pytest.raises(ValueError, match="other settings: users = "):
        train_sasrec(split, CONFIG, tmp_path, users=np.arange(1, 40, 2), **OPTIONS)


@pytest.mark.parametrize("users", [np.array([], int), np.array([40]), np.array([1, 1])])
def test_wrong_users_are_named(tmp_path: Path, users: np.ndarray) -> None:
    with pytest.raises(ValueError, match="users must be "):
        train_sasrec(make_split(), CONFIG, tmp_path, users=users, **OPTIONS)


def test_a_model_per_fold_is_trained_without_the_folds_users(tmp_path: Path) -> None:
    split = make_split()
    fitted = train_cross_fitted(split, CONFIG, tmp_path, folds=2, seed=5, **OPTIONS)
    assert fitted.fold_of_user.bincount().tolist() == [20, 20]
    history = pad_histories([np.array([1, 2])])
    for fold in range(2):
        others = (fitted.fold_of_user != fold).nonzero()[:, 0].numpy()
        alone = train_sasrec(
            split, CONFIG, tmp_path / f"alone_{fold}", users=others, seed=5, **OPTIONS
        )
        user = (fitted.fold_of_user == fold).nonzero()[:1, 0]
        expected = alone.score(history).log_softmax(1)
        assert torch.equal(fitted.score_of_users(user, history), expected)
    again = train_cross_fitted(split, CONFIG, tmp_path, folds=2, seed=5, **OPTIONS)  # loads
    assert torch.equal(again.score(history), fitted.score(history))
    for folds in (1, 5):
        with pytest.raises(ValueError, match=r"folds must be in 2..4"):
            train_cross_fitted(split, CONFIG, tmp_path, folds=folds)


def test_temperature_is_found_or_given() -> None:
    split = make_split()
    model = Popularity(9 * np.bincount(split.targets("valid"), minlength=NUM_ITEMS))
    best = calibrate_temperature(model, split)
    for number in (best.temperature * 0.8, best.temperature * 1.2):
        given = calibrate_temperature(model, split, number)
        assert given.temperature == number
        assert given.nll > best.nll
    soft = calibrate_temperature(model, split, {"entropy": 3.0})
    assert soft.entropy == pytest.approx(3.0, abs=0.01)
    assert calibrate_temperature(model, split, seen="keep").users == 40
    unseen = sum(
        target not in history
        for target, history in zip(split.targets("valid"), split.histories("valid"), strict=True)
    )
    assert best.users == unseen < 40


@pytest.mark.parametrize("value", ["best", 0.0, True, {"entropy": -1.0}, {"nll": 2.0}])
def test_a_wrong_temperature_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="temperature must be 'auto', a number > 0"):
        calibrate_temperature(Popularity(np.arange(NUM_ITEMS)), make_split(), value)
