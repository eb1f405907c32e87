"""What GFlowGRTrainer and its configuration refuse, before any work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support.tiny_shop import make_args, make_model, make_scorer, shop
from support.tiny_trainer import make_trainer

from gflowgr.data import LeaveOneOut, generate_builtin
from gflowgr.training import GFlowGRConfig, GFlowGRTrainer


def test_item_numbers_must_agree(tmp_path: Path) -> None:
    args = make_args(tmp_path)
    with pytest.raises(ValueError, match="collaborative has 7 items, but the data has 200"):
        GFlowGRTrainer(make_model(), args, shop(), collaborative=make_scorer(7))
    other = LeaveOneOut(generate_builtin(seed=0, num_users=20, num_items=210), max_history=8)
    with pytest.raises(ValueError, match="tree has 200 items, but the data has 210"):
        GFlowGRTrainer(make_model(), args, other)


def test_curriculum_needs_a_collaborative_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sampler='curriculum' needs a collaborative model"):
        make_trainer(make_args(tmp_path), scorer=False)
    make_trainer(make_args(tmp_path), make_model(objective="sft"), scorer=False)


def test_vargrad_needs_two_trajectories(tmp_path: Path) -> None:
    args = make_args(tmp_path, num_trajectories=1)
    with pytest.raises(ValueError, match="num_trajectories must be >= 2 for partition 'vargrad'"):
        make_trainer(args, make_model(partition="vargrad"))


def test_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GFlowGRConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"2 GPUs are visible to one process.*torchrun"):
        make_trainer(make_args(tmp_path))


def test_a_behaviour_with_a_value_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"behaviour_values\['purchase'\] must be .* got -1"):
        make_trainer(make_args(tmp_path, behaviour_values={"purchase": -1.0}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_trajectories": 0}, "num_trajectories must be >= 1; got 0"),
        ({"eval_beams": 0}, "eval_beams must be >= 1; got 0"),
        ({"eval_max_users": 0}, "eval_max_users must be >= 1; got 0"),
        ({"sampler": "oracle"}, "sampler must be one of .* or weights of them; got 'oracle'"),
        ({"sampler": {"random": 0.0}}, "sampler: weight of 'random' must be finite and > 0"),
        ({"sampler_options": {"alpa": 1}}, "sampler_options has no 'alpa'; it has schedule,"),
        ({"sampler_options": {"window": 0}}, "window must be >= 1; got 0"),
        ({"partition_learning_rate": 0.0}, "partition_learning_rate must be > 0"),
        ({"partition_learning_rate": math.nan}, "partition_learning_rate must be > 0"),
        ({"fusion_learning_rate": -1.0}, "fusion_learning_rate must be > 0; got -1"),
        ({"eval_calibration_users": -1}, "eval_calibration_users must be >= 0; got -1"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs eval_strategy"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False: .*; got True"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **options)
