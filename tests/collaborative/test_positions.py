"""Scores after every prefix of whole sequences, and several models as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gflowgr.collaborative import (
    AverageModel,
    CollaborativeModel,
    CrossFitted,
    EmbeddingScorer,
    Popularity,
    SASRec,
    SASRecConfig,
    score_positions,
)
from gflowgr.collaborative.ensemble import fold_folder
from gflowgr.data import pad_histories

NUM_ITEMS = 23
# Longer than the 6 items that the SASRec reads, as long, shorter, empty.
ROWS = [np.arange(9), np.arange(6)[::-1].copy(), np.array([5]), np.array([], int)]
HISTORIES = pad_histories(ROWS)


def sasrec(seed: int = 0) -> SASRec:
    torch.manual_seed(seed)
    model = SASRec(SASRecConfig(num_items=NUM_ITEMS, d_model=16, d_ff=32, max_length=6))
    for parameter in model.parameters():  # larger than at initialisation, so effects show
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def embedding(seed: int = 0) -> EmbeddingScorer:
    return EmbeddingScorer(torch.randn(NUM_ITEMS, 8, generator=torch.Generator().manual_seed(seed)))


class ScoresOnly:
    """A model with nothing but ``score``, of which every prefix is scored by itself."""

    def __init__(self, model: CollaborativeModel) -> None:
        self.model = model
        self.num_items = model.num_items

    def score(self, histories: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        return self.model.score(histories, items)


FOLDS = torch.tensor([1, 0, 1, 0, 1])
MODELS = {
    "scores only": lambda: ScoresOnly(sasrec()),
    "sasrec": sasrec,
    "embedding": embedding,
    "popularity": lambda: Popularity(np.arange(NUM_ITEMS)),
    "average": lambda: AverageModel([sasrec(), embedding()]),
    "cross-fitted": lambda: CrossFitted([sasrec(1), sasrec(2)], FOLDS),
}


@pytest.mark.parametrize("rows", [slice(0, 4), slice(1, 4), slice(3, 4), slice(0, 0)])
@pytest.mark.parametrize("name", MODELS)
def test_every_position_has_the_scores_of_its_prefix(name: str, rows: slice) -> None:
    model: CollaborativeModel = MODELS[name]()
    prefixes = [row[: p + 1] for row in ROWS[rows] for p in range(len(row))]
    histories = HISTORIES[rows]
    found = score_positions(model, histories)
    assert found.shape == (len(prefixes), NUM_ITEMS)
    if prefixes:
        expected = model.score(pad_histories(prefixes))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    every_other = torch.zeros(histories.shape, dtype=torch.bool)
    every_other[:, ::2] = True
    part = score_positions(model, histories, every_other)
    torch.testing.assert_close(part, found[every_other[histories >= 0]])


def test_wrong_positions_and_users_are_named() -> None:
    with pytest.raises(ValueError, match=r"chosen must be a bool tensor of shape \(4, 9\)"):
        score_positions(sasrec(), HISTORIES, torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"users must be of shape \(4,\)"):
        score_positions(sasrec(), HISTORIES, users=torch.arange(3))
    with pytest.raises(ValueError, match=r"users must be \[B\] = \(4,\) of 0..4"):
        MODELS["cross-fitted"]().score_of_users(torch.tensor([0, 1, 2, 5]), HISTORIES)
    with pytest.raises(ValueError, match="models must be some of one catalogue"):
        AverageModel([sasrec(), Popularity(np.arange(5))])
    with pytest.raises(ValueError, match=r"fold_of_user must be folds 0..0"):
        CrossFitted([sasrec()], FOLDS)


def test_the_average_is_the_mean_of_log_softmax_scores() -> None:
    one, two = sasrec(), embedding()
    parts = [model.score(HISTORIES).double().log_softmax(1) for model in (one, two)]
    items = torch.tensor([[0, 22], [7, 7], [3, 4], [1, 2]])
    average = AverageModel([one, two])
    expected = (parts[0] + parts[1]) / 2
    torch.testing.assert_close(average.score(HISTORIES).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(average.score(HISTORIES, items), average.score(HISTORIES).gather(1, items))


def test_a_training_prompt_is_scored_by_the_model_without_its_user(tmp_path: Path) -> None:
    models = [sasrec(1), sasrec(2)]
    fitted = CrossFitted(models, FOLDS)
    users = torch.tensor([4, 1, 3, 2])
    found = fitted.score_of_users(users, HISTORIES)
    at_positions = score_positions(fitted, HISTORIES, users=users)
    begin = 0
    for row, fold in enumerate([1, 0, 0, 1]):
        history = HISTORIES[row : row + 1]
        torch.testing.assert_close(found[row], models[fold].score(history)[0].log_softmax(0))
        mine = score_positions(models[fold], history).log_softmax(1)
        torch.testing.assert_close(at_positions[begin : begin + len(mine)], mine)
        begin += len(mine)
    assert begin == len(at_positions)
    for fold, model in enumerate(models):
        model.save(fold_folder(tmp_path, fold))
    fitted.save(tmp_path)
    again = CrossFitted.load(tmp_path)
    assert torch.equal(again.score_of_users(users, HISTORIES), found)
