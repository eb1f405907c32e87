"""The samplers' rules, as properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gflowgr.data import Ragged
from gflowgr.trajectories import (
    CandidatePool,
    CurriculumSampler,
    RandomSampler,
    SampleRequest,
)
from gflowgr.trajectories.keyed_random import keyed_integers

NUM_ITEMS = 60
NUM_USERS = 9


def make_pool(seed: int = 0, leaf_of: np.ndarray | None = None) -> CandidatePool:
    rng = np.random.default_rng(1)
    rows = [np.unique(rng.integers(0, NUM_ITEMS, 12)) for _ in range(NUM_USERS)]
    known = Ragged.from_lengths(np.array([len(r) for r in rows]), np.concatenate(rows))
    return CandidatePool(known, np.arange(NUM_ITEMS) if leaf_of is None else leaf_of, seed)


def request(
    examples: np.ndarray, epoch: int = 0, progress: float = 0.0, scores: torch.Tensor | None = None
) -> SampleRequest:
    users = examples % NUM_USERS
    pool = make_pool()
    # The target is an item the user knows.
    targets = np.array([pool._known[pool._known // NUM_ITEMS == u][0] % NUM_ITEMS for u in users])
    return SampleRequest(examples, users, targets, epoch, progress, scores)


def scores_for(examples: np.ndarray) -> torch.Tensor:
    return torch.randn(len(examples), NUM_ITEMS, generator=torch.Generator().manual_seed(3))


@given(
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
    progress=st.floats(0, 1),
    count=st.integers(1, 8),
    curriculum=st.booleans(),
)
def test_rules_hold(seed: int, epoch: int, progress: float, count: int, curriculum: bool) -> None:
    leaf_of = np.arange(NUM_ITEMS) // 2  # every identifier is shared by two items
    pool = make_pool(seed, leaf_of)
    examples = np.arange(20)
    asked = request(examples, epoch, progress, scores_for(examples))
    sampler = CurriculumSampler(pool, count) if curriculum else RandomSampler(pool, count)
    items = sampler.sample(asked).items
    assert items.shape == (20, count)
    assert (items[:, 0] == asked.targets).all()
    assert (items >= 0).all()
    assert not pool.is_known(asked.users, items[:, 1:]).any()
    for row in items:
        assert len({leaf_of[item] for item in row}) == count


def test_draws_depend_on_the_example_and_not_on_the_batch() -> None:
    sampler = CurriculumSampler(make_pool(), 4)
    examples = np.arange(30)
    scores = scores_for(examples)
    together = sampler.sample(request(examples, 2, 0.3, scores)).items
    for half in (examples[:11], examples[11:]):
        apart = sampler.sample(request(half, 2, 0.3, scores[half])).items
        assert (apart == together[half]).all()


def test_draws_differ_between_seeds_epochs_and_examples() -> None:
    draws = {
        (seed, epoch, row): tuple(items)
        for seed in (0, 1)
        for epoch in (0, 1)
        for row, items in enumerate(
            make_pool(seed).draw(request(np.zeros(1, int) + epoch * 0, epoch), 8).tolist()
        )
    }
    assert len(set(draws.values())) == len(draws) == 4


def test_the_curriculum_goes_from_low_scores_to_high_ones() -> None:
    examples = np.arange(200)
    scores = scores_for(examples)
    sampler = CurriculumSampler(make_pool(), 3, pool_size=20)
    means = []
    for progress in (0.0, 0.5, 1.0):
        chosen = sampler.sample(request(examples, 0, progress, scores))
        assert chosen.difficulty is not None
        means.append(float(chosen.difficulty.mean()))
    assert means[0] < 0.15
    assert 0.4 < means[1] < 0.6
    assert means[2] > 0.85


def test_a_user_who_knows_nearly_everything_gets_padding_not_a_known_item() -> None:
    known = Ragged.from_lengths(np.array([58]), np.arange(58))
    pool = CandidatePool(known, np.arange(NUM_ITEMS), 0)
    asked = SampleRequest(np.array([0]), np.array([0]), np.array([5]), 0, 0.0)
    items = pool.draw(asked, 4)
    assert sorted(items[0].tolist()) == [-1, -1, 58, 59]


def test_a_curriculum_prefers_real_items_to_padding() -> None:
    known = Ragged.from_lengths(np.array([57]), np.arange(57))
    sampler = CurriculumSampler(CandidatePool(known, np.arange(NUM_ITEMS), 0), 3, pool_size=6)
    for progress in (0.0, 1.0):
        asked = SampleRequest(
            np.array([0]), np.array([0]), np.array([5]), 0, progress, torch.randn(1, NUM_ITEMS)
        )
        assert (sampler.sample(asked).items >= 0).all()


def test_draws_are_uniform() -> None:
    draws = keyed_integers(7, 0, np.arange(20_000), 5, 10)
    counts = np.bincount(draws.ravel(), minlength=10)
    expected = draws.size / 10
    # Chi-square with 9 degrees of freedom exceeds 27.9 with probability 0.001.
    assert ((counts - expected) ** 2 / expected).sum() < 27.9


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_trajectories must be >= 1; got 0"):
        RandomSampler(make_pool(), 0)
    with pytest.raises(ValueError, match="pool_size must be >= num_trajectories - 1 = 3; got 2"):
        CurriculumSampler(make_pool(), 4, pool_size=2)
    with pytest.raises(ValueError, match=r"needs request\.scores"):
        CurriculumSampler(make_pool(), 4).sample(request(np.arange(2)))


def test_an_item_with_the_identifier_of_a_held_out_one_is_never_drawn() -> None:
    leaf_of = np.minimum(np.arange(NUM_ITEMS), 50)  # items 50 to 59 share an identifier
    known = Ragged.from_lengths(np.array([46]), np.arange(5, 51))
    asked = SampleRequest(np.array([0]), np.array([0]), np.array([5]), 0, 0.0)
    items = CandidatePool(known, leaf_of, 0).draw(asked, 6)
    assert sorted(items[0].tolist()) == [-1, 0, 1, 2, 3, 4]


def test_a_user_may_know_nothing() -> None:
    known = Ragged.from_lengths(np.array([0]), np.empty(0, np.int32))
    pool = CandidatePool(known, np.arange(NUM_ITEMS), 0)
    assert not pool.is_known(np.array([0]), np.arange(NUM_ITEMS)[None]).any()
