"""References of ``beam_step`` and ``beam_step_hidden`` in plain PyTorch, on any device.

:mod:`gflowgr.ops.beam_step.op` says what they compute; the tests compare the fast backends with
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gflowgr.ops.precision import compute_dtype
from gflowgr.ops.topk import columns_of_keys, ordered_keys
from gflowgr.tree import PrefixTree
from gflowgr.tree.facts import tree_facts

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Masks:
    """Which nodes and leaves may be taken; see :func:`gflowgr.ops.beam_step.op.beam_step`."""

    live: Tensor | None
    barred: Tensor | None
    live_leaves: Tensor | None
    barred_leaves: Tensor | None
    num_nodes: int
    num_leaves: int

    def nodes(self, nodes: Tensor) -> Tensor:
        """Whether each prompt may take ``nodes`` [B, ...]; undefined for -1."""
        return _admissible(nodes, self.live, self.barred, self.num_nodes)

    def leaves(self, leaves: Tensor) -> Tensor:
        """Whether each prompt may get ``leaves`` [B, ...]; undefined for -1."""
        return _admissible(leaves, self.live_leaves, self.barred_leaves, self.num_leaves)

    def children(self, begin: Tensor, end: Tensor) -> Tensor:
        """Number of admissible nodes in begin..end - 1 of each prompt [B, ...]."""
        live = self.live
        count = end - begin
        if live is not None:
            before = torch.nn.functional.pad(live.long().cumsum(0), (1, 0))
            count = before[end] - before[begin]
        if self.barred is None:
            return count
        gone = torch.ones_like(self.barred) if live is None else live[self.barred % self.num_nodes]
        before = torch.nn.functional.pad(gone.long().cumsum(0), (1, 0))
        first = _rows(begin) * self.num_nodes
        low = torch.searchsorted(self.barred, first + begin)
        high = torch.searchsorted(self.barred, first + end)
        return count - (before[high] - before[low])


def _rows(ids: Tensor) -> Tensor:
    """Number of each prompt, in a shape that broadcasts against ``ids`` [B, ...]."""
    return torch.arange(ids.shape[0], device=ids.device).reshape(-1, *[1] * (ids.dim() - 1))


def _admissible(ids: Tensor, live: Tensor | None, barred: Tensor | None, size: int) -> Tensor:
    keep = torch.ones_like(ids, dtype=torch.bool)
    if live is not None:
        keep &= live[ids.clamp(0, size - 1)]
    if barred is not None and barred.numel():
        keys = _rows(ids) * size + ids
        place = torch.searchsorted(barred, keys).clamp_max(barred.numel() - 1)
        keep &= barred[place] != keys
    return keep


@dataclass(frozen=True)
class _Children:
    """Children of the beams' nodes [B, K, C]; ``valid`` says which slots hold one."""

    tree: PrefixTree
    nodes: Tensor
    tokens: Tensor  # 0 where there is no child
    valid: Tensor
    depth: Tensor  # of the beams' nodes [B, K]

    @classmethod
    def find(cls, nodes: Tensor, scores: Tensor, tree: PrefixTree) -> _Children:
        begin, end = tree.child_ranges(torch.where(scores == -math.inf, -1, nodes))
        fanout = max(1, int((end - begin).max())) if nodes.numel() else 1
        children = begin.unsqueeze(-1) + torch.arange(fanout, device=nodes.device)
        valid = children < end.unsqueeze(-1)
        children = torch.where(valid, children, -1)
        bounds = torch.tensor(tree.layout.node_begin[1:-1], device=nodes.device)
        depth = torch.searchsorted(bounds, nodes.clamp_min(0).contiguous(), right=True)
        return cls(tree, children, tree.node_tokens(children).clamp_min(0), valid, depth)

    def choose(
        self, logits: Tensor, normaliser: Tensor, scores: Tensor, masks: _Masks, width: int
    ) -> Outputs:
        """Outputs of the step from the children's scaled logits [B, K, C], lse [B, K, 1]."""
        value = logits - normaliser
        # Where all tokens are forbidden, -inf - (-inf) is NaN; the token must stay forbidden.
        forbidden = (logits == -math.inf) & ~normaliser.isnan()
        taken = self.valid & ~forbidden & masks.nodes(self.nodes)
        total = torch.where(taken, scores.unsqueeze(-1) + value, -math.inf).flatten(1).float()
        nodes, fanout = self.nodes.flatten(1), self.nodes.shape[2]
        begin, end = self.tree.child_ranges(nodes)
        leaves = self.tree.terminal(nodes)
        open_ends = (leaves >= 0) & (end > begin)
        goes_on = (end > begin) & (~open_ends | (masks.children(begin, end) > 0))
        ends = (leaves >= 0) & masks.leaves(leaves)
        best, column = _best(torch.where(goes_on, total, -math.inf), width)
        best_end, end_column = _best(torch.where(ends, total, -math.inf), width)
        return (
            best,
            torch.where(column < 0, -1, column // fanout),
            _pick(self.tokens.flatten(1), column),
            _pick(nodes, column),
            best_end,
            _pick(nodes, end_column),
            torch.where(end_column < 0, -1, end_column // fanout),
        )


def _pick(values: Tensor, columns: Tensor) -> Tensor:
    """``values`` [B, C] at ``columns`` [B, width]; -1 where a column is -1."""
    if values.shape[1] == 0:
        return torch.full_like(columns, -1)
    return torch.where(columns < 0, -1, values.gather(1, columns.clamp_min(0)))


def _best(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` best scores of each row and their columns, NaN first, ties by column.

    Columns with score -inf are not taken; score -inf and column -1 fill the rest of the row.
    """
    count = scores.shape[1]
    column = columns_of_keys(ordered_keys(scores).topk(min(width, count), dim=1).values, count)
    best = scores.gather(1, column)
    missing = width - column.shape[1]
    best = torch.nn.functional.pad(best, (0, missing), value=-math.inf)
    column = torch.nn.functional.pad(column, (0, missing), value=-1)
    return best, torch.where(best == -math.inf, -1, column)


def step_reference(
    logits: Tensor,
    scores: Tensor,
    nodes: Tensor,
    tree: Tensor,
    normalize: str,
    temperature: float,
    live: Tensor | None,
    barred: Tensor | None,
    width: int,
    live_leaves: Tensor | None = None,
    barred_leaves: Tensor | None = None,
) -> Outputs:
    """Reference of ``beam_step``; ``tree`` is the buffer."""
    walk = PrefixTree(tree)
    children = _Children.find(nodes, scores, walk)
    scaled = logits.to(compute_dtype(logits)) / temperature
    chosen = scaled.gather(-1, children.tokens)
    if normalize == "vocab":
        normaliser = scaled.logsumexp(-1, keepdim=True)
    elif normalize == "children":
        normaliser = chosen.masked_fill(~children.valid, -math.inf).logsumexp(-1, keepdim=True)
    else:
        normaliser = torch.zeros_like(scaled[..., :1])
        bounds = zip(walk.layout.token_base, tree_facts(tree).codebook_ends.tolist(), strict=True)
        for depth, (first, end) in enumerate(bounds):
            part = scaled[..., first:end].logsumexp(-1)
            normaliser[..., 0] = torch.where(children.depth == depth, part, normaliser[..., 0])
    masks = _Masks(live, barred, live_leaves, barred_leaves, walk.num_nodes, walk.num_leaves)
    return children.choose(chosen, normaliser, scores, masks, width)


def step_hidden_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor,
    nodes: Tensor,
    tree: Tensor,
    normalize: str,
    temperature: float,
    live: Tensor | None,
    barred: Tensor | None,
    width: int,
    live_leaves: Tensor | None = None,
    barred_leaves: Tensor | None = None,
) -> Outputs:
    """Reference of ``beam_step_hidden``; ``tree`` is the buffer."""
    walk = PrefixTree(tree)
    children = _Children.find(nodes, scores, walk)
    dtype = compute_dtype(hidden, weight, bias)
    flat, valid, depth = (
        hidden.flatten(0, 1).to(dtype),
        children.valid.flatten(0, 1),
        children.depth,
    )
    tokens = children.tokens.flatten(0, 1)
    chosen = flat.new_full(tokens.shape, -math.inf)
    normaliser = flat.new_zeros(tokens.shape[0], 1)
    bounds = zip(walk.layout.token_base, tree_facts(tree).codebook_ends.tolist(), strict=True)
    for level, (first, end) in enumerate(bounds):
        rows = (valid.any(-1) & (depth.flatten() == level)).nonzero()[:, 0]
        if rows.numel() == 0:
            continue
        inside = valid[rows]
        if normalize == "level":
            needed = torch.arange(first, end, device=tokens.device)
        else:
            needed = tokens[rows][inside].unique()
        part = None if bias is None else bias[needed].to(dtype)
        logits = (
            torch.nn.functional.linear(flat[rows], weight[needed].to(dtype), part) / temperature
        )
        columns = torch.searchsorted(needed, tokens[rows]).clamp_max(needed.numel() - 1)
        chosen[rows] = torch.where(inside, logits.gather(-1, columns), -math.inf)
        over = logits if normalize == "level" else chosen[rows]
        normaliser[rows] = over.logsumexp(-1, keepdim=True)
    masks = _Masks(live, barred, live_leaves, barred_leaves, walk.num_nodes, walk.num_leaves)
    shape = children.tokens.shape
    return children.choose(chosen.view(shape), normaliser.view(*shape[:2], 1), scores, masks, width)
