"""Exact flows of a prefix tree in plain PyTorch: the reference.

F(s) = sum of R(i) over the items i whose identifier starts with s. Sums are taken in logs,
bottom-up, with the largest term of each node taken out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gflowgr.tree.prefix_tree import PrefixTree

NO_NODE = torch.iinfo(torch.int64).max
"""Stands for the node of a candidate without an identifier; larger than any node."""


def item_flows_reference(
    log_reward: Tensor, pool: Tensor | None, floor: float, tree: PrefixTree
) -> Tensor:
    """log F of every node, [B, num_nodes].

    Args:
        log_reward: log-reward of every item [B, num_items], or of a pool's candidates [B, M].
        pool: [B, M] ascending, the node where each candidate's identifier ends (:data:`NO_NODE`:
            it has none); None without a pool.
        floor: the log-reward of all items that are no candidates, which may be -inf.
        tree: the prefix tree.
    """
    leaf = torch.arange(tree.num_leaves, device=log_reward.device)
    begin, end = tree.leaf_items(leaf)
    flows = log_reward.new_full((log_reward.shape[0], tree.num_nodes), -math.inf)
    nodes = tree.leaf_nodes(leaf)
    if pool is None:
        values = log_reward[:, tree.item_ids.to(torch.int64)]
        owner = leaf.repeat_interleave(end - begin)
        flows[:, nodes] = _segment_logsumexp(values, owner, tree.num_leaves)
    else:
        known = pool < tree.num_nodes
        place, reward = torch.where(known, pool, 0), log_reward.masked_fill(~known, -math.inf)
        # The root is no item's end: what has no identifier may be added there, and is dropped.
        candidates = _segment_logsumexp(reward, place, tree.num_nodes)[:, nodes]
        counted = torch.zeros_like(flows).scatter_add(1, place, known.to(flows.dtype))[:, nodes]
        others = (end - begin - counted).log() + floor
        flows[:, nodes] = torch.logaddexp(candidates, others)
    return _bottom_up(flows, tree)


def _bottom_up(flows: Tensor, tree: PrefixTree) -> Tensor:
    """Add the flows of the children to those of what ends at each node, [B, num_nodes]."""
    layout = tree.layout
    for depth in range(layout.max_length - 1, -1, -1):
        first, last = layout.node_begin[depth], layout.node_begin[depth + 1]
        nodes = torch.arange(first, last, device=flows.device)
        child, stop = tree.child_ranges(nodes)
        owner = (nodes - first).repeat_interleave(stop - child)
        below = flows[:, last : layout.node_begin[depth + 2]]
        children = _segment_logsumexp(below, owner, last - first)
        flows[:, first:last] = torch.logaddexp(flows[:, first:last], children)
    return flows


def _segment_logsumexp(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """log sum exp of values [B, K] over the columns of each of `count` owners [K] or
    [B, K], [B, count]."""
    index = owner.expand_as(values)
    top = values.new_full((values.shape[0], count), -math.inf)
    top = top.scatter_reduce(1, index, values, "amax")
    safe = top.masked_fill(top == -math.inf, 0.0)
    total = torch.zeros_like(top).scatter_add(1, index, (values - safe.gather(1, index)).exp())
    return safe + total.log()
