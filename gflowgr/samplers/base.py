"""The interface of trajectory samplers: request, candidates, result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..transfer import to_device

if TYPE_CHECKING:
    from .pool import CandidatePool

__all__ = [
    "AUGMENTED",
    "NOT_RECORDED",
    "SHOWN",
    "Candidates",
    "SampleRequest",
    "TrajectorySampler",
    "TrajectorySet",
]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
State = dict[str, npt.NDArray[np.generic]]

NOT_RECORDED = -1
"""Behaviour of an observed item whose behaviour the data does not record."""
AUGMENTED = -2
"""Behaviour of an item that the user was not observed with (and of padding)."""
SHOWN = -3
"""Behaviour of an item that the user was shown and did not engage with (an impression)."""


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
        behaviours: behaviour codes of the positives [B], or None: not recorded.
        step: optimiser steps done; the same on all processes.
        input_ids: prompts [B, S], for samplers that ask the backbone.
        attention_mask: 1 for the prompts' real tokens [B, S].
    """

    examples: Ints
    users: Ints
    targets: Ints
    epoch: int
    progress: float
    scores: Tensor | None = None
    behaviours: Ints | None = None
    step: int = 0
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None


@dataclass(frozen=True)
class TrajectorySet:
    """Items of each prompt [B, N]: the positive, then N - 1 others.

    Attributes:
        items: item ids [B, N]; -1 where a user has no further admissible item.
        behaviours: behaviour code of each item [B, N], :data:`NOT_RECORDED` for an observed one
            without a code, :data:`AUGMENTED` for an item the user was not observed with,
            :data:`SHOWN` for one of a side behaviour.
        difficulty: for each augmented item [B, N - 1], the share of the catalogue that the
            collaborative model scores below it, or None without a model.
        log_proposal: log-probability [B, N] with which the backbone proposed each item when it
            did, NaN for other items; None if the backbone proposed none. Its difference to the
            present ``log_pf`` is an off-policy correction.
    """

    items: Ints
    behaviours: Ints
    difficulty: Tensor | None = None
    log_proposal: Tensor | None = None


@dataclass(frozen=True)
class Candidates:
    """The items that a strategy proposes, best first; the pool's rules may reject some.

    Attributes:
        items: item ids [B, C], -1 for none.
        behaviours: as in :class:`TrajectorySet` [B, C]. Whatever is not :data:`AUGMENTED` was
            observed in the user's own training part, or is one of their impressions.
        log_proposal: as in :class:`TrajectorySet` [B, C], NaN where there is none.
    """

    items: Ints
    behaviours: Ints
    log_proposal: Floats

    @classmethod
    def augmented(cls, items: Ints, log_proposal: Floats | None = None) -> Candidates:
        """Items [B, C] that the users were not observed with."""
        if log_proposal is None:
            log_proposal = np.full(items.shape, np.nan, np.float32)
        return cls(items, np.full_like(items, AUGMENTED), log_proposal)

    @classmethod
    def none(cls, prompts: int) -> Candidates:
        """No candidate for any prompt."""
        return cls.augmented(np.empty((prompts, 0), np.int64))

    @classmethod
    def of(cls, chosen: TrajectorySet) -> Candidates:
        """The N - 1 others of a set."""
        items = chosen.items[:, 1:]
        if chosen.log_proposal is None:
            log_proposal = np.full(items.shape, np.nan, np.float32)
        else:
            log_proposal = chosen.log_proposal[:, 1:].numpy()
        return cls(items, chosen.behaviours[:, 1:], log_proposal)

    @classmethod
    def concatenate(cls, parts: list[Candidates]) -> Candidates:
        """All of the first part, then all of the second, and so on."""
        return cls(
            np.concatenate([part.items for part in parts], axis=1),
            np.concatenate([part.behaviours for part in parts], axis=1),
            np.concatenate([part.log_proposal for part in parts], axis=1),
        )

    def rows(self, rows: npt.NDArray[np.intp]) -> Candidates:
        """The candidates of some prompts."""
        return Candidates(self.items[rows], self.behaviours[rows], self.log_proposal[rows])

    def take(self, places: npt.NDArray[np.intp]) -> Candidates:
        """Candidates at ``places`` [B, C'], in that order; none where a place is -1."""
        # A last column of padding, which is where -1 points.
        padding = Candidates.augmented(np.full((len(self.items), 1), -1, np.int64))
        padded = Candidates.concatenate([self, padding])
        return Candidates(
            np.take_along_axis(padded.items, places, axis=1),
            np.take_along_axis(padded.behaviours, places, axis=1),
            np.take_along_axis(padded.log_proposal, places, axis=1),
        )


class TrajectorySampler(ABC):
    """Chooses the trajectories of a batch.

    A strategy proposes items in :meth:`candidates`. The rules that all sets keep
    are those of :meth:`CandidatePool.complete`, which :meth:`sample` calls.

    Args:
        pool: knows what may be sampled, and fills up what a strategy leaves open.
        num_trajectories: N, the positive included.
    """

    needs_scores: bool = False
    """Whether requests must carry the collaborative scores."""

    def __init__(self, pool: CandidatePool, num_trajectories: int) -> None:
        if num_trajectories < 1:
            raise ValueError(f"num_trajectories must be >= 1; got {num_trajectories}")
        self.pool = pool
        self.num_trajectories = num_trajectories

    @abstractmethod
    def candidates(self, request: SampleRequest) -> Candidates:
        """The items that the strategy proposes, best first."""

    def sample(self, request: SampleRequest) -> TrajectorySet:
        """Items for each prompt of the request."""
        count = self.num_trajectories - 1
        if count == 0:
            return self.pool.complete(request, Candidates.none(len(request.users)), 0)
        return self.pool.complete(request, self.candidates(request), count, self.refill)

    def refill(self, request: SampleRequest, round_: int, width: int) -> Ints:
        """Draws [B, width] that fill up what the candidates leave open; other ones each round."""
        return self.pool.draw_uniform(request, round_, width)

    def observe(  # noqa: B027 (optional)
        self, request: SampleRequest, chosen: TrajectorySet, log_reward: Tensor
    ) -> None:
        """Learn the rewards [B, N] of the sampled items; most samplers do not use them."""

    def state_dict(self) -> State:
        """The state that an identical resumed run needs; usually empty."""
        return {}

    def load_state_dict(self, state: State) -> None:  # noqa: B027 (optional)
        """Take back what :meth:`state_dict` gave."""


def nested(states: dict[str, State]) -> State:
    """One flat dictionary of several, the names joined by a slash."""
    return {f"{outer}/{k}": v for outer, state in states.items() for k, v in state.items()}


def part_of(state: State, name: str) -> State:
    """The part ``name`` of what :func:`nested` joined."""
    start = f"{name}/"
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}


def difficulty(request: SampleRequest, items: Ints) -> Tensor | None:
    """Share of the catalogue scored below each item [B, M], NaN for padding.

    None without scores.
    """
    if request.scores is None or items.shape[1] == 0:
        return None
    index = to_device(items, request.scores.device)
    chosen = request.scores.gather(1, index.clamp_min(0))
    # Compared into floats, because to sum booleans is ten times slower on a CPU.
    below = torch.empty_like(request.scores, dtype=torch.float32)
    columns = [
        torch.lt(request.scores, chosen[:, n : n + 1], out=below).mean(dim=1)
        for n in range(items.shape[1])
    ]
    return torch.stack(columns, dim=1).masked_fill(index < 0, torch.nan)
