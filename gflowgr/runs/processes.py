"""Helpers for processes: order under ``torchrun``, locks, devices, progress bars of libraries."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ..folders import output_lock

__all__ = [
    "alone",
    "device",
    "first_process_first",
    "is_first_process",
    "quiet_transformers",
    "working_alone",
]


def is_first_process() -> bool:
    """True in the process that writes the files, and in a run of one process."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block while the others wait; then they run it, too.

    The others thus find the files that the first process writes.
    """
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


@contextlib.contextmanager
def working_alone(folder: Path) -> Iterator[None]:
    """Only the processes of this run work in ``folder``; may be nested.

    Raises:
        OutputError: another run works there; the message says which.
    """
    with output_lock(folder) if is_first_process() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block of ``folder``: one prepares, all read."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".prepare.lock"):
        yield


def device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    from accelerate import PartialState

    return PartialState().device


def quiet_transformers() -> None:
    """No bars of ``transformers`` for reading and writing files; the stages have their own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
