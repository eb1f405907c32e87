"""Pruning a prefix tree to what is available, without rebuilding it."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowgr.tree.layout import TreeLayout


def any_in_ranges(flags: Tensor, begins: Tensor) -> Tensor:
    """Whether any of ``flags`` is set in ``begins[i]:begins[i + 1]``, bool [len(begins) - 1]."""
    # The width that counts the nodes counts these flags too; int32 halves the memory traffic.
    count = torch.zeros(flags.numel() + 1, dtype=begins.dtype, device=flags.device)
    torch.cumsum(flags, 0, dtype=begins.dtype, out=count[1:])
    at = count.index_select(0, begins)
    return at[1:] > at[:-1]


def live_nodes(
    layout: TreeLayout, begins: Tensor, leaf_rank: Tensor | None, leaf_live: Tensor
) -> Tensor:
    """Nodes with a live leaf at or below them, bool [num_nodes].

    ``begins`` and ``leaf_rank`` are the tree's sections, ``leaf_live`` is bool [num_leaves]. From
    the deepest level up: a node lives if its identifier is live or any of its children is.
    """
    inner, first = layout.num_inner, layout.node_begin
    live = torch.zeros(layout.num_nodes, dtype=torch.bool, device=leaf_live.device)
    if leaf_rank is None:
        live[inner:] = leaf_live
    else:
        shallow = int(leaf_rank[-1])
        live[:inner][leaf_rank[1:] > leaf_rank[:-1]] = leaf_live[:shallow]
        live[inner:] = leaf_live[shallow:]
    for depth in range(layout.max_length - 1, -1, -1):
        here, below, end = first[depth], first[depth + 1], first[depth + 2]
        live[here:below] |= any_in_ranges(live[below:end], begins[here : below + 1] - below)
    return live
