"""A generator and a collaborative model that answer together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gflowgr.collaborative.base import CollaborativeModel
from gflowgr.data import pad_histories
from gflowgr.evaluation.recommender import Recommender


class SummedRecommender:
    """The generator's best items in the order of the sum of both models' log-probabilities.

    The score of an item is ``log P(item | history)`` of the generator plus the log-softmax, over
    the catalogue, of the collaborative model's scores: the generator finds the candidates, both
    rank them. Ties keep the generator's order.

    Args:
        generator: its scores are log-probabilities.
        model: the collaborative model.
        width: candidates per history; at least as many as are asked for.
        name: how tables call it.

    Raises:
        ValueError: ``width`` below 1.
    """

    def __init__(
        self, generator: Recommender, model: CollaborativeModel, *, width: int, name: str
    ) -> None:
        if width < 1:
            raise ValueError(f"width must be at least 1; got {width}")
        self.generator, self.model, self.width, self.name = generator, model, width, name

    def recommend(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        exclude: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`Recommender.recommend`."""
        items, log_p = self.generator.recommend(histories, max(self.width, k), exclude)
        scores = self.model.score(pad_histories(histories), None).float().log_softmax(dim=1).cpu()
        found = torch.from_numpy(items)
        own = scores.gather(1, found.clamp_min(0)).masked_fill(found < 0, float("-inf"))
        total = torch.from_numpy(log_p) + own
        total, order = total.sort(dim=1, descending=True, stable=True)
        return found.gather(1, order)[:, :k].numpy(), total[:, :k].numpy()
