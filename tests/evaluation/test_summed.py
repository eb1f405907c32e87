"""A generator and a collaborative model that answer together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from gflowgr.evaluation import SummedRecommender


class Beams:
    """Three candidates for everybody, with log-probabilities; the last place may be empty."""

    name = "beams"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def recommend(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        exclude: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append(k)
        items = np.array([[4, 2, 0, -1], [1, 3, -1, -1]])
        log_p = np.log(np.array([[0.5, 0.3, 0.1, 1e-9], [0.6, 0.2, 1e-9, 1e-9]], np.float32))
        return items, log_p


class Scores:
    num_items = 5

    def score(self, histories: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        return torch.tensor([[0.0, 9.0, 1.0, 0.0, 0.2], [0.0, 0.0, 0.0, 3.0, 5.0]])


def test_beams_are_ordered_by_the_sum_of_both_log_probabilities() -> None:
    beams, scores = Beams(), Scores()
    both = SummedRecommender(beams, scores, width=4, name="both")  # type: ignore[arg-type]
    items, totals = both.recommend([np.array([1]), np.array([2, 3])], 2)
    assert beams.asked == [4]  # as many candidates as there are beams, whatever is asked for
    # Item 1 has user 0's largest score, but is not among the generator's candidates.
    assert items.tolist() == [[2, 4], [3, 1]]
    shares = scores.score(torch.empty(0)).double().log_softmax(1)
    expected = np.log([[0.3, 0.5], [0.2, 0.6]]) + shares.gather(1, torch.tensor(items)).numpy()
    np.testing.assert_allclose(totals, expected, rtol=1e-5)


def test_places_without_a_candidate_stay_last() -> None:
    both = SummedRecommender(Beams(), Scores(), width=1, name="both")  # type: ignore[arg-type]
    items, totals = both.recommend([np.array([1]), np.array([2])], 4)
    assert items.tolist() == [[2, 4, 0, -1], [3, 1, -1, -1]]
    assert np.isneginf(totals[items < 0]).all()


def test_a_width_that_holds_nothing() -> None:
    with pytest.raises(ValueError, match="width must be at least 1; got 0"):
        SummedRecommender(Beams(), Scores(), width=0, name="both")  # type: ignore[arg-type]
