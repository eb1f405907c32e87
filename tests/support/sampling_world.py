"""A small world to sample in: users with repeats, items that share identifiers, a fake backbone."""

from __future__ import annotations

import functools

import numpy as np
import torch

from gflowgr.data import Dataset, LeaveOneOut, Ragged
from gflowgr.samplers import CandidatePool, Proposals, SampleRequest

NUM_USERS, NUM_ITEMS = 12, 80
LEAF_OF = np.arange(NUM_ITEMS) // 2  # every identifier is shared by two items


@functools.cache
def world(times: bool = True, behaviours: bool = True, impressions: bool = False) -> LeaveOneOut:
    """Users of 4 to 15 events, with repeats; sessions of three events, an hour apart.

    With ``impressions``, user u was also shown 3 u items, some of which they engaged with at
    another time.
    """
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, NUM_ITEMS, 4 + user) for user in range(NUM_USERS)]
    for row in rows[::2]:
        row[0] = row[-1]
    lengths = np.array([len(row) for row in rows])
    place = np.concatenate([np.arange(length) for length in lengths])
    values = np.concatenate(rows).astype(np.int32)
    shown = [
        np.append(rng.permutation(NUM_ITEMS)[: 3 * user], row[: user > 0])
        for user, row in enumerate(rows)
    ]
    side = {"impression": Ragged.from_lists(shown)} if impressions else {}
    dataset = Dataset(
        name="world",
        user_ids=[str(user) for user in range(NUM_USERS)],
        sequences=Ragged.from_lengths(lengths, values),
        num_items=NUM_ITEMS,
        behaviours=(values % 3).astype(np.int8) if behaviours else None,
        behaviour_names=("click", "cart", "purchase") if behaviours else (),
        times=(place // 3 * 3600 + place % 3 * 10).astype(np.int64) if times else None,
        side=side,
    )
    return LeaveOneOut(dataset, max_history=20)


@functools.lru_cache(8)
def world_pool(seed: int = 0) -> CandidatePool:
    return CandidatePool.from_split(world(), LEAF_OF, seed)


def scores_of(examples: np.ndarray) -> torch.Tensor:
    """Collaborative scores of examples, the same in whatever batch they are."""
    table = torch.randn(1000, NUM_ITEMS, generator=torch.Generator().manual_seed(3))
    return table[torch.from_numpy(examples)]


def ask(
    examples: np.ndarray | None = None,
    epoch: int = 0,
    progress: float = 0.0,
    step: int = 0,
    *,
    scores: bool = True,
) -> SampleRequest:
    """A request for examples of the world (default: all)."""
    train = world().train
    if examples is None:
        examples = np.arange(len(train))
    rows = [train[int(index)] for index in examples]
    return SampleRequest(
        examples,
        np.array([row["user"] for row in rows]),
        np.array([row["target"] for row in rows]),
        epoch,
        progress,
        scores_of(examples) if scores else None,
        np.array([row["behaviour"] for row in rows]),
        step,
    )


class FakeProposer:
    """A backbone whose log-probability of item i is -0.01 i - 0.001 step; it proposes from 0 up.

    With ``careless`` it proposes what it was told to leave out as well.
    """

    def __init__(self, careless: bool = False) -> None:
        self.careless = careless
        self.steps: list[int] = []

    def propose(self, request: SampleRequest, count: int, exclude: np.ndarray) -> Proposals:
        self.steps.append(request.step)
        items = np.full((len(request.examples), count), -1)
        for row in range(len(items)):
            barred = set() if self.careless else set(exclude[row].tolist())
            free = [item for item in range(NUM_ITEMS) if item not in barred]
            items[row] = free[:count]
        return Proposals(items, self._log_probs(request, items))

    def log_probs(self, request: SampleRequest, items: np.ndarray) -> np.ndarray:
        self.steps.append(request.step)
        return self._log_probs(request, items)

    def _log_probs(self, request: SampleRequest, items: np.ndarray) -> np.ndarray:
        return np.where(items < 0, -np.inf, -0.01 * items - 0.001 * request.step).astype(np.float32)
