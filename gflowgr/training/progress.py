"""One progress bar for a training stage, with the numbers that people watch."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..progress import progress_bar

__all__ = ["ProgressBar"]

_SHOWN = {"loss": "loss", "loss_gr": "L_GR", "loss_gfn": "L_GFN", "eval_N@10": "valid N@10"}


class ProgressBar(TrainerCallback):
    """A bar over optimiser steps; silent on processes other than the first.

    Args:
        title: what is being trained.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Any = None
        self._numbers: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            self._bar = progress_bar(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.title,
                unit="step",
                mininterval=0.5,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance to the state's step."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the numbers to show."""
        for key, label in _SHOWN.items():
            if logs and key in logs:
                self._numbers[label] = f"{logs[key]:.4g}"
        if self._bar is not None:
            self._bar.set_postfix(self._numbers, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
