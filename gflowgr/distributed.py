"""Work and numbers shared by the processes of a run (``torchrun``); with one there is no cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from .evaluation import Recommender

__all__ = [
    "SharedRecommender",
    "first_process_finds",
    "gathered",
    "process",
    "sum_over_processes",
]

T = TypeVar("T")


def process() -> tuple[int, int]:
    """Rank of this process, and the number of processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(value: T) -> list[T]:
    """What each process passed, in the order of their ranks; all must call it together."""
    _, count = process()
    if count == 1:
        return [value]
    values: list[T | None] = [None] * count
    torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def first_process_finds(work: Callable[[], T]) -> T:
    """What ``work`` gives the first process, in all of them; its ValueError is raised in all."""
    found: tuple[T | None, ValueError | None] = (None, None)
    if process()[0] == 0:
        try:
            found = work(), None
        except ValueError as error:
            found = None, error
    value, failure = gathered(found)[0]
    if failure is not None:
        raise failure
    return cast(T, value)


def sum_over_processes(
    values: Mapping[str, tuple[float, float]],
) -> dict[str, tuple[float, float]]:
    """Sums and weights by name, over all processes; a name may be missing in some of them."""
    total: dict[str, tuple[float, float]] = {}
    for part in gathered(values):
        for name, (value, count) in part.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = before[0] + value, before[1] + count
    return total


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
        histories: Sequence[npt.NDArray[np.integer]],
        k: int,
        exclude: Sequence[npt.NDArray[np.integer]] | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """See :meth:`gflowgr.evaluation.Recommender.recommend`."""
        rank, count = process()
        begin, end = (len(histories) * place // count for place in (rank, rank + 1))
        found = np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        if end > begin:
            barred = None if exclude is None else exclude[begin:end]
            found = self.inner.recommend(histories[begin:end], k, barred)
        items, scores = zip(*gathered(found), strict=True)
        return np.concatenate(items), np.concatenate(scores)
