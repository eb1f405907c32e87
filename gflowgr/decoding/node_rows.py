"""Sets of tree nodes, one per prompt, as rows of sorted ids."""

from __future__ import annotations

import torch
from torch import Tensor

_LAST = torch.iinfo(torch.int64).max


def distinct(values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct values of each row, ascending then -1, and each entry's place among them.

    ``values`` [R, W] hold -1 for nothing, whose place is -1; at least one column is returned.
    """
    ordered, order = values.masked_fill(values < 0, _LAST).sort(dim=1)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    new &= ordered != _LAST
    rank = new.cumsum(1) - 1
    width = max(1, int(rank.max()) + 1) if rank.numel() else 1
    out = values.new_full((values.shape[0], width + 1), -1)
    out.scatter_(1, torch.where(new, rank, width), ordered)
    place = torch.empty_like(values).scatter_(1, order, rank)
    return out[:, :width].contiguous(), place.masked_fill(values < 0, -1)


def parents_of(count: int, place: Tensor, above: Tensor) -> Tensor:
    """For each of ``count`` nodes the place of its parent [R, count], 0 for padding.

    ``place`` and ``above`` [R, W] are the places of each entry's node and of that node's parent;
    entries of one node agree on the parent. -1 stands for none.
    """
    wide = place.new_zeros(place.shape[0], count + 1)
    # Entries without a node write to a spare column.
    wide.scatter_(1, torch.where(place < 0, count, place), above.clamp_min(0))
    return wide[:, :-1]
