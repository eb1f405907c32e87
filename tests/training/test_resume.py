"""A training that was interrupted ends as if it never was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_shop import make_args, make_model
from support.tiny_trainer import (
    Killed,
    StopAt,
    assert_equal_weights,
    make_trainer,
    reproducible,
    steps,
    weights,
)

from gflowgr.errors import OutputError

# ---- resume ----

RESUMABLE: dict[str, Any] = {
    "max_steps": 14,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "load_best_model_at_end": True,
    "save_total_limit": 2,
}


@pytest.mark.parametrize(
    ("accumulation", "save_steps", "stop"),
    [
        pytest.param(1, 4, 9, id="in the middle of an epoch"),
        pytest.param(1, 6, 7, id="after an epoch"),
        pytest.param(2, 4, 10, id="with gradient accumulation"),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(
    accumulation: int, save_steps: int, stop: int, tmp_path: Path
) -> None:
    """Bit for bit, with dropout, the curriculum, a learned log Z and a log every third step."""
    options = {
        **RESUMABLE,
        "gradient_accumulation_steps": accumulation,
        "save_steps": save_steps,
        "eval_steps": save_steps,
    }
    whole = make_trainer(make_args(tmp_path / "whole", **options), make_model(dropout=0.2))
    whole.train()
    assert whole.state.epoch is not None
    assert whole.state.epoch > 2
    assert whole.state.global_step == 14

    args = make_args(tmp_path / "cut", **options)
    cut = make_trainer(args, make_model(dropout=0.2), StopAt(stop))
    with pytest.raises(Killed):
        cut.train()
    # Another process: other weights, other random numbers.
    torch.manual_seed(99)
    resumed = make_trainer(make_args(tmp_path / "cut", **options), make_model(dropout=0.2, seed=7))
    resumed.train(resume_from_checkpoint=True)
    first_resumed = stop // save_steps * save_steps + 1
    assert resumed._initial_global_step == first_resumed - 1
    assert reproducible(resumed) == reproducible(whole)
    assert len(steps(whole)) >= 14 // 3
    assert_equal_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize("ends_by", ["max_steps", "num_train_epochs", "early stopping"])
def test_run_killed_after_its_last_checkpoint_takes_no_further_step(
    ends_by: str, tmp_path: Path
) -> None:
    options = {**RESUMABLE, "max_steps": 5, "save_steps": 2, "eval_steps": 2}
    last = 5
    if ends_by == "num_train_epochs":
        options |= {
            "max_steps": -1,
            "num_train_epochs": 1,
            "save_strategy": "epoch",
            "eval_strategy": "epoch",
        }
        last = 6
    elif ends_by == "early stopping":
        options |= {"max_steps": 50, "learning_rate": 0.0, "early_stopping_patience": 1}
        last = 4
    whole = make_trainer(make_args(tmp_path / "whole", **options))
    whole.train()
    assert whole.state.global_step == last

    cut = make_trainer(make_args(tmp_path / "cut", **options), None, StopAt(last, "on_save"))
    with pytest.raises(Killed):
        cut.train()
    trained = StopAt(last + 1)
    resumed = make_trainer(make_args(tmp_path / "cut", **options), make_model(seed=7), trained)
    outcome = resumed.train(resume_from_checkpoint=True)
    assert outcome.global_step == last
    assert reproducible(resumed) == reproducible(whole)
    assert_equal_weights(weights(resumed), weights(whole))


def test_early_stopping_remembers_how_long_it_waited(tmp_path: Path) -> None:
    """With a rate of zero no evaluation is better than the first, so the third one ends the run."""
    options = {
        **RESUMABLE,
        "max_steps": 20,
        "eval_steps": 2,
        "save_steps": 2,
        "learning_rate": 0.0,
        "early_stopping_patience": 2,
    }
    cut = make_trainer(make_args(tmp_path, **options), None, StopAt(5))
    with pytest.raises(Killed):
        cut.train()
    resumed = make_trainer(make_args(tmp_path, **options))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert len([entry for entry in resumed.state.log_history if "eval_N@10" in entry]) == 3


def test_resuming_needs_a_complete_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="there is no complete checkpoint in"):
        make_trainer(make_args(tmp_path)).train(resume_from_checkpoint=True)


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(make_args(tmp_path, max_steps=2, **options)).train()
    longer = make_trainer(make_args(tmp_path, max_steps=4, **options))
    assert longer.train(resume_from_checkpoint=True).global_step == 4


def test_full_disk_names_the_checkpoint_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OutputError, match=r"cannot write the checkpoint, .*file write failed"):
            make_trainer(make_args(tmp_path, **options)).train()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    trainer = make_trainer(make_args(tmp_path, **options))
    assert trainer.train().global_step == 4
