"""Writing of whole checkpoints, and the choice of the one that a run resumes from."""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..errors import DataError, OutputError
from ..files import read_json
from ..folders import (
    find_damage,
    manifest_facts,
    output_lock,
    remove_leftovers,
    swap_in,
    write_manifest,
)

if TYPE_CHECKING:
    from transformers import TrainerState
    from transformers.trainer_utils import TrainOutput

    from .config import GFlowGRConfig

__all__ = [
    "CheckpointTrainer",
    "check_checkpoint",
    "has_ended",
    "last_complete_checkpoint",
    "named_write_errors",
]

_RUN = "run"


def last_complete_checkpoint(
    folder: Path | str, say: Callable[[str], None] | None = None
) -> Path | None:
    """The newest complete ``checkpoint-<step>`` of the run that wrote last into ``folder``.

    A checkpoint is complete when its manifest says so, which is written last, and when the best
    one, which its state refers to, is so too. Nothing is removed: another process may be writing.

    Args:
        folder: the trainer's ``output_dir``.
        say: told of each checkpoint that is passed over, and why; by default a warning.
    """
    say = _warn if say is None else say
    found = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and path.is_dir():
            run = manifest_facts(path).get(_RUN)
            # Those that do not say of which run they are come first: they must be spoken of.
            found.append((run is None, str(run), int(step), path))
    newest = max((run for unknown, run, *_ in found if not unknown), default="")
    for unknown, run, _, path in sorted(found, reverse=True):
        earlier = not unknown and run != newest
        reason = "it is of an earlier run in this folder" if earlier else _damage(path)
        if reason is None:
            return path
        say(f"{path} is passed over: {reason}")
    return None


def check_checkpoint(folder: Path) -> None:
    """Check that a checkpoint can be gone on from.

    Raises:
        DataError: it is not there, incomplete or damaged, or the best one is that it refers to.
    """
    if not folder.is_dir():
        raise DataError(f"resume_from_checkpoint must be a checkpoint's folder; got {folder}")
    damage = _damage(folder)
    if damage is not None:
        raise DataError(f"{folder} is no complete checkpoint: {damage}")


def _damage(path: Path) -> str | None:
    damage = find_damage(path)
    if damage is not None:
        return damage
    try:
        state = read_json(path / TRAINER_STATE_NAME, expect=dict)
    except (FileNotFoundError, DataError) as error:
        return str(error)
    if not state.get("best_model_checkpoint"):
        return None
    best = path.parent / Path(state["best_model_checkpoint"]).name
    if best.name == path.name or not best.is_dir():
        return None  # copied without it: the best of what follows is kept
    damage = find_damage(best)
    return None if damage is None else f"its best model is in {best.name}, and there {damage}"


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def has_ended(state: TrainerState, args: GFlowGRConfig) -> bool:
    """Whether the training that left ``state`` was complete: all its steps, or stopped early."""
    if args.max_steps > 0:
        if state.global_step >= args.max_steps:
            return True
    elif (state.epoch or 0) >= args.num_train_epochs:
        return True
    callbacks: Any = state.stateful_callbacks
    stopping = callbacks.get("EarlyStoppingCallback")
    if stopping is None or args.early_stopping_patience is None:
        return False
    waited = stopping["attributes"]["early_stopping_patience_counter"]
    return bool(waited >= args.early_stopping_patience)


@contextlib.contextmanager
def named_write_errors(folder: Path | str) -> Iterator[None]:
    """Turn what the libraries raise when a disk is full into an error that names the folder.

    Raises:
        OutputError: a write within the block failed.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save raises a RuntimeError, safetensors an error of its own.
        code = getattr(error, "errno", None) or errno.EIO
        reason = str(error).strip().splitlines()[0]
        place = Path(folder).resolve()
        free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
        raise OutputError(
            code, f"cannot write the checkpoint, {free:,} bytes are free: {reason}", str(folder)
        ) from error


class CheckpointTrainer(Trainer):
    """A ``transformers`` Trainer whose checkpoints are whole.

    Each is written into an empty folder beside (``.checkpoint-<step>.tmp``), completed with a
    manifest and only then renamed; what an earlier run left under its name is replaced.
    """

    _staging: Path | None = None
    _run = ""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As ``transformers.Trainer.train``, while no other process writes into ``output_dir``.

        Raises:
            OutputError: another process does, or a checkpoint cannot be written.
        """
        facts = manifest_facts(Path(str(resume_from_checkpoint))) if resume_from_checkpoint else {}
        # A resumed training is the same run.
        self._run = str(facts.get(_RUN) or f"{time.time_ns():020d}")
        folder = Path(str(self.args.output_dir))
        saves = self.args.save_strategy != "no" and self.args.should_save
        with output_lock(folder) if saves else contextlib.nullcontext():
            if saves:
                remove_leftovers(folder, f"{PREFIX_CHECKPOINT_DIR}-*")
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = Path(super()._get_output_dir(trial))
        folder = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_folder / f".{folder.name}.tmp"
        first = bool(self.args.should_save)
        with named_write_errors(folder):
            if first:
                shutil.rmtree(staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # each has written its random state
                self._name_best(run_folder, folder.name)
                if first:
                    self.state.save_to_json(str(staging / folder.name / TRAINER_STATE_NAME))
                    write_manifest(staging / folder.name, **{_RUN: self._run})
                    swap_in(staging / folder.name, folder)
            finally:
                self._staging = None
                if first:
                    shutil.rmtree(staging, ignore_errors=True)
            if first:
                rotate_checkpoints(
                    output_dir=str(run_folder),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=True,
                )

    def _name_best(self, run_folder: Path, current: str) -> None:
        """Name the best checkpoint by where it will be, which the base class could not know."""
        if self.state.best_global_step:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            ours = manifest_facts(run_folder / name).get(_RUN) == self._run
            if name == current or ours:  # and not what an earlier run left under its name
                self.state.best_model_checkpoint = str(run_folder / name)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            check_checkpoint(Path(best))
            self._load_from_checkpoint(best)
