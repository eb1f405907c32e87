"""Items that were proposed or rewarded before, kept per user within a bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .base import (
    AUGMENTED,
    Candidates,
    Floats,
    Ints,
    SampleRequest,
    State,
    TrajectorySampler,
    TrajectorySet,
    nested,
    part_of,
)
from .keyed_random import systematic_counts

__all__ = ["Entries", "ReplayBuffer", "ReplaySampler"]

_REPLAY = 5
_FIELDS = {"items": -1, "log_probs": np.nan, "examples": -1, "steps": -1, "priorities": -np.inf}
_TYPES = {
    "items": np.int64,
    "log_probs": np.float32,
    "examples": np.int64,
    "steps": np.int64,
    "priorities": np.float64,
}


@dataclass(frozen=True)
class Entries:
    """What a buffer holds for some users, best first.

    Attributes:
        items: item ids [B, S], -1 for none.
        log_probs: log-probability with which the backbone proposed each [B, S], NaN where it did
            not.
        examples: example each was sampled for [B, S].
        priorities: [B, S], -inf for none.
    """

    items: Ints
    log_probs: Floats
    examples: Ints
    priorities: npt.NDArray[np.float64]


class ReplayBuffer:
    """The best items of each user; bounded and deterministic.

    What is added in a step can be looked up from the next step on, and is shared by all processes
    of a distributed run. So it does not matter how a step's prompts are cut into micro-batches or
    spread over processes. Of one user the items with the highest priority are kept (ties: later
    steps, higher example numbers, then lower item ids first); an item counts once, as it was added
    last. When there are more users than ``capacity``, those who came first go first.

    Args:
        num_users: users that there are.
        slots: items S kept per user.
        capacity: users kept; the memory is ``36 * slots + 8`` bytes for each, and 8 for each user
            that there is.
    """

    def __init__(self, num_users: int, slots: int, capacity: int) -> None:
        for name, value in (("slots", slots), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}")
        self.slots = slots
        self.capacity = min(capacity, max(1, num_users))
        self._row_of = np.full(num_users, -1, np.int64)
        self._owner = np.full(self.capacity, -1, np.int64)
        self._next = 0
        self._held = {
            name: np.full((self.capacity, slots), value, _TYPES[name])
            for name, value in _FIELDS.items()
        }
        self._pending: list[dict[str, npt.NDArray[np.generic]]] = []
        self._pending_step = -1

    def add(
        self,
        step: int,
        users: Ints,
        examples: Ints,
        items: Ints,
        log_probs: Floats,
        priorities: npt.NDArray[np.floating],
    ) -> None:
        """Add items [B, K] (-1 for none); all processes must call it in the same step.

        Args:
            step: the present step; never less than in an earlier call.
            users: of each prompt [B].
            examples: of each prompt [B].
            items: [B, K].
            log_probs: [B, K].
            priorities: [B, K]; higher is better.

        Raises:
            ValueError: a priority of a real item is NaN.
        """
        self._commit(step)
        rows, columns = np.nonzero(items >= 0)
        new: dict[str, npt.NDArray[np.generic]] = {
            "users": users[rows],
            "items": items[rows, columns],
            "log_probs": log_probs[rows, columns].astype(np.float32),
            "examples": examples[rows],
            "steps": np.full(len(rows), step),
            "priorities": priorities[rows, columns].astype(np.float64),
        }
        if np.isnan(new["priorities"]).any():
            raise ValueError("priorities holds NaN")
        self._pending.extend(_of_all_processes(new))
        self._pending_step = step

    def lookup(self, step: int, users: Ints) -> Entries:
        """What was added for the users [B] before ``step``."""
        self._commit(step)
        rows = self._row_of[users]
        found = {
            name: np.where(rows[:, None] < 0, _FIELDS[name], values[np.maximum(rows, 0)])
            for name, values in self._held.items()
        }
        return Entries(
            found["items"].astype(np.int64),
            found["log_probs"].astype(np.float32),
            found["examples"].astype(np.int64),
            found["priorities"],
        )

    def _commit(self, step: int) -> None:
        """Merge what earlier steps added."""
        if not self._pending or step <= self._pending_step:
            return
        new = {
            name: np.concatenate([part[name] for part in self._pending])
            for name in ("users", *_FIELDS)
        }
        self._pending = []
        users = np.unique(new["users"])
        old = self._row_of[users]
        old = old[old >= 0]
        here = self._held["items"][old] >= 0
        merged = {
            name: np.concatenate([values[old][here], new[name]])
            for name, values in self._held.items()
        }
        owners = np.concatenate([np.repeat(self._owner[old], here.sum(axis=1)), new["users"]])
        # Of each (user, item) the newest.
        order = np.lexsort((-merged["examples"], -merged["steps"], merged["items"], owners))
        same = (np.diff(owners[order]) == 0) & (np.diff(merged["items"][order]) == 0)
        order = order[np.append(True, ~same)] if len(order) else order
        merged, owners = {k: v[order] for k, v in merged.items()}, owners[order]
        keys = (merged["items"], -merged["examples"], -merged["steps"], -merged["priorities"])
        order = np.lexsort((*keys, owners))
        merged, owners = {k: v[order] for k, v in merged.items()}, owners[order]
        rank = np.arange(len(owners)) - np.searchsorted(owners, owners)
        self._make_room(users)
        rows = self._row_of[owners]
        keep = (rank < self.slots) & (rows >= 0)
        fresh = self._row_of[users]
        for name, values in self._held.items():
            values[fresh[fresh >= 0]] = _FIELDS[name]
            values[rows[keep], rank[keep]] = merged[name][keep]

    def _make_room(self, users: Ints) -> None:
        """Give each user a row; the users that came first lose theirs."""
        new = users[self._row_of[users] < 0][-self.capacity :]
        rows = (self._next + np.arange(len(new))) % self.capacity
        evicted = self._owner[rows]
        self._row_of[evicted[evicted >= 0]] = -1
        self._owner[rows] = new
        self._row_of[new] = rows
        self._next = int((self._next + len(new)) % self.capacity)

    def state_dict(self) -> State:
        """Everything it holds; to be called between two steps."""
        self._commit(self._pending_step + 1)
        state = {**self._held, "owner": self._owner, "next": np.asarray(self._next)}
        return {name: values.copy() for name, values in state.items()}

    def load_state_dict(self, state: State) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            ValueError: it is the state of a buffer of another size.
        """
        for name, values in (*self._held.items(), ("owner", self._owner)):
            if state[name].shape != values.shape:
                raise ValueError(
                    f"state[{name!r}] has shape {state[name].shape}, this buffer {values.shape}"
                )
            values[...] = state[name]
        self._next = int(state["next"])
        self._row_of[:] = -1
        held = np.flatnonzero(self._owner >= 0)
        self._row_of[self._owner[held]] = held
        self._pending, self._pending_step = [], -1


class ReplaySampler(TrajectorySampler):
    """Another sampler, with a share of its items replaced by ones that had a high reward before.

    Of the augmented items that were sampled for a user, the ``slots`` with the highest rewards are
    kept; from them is drawn without replacement, with probability ~ reward. What the rules forbid
    for the present example is left out.

    Args:
        inner: the other sampler.
        share: of the N - 1 items that are replayed (on average, where it is no whole number).
        slots: items kept per user.
        capacity: users kept.
    """

    def __init__(
        self,
        inner: TrajectorySampler,
        share: float,
        *,
        slots: int = 16,
        capacity: int = 100_000,
    ) -> None:
        super().__init__(inner.pool, inner.num_trajectories)
        if not 0 < share <= 1:
            raise ValueError(f"replay share must be in (0, 1]; got {share}")
        self.inner = inner
        self.needs_scores = inner.needs_scores
        self.share = share
        self.buffer = ReplayBuffer(inner.pool.num_users, slots, capacity)

    def candidates(self, request: SampleRequest) -> Candidates:
        """The replayed items, then those of the other sampler."""
        held = self.buffer.lookup(request.step, request.users)
        uniform = self.pool.uniform(request, _REPLAY, self.buffer.slots + 1)
        # The largest log-weights with Gumbel noise are a draw without replacement.
        gumbel = -np.log(-np.log(np.maximum(uniform[:, 1:], 2.0**-54)))
        order = (-(held.priorities + gumbel)).argsort(axis=1, kind="stable")
        shares = np.array([self.share, 1.0 - self.share])
        counts = systematic_counts(uniform[:, :1], shares, self.num_trajectories - 1)
        order[np.arange(order.shape[1]) >= counts[:, :1]] = -1
        replayed = kept_candidates(request, held).take(order)
        return Candidates.concatenate([replayed, Candidates.of(self.inner.sample(request))])

    def observe(self, request: SampleRequest, chosen: TrajectorySet, log_reward: Tensor) -> None:
        """Keep the augmented items with their log-rewards [B, N]."""
        self.inner.observe(request, chosen, log_reward)
        items = np.where(chosen.behaviours == AUGMENTED, chosen.items, -1)[:, 1:]
        log_probs = Candidates.of(chosen).log_proposal
        priorities = log_reward[:, 1:].detach().double().cpu().numpy()
        self.buffer.add(request.step, request.users, request.examples, items, log_probs, priorities)

    def state_dict(self) -> State:
        """The buffer and the other sampler's state."""
        return nested({"buffer": self.buffer.state_dict(), "inner": self.inner.state_dict()})

    def load_state_dict(self, state: State) -> None:
        """See :class:`TrajectorySampler`."""
        self.buffer.load_state_dict(part_of(state, "buffer"))
        self.inner.load_state_dict(part_of(state, "inner"))


def kept_candidates(request: SampleRequest, held: Entries) -> Candidates:
    """Kept items as candidates; a proposal for another prompt had another log-probability."""
    same = held.examples == request.examples[:, None]
    log_probs = np.where(same, held.log_probs, np.nan).astype(np.float32)
    return Candidates.augmented(held.items, log_probs)


def _of_all_processes(
    values: dict[str, npt.NDArray[np.generic]],
) -> list[dict[str, npt.NDArray[np.generic]]]:
    """What every process of a distributed run passed in."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return [values]
    gathered: list[dict[str, npt.NDArray[np.generic]]] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(gathered, values)
    return gathered
