"""Top-k with a stated order of ties."""

from __future__ import annotations

from torch import Tensor

__all__ = ["stable_topk"]


def stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, largest first, ties by ascending column.

    ``torch.topk`` leaves the choice among equal scores open, which would make results depend on the
    machine and on the batch.

    Args:
        scores: [B, V] without NaN; -inf is allowed.
        k: at most V.

    Returns:
        values [B, k] and columns [B, k] int64.
    """
    values, columns = scores.topk(k, dim=1)
    edge = values[:, -1:]
    # Where more columns reach the last place's score than there are places, topk chose among them as
    # it liked: choose the lowest columns instead.
    tied = ((scores >= edge).sum(1) > k).nonzero()[:, 0]
    if len(tied):
        part, limit = scores[tied], edge[tied]
        above, equal = part > limit, part == limit
        places = k - above.sum(1, keepdim=True)
        taken = above | (equal & (equal.cumsum(1) <= places))
        columns[tied] = taken.nonzero()[:, 1].view(-1, k)
        values[tied] = part.gather(1, columns[tied])
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)
