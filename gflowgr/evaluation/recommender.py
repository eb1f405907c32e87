"""The recommender interface: histories in, ranked items out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from gflowgr.collaborative.base import CollaborativeModel
from gflowgr.data import pad_histories
from gflowgr.distributed import gathered, process
from gflowgr.integers import integer_array
from gflowgr.ops.topk import stable_topk


@runtime_checkable
class Recommender(Protocol):
    """Histories in, ranked items out.

    Items with equal scores, and so all items that share an identifier, stand in ascending order
    of their ids.
    """

    name: str

    def recommend(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        exclude: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` best items of each history.

        Args:
            histories: B int64 arrays, oldest first; may be empty.
            k: list length.
            exclude: B int arrays of items that must not be recommended, or None.

        Returns:
            items int64 [B, k], best first, without repeats, -1 where there are no more; and their
            scores, float32 [B, k].
        """
        ...


class ScoringRecommender:
    """Ranks the full catalogue by a collaborative model's scores; ties by ascending item id.

    Args:
        name: how tables call it.
        model: the scorer.
        available: true for items that may be recommended [items]; by default all may.
    """

    def __init__(
        self, name: str, model: CollaborativeModel, *, available: torch.Tensor | None = None
    ) -> None:
        self.name = name
        self.model = model
        self.available = available

    def recommend(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        exclude: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`Recommender.recommend`.

        Raises:
            ValueError: k below 1, ``exclude`` of another length or with something else than items,
                a score that is NaN.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        if exclude is not None and len(exclude) != len(histories):
            raise ValueError(f"exclude has {len(exclude)} rows, histories {len(histories)}")
        scores = self.model.score(pad_histories(histories), None).float()
        if exclude is not None and any(len(items) for items in exclude):
            rows = np.repeat(np.arange(len(exclude)), [len(items) for items in exclude])
            columns = integer_array(
                np.concatenate([np.asarray(items) for items in exclude if len(items)]),
                "exclude",
                low=0,
                high=scores.shape[1] - 1,
            )
            barred = torch.from_numpy(np.stack([rows, columns])).to(scores.device)
            scores = scores.clone()
            scores[barred[0], barred[1]] = float("-inf")
        if self.available is not None:
            scores = scores.masked_fill(~self.available.to(scores.device), float("-inf"))
        values, items = stable_topk(scores, min(k, scores.shape[1]))
        if bool(values[:, :1].isnan().any()):  # NaN ranks first, so no full pass is needed
            row = int(values[:, 0].isnan().nonzero()[0])
            raise ValueError(f"{self.name} gave a score that is NaN for histories[{row}]")
        items = items.masked_fill(values == float("-inf"), -1)
        short = k - items.shape[1]
        items_out = np.pad(items.cpu().numpy(), ((0, 0), (0, short)), constant_values=-1)
        values_out = np.pad(values.cpu().numpy(), ((0, 0), (0, short)), constant_values=-np.inf)
        return items_out, values_out


class SharedRecommender:
    """A recommender whose users are divided between the processes; all get the same answer.

    All processes must call it together, with the same arguments.

    Args:
        inner: the recommender, with the same model in every process.
    """

    def __init__(self, inner: Recommender) -> None:
        self.inner = inner
        self.name = inner.name

    def recommend(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        exclude: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`Recommender.recommend`."""
        rank, count = process()
        begin, end = (len(histories) * place // count for place in (rank, rank + 1))
        found = np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        if end > begin:
            barred = None if exclude is None else exclude[begin:end]
            found = self.inner.recommend(histories[begin:end], k, barred)
        items, scores = zip(*gathered(found), strict=True)
        return np.concatenate(items), np.concatenate(scores)
