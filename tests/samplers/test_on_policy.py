"""Trajectories from the current backbone, and what is kept of them between refreshes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.sampling_world import LEAF_OF, FakeProposer, ask, world_pool
from support.tiny_shop import make_model, make_scorer, shop

from gflowgr.data import pad_histories
from gflowgr.decoding import item_logprobs
from gflowgr.models.prompts import prompt_tokens
from gflowgr.samplers import (
    BackboneProposer,
    CandidatePool,
    ConfidenceSampler,
    OnPolicySampler,
    RandomSampler,
    SampleRequest,
)


def shop_request(size: int = 12) -> tuple[SampleRequest, CandidatePool]:
    """Prompts of the tiny shop."""
    split, model = shop(), make_model()
    leaf_of = model.tree.leaf_of(torch.arange(model.tree.num_items)).numpy()
    rows = [split.train[index] for index in range(0, 40 * size, 40)]
    histories = pad_histories([row["history"] for row in rows])
    input_ids, attention_mask = prompt_tokens(histories, model.item_tokens())
    request = SampleRequest(
        np.array([row["example"] for row in rows]),
        np.array([row["user"] for row in rows]),
        np.array([row["target"] for row in rows]),
        epoch=0,
        progress=0.0,
        scores=make_scorer().score(histories, None),
        input_ids=input_ids,
        attention_mask=attention_mask,
    )
    return request, CandidatePool.from_split(split, leaf_of, 0)


@pytest.mark.parametrize("method", ["beam", "sample", "sample_without_replacement"])
def test_the_backbone_proposes_admissible_items_and_says_how_likely(method: str) -> None:
    request, pool = shop_request()
    model = make_model(dropout=0.5).train()
    proposer = BackboneProposer(model, method)  # type: ignore[arg-type]
    found = proposer.propose(request, 6, pool.barred(request))
    assert model.training
    assert model.backbone.training
    assert (found.items >= 0).all()
    assert not pool.is_known(request.users, found.items).any()
    again = proposer.propose(request, 6, pool.barred(request))
    assert (again.items == found.items).all()
    if method == "beam":
        expected = proposer.log_probs(request, found.items)
        np.testing.assert_allclose(found.log_probs, expected, atol=1e-4)
        assert (np.diff(found.log_probs, axis=1) <= 1e-6).all()
    else:  # a distribution over fewer items than the vocabulary has tokens: higher
        assert (found.log_probs > proposer.log_probs(request, found.items)).all()
    if method != "sample":
        assert all(len(set(row)) == 6 for row in found.items.tolist())


@pytest.mark.parametrize("method", ["sample", "sample_without_replacement"])
def test_every_epoch_and_seed_draws_other_proposals(method: str) -> None:
    request, pool = shop_request()
    barred, model = pool.barred(request), make_model()

    def draws(seed: int, epoch: int) -> np.ndarray:
        proposer = BackboneProposer(model, method, seed=seed)  # type: ignore[arg-type]
        return proposer.propose(dataclasses.replace(request, epoch=epoch), 6, barred).items

    first = draws(seed=0, epoch=0)
    for other in (draws(seed=0, epoch=1), draws(seed=1, epoch=0)):
        assert (other != first).any(axis=1).all()  # for every prompt


def test_beam_search_finds_the_most_probable_admissible_items() -> None:
    """With as many beams as items the search is exhaustive."""
    request, pool = shop_request()
    model = make_model()
    sampler = OnPolicySampler(
        BackboneProposer(model), RandomSampler(pool, 4), num_proposals=200, refresh_steps=1
    )
    chosen = sampler.sample(request)
    assert chosen.log_proposal is not None
    everything = item_logprobs(
        model.backbone, request.input_ids, request.attention_mask, model.tree
    )
    catalogue = np.tile(np.arange(200), (len(request.users), 1))
    known = torch.from_numpy(pool.is_known(request.users, catalogue))
    best = everything.masked_fill(known, -torch.inf).sort(dim=1, descending=True).values
    torch.testing.assert_close(chosen.log_proposal[:, 1], best[:, 0], atol=1e-4, rtol=0)
    assert (chosen.log_proposal[:, 1:].diff(dim=1) <= 1e-6).all()
    assert chosen.log_proposal[:, 0].isnan().all()


def test_the_confidence_sampler_takes_what_the_backbone_is_least_sure_of() -> None:
    """Of the 5 best identifiers of the collaborative model, the improbable ones."""
    request, pool = shop_request()
    assert request.scores is not None
    proposer = BackboneProposer(make_model())
    sampler = ConfidenceSampler(proposer, RandomSampler(pool, 3), pool_size=5, refresh_steps=1)
    chosen = sampler.sample(request)
    scores = pool.admissible_scores(request, -torch.inf)
    best = scores.topk(5, dim=1).indices.numpy()
    sure = proposer.log_probs(request, best)
    for row in range(len(best)):
        by_confidence = best[row][np.argsort(sure[row], kind="stable")]
        assert chosen.items[row, 1:].tolist() == by_confidence[:2].tolist()


def test_the_backbone_is_asked_every_so_many_steps_only() -> None:
    proposer = FakeProposer()
    sampler = OnPolicySampler(proposer, RandomSampler(world_pool(), 3), refresh_steps=4)
    for step in range(10):
        sampler.sample(ask(step=step))
    assert proposer.steps == [0, 4, 8]


def test_between_refreshes_the_users_latest_proposals_are_used() -> None:
    pool = world_pool()
    fallback = RandomSampler(pool, 3)
    sampler = OnPolicySampler(FakeProposer(), fallback, refresh_steps=5, num_proposals=4)
    half = np.flatnonzero(ask().users < 6)
    sampler.sample(ask(half[::2], step=0))
    asked_before = set(half[::2].tolist())
    asked = ask(epoch=1, step=1)
    chosen = sampler.sample(asked)
    assert chosen.log_proposal is not None
    others = fallback.sample(asked)
    barred = pool.barred(asked)
    for row, user in enumerate(asked.users):
        if user >= 6:  # never asked for: the fallback
            assert chosen.items[row].tolist() == others.items[row].tolist()
            continue
        free = [item for item in range(80) if item not in set(barred[row].tolist())][:4]
        assert set(chosen.items[row, 1:].tolist()) <= set(free)
        # The probability was that of one prompt, and not of the user's other ones.
        latest = max(e for e in asked_before if ask(np.array([e])).users[0] == user)
        given = ~chosen.log_proposal[row, 1:].isnan()
        assert given.all() if asked.examples[row] == latest else not given.any()


def test_new_proposals_replace_old_ones() -> None:
    sampler = OnPolicySampler(
        FakeProposer(), RandomSampler(world_pool(), 3), refresh_steps=2, num_proposals=4
    )
    for step in (0, 2):
        sampler.sample(ask(step=step))
    held = sampler.buffer.lookup(3, np.arange(12))
    assert (held.priorities == 2.0).all()
    np.testing.assert_allclose(held.log_probs, -0.01 * held.items - 0.002, atol=1e-6)


def test_a_careless_proposer_breaks_no_rule() -> None:
    sampler = OnPolicySampler(
        FakeProposer(careless=True), RandomSampler(world_pool(), 5), refresh_steps=1
    )
    asked = ask()
    chosen = sampler.sample(asked)
    assert not world_pool().is_known(asked.users, chosen.items[:, 1:]).any()
    assert all(len(set(LEAF_OF[row].tolist())) == 5 for row in chosen.items)


def test_a_resumed_run_goes_on_with_the_same_proposals() -> None:
    def make() -> OnPolicySampler:
        return OnPolicySampler(FakeProposer(), RandomSampler(world_pool(), 3), refresh_steps=4)

    whole, resumed = make(), make()
    for step in range(3):
        whole.sample(ask(step=step))
    resumed.load_state_dict(whole.state_dict())
    for step in range(3, 6):
        one, other = whole.sample(ask(epoch=1, step=step)), resumed.sample(ask(epoch=1, step=step))
        assert (one.items == other.items).all()
        assert one.log_proposal is not None
        assert other.log_proposal is not None
        torch.testing.assert_close(one.log_proposal, other.log_proposal, equal_nan=True)


def test_bad_arguments_are_named() -> None:
    fallback = RandomSampler(world_pool(), 4)
    with pytest.raises(ValueError, match="refresh_steps must be >= 1; got 0"):
        OnPolicySampler(FakeProposer(), fallback, refresh_steps=0)
    with pytest.raises(
        ValueError, match=r"num_proposals must be >= num_trajectories - 1 = 3; got 2"
    ):
        OnPolicySampler(FakeProposer(), fallback, num_proposals=2)
    with pytest.raises(ValueError, match="pool_size must be >= num_trajectories - 1 = 3; got 1"):
        ConfidenceSampler(FakeProposer(), fallback, pool_size=1)
    with pytest.raises(ValueError, match=r"ConfidenceSampler needs request\.scores"):
        ConfidenceSampler(FakeProposer(), fallback).sample(ask(scores=False))
    with pytest.raises(ValueError, match=r"method must be one of .*; got 'greedy'"):
        BackboneProposer(make_model(), "greedy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be finite and > 0; got 0"):
        BackboneProposer(make_model(), temperature=0)
    with pytest.raises(ValueError, match=r"need request\.input_ids"):
        OnPolicySampler(BackboneProposer(make_model()), fallback).sample(ask())
