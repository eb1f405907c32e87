"""Top-k with a stated order of ties."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["columns_of_keys", "float_order", "ordered_keys", "stable_topk"]

# Columns read beyond k, which is enough to detect and resolve most ties at the end.
_SPARE = 32


def stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, largest first, ties by ascending column.

    ``torch.topk`` leaves the choice among equal scores open, which would make results depend on the
    machine and on the batch.

    Args:
        scores: float32 [B, V] without NaN; -inf is allowed.
        k: at most V.

    Returns:
        values [B, k] and columns [B, k] int64.
    """
    values, columns = scores.topk(min(k + _SPARE, scores.shape[1]), dim=1)
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if columns.shape[1] < scores.shape[1]:
        # Ties that reach beyond the spare places: rank these rows by score and column together.
        tied = (values[:, -1] == values[:, k - 1]).nonzero()[:, 0]
        if len(tied):
            part = scores[tied]
            columns[tied, :k] = _lowest_columns_first(part, k)
            values[tied, :k] = part.gather(1, columns[tied, :k])
    return values[:, :k], columns[:, :k]


def _lowest_columns_first(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest (score, -column) pairs."""
    return columns_of_keys(ordered_keys(scores).topk(k, dim=1).values, scores.shape[1])


def ordered_keys(scores: Tensor) -> Tensor:
    """Pairs of score and column, each made one int64: no two are equal, larger is better.

    Score descending, NaN first; then column ascending.

    Args:
        scores: float32 [B, V].

    Returns:
        Keys [B, V]; :func:`columns_of_keys` tells their columns.
    """
    last = scores.shape[1] - 1
    return (float_order(scores) << 32) | (last - torch.arange(last + 1, device=scores.device))


def columns_of_keys(keys: Tensor, size: int) -> Tensor:
    """The columns of :func:`ordered_keys` of rows of ``size`` scores."""
    return size - 1 - (keys & 0xFFFFFFFF)


def float_order(values: Tensor) -> Tensor:
    """int64 numbers in the 32-bit range with the order of float32 values; NaN is the largest."""
    # One NaN, and minus zero equals zero.
    bits = torch.where(values.isnan(), math.nan, values + 0.0).view(torch.int32)
    # The bits themselves, magnitude inverted where negative.
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
