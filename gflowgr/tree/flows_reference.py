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
"""Fills the rows of :func:`pooled_flows_reference`; larger than any node."""


def item_flows_reference(log_reward: Tensor, tree: PrefixTree) -> Tensor:
    """log F of every node, [B, num_nodes], from the log-reward of every item, [B, num_items]."""
    layout = tree.layout
    leaf = torch.arange(tree.num_leaves, device=log_reward.device)
    begin, end = tree.leaf_items(leaf)
    values = log_reward[:, tree.item_ids.to(torch.int64)]
    of_leaf = _segment_logsumexp(values, leaf.repeat_interleave(end - begin), tree.num_leaves)
    flows = log_reward.new_full((log_reward.shape[0], tree.num_nodes), -math.inf)
    flows[:, tree.leaf_nodes(leaf)] = of_leaf
    for depth in range(layout.max_length - 1, -1, -1):
        first, last = layout.node_begin[depth], layout.node_begin[depth + 1]
        nodes = torch.arange(first, last, device=log_reward.device)
        child, stop = tree.child_ranges(nodes)
        owner = (nodes - first).repeat_interleave(stop - child)
        below = flows[:, last : layout.node_begin[depth + 2]]
        children = _segment_logsumexp(below, owner, last - first)
        flows[:, first:last] = torch.logaddexp(flows[:, first:last], children)
    return flows


def pooled_flows_reference(
    log_reward: Tensor, items: Tensor, floor: float, tree: PrefixTree
) -> tuple[Tensor, Tensor]:
    """Nodes at and above a candidate, and their log F, both [B, M * max_length + 1].

    items [B, M] are candidates (-1 = padding) with log-rewards [B, M]; all other items have the
    log-reward `floor`, which may be -inf. Nodes ascend; :data:`NO_NODE` and -inf fill the rest.
    """
    valid = tree.leaf_of(items) >= 0
    table = log_reward.new_full((items.shape[0], tree.num_items + 1), floor)
    table.scatter_(1, torch.where(valid, items, tree.num_items), log_reward)
    flows = item_flows_reference(table[:, :-1], tree)
    nodes = tree.walk(tree.identifiers(torch.where(valid, items, -1))).flatten(1)
    nodes = torch.cat([torch.zeros_like(nodes[:, :1]), nodes], 1)
    nodes = torch.where(nodes < 0, NO_NODE, nodes).sort(-1).values
    repeated = torch.zeros_like(nodes, dtype=torch.bool)
    repeated[:, 1:] = nodes[:, 1:] == nodes[:, :-1]
    nodes = nodes.masked_fill(repeated, NO_NODE).sort(-1).values
    known = nodes < NO_NODE
    values = flows.gather(1, nodes.masked_fill(~known, 0)).masked_fill(~known, -math.inf)
    return nodes, values


def items_under(tree: PrefixTree, nodes: Tensor) -> Tensor:
    """Number of items whose identifier passes through or ends at each node, int64 [...].

    The nodes below a node are a range on every level, and so are the leaves among them.
    """
    first, last = nodes, nodes + 1
    count = torch.zeros_like(nodes)
    for _ in range(tree.max_length + 1):
        count += _items_before(tree, last) - _items_before(tree, first)
        first, last = _first_child(tree, first), _first_child(tree, last)
    return count


def _items_before(tree: PrefixTree, nodes: Tensor) -> Tensor:
    """Number of items that end at the nodes before each of these, num_nodes included."""
    leaf = nodes - tree.layout.num_inner
    rank = tree._leaf_rank
    if rank is not None:
        shallow = rank[nodes.clamp(max=tree.layout.num_inner)].to(torch.int64)
        leaf = shallow + leaf.clamp(min=0)
    leaf = leaf.clamp(min=0)
    return leaf if tree._item_begin is None else tree._item_begin[leaf].to(torch.int64)


def _first_child(tree: PrefixTree, nodes: Tensor) -> Tensor:
    """Where the children of each node and of all after it begin; num_nodes on the last level."""
    inner = tree.layout.num_inner
    begin = tree._begins[nodes.clamp(max=inner)].to(torch.int64)
    return torch.where(nodes < inner, begin, tree.num_nodes)


def _segment_logsumexp(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """log sum exp of values [B, K] over the columns of each of `count` owners [K], [B, count]."""
    index = owner.expand_as(values)
    top = values.new_full((values.shape[0], count), -math.inf)
    top = top.scatter_reduce(1, index, values, "amax")
    safe = top.masked_fill(top == -math.inf, 0.0)
    total = torch.zeros_like(top).scatter_add(1, index, (values - safe.gather(1, index)).exp())
    return safe + total.log()
