"""The trainer with the baselines' objectives: what they learn, resume, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_shop import make_args, make_model
from support.tiny_trainer import Killed, StopAt, assert_equal_weights, make_trainer, steps, weights

ON_POLICY = {"sampler": "on_policy", "sampler_options": {"refresh_steps": 1}}
OPTIONS: dict[str, dict[str, Any]] = {
    "dpo": {"num_trajectories": 2, "sampler": "random"},
    "sdpo": {"num_trajectories": 4, "sampler": "random"},
    "grpo": {"num_trajectories": 6, **ON_POLICY},
}


@pytest.mark.parametrize("objective", OPTIONS)
def test_the_positive_gains_over_the_reference(objective: str, tmp_path: Path) -> None:
    """For GRPO r_a makes it the best of its group; it need not gain more than what is drawn just
    because it gained."""
    model = make_model(objective=objective)
    args = make_args(tmp_path, max_steps=6, learning_rate=1e-2, **OPTIONS[objective])
    trainer = make_trainer(args, model)
    trainer.train()
    log = steps(trainer)
    assert log[0]["preference_margin"] == pytest.approx(0.0, abs=1e-5)  # the model is the reference
    assert log[0]["reference_divergence"] == pytest.approx(0.0, abs=1e-5)
    assert log[-1]["loss_gr"] < log[0]["loss_gr"] - 0.5
    if objective != "grpo":
        assert log[-1]["preference_margin"] > 0
        assert log[-1]["preference_accuracy"] > 0.5
    assert log[-1]["reference_divergence"] > 0


@pytest.mark.parametrize("objective", ["sdpo", "grpo"])
def test_resumed_run_has_the_reference_it_started_with(objective: str, tmp_path: Path) -> None:
    """Bit for bit the uninterrupted run, though the process starts from other weights."""
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 64,
        **OPTIONS[objective],
    }

    def model(seed: int = 0) -> Any:
        return make_model(objective=objective, dropout=0.2, seed=seed)

    whole = make_trainer(make_args(tmp_path / "whole", **options), model())
    whole.train()
    cut = make_trainer(make_args(tmp_path / "cut", **options), model(), StopAt(3))
    with pytest.raises(Killed):
        cut.train()
    torch.manual_seed(99)
    resumed = make_trainer(make_args(tmp_path / "cut", **options), model(seed=7))
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 2
    assert_equal_weights(weights(resumed), weights(whole))
    assert steps(resumed)[-1]["loss"] == steps(whole)[-1]["loss"]


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("dpo", {"num_trajectories": 3}, "num_trajectories must be 2 for objective 'dpo'.*got 3"),
        ("sdpo", {"num_trajectories": 1}, "num_trajectories must be >= 2 for objective 'sdpo'"),
        ("grpo", {}, "'grpo' needs trajectories of the present model.*got 'curriculum' with None"),
        ("grpo", {"sampler": "on_policy"}, "'grpo' needs trajectories of the present model"),
        (
            "grpo",
            {"sampler": "on_policy", "sampler_options": {"refresh_steps": 1, "replay_share": 0.5}},
            "nothing replayed",
        ),
    ],
)
def test_trajectories_that_the_objective_is_not_made_for(
    objective: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(make_args(tmp_path, **options), make_model(objective=objective))
