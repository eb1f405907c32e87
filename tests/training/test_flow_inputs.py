"""Trajectories and rewards of a batch, and the same rewards over the whole catalogue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_shop import make_args, make_model, make_scorer, shop

from gflowgr.evaluation.calibration import catalogue_log_reward
from gflowgr.training.batches import PromptCollator
from gflowgr.training.flow_inputs import FlowInputs


def test_catalogue_rewards_are_those_of_training(tmp_path: Path) -> None:
    """The calibration report compares with the reward that sampled trajectories get."""
    model = make_model(signals=["r_a", "r_yhat", "r_generation", "r_sim"]).eval()
    args = make_args(tmp_path, num_trajectories=6, sampler="random")
    make_inputs = FlowInputs(model, args, shop(), make_scorer())
    assert make_inputs.reward is not None
    collate = PromptCollator(model.item_tokens(), model.settings.max_history)
    batch = collate([shop().train[i] for i in (3, 500, 900)])
    flow, logs = make_inputs(batch, epoch=0, progress=0.0, log_probs=model.log_probs)
    assert flow["signals"].shape == (3, 6, 4)
    assert set(logs) >= {"reward/r_generation", "reward_augmented/r_yhat", "difficulty"}
    sampled = make_inputs.reward.fusion(flow["signals"])

    every = model.item_tokens().expand(3, -1, -1)
    log_probs = model.log_probs(
        {**flow, "tokens": every, "mask": torch.ones_like(every, dtype=torch.bool)}
    )
    scores = make_scorer().score(batch["histories"], None)
    catalogue = catalogue_log_reward(
        make_inputs.reward,
        model.item_tokens(),
        batch["target"],
        batch["behaviour"],
        scores,
        log_probs,
    )
    for b in range(3):
        assert torch.isfinite(catalogue[b]).all()
        for n in range(6):
            item = int((every[b] == flow["tokens"][b, n]).all(-1).nonzero()[0, 0])
            torch.testing.assert_close(catalogue[b, item], sampled[b, n], rtol=1e-4, atol=1e-5)


def test_generation_probability_is_computed_only_where_it_is_asked_for(tmp_path: Path) -> None:
    model = make_model()
    make_inputs = FlowInputs(model, make_args(tmp_path), shop(), make_scorer())
    batch = PromptCollator(model.item_tokens(), 8)([shop().train[i] for i in (3, 500)])

    def refuse(flow: dict[str, torch.Tensor]) -> torch.Tensor:
        raise AssertionError("a forward pass that nobody needs")

    flow, _ = make_inputs(batch, epoch=0, progress=0.0, log_probs=refuse)
    assert flow["signals"].shape == (2, 3, 3)


def test_the_sampler_learns_the_rewards_of_what_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    make_inputs = FlowInputs(model, make_args(tmp_path, num_trajectories=4), shop(), make_scorer())
    assert make_inputs.sampler is not None
    assert make_inputs.reward is not None
    told: list[tuple[np.ndarray, np.ndarray, torch.Tensor]] = []
    monkeypatch.setattr(
        make_inputs.sampler,
        "observe",
        lambda request, chosen, rewards: told.append((request.examples, chosen.items, rewards)),
    )
    batch = PromptCollator(model.item_tokens(), 8)([shop().train[i] for i in (3, 500)])
    flow, _ = make_inputs(batch, epoch=0, progress=0.0, log_probs=model.log_probs)
    ((examples, items, rewards),) = told
    assert examples.tolist() == batch["example"].tolist()
    tokens = model.item_tokens()[torch.from_numpy(items)]
    assert torch.equal(tokens, flow["tokens"])
    assert torch.equal(rewards, make_inputs.reward.fusion(flow["signals"]))


def test_supervised_training_samples_nothing(tmp_path: Path) -> None:
    model = make_model(objective="sft")
    make_inputs = FlowInputs(model, make_args(tmp_path), shop(), None)
    batch = PromptCollator(model.item_tokens(), 8)([shop().train[3]])
    flow, logs = make_inputs(batch, epoch=0, progress=0.0, log_probs=model.log_probs)
    assert flow["tokens"].shape == (1, 1, 4)
    assert "signals" not in flow
    assert logs == {}
