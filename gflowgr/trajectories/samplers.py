"""Which items a prompt is trained on, beside the observed one (GFlowGR, trajectory sampler).

Rules that every sampler keeps: the positive is item 0 and nowhere else; no two items of a set have
the same identifier; never an item the user has interacted with, held-out ones included, nor one
with such an item's identifier; the same draws for the same (seed, epoch, example), on one process
or on many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data import Ragged
from .keyed_random import keyed_integers

__all__ = [
    "CandidatePool",
    "CurriculumSampler",
    "RandomSampler",
    "SampleRequest",
    "TrajectorySampler",
    "TrajectorySet",
]

_Ints = npt.NDArray[np.int64]
_ROUNDS = 64


@dataclass(frozen=True)
class SampleRequest:
    """A batch that needs trajectories.

    Attributes:
        examples: index of each training example [B] (the key of its draws).
        users: user of each example [B].
        targets: observed positive items [B].
        epoch: epoch number (draws differ between epochs).
        progress: share of the training done, in [0, 1].
        scores: collaborative scores of the whole catalogue [B, items], or None.
    """

    examples: _Ints
    users: _Ints
    targets: _Ints
    epoch: int
    progress: float
    scores: Tensor | None = None


@dataclass(frozen=True)
class TrajectorySet:
    """Items of each prompt [B, N]: the positive, then N - 1 others.

    Attributes:
        items: item ids [B, N]; -1 where a user has no further admissible item.
        difficulty: for each augmented item [B, N - 1], the share of the catalogue that the
            collaborative model scores below it, or None without a model.
    """

    items: _Ints
    difficulty: Tensor | None


class TrajectorySampler(Protocol):
    """Chooses the trajectories of a batch."""

    needs_scores: bool

    def sample(self, request: SampleRequest) -> TrajectorySet:
        """Items for each prompt of the request."""
        ...


class CandidatePool:
    """Uniform draws of items that a user has not interacted with.

    Args:
        known: per user, every item they ever interacted with, held-out ones included.
        leaf_of: identifier (leaf) of each item [items].
        seed: seeds all draws.
    """

    def __init__(self, known: Ragged, leaf_of: npt.NDArray[np.integer], seed: int) -> None:
        self.num_items = len(leaf_of)
        self.leaf_of = np.asarray(leaf_of, dtype=np.int64)
        self.seed = seed
        users = np.repeat(np.arange(len(known), dtype=np.int64), np.diff(known.offsets))
        # By identifier: another item with the identifier of a held-out one would tell it as well.
        pairs = np.unique(users * self.num_items + self.leaf_of[known.values])
        # The last entry is beyond every key, so that a search always lands on an entry.
        self._known = np.append(pairs, np.iinfo(np.int64).max)

    def is_known(self, users: _Ints, items: _Ints) -> npt.NDArray[np.bool_]:
        """Whether the user [B] knows the item [B, M], or one with the same identifier."""
        keys = users[:, None] * self.num_items + self.leaf_of[items]
        return self._known[np.searchsorted(self._known, keys)] == keys

    def draw(self, request: SampleRequest, size: int) -> _Ints:
        """``size`` admissible items per prompt [B, size]; -1 where none could be found.

        Inadmissible draws are drawn again, up to 64 rounds, which only a user who knows
        nearly the whole catalogue can exhaust.
        """
        chosen = np.full((len(request.users), size), -1, dtype=np.int64)
        filled = np.zeros(len(chosen), dtype=np.int64)
        pending = np.arange(len(chosen))
        for round_ in range(_ROUNDS):
            if not len(pending):
                break
            width = max(4, 2 * size)
            key = request.epoch * _ROUNDS + round_
            draws = keyed_integers(self.seed, key, request.examples[pending], width, self.num_items)
            taken = np.concatenate([request.targets[pending, None], chosen[pending]], axis=1)
            known = self.is_known(request.users[pending], draws)
            for column in range(width):
                item = draws[:, column]
                same = self.leaf_of[item][:, None] == self.leaf_of[taken]
                good = ~known[:, column] & ~(same & (taken >= 0)).any(axis=1)
                good &= filled[pending] < size
                rows = pending[good]
                chosen[rows, filled[rows]] = item[good]
                taken[good, 1 + filled[rows]] = item[good]
                filled[rows] += 1
            pending = pending[filled[pending] < size]
        return chosen


class RandomSampler:
    """N - 1 unobserved items, uniform over the catalogue.

    Args:
        pool: draws admissible items.
        num_trajectories: N, the positive included.
    """

    needs_scores = False

    def __init__(self, pool: CandidatePool, num_trajectories: int) -> None:
        self.pool = pool
        self.num_trajectories = _check_count(num_trajectories)

    def sample(self, request: SampleRequest) -> TrajectorySet:
        """See :class:`TrajectorySampler`."""
        items = self.pool.draw(request, self.num_trajectories - 1)
        return TrajectorySet(
            np.concatenate([request.targets[:, None], items], axis=1), _difficulty(request, items)
        )


class CurriculumSampler:
    """The paper's default: from a random pool, low-scored items early and higher-scored ones later.

    A pool of M items is ordered by the collaborative model's score; the N - 1 items of a window are
    taken, which moves linearly with training progress from the lowest scores to the highest.

    Args:
        pool: draws admissible items.
        num_trajectories: N, the positive included.
        pool_size: M (default 2 N - 1, the paper's example).
    """

    needs_scores = True

    def __init__(
        self, pool: CandidatePool, num_trajectories: int, pool_size: int | None = None
    ) -> None:
        self.pool = pool
        self.num_trajectories = _check_count(num_trajectories)
        self.pool_size = 2 * num_trajectories - 1 if pool_size is None else pool_size
        if self.pool_size < num_trajectories - 1:
            raise ValueError(
                f"pool_size must be >= num_trajectories - 1 = {num_trajectories - 1}; "
                f"got {self.pool_size}"
            )

    def sample(self, request: SampleRequest) -> TrajectorySet:
        """See :class:`TrajectorySampler`; ``request.scores`` is required."""
        if request.scores is None:
            raise ValueError("CurriculumSampler needs request.scores of a collaborative model")
        pool = self.pool.draw(request, self.pool_size)
        index = torch.from_numpy(pool).to(request.scores.device)
        scores = request.scores.gather(1, index.clamp_min(0))
        # Empty slots come last, so that they are taken only where nothing else is left.
        scores = scores.masked_fill(index < 0, torch.inf)
        order = scores.argsort(dim=1, stable=True).cpu().numpy()
        count = self.num_trajectories - 1
        available = (pool >= 0).sum(axis=1)
        room = np.maximum(available - count, 0)
        start = np.rint(min(max(request.progress, 0.0), 1.0) * room).astype(np.int64)
        window = start[:, None] + np.arange(count)
        items = np.take_along_axis(pool, np.take_along_axis(order, window, axis=1), axis=1)
        return TrajectorySet(
            np.concatenate([request.targets[:, None], items], axis=1), _difficulty(request, items)
        )


def _difficulty(request: SampleRequest, items: _Ints) -> Tensor | None:
    if request.scores is None or items.shape[1] == 0:
        return None
    index = torch.from_numpy(items).to(request.scores.device)
    chosen = request.scores.gather(1, index.clamp_min(0))
    columns = [
        (request.scores < chosen[:, n : n + 1]).float().mean(dim=1) for n in range(items.shape[1])
    ]
    return torch.stack(columns, dim=1).masked_fill(index < 0, torch.nan)


def _check_count(num_trajectories: int) -> int:
    if num_trajectories < 1:
        raise ValueError(f"num_trajectories must be >= 1; got {num_trajectories}")
    return num_trajectories
