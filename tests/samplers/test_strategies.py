"""Samplers without a backbone: popularity, the curriculum, logs, impressions, mixtures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sampling_world import LEAF_OF, NUM_ITEMS, ask, world, world_pool

from gflowgr.data import LeaveOneOut, Ragged
from gflowgr.samplers import (
    AUGMENTED,
    NOT_RECORDED,
    SHOWN,
    CandidatePool,
    CurriculumSampler,
    ImpressionSampler,
    LogSampler,
    MixtureSampler,
    PopularitySampler,
    RandomSampler,
    SampleRequest,
    Schedule,
)


def strangers(count: int, num_items: int, scores: torch.Tensor | None = None) -> SampleRequest:
    """Examples of users who know item 0 only, which is their target."""
    rows = np.arange(count)
    return SampleRequest(rows, rows * 0, rows * 0, 0, 0.0, scores)


def strangers_pool(num_items: int) -> CandidatePool:
    known = Ragged.from_lengths(np.array([1]), np.zeros(1, np.int32))
    return CandidatePool(known, np.arange(num_items), 0)


# ---- popularity ----


@pytest.mark.parametrize("alpha", [0.0, 0.75, 2.0])
def test_popular_items_are_drawn_in_proportion(alpha: float) -> None:
    counts = np.array([15, 0, 1, 3, 7, 15])
    sampler = PopularitySampler(strangers_pool(6), 2, counts, alpha)
    items = sampler.sample(strangers(40_000, 6)).items[:, 1]
    expected = np.array([0, 1, 2, 4, 8, 16.0]) ** alpha
    expected[0] = 0  # known
    expected *= len(items) / expected.sum()
    found = np.bincount(items, minlength=6)
    # Chi-square with 4 degrees of freedom exceeds 18.5 with probability 0.001.
    assert ((found - expected)[1:] ** 2 / expected[1:]).sum() < 18.5


def test_no_exponent_overflows() -> None:
    counts = np.array([10**9, 0, 10**9, 5])
    items = PopularitySampler(strangers_pool(4), 4, counts, 1000.0).sample(strangers(9, 4)).items
    assert (np.sort(items, axis=1) == np.arange(4)).all()
    assert (items[:, 1] == 2).all()


# ---- the curriculum ----


@pytest.mark.parametrize("pool_size", [20, NUM_ITEMS])
def test_the_curriculum_goes_from_low_scores_to_high_ones(pool_size: int) -> None:
    sampler = CurriculumSampler(world_pool(), 3, pool_size)
    quantiles = []
    for progress in (0.0, 0.5, 1.0):
        chosen = sampler.sample(ask(progress=progress))
        assert chosen.difficulty is not None
        quantiles.append(float(chosen.difficulty.mean()))
    assert quantiles[0] < 0.15
    assert 0.4 < quantiles[1] < 0.6
    assert quantiles[2] > 0.85


@settings(max_examples=30)
@given(
    progress=st.floats(0, 1),
    seed=st.integers(0, 2**32),
    coarse=st.booleans(),
    count=st.integers(2, 6),
)
def test_the_whole_catalogue_as_pool_gives_the_very_items(
    progress: float, seed: int, coarse: bool, count: int
) -> None:
    """Nearest in rank to the quantile among the admissible ones; ties by item, then lower rank."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, NUM_ITEMS, generator=generator)
    if coarse:
        scores = (scores * 2).round() / 2 * torch.tensor([-1.0, 1.0]).repeat(NUM_ITEMS // 2)
    base = ask(np.arange(5))
    asked = SampleRequest(base.examples, base.users, base.targets, 0, progress, scores)
    pool = CandidatePool(world().known, np.arange(NUM_ITEMS), 0)  # no shared identifiers
    items = CurriculumSampler(pool, count, NUM_ITEMS).sample(asked).items[:, 1:]
    for row, user in enumerate(base.users):
        known = set(world().known.row(int(user)).tolist())
        ranked = sorted(
            (float(scores[row, item]), item) for item in range(NUM_ITEMS) if item not in known
        )
        centre = progress * (len(ranked) - 1)
        nearest = sorted(range(len(ranked)), key=lambda rank: (abs(rank - centre), rank))
        assert items[row].tolist() == [ranked[rank][1] for rank in nearest[: count - 1]]


@pytest.mark.gpu
@pytest.mark.parametrize("pool_size", [20, NUM_ITEMS])
def test_scores_on_a_gpu_give_the_same_items(pool_size: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    sampler = CurriculumSampler(world_pool(), 4, pool_size)
    for progress in (0.0, 0.3, 1.0):
        asked = ask(progress=progress)
        assert asked.scores is not None
        expected = sampler.sample(asked)
        found = sampler.sample(replace(asked, scores=asked.scores.cuda()))
        assert (found.items == expected.items).all()
        assert found.difficulty is not None
        assert expected.difficulty is not None
        torch.testing.assert_close(found.difficulty.cpu(), expected.difficulty)


def test_a_pool_holds_each_item_equally_often_and_once() -> None:
    sampler = CurriculumSampler(strangers_pool(50), 2, 7)
    pool = sampler._draw_pool(strangers(20_000, 50))
    assert all(len(set(row)) == pool.shape[1] for row in pool[:200].tolist())
    counts = np.bincount(pool.ravel(), minlength=50)
    assert counts == pytest.approx(np.full(50, pool.size / 50), rel=0.08)
    assert pool.shape[1] == 8  # one of which may be the one known item


def test_a_pool_makes_up_for_what_a_user_knows() -> None:
    known = Ragged.from_lengths(np.array([80]), np.arange(80))
    pool = CandidatePool(known, np.arange(100), 0)
    drawn = CurriculumSampler(pool, 2, 10)._draw_pool(strangers(500, 100))
    admissible = (drawn >= 80).sum(axis=1)
    assert admissible.mean() == pytest.approx(10, abs=0.3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), [0, 0.25, 0.5, 1]),
        (Schedule(start=0.2, end=0.6), [0.2, 0.3, 0.4, 0.6]),
        (Schedule("cosine"), [0, 0.1464466, 0.5, 1]),
        (Schedule("step", steps=2), [0, 0, 1, 1]),
        (Schedule("step", steps=5), [0, 0.25, 0.5, 1]),
        (Schedule("constant", end=0.9), [0.9] * 4),
        (Schedule(start=1, end=0), [1, 0.75, 0.5, 0]),
    ],
)
def test_schedules(schedule: Schedule, expected: list[float]) -> None:
    assert [schedule(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx(expected)
    assert schedule(-1) == expected[0]
    assert schedule(2) == expected[-1]


def test_difficulty_is_the_share_of_lower_scores() -> None:
    asked = ask(progress=0.4)
    chosen = CurriculumSampler(world_pool(), 4).sample(asked)
    assert asked.scores is not None
    assert chosen.difficulty is not None
    for row in range(5):
        for n in range(3):
            mine = asked.scores[row, chosen.items[row, n + 1]]
            share = float((asked.scores[row] < mine).sum()) / NUM_ITEMS
            assert float(chosen.difficulty[row, n]) == pytest.approx(share)
    assert RandomSampler(world_pool(), 4).sample(ask(scores=False)).difficulty is None


# ---- interaction logs ----


def neighbours(example: int, window: int, *, session: bool) -> list[tuple[int, int]]:
    """(item, behaviour) of the events around an example's target, within its training part."""
    train, dataset = world().train, world().dataset
    user = train[example]["user"]
    begin = int(dataset.sequences.offsets[user])
    items = world().train_sequences.row(user).tolist()
    at = int(train.bounds[example, 1]) - int(world().train_sequences.offsets[user])
    assert dataset.behaviours is not None
    codes = dataset.behaviours[begin:].tolist()
    return [
        (items[place], codes[place])
        for place in range(len(items))
        if place != at
        and abs(place - at) <= window
        and (not session or place // 3 == at // 3)  # sessions are of three events
    ]


@pytest.mark.parametrize("session", [False, True])
def test_logged_items_are_neighbours_with_their_own_behaviours(session: bool) -> None:
    sampler = LogSampler(world_pool(), 4, world(), window=3, session_gap=600 if session else None)
    asked = ask()
    chosen = sampler.sample(asked)
    users, valid, test = world().dataset.held_out()
    full = 0
    for row, example in enumerate(asked.examples):
        around = neighbours(int(example), 3, session=session)
        pairs = list(zip(chosen.items[row, 1:], chosen.behaviours[row, 1:], strict=True))
        logged = [(int(item), int(code)) for item, code in pairs if code != AUGMENTED]
        assert set(logged) <= set(around)
        place = users.tolist().index(asked.users[row])
        barred = {LEAF_OF[valid[place]], LEAF_OF[test[place]], LEAF_OF[asked.targets[row]]}
        distinct = {LEAF_OF[item] for item, _ in around} - barred
        assert len(logged) == min(3, len(distinct))
        full += len(logged) == 3
    assert full > 10 or session


def test_logs_differ_between_epochs() -> None:
    sampler = LogSampler(world_pool(), 2, world())
    assert (sampler.sample(ask(epoch=0)).items != sampler.sample(ask(epoch=1)).items).any()


def test_without_recorded_behaviours_a_logged_item_is_still_told_from_an_augmented_one() -> None:
    chosen = LogSampler(world_pool(), 3, world(behaviours=False)).sample(ask())
    assert set(np.unique(chosen.behaviours[:, 1:]).tolist()) == {NOT_RECORDED, AUGMENTED}


def test_a_held_out_item_that_occurred_before_stays_out() -> None:
    """Even users of the world began with what they ended with."""
    users, valid, test = world().dataset.held_out()
    repeated = [
        user
        for user, v, t in zip(users.tolist(), valid, test, strict=True)
        if {v, t} & set(world().train_sequences.row(user).tolist())
    ]
    assert repeated  # otherwise this test would show nothing
    sampler = LogSampler(world_pool(), 8, world(), window=20)
    asked = ask()
    for epoch in range(5):
        items = sampler.sample(ask(epoch=epoch)).items[:, 1:]
        assert not world_pool().is_future(asked.users, items).any()


# ---- impressions ----


def test_impressions_are_what_the_user_passed_over_then_unobserved_items() -> None:
    shop = world(impressions=True)
    asked = ask()
    chosen = ImpressionSampler(CandidatePool.from_split(shop, LEAF_OF, 0), 9, shop).sample(asked)
    engaged_after_all = 0
    for row, user in enumerate(asked.users):
        shown = shop.dataset.side["impression"].row(int(user))
        touched = shop.dataset.sequences.row(int(user))
        engaged_after_all += len(np.intersect1d(shown, touched))
        held_out = set(LEAF_OF[touched[-2:]].tolist()) | {LEAF_OF[asked.targets[row]]}
        free = {LEAF_OF[item] for item in np.setdiff1d(shown, touched)} - held_out
        codes = chosen.behaviours[row, 1:]
        assert (codes == SHOWN).sum() == min(8, len(free))
        assert set(chosen.items[row, 1:][codes == SHOWN]) <= set(shown) - set(touched)
        assert set(codes[codes != SHOWN]) <= {AUGMENTED}
    assert engaged_after_all  # otherwise this test would show nothing
    assert (chosen.behaviours == AUGMENTED).any()


def test_impressions_differ_between_epochs() -> None:
    sampler = ImpressionSampler(world_pool(), 2, world(impressions=True))
    assert (sampler.sample(ask(epoch=0)).items != sampler.sample(ask(epoch=1)).items).any()


def test_another_side_behaviour_may_take_their_place() -> None:
    shop = world(impressions=True)
    carts = replace(shop.dataset, side={"cart": shop.dataset.side["impression"]})
    named = ImpressionSampler(world_pool(), 2, LeaveOneOut(carts), side="cart")
    plain = ImpressionSampler(world_pool(), 2, shop)
    asked = ask()
    np.testing.assert_array_equal(named.sample(asked).items, plain.sample(asked).items)
    with pytest.raises(ValueError, match="needs the side behaviour 'impression', which world does"):
        ImpressionSampler(world_pool(), 2, LeaveOneOut(carts))


def test_data_without_impressions_are_refused() -> None:
    with pytest.raises(ValueError, match="side behaviour 'impression', which world does not have"):
        ImpressionSampler(world_pool(), 2, world())


# ---- mixtures ----


def test_a_mixture_gives_each_sampler_its_share() -> None:
    pool = strangers_pool(1000)
    low = CurriculumSampler(pool, 5, 500, Schedule("constant", end=0.0))
    high = CurriculumSampler(pool, 5, 500, Schedule("constant", end=1.0))
    mixture = MixtureSampler({"low": low, "high": high}, {"low": 1.0, "high": 3.0})
    scores = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    chosen = mixture.sample(strangers(50, 1000, scores))
    assert mixture.needs_scores
    assert chosen.difficulty is not None
    assert ((chosen.difficulty > 0.5).sum(dim=1) == 3).all()


def test_a_mixture_takes_an_item_once() -> None:
    pool = world_pool()
    one, two = RandomSampler(pool, 4), RandomSampler(pool, 4)
    chosen = MixtureSampler({"a": one, "b": two}, {"a": 1, "b": 1}).sample(ask())
    assert (chosen.items == one.sample(ask()).items).sum(axis=1).min() >= 2
    assert all(len(set(row)) == 4 for row in chosen.items.tolist())


# ---- what goes wrong ----


def test_bad_arguments_are_named() -> None:
    pool = world_pool()
    with pytest.raises(ValueError, match="num_trajectories must be >= 1; got 0"):
        RandomSampler(pool, 0)
    with pytest.raises(ValueError, match="pool_size must be >= num_trajectories - 1 = 3; got 2"):
        CurriculumSampler(pool, 4, pool_size=2)
    with pytest.raises(ValueError, match=r"needs request\.scores"):
        CurriculumSampler(pool, 4).sample(ask(scores=False))
    with pytest.raises(ValueError, match=r"counts must be \[items\] = \(80,\); got \(3,\)"):
        PopularitySampler(pool, 4, np.ones(3, int))
    with pytest.raises(ValueError, match="alpha must be finite and >= 0; got -1"):
        PopularitySampler(pool, 4, world().item_counts, -1)
    with pytest.raises(ValueError, match="window must be >= 1; got 0"):
        LogSampler(pool, 4, world(), window=0)
    with pytest.raises(ValueError, match="session_gap must be >= 0; got -5"):
        LogSampler(pool, 4, world(), session_gap=-5)
    with pytest.raises(ValueError, match="session_gap = 60 needs timestamps, which world does not"):
        LogSampler(pool, 4, world(times=False), session_gap=60)
    two = {"a": RandomSampler(pool, 4), "b": RandomSampler(pool, 4)}
    with pytest.raises(ValueError, match=r"weights\['b'\] must be finite and > 0; got 0"):
        MixtureSampler(two, {"a": 1, "b": 0})
    with pytest.raises(ValueError, match="weights must have an entry for each sampler"):
        MixtureSampler({}, {})
    for options, message in (
        ({"shape": "cubic"}, "schedule must be one of .*; got 'cubic'"),
        ({"start": -0.1}, r"schedule_start must be in \[0, 1\]; got -0.1"),
        ({"end": 1.1}, r"schedule_end must be in \[0, 1\]; got 1.1"),
        ({"steps": 1}, "schedule_steps must be >= 2; got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Schedule(**options)  # type: ignore[arg-type]
