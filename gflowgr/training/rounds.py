"""SPRec and IPA: training in rounds, on trajectories that the model itself generates.

- SPRec: a round is an SFT pass and then a DPO pass of as many steps, each over its own prompts. The
  rejected item is the one that the present model generates greedily among those the user has not
  interacted with (so that it never is the chosen one); the reference is the model at the end of the
  round's SFT pass.
- IPA: every step is SFT. In every ``refresh_steps``-th one the present model also generates
  candidates by beam search, and lambda times the DPO loss between the one with the best and the one
  with the worst reward is added; the reference is the model at the beginning of the round. With
  ``refresh_steps`` = 100 that is 1% of the samples.

Sources: SPRec (arXiv 2412.09243); OneRec (arXiv 2502.18965), iterative preference alignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models.settings import FlowSettings
from .config import GFlowGRConfig

__all__ = ["FreezeReference", "Rounds"]


@dataclass(frozen=True)
class Rounds:
    """The schedule of a round: the kind of each optimiser step.

    Attributes:
        objective: ``"sprec"``, ``"ipa"``; of any other objective all steps are alike.
        round_steps: steps of a round; None: the training is one.
        refresh_steps: of IPA, steps from one with the preference term to the next.
    """

    objective: str
    round_steps: int | None
    refresh_steps: int

    @classmethod
    def of(cls, settings: FlowSettings, args: GFlowGRConfig) -> Rounds:
        """Those of a training."""
        return cls(settings.objective, args.round_steps, args.sampler_settings.refresh_steps)

    def is_supervised(self, step: int) -> bool:
        """Whether the step is next-token prediction of the positives alone."""
        if self.objective == "ipa":
            return step % self.refresh_steps != 0
        return self.objective == "sprec" and not self._in_second_half(step)

    def freezes_reference(self, step: int) -> bool:
        """Whether the model before this step becomes the reference."""
        if self.round_steps is None:
            return step == 0
        first = self.round_steps // 2 if self.objective == "sprec" else 0
        return step % self.round_steps == first

    def _in_second_half(self, step: int) -> bool:
        assert self.round_steps is not None
        return step % self.round_steps >= self.round_steps // 2


class FreezeReference(TrainerCallback):
    """Makes the model the reference where a round asks for it."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Before the step, so that a run resumed here does the same."""
        if self.rounds.freezes_reference(state.global_step):
            getattr(model, "module", model).freeze_reference()
