"""Random numbers as a hash of seed and keys, independent of the order of the draws.

Each number is a hash of (seed, step key, example, position). A run can therefore be replayed from
any point, and the same example gets the same draws on one process or on many.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["keyed_integers", "keyed_uniform", "systematic_counts"]

_U64 = npt.NDArray[np.uint64]


def keyed_integers(
    seed: int, key: int, rows: npt.NDArray[np.integer], columns: int, high: int
) -> npt.NDArray[np.int64]:
    """Uniform integers in [0, high).

    Args:
        seed: the run's seed.
        key: a further key, such as the epoch.
        rows: one key per row [B], such as the example's index.
        columns: numbers per row.
        high: exclusive upper bound, below 2**32.

    Returns:
        [B, columns] int64. The bias from mapping 64 bits to ``high`` values is below 2**-32.

    Raises:
        ValueError: ``high`` is not in 1..2**32 - 1.
    """
    if not 1 <= high < 2**32:
        raise ValueError(f"high must be in 1..2**32-1; got {high}")
    bits = _keyed_bits(seed, key, rows, columns)
    # Multiply-shift of the upper 32 bits instead of a modulo.
    upper = bits >> np.uint64(32)
    return ((upper * np.uint64(high)) >> np.uint64(32)).astype(np.int64)


def keyed_uniform(
    seed: int, key: int, rows: npt.NDArray[np.integer], columns: int
) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) [B, columns], multiples of 2**-53; see :func:`keyed_integers`."""
    return (_keyed_bits(seed, key, rows, columns) >> np.uint64(11)) * 2.0**-53


def systematic_counts(
    uniform: npt.NDArray[np.float64], shares: npt.NDArray[np.float64], count: int
) -> npt.NDArray[np.int64]:
    """Split ``count`` places by ``shares`` [K] (of sum 1) for each prompt [B, K].

    Systematic sampling: a share's places are ``count * share`` on average, and never a whole one
    off. ``uniform`` [B, 1] holds one number in [0, 1) per prompt.
    """
    ends = np.cumsum(shares) * count
    # Points uniform + 0, 1, ... below each end; rounding must not lose the last one.
    points = np.ceil(ends - uniform - 1e-9).clip(0, count).astype(np.int64)
    points[:, -1] = count
    return np.diff(points, axis=1, prepend=0)


def _keyed_bits(seed: int, key: int, rows: npt.NDArray[np.integer], columns: int) -> _U64:
    with np.errstate(over="ignore"):
        base = _mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + _mix(np.uint64(key)))
        row = _mix(base + rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        position = np.arange(1, columns + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
        return _mix(row[:, None] + position[None, :])


def _mix(values: _U64 | np.uint64) -> _U64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = np.asarray(values, dtype=np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
