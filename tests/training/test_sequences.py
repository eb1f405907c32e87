"""Training on whole sequences: its batches, its rewards, and that it resumes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_decoder import make_decoder
from support.tiny_shop import MAX_HISTORY, make_args, make_model, make_scorer, shop
from support.tiny_trainer import (
    Killed,
    StopAt,
    assert_equal_weights,
    make_trainer,
    steps,
    weights,
)

from gflowgr.rewards import CatalogueReward
from gflowgr.training.catalogue import PromptRewards, position_histories
from gflowgr.training.inputs import make_inputs
from gflowgr.training.sequences import SequenceCollator, SequenceExamples


def test_each_transition_is_a_target_once() -> None:
    examples = SequenceExamples(shop(), 3)
    sequences = shop().train_sequences
    found = []
    for index in range(len(examples)):
        example = examples[index]
        assert 2 <= len(example["items"]) <= 4
        found += [(example["user"], *pair) for pair in itertools.pairwise(example["items"])]
    wanted = [
        (user, *pair)
        for user, row in enumerate(sequences)
        for pair in itertools.pairwise(row.tolist())
    ]
    assert sorted(found) == sorted(wanted)
    assert int(examples.lengths.sum()) == len(shop().train)


def test_behaviours_are_those_of_the_targets() -> None:
    examples = SequenceExamples(shop(), MAX_HISTORY)
    of_prompts = {
        (example["user"], int(example["history"][-1]), example["target"]): example["behaviour"]
        for example in (shop().train[i] for i in range(len(shop().train)))
    }
    example = examples[0]
    pairs = itertools.pairwise(example["items"].tolist())
    wanted = [of_prompts[example["user"], before, item] for before, item in pairs]
    assert example["behaviours"].tolist() == wanted


def test_rewards_of_positions_are_those_of_the_prompts_one_by_one(tmp_path: Path) -> None:
    model = make_decoder(objective="flow_kl", observed_share=0.2, reward_temperature=1.3)
    rewards = PromptRewards(model.settings, make_args(tmp_path), shop(), make_scorer())
    examples = SequenceExamples(shop(), MAX_HISTORY)
    batch = SequenceCollator(model.item_tokens(), model.prompt)([examples[i] for i in (0, 5, 9)])
    cpu = torch.device("cpu")
    scores = rewards.sequence_scores(batch["items"], batch["user"], cpu)
    found = rewards.of_sequences(scores, batch["items"], batch["behaviours"])
    valid = batch["items"][:, 1:] >= 0
    histories = position_histories(batch["items"][:, :-1], valid)
    targets, behaviours = batch["items"][:, 1:][valid], batch["behaviours"][valid]
    scores = make_scorer().score(histories)
    wanted = rewards.of_prompts(scores, histories, targets, behaviours)
    assert len(found) == int(batch["targets"]) == int(valid.sum())
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found.logsumexp(1), torch.zeros(len(found)), rtol=0, atol=0.25)


def test_the_temperature_is_chosen_by_validation(tmp_path: Path) -> None:
    settings = make_decoder(objective="flow_kl").settings
    chosen = PromptRewards(settings, make_args(tmp_path), shop(), make_scorer()).reward

    def nll(temperature: float) -> float:
        reward = CatalogueReward(temperature=temperature, seen=chosen.seen)
        total = []
        for history, target in zip(shop().histories("valid"), shop().targets("valid"), strict=True):
            past = torch.from_numpy(history)[None]
            log_reward = reward(make_scorer().score(past).clone(), past).log_softmax(1)
            if log_reward[0, int(target)] > -torch.inf:
                total.append(-float(log_reward[0, int(target)]))
        return float(np.mean(total))

    # Random scores say nothing: the flatter, the better.
    assert chosen.temperature > 2.9  # the search ends at 3
    assert nll(chosen.temperature) < nll(1.0) < nll(0.5)


BRANCHED: dict[str, Any] = {
    "augment_share": 0.5,
    "positions_per_sequence": 2,
    "sampler": "teacher",
}


@pytest.mark.parametrize(
    ("objective", "more"),
    [("sft", {}), ("flow_kl", {}), ("flow_kl", BRANCHED)],
    ids=["sft", "flow_kl", "branched"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, objective: str, more: dict[str, Any]
) -> None:
    options = {
        **more,
        "sequences": True,
        "per_device_train_batch_size": 64,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = make_trainer(
        make_args(tmp_path / "whole", **options), make_decoder(objective=objective, dropout=0.1)
    )
    whole.train()
    first = steps(whole)[0]
    assert first["loss_gr"] > steps(whole)[-1]["loss_gr"]
    if objective == "flow_kl" and not more:
        assert first["loss"] == pytest.approx(first["loss_gr"] + first["loss_gfn"], rel=1e-4)
    args = make_args(tmp_path / "parts", **options)
    killed = make_trainer(args, make_decoder(objective=objective, dropout=0.1), StopAt(4))
    with pytest.raises(Killed):
        killed.train()
    resumed = make_trainer(args, make_decoder(objective=objective, dropout=0.1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert_equal_weights(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"objective": "flow_kl"}, {}),
        ({"objective": "flow_kl"}, BRANCHED),
        ({"objective": "sft", "behaviour_temperature": 0.5, "label_smoothing": 0.1}, {}),
    ],
    ids=["positives", "branched", "weighted and smoothed"],
)
def test_accumulated_steps_equal_one_large_batch(
    tmp_path: Path, settings: dict[str, Any], more: dict[str, Any]
) -> None:
    """Micro-batches have different numbers of targets; each target weighs the same."""
    found = []
    for size, parts in ((64, 1), (16, 4)):
        args = make_args(
            tmp_path / str(size),
            sequences=True,
            **more,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_steps=2,
        )
        trainer = make_trainer(args, make_decoder(**settings))
        trainer.train()
        found.append((weights(trainer), [entry["loss"] for entry in steps(trainer)]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=1e-3, atol=1e-4)


def test_flow_kl_trains_encoder_decoders_on_prompts(tmp_path: Path) -> None:
    model = make_model(objective="flow_kl", normalize="children")
    args = make_args(tmp_path, num_trajectories=2, max_steps=6)
    trainer = make_trainer(args, model)
    trainer.train()
    assert steps(trainer)[0]["loss_gfn"] > steps(trainer)[-1]["loss_gfn"]


def test_what_whole_sequences_cannot_do_is_said(tmp_path: Path) -> None:
    args = make_args(tmp_path, sequences=True)
    with pytest.raises(ValueError, match="sequences must be off for objectives of sampled"):
        make_inputs(make_decoder(objective="tb"), args, shop(), make_scorer())
    with pytest.raises(ValueError, match="need a decoder-only model"):
        make_inputs(make_model(objective="sft"), args, shop(), None)
    with pytest.raises(ValueError, match="collaborative is required by the objective 'flow_kl'"):
        make_inputs(make_decoder(objective="flow_kl"), args, shop(), None)
    model = make_decoder(objective="flow_kl")
    tokens = model.item_tokens()[:1][None]
    with pytest.raises(ValueError, match="catalogue_log_reward is required"):
        model(torch.tensor([[1, 2]]), None, tokens)


class Unseen:
    """Scores every user by another rule, as cross-fitted models do at training prompts."""

    num_items = 200

    def score(self, histories: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        return make_scorer().score(histories, items)

    def score_of_users(self, users: torch.Tensor, histories: torch.Tensor) -> torch.Tensor:
        self.asked = users
        return make_scorer().score(histories) + users[:, None] * torch.arange(200.0)


def test_training_prompts_are_scored_once_by_what_has_not_seen_their_users(tmp_path: Path) -> None:
    model, scorer = make_model(objective="flow_kl", reward_temperature=1.0), Unseen()
    inputs, examples, collator = make_inputs(model, make_args(tmp_path), shop(), scorer)
    batch = collator([examples[i] for i in (0, 40)])
    flow, _ = inputs(batch, epoch=0, progress=0.0, log_probs=model.log_probs)
    assert torch.equal(scorer.asked, batch["user"])
    expected = scorer.score_of_users(batch["user"], batch["histories"])
    seen = torch.zeros(2, 200, dtype=torch.bool)
    rows, places = (batch["histories"] >= 0).nonzero(as_tuple=True)
    seen[rows, batch["histories"][rows, places]] = True
    wanted = expected.masked_fill(seen, -torch.inf).log_softmax(1)
    torch.testing.assert_close(flow["catalogue_log_reward"].log_softmax(1), wanted)
