"""CPU time of this process: of all its threads, and of its children that have ended."""

from __future__ import annotations

import os

__all__ = ["cpu_seconds"]


def cpu_seconds() -> float:
    """User and system time so far, in seconds; of two calls, only the difference means anything.

    Unlike wall-clock time it does not grow while other work has the cores, and two threads that
    compute for a second have two seconds of it. Resolution: a tick of the kernel, usually 10 ms.
    """
    return sum(os.times()[:4])
