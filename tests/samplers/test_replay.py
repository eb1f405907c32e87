"""The replay buffer, prioritised replay, and the settings that name all samplers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sampling_world import FakeProposer, ask, world, world_pool
from support.tiny_shop import make_model

from gflowgr.data import Ragged
from gflowgr.samplers import (
    CandidatePool,
    ConfidenceSampler,
    CurriculumSampler,
    LogSampler,
    MixtureSampler,
    OnPolicySampler,
    PopularitySampler,
    RandomSampler,
    ReplayBuffer,
    ReplaySampler,
    SampleRequest,
    SamplerSettings,
    TrajectorySampler,
    TrajectorySet,
    make_sampler,
)

# ---- the buffer ----


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), slots=st.integers(1, 4))
def test_the_buffer_keeps_each_users_best(seed: int, slots: int) -> None:
    """Against dictionaries: newest priority of each item, highest priority first."""
    rng = np.random.default_rng(seed)
    buffer = ReplayBuffer(6, slots, capacity=100)
    plain: dict[int, dict[int, tuple[float, int, int]]] = {user: {} for user in range(6)}
    for step in range(5):
        found = buffer.lookup(step, np.arange(6))
        for user in range(6):
            assert _items(found, user) == list(plain[user])
        users, examples = rng.integers(0, 6, 3), rng.permutation(50)[:3]
        items = np.stack([rng.permutation(8)[:4] for _ in range(3)])
        items[rng.random(items.shape) < 0.2] = -1
        priorities = rng.integers(0, 3, items.shape).astype(float)
        buffer.add(step, users, examples, items, np.zeros(items.shape, np.float32), priorities)
        for row in np.argsort(examples):
            for item, priority in zip(items[row].tolist(), priorities[row].tolist(), strict=True):
                if item >= 0:
                    plain[int(users[row])][item] = (-priority, -step, -int(examples[row]))
        plain = {
            user: dict(sorted(held.items(), key=lambda pair: (pair[1], pair[0]))[:slots])
            for user, held in plain.items()
        }


def test_what_a_step_adds_is_seen_from_the_next_step_on() -> None:
    buffer = ReplayBuffer(2, 3, 2)
    add(buffer, step=4, user=1, item=7)
    assert _items(buffer.lookup(4, np.array([1])), 0) == []
    assert _items(buffer.lookup(5, np.array([1])), 0) == [7]


def test_the_buffer_is_bounded_and_forgets_who_came_first() -> None:
    buffer = ReplayBuffer(1000, 3, capacity=4)
    for step in range(10):
        add(buffer, step=step, user=step, item=step)
    held = buffer.lookup(10, np.arange(1000))
    assert np.flatnonzero((held.items >= 0).any(axis=1)).tolist() == [6, 7, 8, 9]
    size = sum(values.nbytes for values in buffer._held.values())
    assert size <= 40 * 3 * 4
    everyone = np.arange(1000)
    buffer.add(
        10,
        everyone,
        everyone,
        everyone[:, None],
        np.zeros((1000, 1), np.float32),
        np.ones((1000, 1)),
    )
    held = buffer.lookup(11, everyone)
    assert np.flatnonzero((held.items >= 0).any(axis=1)).tolist() == [996, 997, 998, 999]


def test_a_restored_buffer_is_the_same_buffer() -> None:
    one, other = ReplayBuffer(9, 2, 4), ReplayBuffer(9, 2, 4)
    for step in range(7):
        add(one, step=step, user=step, item=step)
    other.load_state_dict(one.state_dict())
    for step in range(7, 12):
        for buffer in (one, other):
            add(buffer, step=step, user=step % 9, item=step)
    for name, values in one.state_dict().items():
        np.testing.assert_array_equal(values, other.state_dict()[name])
    with pytest.raises(ValueError, match=r"state\['items'\] has shape \(4, 2\), this buffer"):
        ReplayBuffer(9, 3, 4).load_state_dict(one.state_dict())


def test_bad_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="slots must be >= 1; got 0"):
        ReplayBuffer(5, 0, 5)
    with pytest.raises(ValueError, match="capacity must be >= 1; got 0"):
        ReplayBuffer(5, 5, 0)
    with pytest.raises(ValueError, match="priorities holds NaN"):
        add(ReplayBuffer(5, 5, 5), step=0, user=0, item=1, priority=np.nan)


def add(buffer: ReplayBuffer, *, step: int, user: int, item: int, priority: float = 1.0) -> None:
    one = np.array([user])
    buffer.add(
        step, one, one, np.array([[item]]), np.zeros((1, 1), np.float32), np.array([[priority]])
    )


def _items(found: Any, row: int) -> list[int]:
    return [item for item in found.items[row].tolist() if item >= 0]


# ---- replay by reward ----


def test_items_with_high_rewards_come_back() -> None:
    """Item 3 is worth e^8 times any other, so whoever was given it before gets it again."""
    sampler = ReplaySampler(RandomSampler(world_pool(), 5), 0.5, slots=8)
    had: set[int] = set()
    for step in range(30):
        asked = ask(epoch=step, step=step)
        chosen = sampler.sample(asked)
        for user, items in zip(asked.users.tolist(), chosen.items[:, 1:].tolist(), strict=True):
            assert user not in had or 3 in items
        had |= {
            int(user)
            for user, items in zip(asked.users, chosen.items[:, 1:].tolist(), strict=True)
            if 3 in items
        }
        sampler.observe(asked, chosen, 8.0 * torch.from_numpy(chosen.items == 3))
    assert len(had) > 5


def test_the_share_is_replayed_and_the_rest_is_new() -> None:
    inner = RandomSampler(world_pool(), 5)
    sampler = ReplaySampler(inner, 0.5)
    asked = ask()
    before = sampler.sample(asked)
    sampler.observe(asked, before, torch.zeros(before.items.shape))
    later = ask(epoch=1, step=1)
    chosen, new = sampler.sample(later), inner.sample(later)
    by_user: dict[int, set[int]] = {}
    for user, items in zip(asked.users.tolist(), before.items[:, 1:].tolist(), strict=True):
        by_user.setdefault(user, set()).update(items)
    for row, user in enumerate(later.users.tolist()):
        assert set(chosen.items[row, 1:3].tolist()) <= by_user[user]
        assert len(set(chosen.items[row, 3:].tolist()) & set(new.items[row, 1:].tolist())) >= 1


def test_kept_items_are_drawn_without_replacement_in_proportion_to_their_rewards() -> None:
    rows, rewards = 10_000, np.array([1.0, 2.0, 5.0])
    known = Ragged.from_lengths(np.array([1]), np.zeros(1, np.int32))
    pool = CandidatePool(known, np.arange(4), 0)  # one user, who knows item 0
    sampler = ReplaySampler(RandomSampler(pool, 3), 1.0)
    for item, reward in enumerate(rewards, start=1):
        add(sampler.buffer, step=0, user=0, item=item, priority=np.log(reward))
    examples = np.arange(rows)
    asked = SampleRequest(examples, examples * 0, examples * 0, 0, 0.0, None, step=1)
    first, second = sampler.sample(asked).items[:, 1:].T - 1
    share = rewards / rewards.sum()
    for i in range(3):
        for j in range(3):
            found = ((first == i) & (second == j)).mean()
            expected = 0.0 if i == j else share[i] * share[j] / (1 - share[i])
            assert abs(found - expected) <= 4 * (expected * (1 - expected) / rows) ** 0.5


def test_logged_items_are_not_replayed_as_augmented_ones() -> None:
    sampler = ReplaySampler(LogSampler(world_pool(), 3, world()), 1.0)
    asked = ask()
    chosen = sampler.sample(asked)
    sampler.observe(asked, chosen, torch.zeros(chosen.items.shape))
    held = sampler.buffer.lookup(1, asked.users)
    assert not (
        world_pool().is_known(asked.users, np.maximum(held.items, 0)) & (held.items >= 0)
    ).any()


# ---- samplers that hold others ----


class Learner(RandomSampler):
    """Remembers how many rewards it was told, and that as its state."""

    told = 0

    def observe(
        self, request: SampleRequest, chosen: TrajectorySet, log_reward: torch.Tensor
    ) -> None:
        self.told += log_reward.numel()

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"told": np.array(self.told)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self.told = int(state["told"])


def holders(first: Learner, second: Learner) -> dict[str, TrajectorySampler]:
    on_policy = OnPolicySampler(FakeProposer(), second)
    return {
        "mixture": MixtureSampler({"a": first, "b": second}, {"a": 1, "b": 1}),
        "replay": MixtureSampler({"a": first, "b": ReplaySampler(second, 0.5)}, {"a": 1, "b": 1}),
        "on_policy": MixtureSampler({"a": first, "b": on_policy}, {"a": 1, "b": 1}),
    }


@pytest.mark.parametrize("kind", ["mixture", "replay", "on_policy"])
def test_rewards_and_states_reach_every_sampler_within_another(kind: str) -> None:
    learners = [Learner(world_pool(), 4) for _ in range(2)]
    sampler = holders(learners[0], learners[1])[kind]
    asked = ask(np.arange(5))
    sampler.observe(asked, sampler.sample(asked), torch.ones(5, 4))
    assert [learner.told for learner in learners] == [20, 20]
    restored = [Learner(world_pool(), 4) for _ in range(2)]
    holders(restored[0], restored[1])[kind].load_state_dict(sampler.state_dict())
    assert [learner.told for learner in restored] == [20, 20]


# ---- settings ----


def build(**values: Any) -> Any:
    return make_sampler(
        SamplerSettings(**values),
        world_pool(),
        4,
        split=world(),
        model=make_model(),
        has_scores=values.pop("has_scores", True),
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("curriculum", CurriculumSampler),
        ("random", RandomSampler),
        ("popularity", PopularitySampler),
        ("logs", LogSampler),
        ("on_policy", OnPolicySampler),
        ("confidence", ConfidenceSampler),
        ({"logs": 1}, LogSampler),
        ({"curriculum": 0.5, "on_policy": 0.5}, MixtureSampler),
    ],
)
def test_each_kind_is_built(kind: Any, expected: type) -> None:
    assert type(build(kind=kind)) is expected
    replayed = build(kind=kind, replay_share=0.25)
    assert type(replayed) is ReplaySampler
    assert type(replayed.inner) is expected


def test_settings_reach_the_samplers() -> None:
    curriculum = build(pool_size=33, schedule="step", schedule_steps=3, schedule_end=0.8)
    assert curriculum.pool_size == 33
    assert curriculum.schedule(1.0) == 0.8
    assert curriculum.schedule(0.5) == 0.4
    on_policy = build(
        kind="on_policy", method="sample", temperature=2.0, num_proposals=9, refresh_steps=5
    )
    assert (on_policy.num_proposals, on_policy.refresh_steps) == (9, 5)
    assert (on_policy.proposer.method, on_policy.proposer.temperature) == ("sample", 2.0)
    assert type(on_policy.fallback) is CurriculumSampler
    assert type(build(kind="on_policy", fallback="logs", window=2).fallback) is LogSampler
    assert build(kind="confidence", confidence_pool=17).pool_size == 17
    replay = build(kind="random", replay_share=0.3, replay_slots=7, capacity=5)
    assert (replay.share, replay.buffer.slots, replay.buffer.capacity) == (0.3, 7, 5)


def test_only_some_samplers_need_a_collaborative_model() -> None:
    def without(**values: Any) -> Any:
        return make_sampler(
            SamplerSettings(**values), world_pool(), 4, split=world(), model=make_model()
        )

    assert type(without(kind="on_policy").fallback) is RandomSampler
    for values, name in (
        ({}, "curriculum"),
        ({"kind": {"random": 1, "confidence": 1}}, "confidence"),
        ({"kind": "on_policy", "fallback": "curriculum"}, "curriculum"),
    ):
        with pytest.raises(ValueError, match=f"sampler='{name}' needs a collaborative model"):
            without(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "oracle"}, "sampler must be one of .* or weights of them; got 'oracle'"),
        ({"kind": {"random": 0.5, "oracle": 1}}, "sampler must be one of .*; got 'oracle'"),
        ({"kind": {}}, "sampler is an empty mixture"),
        ({"kind": {"random": -1}}, "weight of 'random' must be finite and > 0; got -1"),
        ({"pool_size": 0}, "pool_size must be >= 1; got 0"),
        ({"schedule": "cubic"}, "schedule must be one of .*; got 'cubic'"),
        ({"schedule_end": 2}, "schedule_end must be in .*; got 2"),
        ({"alpha": -1}, "alpha must be finite and >= 0; got -1"),
        ({"window": 0}, "window must be >= 1; got 0"),
        ({"session_gap": float("nan")}, "session_gap must be finite and >= 0; got nan"),
        ({"method": "greedy"}, "method must be one of .*; got 'greedy'"),
        ({"temperature": 0}, "temperature must be finite and > 0; got 0"),
        ({"refresh_steps": 0}, "refresh_steps must be >= 1; got 0"),
        ({"fallback": "on_policy"}, "fallback must be one of .*; got 'on_policy'"),
        ({"replay_share": 1.5}, r"replay_share must be in \[0, 1\]; got 1.5"),
    ],
)
def test_bad_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerSettings(**values)
