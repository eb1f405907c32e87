"""Evaluations while a GFlowGRTrainer trains: what they measure, leave alone and choose."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_shop import make_args, make_model
from support.tiny_trainer import make_trainer


def random_states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002 (the one libraries use)
    return random.getstate(), numpy_state, torch.get_rng_state().tolist()


def test_evaluation_measures_and_disturbs_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(make_args(tmp_path), make_model(dropout=0.5))
    trainer.model.train()
    before = random_states()
    metrics = trainer.evaluate()
    assert random_states() == before
    assert trainer.model.training
    for name in ("eval_R@5", "eval_R@10", "eval_N@5", "eval_N@10", "eval_coverage"):
        assert 0 <= metrics[name] <= 1
    assert metrics["eval_num_users"] == 30
    again = trainer.evaluate()
    timed = dict.fromkeys(("eval_runtime", "eval_cpu_seconds"), 0.0)
    assert again | timed == metrics | timed
    assert trainer.state.log_history[-1]["eval_N@10"] == metrics["eval_N@10"]


def test_evaluation_can_report_how_calibrated_the_flow_is(tmp_path: Path) -> None:
    """Training brings the generator's distribution over the catalogue nearer to the reward's."""
    args = make_args(
        tmp_path,
        per_device_train_batch_size=64,
        max_steps=20,
        num_trajectories=8,
        learning_rate=2e-2,
        sampler="random",
        lr_scheduler_type="constant",
        eval_calibration_users=20,
    )
    trainer = make_trainer(args, make_model(gfn_weight=1.0, normalize="children", beta=0.5))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for metrics in (before, after):
        assert -1 <= metrics["eval_calibration_pearson"] <= 1
        assert -1 <= metrics["eval_calibration_spearman"] <= 1
        assert 0 <= metrics["eval_calibration_tv"] <= 1
        assert metrics["eval_calibration_invalid"] == pytest.approx(0, abs=1e-5)
    assert after["eval_calibration_tv"] < 0.7 * before["eval_calibration_tv"]
    supervised = make_trainer(args, make_model(objective="sft"), scorer=False)
    assert "eval_calibration_tv" not in supervised.evaluate()


def test_the_best_model_is_kept(tmp_path: Path) -> None:
    args = make_args(
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
        learning_rate=2e-2,
    )
    trainer = make_trainer(args)
    trainer.train()
    measured = {
        entry["step"]: entry["eval_N@10"]
        for entry in trainer.state.log_history
        if "eval_N@10" in entry
    }
    assert sorted(measured) == [2, 4, 6]
    assert trainer.state.best_metric == max(measured.values())
    assert trainer.evaluate()["eval_N@10"] == max(measured.values())
