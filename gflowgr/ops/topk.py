"""Top-k with a stated order of ties."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["stable_topk"]

# Places beyond k that are looked at, so that ties at the end are seen and mostly settled.
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
    """Columns of the k largest (score, -column) pairs, each pair made one int64 key."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    # Order of floats as integers: the bits themselves, magnitude inverted where negative.
    rank = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = scores.shape[1] - 1
    low = last - torch.arange(last + 1, device=scores.device)
    keys = (rank << 32) | low
    return last - (keys.topk(k, dim=1).values & 0xFFFFFFFF)
