"""Progress bars: redrawn on a terminal, elsewhere (logs, CI) a line every half minute at most."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

__all__ = ["progress_bar"]

_SECONDS = 30.0


class _Lines:
    """A stream that makes lines of a bar's frames, the first after ``_SECONDS``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last = stream, time.monotonic()
        self.encoding = getattr(stream, "encoding", None)

    def write(self, frame: str) -> None:
        text, now = frame.strip(), time.monotonic()
        if text and now - self._last >= _SECONDS:
            self._last = now
            self._stream.write(f"{text}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """A ``tqdm`` bar on standard error.

    Args:
        iterable: what it runs over, or None for one that is advanced by hand.
        options: of ``tqdm``.
    """
    from tqdm.auto import tqdm

    if sys.stderr.isatty():
        return tqdm(iterable, **{"dynamic_ncols": True, **options})
    # The stream alone decides what is shown: steps are slow, and a frame that is dropped is cheap.
    every = {"mininterval": 0, "miniters": 1, "dynamic_ncols": False}
    return tqdm(iterable, **{**options, **every, "file": _Lines(sys.stderr)})
