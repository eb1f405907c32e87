"""The rules that the sets of every sampler keep, and on what the draws depend."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sampling_world import LEAF_OF, NUM_ITEMS, FakeProposer, ask, world, world_pool

from gflowgr.data import Ragged
from gflowgr.samplers import (
    AUGMENTED,
    SHOWN,
    CandidatePool,
    ConfidenceSampler,
    CurriculumSampler,
    ImpressionSampler,
    LogSampler,
    MixtureSampler,
    OnPolicySampler,
    PopularitySampler,
    RandomSampler,
    ReplaySampler,
    SampleRequest,
    Schedule,
    TeacherSampler,
    TrajectorySampler,
    TrajectorySet,
)
from gflowgr.samplers.keyed_random import keyed_integers, keyed_uniform, systematic_counts

Make = Callable[[CandidatePool, int], TrajectorySampler]

ALL: dict[str, Make] = {
    "random": RandomSampler,
    "popularity": lambda pool, n: PopularitySampler(pool, n, world().item_counts, alpha=2.0),
    "curriculum": lambda pool, n: CurriculumSampler(pool, n, 12, Schedule("cosine")),
    "curriculum-of-everything": lambda pool, n: CurriculumSampler(pool, n, NUM_ITEMS),
    "logs": lambda pool, n: LogSampler(pool, n, world(), window=4),
    "impressions": lambda pool, n: ImpressionSampler(pool, n, world(impressions=True)),
    "on-policy": lambda pool, n: OnPolicySampler(
        FakeProposer(careless=True), RandomSampler(pool, n), refresh_steps=2
    ),
    "confidence": lambda pool, n: ConfidenceSampler(
        FakeProposer(), CurriculumSampler(pool, n), refresh_steps=2
    ),
    "teacher": lambda pool, n: TeacherSampler(pool, n, temperature=0.5),
    "mixture": lambda pool, n: MixtureSampler(
        {"logs": LogSampler(pool, n, world()), "random": RandomSampler(pool, n)},
        {"logs": 2.0, "random": 1.0},
    ),
    "replay": lambda pool, n: ReplaySampler(LogSampler(pool, n, world(), window=2), 0.5),
}


def passed_over(user: int) -> set[int]:
    """Items that a user was shown and never engaged with."""
    data = world(impressions=True).dataset
    return set(data.side["impression"].row(user)) - set(data.sequences.row(user))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
    progress=st.floats(0, 1),
    count=st.integers(1, 8),
    step=st.integers(0, 100),
)
def test_every_set_keeps_the_rules(
    name: str, seed: int, epoch: int, progress: float, count: int, step: int
) -> None:
    pool = CandidatePool.from_split(world(), LEAF_OF, seed)
    sampler = ALL[name](pool, count)
    users, valid, test = world().dataset.held_out()
    held_out = {
        user: {int(LEAF_OF[v]), int(LEAF_OF[t])}
        for user, v, t in zip(users.tolist(), valid.tolist(), test.tolist(), strict=True)
    }
    known = [{int(leaf) for leaf in LEAF_OF[row]} for row in world().known]
    for later in range(3):  # what was kept of earlier steps must keep the rules too
        asked = ask(epoch=epoch, progress=progress, step=step + later)
        chosen = sampler.sample(asked)
        assert chosen.items.shape == chosen.behaviours.shape == (len(asked.users), count)
        assert (chosen.items[:, 0] == asked.targets).all()
        assert (chosen.behaviours[:, 0] == asked.behaviours).all()
        assert (chosen.items >= 0).all()
        assert (chosen.items < NUM_ITEMS).all()
        for user, items, codes in zip(asked.users, chosen.items, chosen.behaviours, strict=True):
            leaves = LEAF_OF[items].tolist()
            assert len(set(leaves)) == count
            assert not held_out[user] & set(leaves[1:])
            logged = set(zip(*_training_events(int(user)), strict=True))
            logged |= {(item, SHOWN) for item in passed_over(int(user))}
            for item, leaf, code in list(zip(items, leaves, codes, strict=True))[1:]:
                if code == AUGMENTED:
                    assert leaf not in known[user]
                else:
                    assert (item, code) in logged
        sampler.observe(asked, chosen, _rewards(chosen))


@pytest.mark.parametrize("name", ALL)
def test_draws_depend_on_the_example_and_not_on_the_batch(name: str) -> None:
    """Also where the steps before decide, and whatever the order within a batch."""
    together, apart = (ALL[name](world_pool(), 4) for _ in range(2))
    rng = np.random.default_rng(0)
    for step in range(6):
        examples = rng.permutation(len(world().train))[:40]
        asked = ask(examples, 2, 0.3, step)
        chosen = together.sample(asked)
        together.observe(asked, chosen, _rewards(chosen))
        for part in (np.sort(examples[:11]), examples[11:]):
            asked = ask(part, 2, 0.3, step)
            again = apart.sample(asked)
            apart.observe(asked, again, _rewards(again))
            place = [examples.tolist().index(example) for example in part]
            assert (again.items == chosen.items[place]).all()
            assert (again.behaviours == chosen.behaviours[place]).all()


def test_draws_differ_between_seeds_epochs_and_examples() -> None:
    one = np.zeros(1, np.int64)
    draws = set()
    for seed in (0, 1):
        for epoch in (0, 1):
            for example in (0, 1):
                asked = SampleRequest(one + example, one, one, epoch, 0.0)
                items = RandomSampler(world_pool(seed), 9).sample(asked).items
                draws.add(tuple(items[0].tolist()))
    assert len(draws) == 8


def test_a_user_who_knows_nearly_everything_gets_the_rest_and_then_padding() -> None:
    known = Ragged.from_lengths(np.array([58]), np.arange(58))
    pool = CandidatePool(known, np.arange(60), 0)
    one = np.array([0])
    asked = SampleRequest(one, one, np.array([5]), 0, 0.0)
    assert sorted(RandomSampler(pool, 3).sample(asked).items[0]) == [5, 58, 59]
    chosen = RandomSampler(pool, 5).sample(asked)
    assert sorted(chosen.items[0].tolist()) == [-1, -1, 5, 58, 59]
    assert chosen.items[0, 0] == 5


def test_the_last_admissible_item_of_a_large_catalogue_is_found() -> None:
    known = Ragged.from_lengths(np.array([4999]), np.arange(4999))
    one = np.array([0])
    asked = SampleRequest(one, one, one, 0, 0.0)
    pool = CandidatePool(known, np.arange(5000), 0)
    assert RandomSampler(pool, 2).sample(asked).items.tolist() == [[0, 4999]]


def test_an_item_with_the_identifier_of_a_held_out_one_is_never_drawn() -> None:
    leaf_of = np.minimum(np.arange(60), 50)  # items 50 to 59 share an identifier
    known = Ragged.from_lengths(np.array([46]), np.arange(5, 51))
    one = np.array([0])
    asked = SampleRequest(one, one, np.array([5]), 0, 0.0)
    items = RandomSampler(CandidatePool(known, leaf_of, 0), 7).sample(asked).items
    assert sorted(items[0].tolist()) == [-1, 0, 1, 2, 3, 4, 5]


def test_an_item_without_an_identifier_is_never_drawn() -> None:
    leaf_of = np.where(np.arange(60) % 3 == 0, -1, np.arange(60))
    known = Ragged.from_lengths(np.array([4, 3]), np.array([0, 1, 3, 4, 6, 7, 8]))
    pool = CandidatePool(known, leaf_of, 0)
    asked = SampleRequest(np.arange(2), np.arange(2), np.array([4, 7]), 0, 0.0)
    assert pool.barred(asked).tolist() == [[1, 4], [7, 8]]
    items = RandomSampler(pool, 39).sample(asked).items[:, 1:]
    for row, barred in ((0, {1, 4}), (1, {7, 8})):
        assert set(items[row].tolist()) == set(leaf_of[leaf_of >= 0].tolist()) - barred


def test_a_user_may_know_nothing() -> None:
    known = Ragged.from_lengths(np.array([0]), np.empty(0, np.int32))
    pool = CandidatePool(known, np.arange(60), 0)
    assert not pool.is_known(np.array([0]), np.arange(60)[None]).any()
    one = np.array([0])
    assert pool.barred(SampleRequest(one, one, one, 0, 0.0)).shape == (1, 0)


def test_barred_are_all_items_of_known_identifiers() -> None:
    three = np.arange(3)
    barred = world_pool().barred(SampleRequest(three, three, three, 0, 0.0))
    for user in range(3):
        leaves = LEAF_OF[world().known.row(user)]
        expected = np.flatnonzero(np.isin(LEAF_OF, leaves))
        assert sorted(barred[user][barred[user] >= 0].tolist()) == expected.tolist()


def test_draws_are_uniform() -> None:
    """Chi-square with 9 degrees of freedom exceeds 27.9 with probability 0.001."""
    integers = keyed_integers(7, 0, np.arange(20_000), 5, 10)
    floats = np.floor(10 * keyed_uniform(7, 0, np.arange(20_000), 5)).astype(int)
    for draws in (integers, floats):
        counts = np.bincount(draws.ravel(), minlength=10)
        expected = draws.size / 10
        assert ((counts - expected) ** 2 / expected).sum() < 27.9


@given(
    count=st.integers(0, 9),
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_shares_are_kept_to_the_place(count: int, weights: list[float], seed: int) -> None:
    shares = np.array(weights) / sum(weights)
    start = keyed_uniform(seed, 0, np.arange(2000), 1)
    counts = systematic_counts(start, shares, count)
    assert (counts >= 0).all()
    assert (counts.sum(axis=1) == count).all()
    assert (np.abs(counts - shares * count) < 1 + 1e-6).all()
    assert counts.mean(axis=0) == pytest.approx(shares * count, abs=0.06)


def _training_events(user: int) -> tuple[list[int], list[int]]:
    items = world().train_sequences.row(user).tolist()
    begin = int(world().dataset.sequences.offsets[user])
    codes = world().dataset.behaviours
    assert codes is not None
    return items, codes[begin : begin + len(items)].tolist()


def _rewards(chosen: TrajectorySet) -> torch.Tensor:
    return torch.from_numpy((chosen.items * 7 % 11) / 5.0)
