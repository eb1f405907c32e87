"""Copy what a report is made from: an experiment's results without models, data and lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from .results import EXPERIMENT, read_results

__all__ = ["publish", "without_places"]

_JSON = ("done.json", "analysis.json", "log_history.json", "sasrec_training.json")
_ARRAYS = ("users.npy", "ranks.npy")
_VALUES = "values.npy"
_PLACES = ("path", "embeddings", "output_dir")


def publish(out: Path, folder: Path) -> None:
    """Copy the results of an experiment, whatever cells are complete, to a folder of their own.

    ``gflowgr experiment --out FOLDER --report`` writes the report there from the copy alone. No
    path of this machine is in it. Integers are stored as narrow as they can be: about 150 KiB for
    an evaluation of 22,000 users and its log.

    Args:
        out: the experiment's folder.
        folder: created when missing; files of the same names are replaced.

    Raises:
        DataError: no experiment in ``out``, or a damaged file.
        OutputError: the folder cannot be written.
    """
    read_results(out)
    files.write_json(folder / EXPERIMENT, without_places(files.read_json(out / EXPERIMENT, dict)))
    for path in sorted(out.rglob("*")):
        place = path.relative_to(out)
        inside = {"model", "checkpoints", "data", "examples"}.intersection(place.parts[:-1])
        if inside or "sasrec_checkpoints" in place.parts or folder in path.parents:
            continue
        if path.name in _JSON:
            values = without_places(files.read_json(path))
            files.write_json(files.ensure_writable((folder / place).parent) / path.name, values)
        elif path.name in _ARRAYS:
            array = files.load_npy(path)
            kinds = (np.int8, np.int16, np.int32, np.int64)
            kind = next(each for each in kinds if array.max() <= np.iinfo(each).max)
            files.ensure_writable((folder / place).parent)
            files.save_npy(folder / place, array.astype(kind))
        elif path.name == _VALUES:
            files.ensure_writable((folder / place).parent)
            files.save_npy(folder / place, files.load_npy(path).astype(np.float32))


def without_places(values: Any, key: str = "") -> Any:
    """A configuration to pass on: of paths, the names alone."""
    if isinstance(values, dict):
        return {name: without_places(value, name) for name, value in values.items()}
    if isinstance(values, list):
        return [without_places(value) for value in values]
    if isinstance(values, str) and (key in _PLACES or Path(values).is_absolute()):
        return Path(values).name
    return values
