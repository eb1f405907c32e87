"""Which checkpoint a killed run can go on from."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import DataError
from ..files import read_json

__all__ = ["last_complete_checkpoint"]


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
