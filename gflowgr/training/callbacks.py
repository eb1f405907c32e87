"""Callbacks of :class:`~gflowgr.training.GFlowGRTrainer`: data order, logs before checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .batches import LengthBucketSampler

__all__ = ["EpochOrder", "LogBeforeSaving"]


class EpochOrder(TrainerCallback):
    """Tells the data order which epoch begins, also when a run resumes inside one."""

    def __init__(self, order: LengthBucketSampler) -> None:
        self.order = order

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Set the order's epoch."""
        self.order.set_epoch(int(state.epoch or 0))


class LogBeforeSaving(TrainerCallback):
    """Logs before each checkpoint.

    What was summed since the last log is not part of a checkpoint, so a resumed run would log
    other averages; and a loss that is NaN must be found before it is saved.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a log where a checkpoint follows."""
        saves_best = args.save_strategy == "best" and control.should_evaluate
        control.should_log = control.should_log or control.should_save or saves_best

    on_epoch_end = on_step_end
