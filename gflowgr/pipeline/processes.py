"""Several processes (``torchrun``): what only the first one does, and where models go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

__all__ = ["device", "first_process_first", "is_first_process"]


def is_first_process() -> bool:
    """True in the process that writes the files, and in a run of one process."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block while the others wait; then they run it, too.

    What the first one has written is there when the others look for it.
    """
    from accelerate import PartialState  # type: ignore[import-untyped]

    with PartialState().main_process_first():
        yield


def device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    from accelerate import PartialState

    return PartialState().device
