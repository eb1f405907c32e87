"""The journal of a served catalogue: one line for each change, read by every replica."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ..errors import DataError
from ..files import ensure_writable, parse_json
from .requests import Change, change_from_json

__all__ = ["Journal"]

_NAME = "changes.jsonl"
_LOCK = "changes.lock"


class Journal:
    """Changes in the order in which they were made, in a file that several processes share.

    Each line is ``{"version": 3, "time": ..., "by": ..., "change": {...}}``: what to do, and who
    did it. A line is in the file, on the disk, before anybody is told that the change was made. A
    line without its end was never answered for: its process died. The next writer removes it.

    Args:
        folder: the folder of the file; made if it is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = ensure_writable(Path(folder).resolve())
        self.path = self.folder / _NAME
        self.path.touch()
        self._read_to = 0
        self.version = 0

    @property
    def where(self) -> str:
        """The line that is not read yet, for errors."""
        return f"{self.path}: line {self.version + 1}"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """No other process, and no other thread, writes within the block."""
        from filelock import FileLock

        with FileLock(self.folder / _LOCK):
            yield

    def unread(self) -> Iterator[Change]:
        """The changes since the last one that was read.

        A line counts as read when the next one is asked for: what could not be done comes again.

        Raises:
            DataError: a line is no change, or does not follow on the line before.
        """
        if self.path.stat().st_size <= self._read_to:
            return
        with self.path.open("rb") as handle:
            handle.seek(self._read_to)
            for line in handle:
                if not line.endswith(b"\n"):
                    return
                try:
                    record = parse_json(line)
                    if not isinstance(record, dict) or record.get("version") != self.version + 1:
                        raise DataError("the version must follow on the line before")
                    change = change_from_json(record.get("change") or {})
                except DataError as error:
                    raise DataError(f"{self.where}: {error}") from None
                yield change
                self._read_to += len(line)
                self.version += 1

    def append(self, change: Change, by: str) -> str:
        """Write a change; to be called within :meth:`writing`, with all others read.

        Args:
            change: what was done.
            by: who did it.

        Returns:
            The line.
        """
        record = {
            "version": self.version + 1,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "by": by,
            "change": asdict(change),
        }
        line = json.dumps(record)
        with self.path.open("r+b") as handle:
            handle.truncate(self._read_to)
            handle.seek(self._read_to)
            handle.write(line.encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
        self._read_to += len(line) + 1
        self.version += 1
        return line
