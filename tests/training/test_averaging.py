"""Moving averages of the weights, and schedules with a constant rate and a decay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_decoder import make_decoder
from support.tiny_shop import make_args
from support.tiny_trainer import (
    Entry,
    Killed,
    StopAt,
    assert_equal_weights,
    make_trainer,
    reproducible,
    steps,
    weights,
)
from transformers import TrainerCallback

from gflowgr.errors import DataError
from gflowgr.models import GFlowModel
from gflowgr.training import GFlowGRConfig, GFlowGRTrainer

OPTIONS: dict[str, Any] = {"sequences": True, "per_device_train_batch_size": 64, "max_steps": 5}


class Weights(TrainerCallback):
    """One weight after each step, and what it was in each evaluation."""

    def __init__(self, model: GFlowModel) -> None:
        self.weight = model.backbone.transformer.wte.weight
        self.begin = self.weight.detach().double().clone()
        self.after_steps: list[torch.Tensor] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.after_steps.append(self.weight.detach().double().clone())

    def average(self, decay: float) -> torch.Tensor:
        value = self.begin.clone()
        for step, weight in enumerate(self.after_steps, start=1):
            share = min(decay, (1 + step) / (10 + step))
            value = share * value + (1 - share) * weight
        return value


def train(folder: Path, **options: Any) -> tuple[GFlowGRTrainer, Weights]:
    model = make_decoder(dropout=0.1)
    seen = Weights(model)
    trainer = make_trainer(make_args(folder, **{**OPTIONS, **options}), model, seen)
    trainer.train()
    return trainer, seen


def test_the_average_is_left_in_the_model_and_the_training_does_not_see_it(tmp_path: Path) -> None:
    plain, raw = train(tmp_path / "plain")
    averaged, seen = train(tmp_path / "averaged", ema_decay=0.4)
    assert [e["loss"] for e in steps(plain)] == [e["loss"] for e in steps(averaged)]
    assert all(
        torch.equal(one, two) for one, two in zip(raw.after_steps, seen.after_steps, strict=True)
    )
    left = averaged.model.backbone.transformer.wte.weight.detach().double()
    torch.testing.assert_close(left, seen.average(0.4), rtol=0, atol=1e-6)
    assert not torch.allclose(left, seen.after_steps[-1], rtol=0, atol=1e-4)


def test_the_average_is_evaluated_and_saved(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    trainer, seen = train(tmp_path, ema_decay=0.4, **options)

    def evaluated(entries: list[Entry]) -> float:
        return next(entry["eval_N@10"] for entry in entries if "eval_N@10" in entry)

    plain = make_decoder()
    plain.load_weights(tmp_path / "checkpoint-5")
    saved = plain.backbone.transformer.wte.weight.detach().double()
    torch.testing.assert_close(saved, seen.average(0.4), rtol=0, atol=1e-6)
    again = make_trainer(make_args(tmp_path / "again"), plain)
    assert evaluated(trainer.state.log_history) == again.evaluate()["eval_N@10"]


@pytest.mark.parametrize("keeps_best", [False, True])
def test_a_resumed_average_equals_an_uninterrupted_one(tmp_path: Path, keeps_best: bool) -> None:
    options: dict[str, Any] = {
        **OPTIONS,
        "ema_decay": 0.6,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": keeps_best,
    }
    whole = make_trainer(make_args(tmp_path / "whole", **options), make_decoder(dropout=0.1))
    whole.train()
    args = make_args(tmp_path / "cut", **options)
    with pytest.raises(Killed):
        make_trainer(args, make_decoder(dropout=0.1), StopAt(5)).train()
    resumed = make_trainer(args, make_decoder(dropout=0.1, seed=7))
    resumed.train(resume_from_checkpoint=True)
    assert reproducible(resumed) == reproducible(whole)
    assert_equal_weights(weights(resumed), weights(whole))
    ended = make_trainer(args, make_decoder(seed=7))
    ended.train(resume_from_checkpoint=True)  # it had ended: its result is read
    assert_equal_weights(weights(ended), weights(whole))


def test_a_checkpoint_without_an_average_is_named(tmp_path: Path) -> None:
    train(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    args = make_args(tmp_path, **OPTIONS, ema_decay=0.9)
    with pytest.raises(DataError, match=r"weight_average.safetensors must be there to go on with"):
        make_trainer(args, make_decoder()).train(resume_from_checkpoint=True)


def test_the_rate_is_constant_and_then_decays(tmp_path: Path) -> None:
    trainer, _ = train(
        tmp_path,
        max_steps=8,
        learning_rate=1e-3,
        warmup_steps=2,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 4, "decay_type": "linear"},
    )
    # A log has the rate that the step took.
    rates = [round(entry["learning_rate"] * 1e3, 6) for entry in steps(trainer)]
    assert rates == [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\); got 1.0"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "must have num_decay_steps > 0 for"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GFlowGRConfig("unused", **options)
