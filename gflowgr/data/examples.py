"""Training examples without copies of histories: three numbers each over one flat array."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gflowgr.data.ragged import Ragged
from gflowgr.errors import DataError, shown
from gflowgr.files import ensure_writable, load_npy, read_json, save_npy, write_json
from gflowgr.integers import integer_array

_FORMAT = "gflowgr-training-examples"
_VERSION = 1


class TrainingExamples:
    """Every prefix of length >= 1 of every user's training part, with the item that follows it.

    Example ``i`` has ``bounds[i] = (begin, end, user)``: its history is ``items[begin:end]``
    (oldest first, at most ``max_history`` items) and its target ``items[end]``. Storage is 4 bytes
    per training event and 12 bytes per example (int64 bounds, 24 bytes, only past 2^31 events); no
    history is stored twice.

    ``items`` holds the training part only: a held-out event is not in here at all.

    Attributes:
        items: int32 [M], all users' training sequences, one after the other.
        bounds: int32 or int64 [E, 3].
        behaviours: int8 [M] parallel to ``items``, or None.
        max_history: longest history.
    """

    def __init__(
        self,
        items: np.ndarray,
        bounds: np.ndarray,
        max_history: int,
        behaviours: np.ndarray | None = None,
        folder: Path | None = None,
    ) -> None:
        self.items = items
        self.bounds = bounds
        self.behaviours = behaviours
        self.max_history = max_history
        self._folder = folder

    @classmethod
    def build(
        cls, sequences: Ragged, max_history: int, behaviours: np.ndarray | None = None
    ) -> TrainingExamples:
        """All examples of the training ``sequences`` (Ragged int32), user by user, oldest first.

        Raises:
            ValueError: ``max_history`` below 1, or items that are not integers of 32 bits.
        """
        if max_history < 1:
            raise ValueError(f"max_history must be at least 1; got {max_history}")
        first = sequences.offsets[:-1]
        lengths = sequences.lengths
        users = np.repeat(np.arange(len(sequences)), np.maximum(lengths - 1, 0))
        # Every event except each user's first one is a target once.
        is_first = np.zeros(len(sequences.values), dtype=bool)
        is_first[first[lengths > 0]] = True
        end = np.flatnonzero(~is_first)
        begin = np.maximum(first[users], end - max_history)
        small = len(sequences.values) < 2**31
        bounds = np.stack([begin, end, users], axis=1).astype(np.int32 if small else np.int64)
        items = integer_array(sequences.values, "items", np.int32)
        return cls(items, bounds, max_history, behaviours)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example.

        Returns:
            {"example": its number, "user", "history": int64 [1 .. max_history] oldest first,
            "target", "behaviour": the target event's code, -1 when the data has none}.
        """
        size = len(self.bounds)
        if not -size <= index < size:
            raise IndexError(f"example {index} of {size}")
        index = int(index) % size
        begin, end, user = (int(v) for v in self.bounds[index])
        return {
            "example": index,
            "user": user,
            "history": np.asarray(self.items[begin:end], dtype=np.int64),
            "target": int(self.items[end]),
            "behaviour": -1 if self.behaviours is None else int(self.behaviours[end]),
        }

    @property
    def lengths(self) -> np.ndarray:
        """int64 [E]: history lengths, for batches of like length."""
        return (self.bounds[:, 1] - self.bounds[:, 0]).astype(np.int64)

    @property
    def users(self) -> np.ndarray:
        """int64 [E]."""
        return self.bounds[:, 2].astype(np.int64)

    @property
    def targets(self) -> np.ndarray:
        """int64 [E]."""
        return np.asarray(self.items)[self.bounds[:, 1]].astype(np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        extra = 0 if self.behaviours is None else self.behaviours.nbytes
        return self.items.nbytes + self.bounds.nbytes + extra

    def save(self, folder: str | Path) -> None:
        """Write the arrays as ``.npy`` files and, last, ``examples.json`` that vouches for them.

        Raises:
            OutputError: the folder cannot be written.
        """
        folder = ensure_writable(folder)
        # Remove the json first: without it an interrupted rewrite does not load.
        (folder / "examples.json").unlink(missing_ok=True)
        arrays = {"items": self.items, "bounds": self.bounds}
        if self.behaviours is not None:
            arrays["behaviours"] = self.behaviours
        for name, array in arrays.items():
            save_npy(folder / f"{name}.npy", np.asarray(array))
        meta = {
            "format": _FORMAT,
            "version": _VERSION,
            "max_history": self.max_history,
            "arrays": {
                k: {"shape": list(a.shape), "dtype": a.dtype.str} for k, a in arrays.items()
            },
        }
        write_json(folder / "examples.json", meta)

    @classmethod
    def load(cls, folder: str | Path) -> TrainingExamples:
        """Map the arrays of a saved store into memory (nothing is copied).

        Raises:
            FileNotFoundError: no finished store is there.
            DataError: another format or version, a file of another size or type, bounds out of
                range.
        """
        folder = Path(folder)
        meta = read_json(folder / "examples.json", expect=dict)
        if (meta.get("format"), meta.get("version")) != (_FORMAT, _VERSION):
            raise DataError(
                f"{folder / 'examples.json'}: the format must be {_FORMAT!r} version {_VERSION}; "
                f"got {meta.get('format')!r} version {meta.get('version')!r}"
            )
        arrays: dict[str, np.ndarray] = {}
        try:
            max_history = meta["max_history"]
            if type(max_history) is not int:
                raise TypeError(f"max_history must be an integer; got {shown(max_history)}")
            for name, about in meta["arrays"].items():
                arrays[name] = _map(folder / f"{name}.npy", tuple(about["shape"]), about["dtype"])
            items, bounds = arrays["items"], arrays["bounds"]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{folder / 'examples.json'}: entry missing or malformed: {error!r}"
            ) from error
        _check_bounds(folder, items, bounds, max_history)
        behaviours = arrays.get("behaviours")
        if behaviours is not None and (behaviours.shape, behaviours.dtype) != (items.shape, "i1"):
            raise DataError(
                f"{folder / 'behaviours.npy'}: must be int8 {items.shape}; got {behaviours.dtype} "
                f"{behaviours.shape}"
            )
        return cls(items, bounds, max_history, arrays.get("behaviours"), folder)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files again; pickling a memory map would copy all of it.
        if self._folder is not None:
            return {"folder": str(self._folder.resolve())}
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "folder" in state:
            self.__dict__.update(type(self).load(state["folder"]).__dict__)
        else:
            self.__dict__.update(state)

    def __repr__(self) -> str:
        about = {
            "examples": len(self),
            "max_history": self.max_history,
            "MB": round(self.nbytes / 1e6, 2),
        }
        return f"TrainingExamples({json.dumps(about)[1:-1]})"


def _map(file: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if 0 in shape:
        return np.zeros(shape, dtype=dtype)  # an empty file region cannot be mapped
    try:
        array = load_npy(file, mmap=True)
    except FileNotFoundError as error:
        raise DataError(f"{file}: missing although examples.json lists it") from error
    if array.shape != shape or array.dtype.str != dtype:
        raise DataError(
            f"{file}: holds {array.dtype.str} {array.shape}, examples.json says {dtype} {shape}"
        )
    return array


def _check_bounds(folder: Path, items: np.ndarray, bounds: np.ndarray, max_history: int) -> None:
    if bounds.ndim != 2 or bounds.shape[1] != 3 or items.ndim != 1:
        raise DataError(
            f"{folder}: items and bounds must be [M] and [E, 3]; "
            f"got {items.shape} and {bounds.shape}"
        )
    if items.dtype != np.int32 or bounds.dtype not in (np.int32, np.int64):
        raise DataError(
            f"{folder}: items must be int32 and bounds int32 or int64; got {items.dtype} and "
            f"{bounds.dtype}"
        )
    if len(bounds) == 0:
        return
    begin, end, user = bounds.T
    length = end - begin
    bad = np.flatnonzero(
        (begin < 0) | (end >= len(items)) | (length < 1) | (length > max_history) | (user < 0)
    )
    if len(bad):
        row = int(bad[0])
        raise DataError(
            f"{folder / 'bounds.npy'}: example {row} has (begin, end, user) = "
            f"{tuple(int(v) for v in bounds[row])}; there are {len(items)} "
            f"items and max_history is {max_history}"
        )
