"""The samplers within a training: what reaches the model, and that it is resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_shop import make_args, make_model, shop
from support.tiny_trainer import (
    Killed,
    StopAt,
    assert_equal_weights,
    make_trainer,
    reproducible,
    steps,
    weights,
)

from gflowgr.errors import DataError
from gflowgr.samplers import AUGMENTED
from gflowgr.training.batches import PromptCollator
from gflowgr.training.flow_inputs import FlowInputs


def test_logged_items_are_rewarded_by_their_own_behaviours(tmp_path: Path) -> None:
    model = make_model(signals=["r_a", "r_sim"])
    args = make_args(tmp_path, num_trajectories=4, sampler="logs")
    make_inputs = FlowInputs(model, args, shop(), None)
    assert make_inputs.sampler is not None
    sample, sets = make_inputs.sampler.sample, []
    make_inputs.sampler.sample = lambda asked: sets.append(sample(asked)) or sets[-1]  # type: ignore
    batch = PromptCollator(model.item_tokens(), 8)([shop().train[i] for i in range(0, 900, 10)])
    flow, logs = make_inputs(batch, epoch=0, progress=0.0, log_probs=model.log_probs)
    codes = sets[0].behaviours
    worth = {"click": 1.0, "purchase": 10.0}
    values = [worth[name] for name in shop().dataset.behaviour_names]
    expected = np.where(codes == AUGMENTED, 0.0, np.array([*values, 0.0, 0.0])[codes])
    assert (flow["signals"][..., 0].numpy() == expected).all()
    assert (codes[:, 1:] != AUGMENTED).sum() > 100
    logged = expected[:, 1:][codes[:, 1:] != AUGMENTED]
    assert float(logs["reward_logged/r_a"].value) == pytest.approx(logged.mean(), rel=1e-4)


def test_proposals_weigh_the_loss_where_the_settings_say_so(tmp_path: Path) -> None:
    options = {"sampler": "on_policy", "sampler_options": {"refresh_steps": 2}, "max_steps": 3}
    trainer = make_trainer(make_args(tmp_path, **options), make_model(importance_clip=10.0))
    trainer.train()
    assert [entry["importance"] for entry in steps(trainer)] != [1.0, 1.0, 1.0]
    # Just proposed, a trajectory has the probability it was proposed with.
    assert steps(trainer)[0]["importance"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    "sampler",
    [
        {"curriculum": 0.5, "on_policy": 0.5},
        {"logs": 1, "confidence": 1, "popularity": 1},
    ],
)
def test_a_resumed_run_of_a_mixture_equals_an_uninterrupted_one(
    sampler: dict[str, float], tmp_path: Path
) -> None:
    """Proposals and rewarded items of earlier steps are part of the checkpoint."""
    options: dict[str, Any] = {
        "sampler": sampler,
        "sampler_options": {"refresh_steps": 3, "replay_share": 0.3, "confidence_pool": 6},
        "num_trajectories": 4,
        "per_device_train_batch_size": 128,
        "max_steps": 16,
        "save_strategy": "steps",
        "save_steps": 7,
        "logging_steps": 4,
    }
    whole = make_trainer(make_args(tmp_path / "whole", **options))
    whole.train()
    cut = make_trainer(make_args(tmp_path / "cut", **options), None, StopAt(9))
    with pytest.raises(Killed):
        cut.train()
    torch.manual_seed(99)
    resumed = make_trainer(make_args(tmp_path / "cut", **options), make_model(seed=7))
    resumed.train(resume_from_checkpoint=True)
    assert reproducible(resumed) == reproducible(whole)
    assert_equal_weights(weights(resumed), weights(whole))


def test_a_checkpoint_of_another_sampler_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(make_args(tmp_path, **options)).train()
    assert not list(tmp_path.glob("*/sampler.npz"))
    other = make_trainer(make_args(tmp_path, sampler="on_policy", **{**options, "max_steps": 2}))
    with pytest.raises(DataError, match=r"sampler\.npz: not a state of this sampler"):
        other.train(resume_from_checkpoint=True)
