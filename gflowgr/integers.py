"""Range checks of integers from outside before they are stored in a narrower type."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_ID", "integer_array"]

MAX_ID = 2**31 - 1
"""Largest item, token or user number: they are stored as int32."""


def integer_array(
    values: Any,
    name: str,
    dtype: type[np.signedinteger[Any]] = np.int64,
    *,
    low: int | None = None,
    high: int | None = None,
) -> npt.NDArray[Any]:
    """``values`` as an array of ``dtype``, without a copy where they have it already.

    NumPy's own casts wrap what is too large and cut off fractions, both without a word.

    Args:
        values: integers of any kind and shape.
        name: what errors call them.
        dtype: a signed integer type.
        low: smallest value allowed; None for the type's.
        high: largest value allowed; None for the type's.

    Raises:
        ValueError: they are not integers, or one is out of range; the message has its value and
            place.
    """
    array = np.asarray(values)
    if array.size == 0 and not isinstance(values, np.ndarray):
        array = array.astype(dtype)  # an empty list has no type of its own
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers; got {array.dtype}")
    limits = np.iinfo(dtype)
    low = int(limits.min) if low is None else max(low, int(limits.min))
    high = int(limits.max) if high is None else min(high, int(limits.max))
    if array.size and not (low <= int(array.min()) and int(array.max()) <= high):
        # Python integers compare with any type; NumPy has no common type of int64 and uint64.
        wrong = int(array.min()) if int(array.min()) < low else int(array.max())
        place = "".join(f"[{index}]" for index in np.argwhere(array == wrong)[0].tolist())
        raise ValueError(f"{name}{place} must be in {low} .. {high}; got {wrong}")
    return array.astype(dtype, copy=False)
