"""Lists of different lengths in two flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from gflowgr.integers import integer_array


@dataclass(frozen=True, eq=False)
class Ragged:
    """R rows of different lengths: row ``i`` is ``values[offsets[i]:offsets[i + 1]]``.

    Attributes:
        offsets: int64 [R + 1], starts at 0, never decreases, ends at ``len(values)``.
        values: one-dimensional array of all rows, one after the other.

    Raises:
        ValueError: the offsets do not describe the values.
    """

    offsets: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        offsets = integer_array(self.offsets, "offsets")
        if offsets.ndim != 1 or len(offsets) == 0 or self.values.ndim != 1:
            raise ValueError(
                "offsets must be one-dimensional with an entry at least, values one-dimensional; "
                f"got shapes {offsets.shape} and {self.values.shape}"
            )
        if offsets[0] != 0 or offsets[-1] != len(self.values) or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"offsets must rise from 0 to len(values) = {len(self.values)}; "
                f"got {offsets[0]} to {offsets[-1]}"
            )
        object.__setattr__(self, "offsets", offsets)

    @classmethod
    def from_lengths(cls, lengths: np.ndarray, values: np.ndarray) -> Ragged:
        """Rows of the given ``lengths`` [R] over ``values``."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(offsets, values)

    @classmethod
    def from_lists(
        cls, rows: Sequence[Sequence[int]], dtype: type[np.signedinteger[Any]] = np.int32
    ) -> Ragged:
        """Rows given as Python sequences.

        Raises:
            ValueError: a value is no integer, or does not fit ``dtype``.
        """
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        values = integer_array(list(chain.from_iterable(rows)), "values", dtype)
        return cls.from_lengths(lengths, values)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.row(i) for i in range(len(self)))

    def row(self, index: int) -> np.ndarray:
        """A view of row ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R]."""
        return np.diff(self.offsets)

    def row_of_values(self) -> np.ndarray:
        """int64 [len(values)]: the row each value belongs to."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    def filter(self, keep: np.ndarray) -> Ragged:
        """The same rows with only the values where ``keep`` (bool [len(values)]) is true."""
        counts = np.bincount(self.row_of_values()[keep], minlength=len(self))
        return Ragged.from_lengths(counts, self.values[keep])

    def slices(self, begin: np.ndarray, end: np.ndarray) -> Ragged:
        """Rows ``values[begin[i]:end[i]]``: positions [R'] into ``values``, copied together."""
        lengths = end - begin
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        positions = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], lengths)
        return Ragged(offsets, self.values[positions])
