"""Samplers that need no backbone: random items, the collaborative curriculum, interaction logs,
impressions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data import Ragged
from ..ops.topk import float_order
from ..transfer import to_device
from .base import NOT_RECORDED, SHOWN, Candidates, Ints, SampleRequest, TrajectorySampler
from .pool import CandidatePool
from .schedules import Schedule

if TYPE_CHECKING:
    from ..data import Split

__all__ = [
    "CurriculumSampler",
    "ImpressionSampler",
    "LogSampler",
    "PopularitySampler",
    "RandomSampler",
]

# Streams of draws; the pool fills up from stream 0.
_POPULARITY, _CURRICULUM, _LOGS = 1, 2, 3
_IMPRESSIONS = 8


class RandomSampler(TrajectorySampler):
    """N - 1 unobserved items, uniform over the catalogue."""

    def candidates(self, request: SampleRequest) -> Candidates:
        """None: all are drawn."""
        return Candidates.none(len(request.users))


class PopularitySampler(TrajectorySampler):
    """N - 1 unobserved items, drawn with probability ~ (1 + count)^alpha.

    The 1 keeps items without a training event possible.

    Args:
        pool: knows what may be sampled.
        num_trajectories: N, the positive included.
        counts: occurrences of each item in the training part [items].
        alpha: 0 is uniform, 1 proportional to popularity.
    """

    def __init__(
        self,
        pool: CandidatePool,
        num_trajectories: int,
        counts: npt.NDArray[np.integer],
        alpha: float = 0.75,
    ) -> None:
        super().__init__(pool, num_trajectories)
        if len(counts) != pool.num_items:
            raise ValueError(f"counts must be [items] = ({pool.num_items},); got {counts.shape}")
        if not (np.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha must be finite and >= 0; got {alpha}")
        # Relative to the largest, so that no alpha overflows.
        weights = ((1.0 + counts) / (1.0 + counts.max())) ** alpha
        self._cumulative = np.cumsum(weights / weights.sum())

    def candidates(self, request: SampleRequest) -> Candidates:
        """None: all are drawn."""
        return Candidates.none(len(request.users))

    def refill(self, request: SampleRequest, round_: int, width: int) -> Ints:
        """Draws with replacement by popularity; the rules keep the first of equal ones."""
        uniform = self.pool.uniform(request, _POPULARITY, width, round_)
        items = np.searchsorted(self._cumulative, uniform, side="right")
        # The sum may be a rounding below 1.
        return np.minimum(items, self.pool.num_items - 1)


class CurriculumSampler(TrajectorySampler):
    """The paper's default: from a random pool, low-scored items early and higher-scored ones later.

    The admissible items of a pool are ordered by the collaborative model's score (ties: first in
    the pool first). Taken are those whose places are nearest to the quantile that the schedule
    gives for the training's progress.

    Args:
        pool: knows what may be sampled.
        num_trajectories: N, the positive included.
        pool_size: admissible items M of the pool, drawn anew for each example and epoch; the whole
            catalogue if M is no less than that. Default 2 N - 1, the paper's example, which
            seldom holds any of the model's best items. The draws are stratified: one from each of
            equal parts of the catalogue's circle, begun at a random place, so that no item comes
            twice and each is equally likely. There are as many parts as give M admissible items
            on average.
        schedule: quantile by progress.
    """

    needs_scores = True

    def __init__(
        self,
        pool: CandidatePool,
        num_trajectories: int,
        pool_size: int | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(pool, num_trajectories)
        self.pool_size = 2 * num_trajectories - 1 if pool_size is None else pool_size
        if self.pool_size < num_trajectories - 1:
            raise ValueError(
                f"pool_size must be >= num_trajectories - 1 = {num_trajectories - 1}; "
                f"got {self.pool_size}"
            )
        self.schedule = Schedule() if schedule is None else schedule

    def _draw_pool(self, request: SampleRequest) -> Ints:
        """One item of each stratum [B, strata]; -1 where a user has fewer strata than another."""
        items = self.pool.num_items
        # As many strata as give pool_size admissible items on average.
        admissible = np.maximum(items - self.pool.num_barred(request), 1)
        strata = np.minimum(-(-self.pool_size * items // admissible), items)[:, None]
        width = int(strata.max(initial=1))
        uniform = self.pool.uniform(request, _CURRICULUM, width + 1)
        begin = np.arange(width + 1) * items // strata
        places = begin[:, :-1] + np.floor(uniform[:, 1:] * np.diff(begin, axis=1)).astype(np.int64)
        drawn = (places + np.floor(uniform[:, :1] * items).astype(np.int64)) % items
        return np.where(np.arange(width) < strata, drawn, -1)

    def candidates(self, request: SampleRequest) -> Candidates:
        """The pool's admissible items, those next to the quantile first."""
        if request.scores is None:
            raise ValueError("CurriculumSampler needs request.scores of a collaborative model")
        # Inadmissible items come last, and are not counted.
        scores = self.pool.admissible_scores(request, torch.inf)
        whole = self.pool_size >= self.pool.num_items
        if not whole:
            drawn = to_device(self._draw_pool(request), scores.device)
            scores = scores.gather(1, drawn.clamp_min(0)).masked_fill(drawn < 0, torch.inf)
        available = (scores < torch.inf).sum(dim=1, keepdim=True)
        # Room for items that share an identifier; a step to either side at a time.
        width = min(scores.shape[1], 4 * self.num_trajectories + 8)
        centre = self.schedule(request.progress) * (available - 1).double()
        first = (centre.long() - width // 2).minimum(available - width).clamp_min(0)
        ranks = first + torch.arange(width, device=scores.device)
        # The lower of two that are equally near.
        nearest = (ranks - centre).abs().sort(dim=1, stable=True).indices
        ranks = ranks.gather(1, nearest)
        items = _at_ranks(scores, ranks)
        if not whole:
            items = drawn.gather(1, items)
        items = items.masked_fill(ranks >= available, -1)
        return Candidates.augmented(items.cpu().numpy())


def _at_ranks(scores: Tensor, ranks: Tensor) -> Tensor:
    """Columns [B, W] that have these ranks among the row's scores [B, M]; ties: first come first.

    On a CPU, what lies outside all ranks is not put in order, which takes a fifth of the time.
    """
    # Score and column in one integer: numbers whose order is that of the pairs.
    keys = float_order(scores.float()) << 32
    keys += torch.arange(keys.shape[1], device=keys.device)
    low = 0
    if keys.device.type == "cpu":
        low, high = int(ranks.min()), int(ranks.max()) + 1
        part = np.partition(keys.numpy(), (low, high - 1), axis=1)[:, low:high]
        part.sort(axis=1)
        ordered = torch.from_numpy(part)
    else:
        ordered = keys.sort(dim=1).values
    return ordered.gather(1, ranks - low) & 0xFFFFFFFF


class LogSampler(TrajectorySampler):
    """Other items of the same user's session or window, with their behaviours.

    They come from the user's training part, before or after the positive, in random order. Where
    there are fewer than N - 1, unobserved items fill up.

    Args:
        pool: knows what may be sampled.
        num_trajectories: N, the positive included.
        split: the data.
        window: how many events before and after the positive are its neighbours.
        session_gap: with timestamps: a session ends where the next event comes more than this
            later (in the units of ``Dataset.times``, usually seconds), and only events of the
            positive's own session count. None: the window alone.

    Raises:
        ValueError: an argument is out of range, or ``session_gap`` is given for data without
            timestamps.
    """

    def __init__(
        self,
        pool: CandidatePool,
        num_trajectories: int,
        split: Split,
        *,
        window: int = 10,
        session_gap: float | None = None,
    ) -> None:
        super().__init__(pool, num_trajectories)
        if window < 1:
            raise ValueError(f"window must be >= 1; got {window}")
        self.window = window
        self._events = split.train
        # Of every event: where its session (or its user's training part) begins and ends.
        sequences = split.train_sequences
        starts = np.zeros(len(sequences.values) + 1, bool)
        starts[sequences.offsets] = True
        if session_gap is not None:
            if not session_gap >= 0:
                raise ValueError(f"session_gap must be >= 0; got {session_gap}")
            times = split.dataset.times
            if times is None:
                raise ValueError(
                    f"session_gap = {session_gap} needs timestamps, which {split.dataset.name} "
                    "does not have; leave it out to use the window alone"
                )
            begin = split.dataset.sequences.offsets[:-1]
            every = Ragged(split.dataset.sequences.offsets, times)
            mine = every.slices(begin, begin + sequences.lengths).values
            starts[1:-1] |= np.diff(mine) > session_gap
        self._bounds = np.flatnonzero(starts)

    def candidates(self, request: SampleRequest) -> Candidates:
        """The neighbours, in a random order of this epoch."""
        at = np.asarray(self._events.bounds[request.examples, 1], dtype=np.int64)[:, None]
        session = np.searchsorted(self._bounds, at, side="right")
        steps = np.arange(-self.window, self.window + 1)
        places = at + steps[steps != 0]
        inside = (places >= self._bounds[session - 1]) & (places < self._bounds[session])
        safe = np.where(inside, places, 0)
        order = self.pool.uniform(request, _LOGS, places.shape[1]).argsort(axis=1, kind="stable")
        codes = self._events.behaviours
        observed = Candidates(
            np.where(inside, np.asarray(self._events.items)[safe], -1).astype(np.int64),
            np.full(places.shape, NOT_RECORDED) if codes is None else codes[safe].astype(np.int64),
            np.full(places.shape, np.nan, np.float32),
        )
        return observed.take(order)


class ImpressionSampler(TrajectorySampler):
    """Items of a side behaviour: shown and not engaged with, or put into the cart and not bought.

    They come in another random order for each example and epoch. Left out is whatever the user
    engaged with at another time. Where there are fewer than N - 1, unobserved items fill up.

    Args:
        pool: knows what may be sampled.
        num_trajectories: N, the positive included.
        split: the data.
        side: which side behaviour.

    Raises:
        ValueError: the data do not have it.
    """

    def __init__(
        self,
        pool: CandidatePool,
        num_trajectories: int,
        split: Split,
        side: str = "impression",
    ) -> None:
        super().__init__(pool, num_trajectories)
        data = split.dataset
        shown = data.side.get(side)
        if shown is None or not len(shown.values):
            raise ValueError(
                f"the sampler 'impressions' needs the side behaviour {side!r}, which "
                f"{data.name} does not have; it has {list(data.side) or 'none'}"
            )
        pairs, engaged = (
            rows.row_of_values() * data.num_items + rows.values for rows in (shown, data.sequences)
        )
        self._shown = shown.filter(~np.isin(pairs, engaged))

    def candidates(self, request: SampleRequest) -> Candidates:
        """The user's impressions, in a random order of this example and epoch."""
        offsets = self._shown.offsets
        rows = self._shown.slices(offsets[request.users], offsets[request.users + 1])
        width = int(rows.lengths.max(initial=0))
        inside = np.arange(width) < rows.lengths[:, None]
        items = np.full(inside.shape, -1, np.int64)
        items[inside] = rows.values
        order = self.pool.uniform(request, _IMPRESSIONS, width).argsort(axis=1, kind="stable")
        behaviours = np.full_like(items, SHOWN)
        shown = Candidates(items, behaviours, np.full(items.shape, np.nan, np.float32))
        return shown.take(order)
