"""Checkpoints in the model's own format, resumed or pushed to the hub, and model cards."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from ..distributed import first_process_finds, whole_state
from ..models.checkpoint import write_checkpoint
from .checkpoints import (
    CheckpointTrainer,
    check_checkpoint,
    has_ended,
    last_complete_checkpoint,
    named_write_errors,
)

if TYPE_CHECKING:
    from ..models.gflow_model import GFlowModel
    from .averaging import WeightAverage
    from .config import GFlowGRConfig
    from .flow_inputs import FlowInputs
    from .sequences import SequenceInputs
    from .step_log import StepLog

__all__ = ["SavingTrainer"]


class SavingTrainer(CheckpointTrainer):
    """Resumes, saves, describes and pushes a :class:`~gflowgr.models.GFlowModel`."""

    model: GFlowModel
    args: GFlowGRConfig
    _flow_inputs: FlowInputs | SequenceInputs
    _step_log: StepLog
    _average: WeightAverage | None = None
    _saves_checkpoint = False

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As ``transformers.Trainer.train``, but a training that had ended is not trained further.

        Args:
            resume_from_checkpoint: a folder, or True for the last complete checkpoint of
                ``args.output_dir``.
            trial: of a hyper-parameter search.
            ignore_keys_for_eval: unused; it is an argument of the base class.

        Raises:
            ValueError: True was given, and there is no complete checkpoint.
            DataError: the folder given is no complete checkpoint.
            FloatingPointError: the loss or the gradient became NaN or infinite.
            OutputError: a checkpoint cannot be written, or another process trains in this folder.
        """
        model = self.accelerator.unwrap_model(self.model)
        if model.settings.keeps_reference and model.reference is None:
            model.freeze_reference()  # a checkpoint has its own
        checkpoint = None
        if resume_from_checkpoint:
            checkpoint = first_process_finds(lambda: self._checkpoint(resume_from_checkpoint))
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if has_ended(state, self.args):
                return self._adopt(checkpoint, state)
            self._flow_inputs.load_state(checkpoint)
        self._step_log.restart()
        place = None if checkpoint is None else str(checkpoint)
        if self._average is None:
            return super().train(place, trial, ignore_keys_for_eval)
        self._average.resume_from(checkpoint)
        result = super().train(place, trial, ignore_keys_for_eval)
        has_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint
        self._average.finish(keep=not has_best)
        return result

    def _averaged(self) -> AbstractContextManager[None]:
        """In this block the model has the average of its weights, if there is one."""
        return nullcontext() if self._average is None else self._average.in_place()

    def _checkpoint(self, asked: str | bool) -> Path:
        if asked is not True:
            check_checkpoint(Path(str(asked)))
            return Path(str(asked))
        found = last_complete_checkpoint(str(self.args.output_dir))
        if found is None:
            raise ValueError(f"there is no complete checkpoint in {self.args.output_dir}")
        return found

    def _adopt(self, checkpoint: Path, state: TrainerState) -> TrainOutput:
        """The model and state that the ended training would have left."""
        self.state = state
        best = checkpoint.parent / f"checkpoint-{state.best_global_step}"
        keeps_best = self.args.load_best_model_at_end and best.is_dir()
        self._load_from_checkpoint(str(best if keeps_best else checkpoint))
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return TrainOutput(state.global_step, losses[-1] if losses else math.nan, {})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model (:meth:`gflowgr.models.GFlowModel.save_pretrained`).

        All processes must call it; the first one writes.

        Raises:
            OutputError: it cannot be written.
        """
        with named_write_errors(output_dir or self.args.output_dir or "."):
            self._saves_checkpoint = _internal_call
            if self.is_fsdp_enabled:  # the base class would not save a sharded model as a model
                self._save(output_dir)
            else:
                super().save_model(output_dir, _internal_call)
            if _internal_call and output_dir and self.args.should_save:  # of a checkpoint
                self._flow_inputs.save_state(Path(output_dir))
                if self._average is not None:
                    self._average.save(Path(output_dir))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        state = whole_state(model)  # by all processes together
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        with self._averaged():
            if self._saves_checkpoint:  # into an empty folder of the checkpoint's
                write_checkpoint(model, folder, state)
            else:
                model.save_pretrained(folder, state)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self.accelerator.unwrap_model(model or self.model).load_weights(resume_from_checkpoint)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """As ``transformers.Trainer.create_model_card``: a ``README.md`` in the output folder."""
        card = copy.copy(self)
        # It reads the configuration of a transformers model.
        card.model = self.accelerator.unwrap_model(self.model).backbone
        super(SavingTrainer, card).create_model_card(*args, **options)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **options: Any,
    ) -> str | None:
        """Push the model as :meth:`gflowgr.models.GFlowModel.push_to_hub` does.

        All processes must call it; the first one pushes. Unlike the base class it uploads nothing
        else of the output folder. The repository is ``args.hub_model_id``, or has the output
        folder's name.

        Args:
            commit_message: of the commit.
            blocking: must be true: the model is written and uploaded before it returns.
            token: access token; by default ``args.hub_token``, else the stored one.
            revision: must be None: the main branch is pushed to.
            private: of a new repository; by default ``args.hub_private_repo``.
            **options: ``card`` (README.md) is taken; no other.

        Returns:
            URL of the commit; None on other processes than the first.

        Raises:
            ValueError: an argument is not as said here.
        """
        card = options.pop("card", None)
        refused: dict[str, Any] = {"blocking": (blocking, True), "revision": (revision, None)}
        refused |= {name: (value, "left out") for name, value in options.items()}
        for name, (value, wanted) in refused.items():
            if value is not wanted:
                raise ValueError(f"{name} must be {wanted} in push_to_hub(); got {value!r}")
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        self.callback_handler.on_push_begin(args, self.state, self.control)
        state = whole_state(model)  # by all processes together
        if not self.is_world_process_zero():
            return None
        url: str = model.push_to_hub(
            args.hub_model_id or Path(str(args.output_dir)).resolve().name,
            card=card,
            private=args.hub_private_repo if private is None else private,
            token=args.hub_token if token is None else token,
            message=commit_message or "Upload a gflowgr model",
            state=state,
        )
        return url
