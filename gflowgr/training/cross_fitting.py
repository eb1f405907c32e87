"""Collaborative models made of several: averaged, or cross-fitted by user; and calibrated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gflowgr.collaborative import AverageModel, CollaborativeModel, CrossFitted, SASRecConfig
from gflowgr.collaborative.ensemble import fold_folder, member_folder
from gflowgr.data import Split, pad_histories
from gflowgr.rewards import Seen
from gflowgr.rewards.temperature import (
    mean_entropy,
    mean_nll,
    temperature_of_entropy,
    temperature_of_nll,
)
from gflowgr.training.sasrec import train_sasrec

__all__ = ["Calibration", "calibrate_temperature", "train_average", "train_cross_fitted"]

Temperature = str | float | Mapping[str, float]
"""``"auto"``, a number, or ``{"entropy": nats}``."""
_SCORES = 25_000_000
_SEEDS_APART = 1000  # so that runs of neighbouring seeds share no model


def train_average(
    split: Split,
    config: SASRecConfig | None = None,
    folder: str | Path = "average",
    *,
    models: int = 3,
    seed: int = 42,
    **options: Any,
) -> AverageModel:
    """Train several SASRecs that differ in their seeds alone; their scores are averaged.

    Costs ``models`` times what one costs. Killed at any moment, the same call goes on where it was,
    as :func:`~gflowgr.training.train_sasrec` does.

    Args:
        split: the data.
        config: of every model.
        folder: gets ``model_0``, ``model_1``, ...
        models: how many, at least 2.
        seed: of the first one, which is the one that a single SASRec would be.
        options: of :func:`~gflowgr.training.train_sasrec`.

    Raises:
        ValueError: ``models`` out of range, or what :func:`~gflowgr.training.train_sasrec` refuses.
    """
    if models < 2:
        raise ValueError(f"models must be >= 2; got {models}")
    average = AverageModel(
        [
            train_sasrec(
                split,
                config,
                member_folder(folder, number),
                seed=(seed + _SEEDS_APART * number) % 2**32,
                **options,
            )
            for number in range(models)
        ]
    )
    average.save(folder)
    return average


def train_cross_fitted(
    split: Split,
    config: SASRecConfig | None = None,
    folder: str | Path = "cross_fitted",
    *,
    folds: int = 2,
    seed: int = 42,
    **options: Any,
) -> CrossFitted:
    """Train a SASRec per fold of the users, each on the users of the other folds.

    Costs ``folds - 1`` times what one SASRec on all users costs. Killed at any moment, the same
    call goes on where it was, as :func:`~gflowgr.training.train_sasrec` does.

    Args:
        split: the data.
        config: of every model.
        folder: gets ``fold_0``, ``fold_1``, ... and the folds themselves.
        folds: 2 to 4 parts of equal size, by a seeded shuffle of the users.
        seed: of the folds and of every training.
        options: of :func:`~gflowgr.training.train_sasrec`.

    Raises:
        ValueError: ``folds`` out of range, or what :func:`~gflowgr.training.train_sasrec` refuses.
    """
    if not 2 <= folds <= 4:
        raise ValueError(f"folds must be in 2..4; got {folds}")
    if split.num_users < folds:
        raise ValueError(f"folds must be at most the {split.num_users} users; got {folds}")
    fold_of_user = np.random.default_rng(seed).permutation(split.num_users) % folds
    models = [
        train_sasrec(
            split,
            config,
            fold_folder(folder, fold),
            seed=seed,
            users=np.flatnonzero(fold_of_user != fold),
            **options,
        )
        for fold in range(folds)
    ]
    fitted = CrossFitted(models, torch.from_numpy(fold_of_user.astype(np.int64)))
    fitted.save(folder)
    return fitted


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what the softmax is with it.

    Attributes:
        temperature: divides the scores.
        nll: mean NLL of the validation items, nats.
        entropy: mean entropy, nats.
        users: validation users that were measured.
    """

    temperature: float
    nll: float
    entropy: float
    users: int


def calibrate_temperature(
    model: CollaborativeModel,
    split: Split,
    temperature: Temperature = "auto",
    *,
    seen: Seen = "zero",
    users: int = 2000,
    seed: int = 0,
) -> Calibration:
    """The temperature of the reward ``softmax(score / T)``, measured on validation users.

    Args:
        model: gives the scores.
        split: the data.
        temperature: ``"auto"``: of the least NLL of the validation items, in 0.3..3; a number: as
            given; ``{"entropy": nats}``: of that mean entropy.
        seen: ``"zero"``: items of the history are left out of the softmax, and users whose
            validation item is one of them out of the measurement.
        users: a seeded choice of so many of the users with a validation item; fewer where their
            scores would be more than 100 MB.
        seed: of the choice.

    Raises:
        ValueError: an argument is out of range, no user can be measured, or an entropy is out of
            reach.
    """
    given = _check_temperature(temperature)
    if users < 1:
        raise ValueError(f"users must be >= 1; got {users}")
    if seen not in ("zero", "keep"):
        raise ValueError(f"seen must be 'zero' or 'keep'; got {seen!r}")
    targets, histories = split.targets("valid"), split.histories("valid")
    count = min(users, max(64, _SCORES // split.num_items), len(targets))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(targets))[:count])
    if seen == "zero":
        chosen = np.array([n for n in chosen if targets[n] not in histories[n]], dtype=np.int64)
    if len(chosen) == 0:
        raise ValueError(f"split must have a user to measure; {split.dataset.name} has none")
    past = pad_histories([histories[n] for n in chosen])
    with torch.no_grad():
        scores = model.score(past).float().cpu().clone()
    wanted = torch.from_numpy(targets[chosen].astype(np.int64))
    if seen == "zero":
        rows, places = (past >= 0).nonzero(as_tuple=True)
        scores[rows, past[rows, places]] = -math.inf
    if temperature == "auto":
        value = temperature_of_nll(scores, wanted)
    elif isinstance(temperature, Mapping):
        value = temperature_of_entropy(scores, given)
    else:
        value = given
    return Calibration(
        value, mean_nll(scores, wanted, value), mean_entropy(scores, value), len(chosen)
    )


def _check_temperature(temperature: Temperature) -> float:
    """The number that was given, 1 for "auto"."""
    if temperature == "auto":
        return 1.0
    value: Any = temperature
    if isinstance(temperature, Mapping):
        value = temperature.get("entropy") if temperature.keys() == {"entropy"} else None
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not 0 < value < math.inf:
        raise ValueError(
            "temperature must be 'auto', a number > 0 or {'entropy': nats > 0}; "
            f"got {temperature!r}"
        )
    return float(value)
