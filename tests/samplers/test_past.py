"""Items barred where only the example's own past may be read, and draws from the teacher."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.sampling_world import LEAF_OF, NUM_ITEMS, ask, world, world_pool

from gflowgr.data import LeaveOneOut, Ragged
from gflowgr.samplers import (
    CandidatePool,
    CurriculumSampler,
    RandomSampler,
    SamplerSettings,
    TeacherSampler,
    TrajectorySampler,
    make_sampler,
)


def pasts() -> list[set[int]]:
    """Identifiers of each example's past and positive, found event by event."""
    split = world()
    return [
        set(LEAF_OF[row[: end + 1]].tolist())
        for row in split.train_sequences
        for end in range(1, len(row))
    ]


def past_pool(split: LeaveOneOut | None = None) -> CandidatePool:
    return CandidatePool.from_split(split or world(), LEAF_OF, 0, exclude="past")


@pytest.mark.parametrize("kind", [RandomSampler, CurriculumSampler, TeacherSampler])
def test_only_the_examples_own_past_is_barred(kind: type[TrajectorySampler]) -> None:
    pool, asked = past_pool(), ask()
    chosen = set()
    for epoch in range(20):
        items = kind(pool, 6).sample(dataclasses.replace(asked, epoch=epoch)).items
        for example, (past, row) in enumerate(zip(pasts(), items, strict=True)):
            assert not past & set(LEAF_OF[row[1:]].tolist())
            chosen |= {(example, leaf) for leaf in LEAF_OF[row[1:]].tolist()}
    users, _, test = world().dataset.held_out()
    held = dict(zip(users.tolist(), LEAF_OF[test].tolist(), strict=True))
    assert any(leaf == held[int(asked.users[example])] for example, leaf in chosen)
    for example, past in enumerate(pasts()):
        one = ask(np.array([example]))
        barred = {item for item in range(NUM_ITEMS) if int(LEAF_OF[item]) in past}
        assert set(pool.barred(one)[0].tolist()) == barred
        assert pool.num_barred(one) == [len(barred)]


def test_another_future_changes_no_draw() -> None:
    data = world().dataset
    values = data.sequences.values.copy()
    values[data.sequences.offsets[1:] - 1] = 1
    values[data.sequences.offsets[1:] - 2] = 1
    sequences = Ragged(data.sequences.offsets, values)
    other = LeaveOneOut(dataclasses.replace(data, sequences=sequences), max_history=20)
    for kind in (RandomSampler, TeacherSampler):
        items = [kind(past_pool(split), 6).sample(ask()).items for split in (world(), other)]
        assert np.array_equal(*items)


def test_the_teacher_draws_by_its_softmax_without_replacement() -> None:
    """The first item as the softmax, the second as the softmax of what is left."""
    pool = past_pool()
    asked = ask(np.array([0]))
    barred = torch.from_numpy(pool.barred(asked))[0]
    scores = asked.scores[0].double() / 0.7
    p = scores.index_fill(0, barred, -torch.inf).softmax(0).numpy()
    by_leaf = np.bincount(LEAF_OF, weights=p)
    first, second, draws = np.zeros(len(by_leaf)), np.zeros(len(by_leaf)), 4000
    sampler = TeacherSampler(pool, 3, 0.7)
    for epoch in range(draws):
        chosen = sampler.sample(dataclasses.replace(asked, epoch=epoch))
        first[LEAF_OF[chosen.items[0, 1]]] += 1 / draws
        second[LEAF_OF[chosen.items[0, 2]]] += 1 / draws
        assert chosen.log_proposal is not None
        expected = np.log(p[chosen.items[0, 1:]])
        np.testing.assert_allclose(chosen.log_proposal[0, 1:], expected, rtol=1e-4)
    then = by_leaf * ((by_leaf / (1 - by_leaf)).sum() - by_leaf / (1 - by_leaf))
    for found, wanted in ((first, by_leaf), (second, then)):
        deviation = np.abs(found - wanted) / np.sqrt(wanted.clip(1e-4) / draws)
        assert deviation.max() < 5


def test_settings_make_a_teacher_and_name_a_wrong_exclusion() -> None:
    settings = SamplerSettings(kind="teacher", teacher_temperature=0.5, exclude="past")
    made = make_sampler(settings, world_pool(), 4, split=world(), has_scores=True)
    assert isinstance(made, TeacherSampler)
    assert made.temperature == 0.5
    with pytest.raises(ValueError, match="needs a collaborative model"):
        make_sampler(settings, world_pool(), 4, split=world())
    with pytest.raises(ValueError, match="teacher_temperature must be finite and > 0"):
        SamplerSettings(kind="teacher", teacher_temperature=0.0)
    with pytest.raises(ValueError, match="exclude must be one of"):
        SamplerSettings(exclude="future")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exclude must be one of"):
        CandidatePool.from_split(world(), LEAF_OF, 0, exclude="all")  # type: ignore[arg-type]
