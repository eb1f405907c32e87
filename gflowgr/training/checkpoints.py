"""Checkpoints: which one a killed run can go on from, and what happens if one cannot be written."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from ..errors import DataError, OutputError
from ..files import read_json

if TYPE_CHECKING:
    from transformers import TrainerState

    from .config import GFlowGRConfig

__all__ = ["has_ended", "last_complete_checkpoint", "named_write_errors", "whole_or_nothing"]


def last_complete_checkpoint(folder: Path | str) -> Path | None:
    """The newest complete ``checkpoint-<step>`` of ``folder``; incomplete ones are removed.

    The trainer writes ``trainer_state.json`` last, so a checkpoint whose write was interrupted has
    none, or one that does not parse.
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit():
            found.append((int(step), path))
    for _, path in sorted(found, reverse=True):
        state = path / "trainer_state.json"
        try:
            if state.is_file():
                read_json(state)
                return path
        except DataError:
            pass
        shutil.rmtree(path)
    return None


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


@contextlib.contextmanager
def whole_or_nothing(folder: Path | str) -> Iterator[None]:
    """Write the checkpoint ``folder`` in this block; if that fails, the folder is removed.

    Half a checkpoint is of no use, and on a full disk its space is needed.

    Raises:
        OutputError: a write within the block failed.
    """
    try:
        with named_write_errors(folder):
            yield
    except OutputError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
