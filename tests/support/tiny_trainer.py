"""A trainer on the tiny shop, ways to stop it, and what to compare of two of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from gflowgr.data import LeaveOneOut
from gflowgr.models import GFlowModel
from gflowgr.samplers import MakeSampler
from gflowgr.training import GFlowGRConfig, GFlowGRTrainer
from support.tiny_shop import make_model, make_scorer, shop

Entry = dict[str, float]


class Killed(Exception):
    pass


class StopAt(TrainerCallback):
    """Ends the run at a step, as a kill would."""

    def __init__(self, step: int, event: str = "on_step_end") -> None:
        self.step = step
        setattr(self, event, self._stop)

    def _stop(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def make_trainer(
    args: GFlowGRConfig,
    model: GFlowModel | None = None,
    *callbacks: TrainerCallback,
    split: LeaveOneOut | None = None,
    scorer: bool = True,
    sampler: MakeSampler | None = None,
) -> GFlowGRTrainer:
    trainer = GFlowGRTrainer(
        make_model() if model is None else model,
        args,
        shop() if split is None else split,
        collaborative=make_scorer() if scorer else None,
        sampler=sampler,
        callbacks=list(callbacks),
    )
    trainer.pop_callback("PrinterCallback")
    return trainer


def steps(trainer: GFlowGRTrainer) -> list[Entry]:
    """The entries of the log about training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def reproducible(trainer: GFlowGRTrainer) -> list[Entry]:
    """The log without times and speeds, which differ from run to run."""
    timed = ("seconds", "tokens_per_second", "eval_runtime", "total_flos")
    timed += ("cpu_seconds", "eval_cpu_seconds")
    kept = [
        {k: v for k, v in entry.items() if k not in timed and not k.startswith("train_")}
        for entry in trainer.state.log_history
    ]
    return [entry for entry in kept if set(entry) - {"epoch", "step"}]


def weights(trainer: GFlowGRTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal_weights(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert different == []
