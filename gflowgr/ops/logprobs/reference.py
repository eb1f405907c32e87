"""Trajectory log-probabilities in plain PyTorch: the reference.

It computes in float32 or float64 on any device. The tests compare every faster backend with it,
and calls that no other backend supports run it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gflowgr.ops import checks, transforms
from gflowgr.ops.inputs import HeadInputs
from gflowgr.ops.precision import compute_dtype, without_autocast

if TYPE_CHECKING:
    from gflowgr.tree import PrefixTree

BLOCK_ELEMENTS = 2**24
"""Logits held at once (64 MiB in float32)."""

MIN_BLOCK_ROWS = 256
"""Rows per block at least: fewer would spend the time on re-reading the head."""


def logprobs_reference(inputs: HeadInputs) -> Tensor:
    """log_pf [B, N, L] of checked inputs."""
    if inputs.normalize == "vocab":
        return vocab_logprobs(inputs, dense_logprobs)
    assert inputs.tree is not None
    if inputs.normalize == "level":
        return level_logprobs(inputs, inputs.tree, dense_logprobs)
    children = _children_logprobs
    if torch.compiler.is_compiling():
        # Its shapes depend on values. Not used as a decorator: that would import the compiler here.
        children = torch.compiler.disable(children)
    with without_autocast(inputs.hidden.device):
        return children(inputs, inputs.tree)


Dense = Callable[[Tensor, Tensor, "Tensor | None", Tensor, float], tuple[Tensor, Tensor]]
"""A backend's :func:`dense_logprobs`."""


def vocab_logprobs(inputs: HeadInputs, dense: Dense) -> Tensor:
    """Normalise over the whole vocabulary."""
    states, tokens = inputs.hidden.flatten(0, -2), inputs.marked_tokens
    values, _ = dense(states, inputs.weight, inputs.bias, tokens.flatten(), inputs.temperature)
    return values.view(tokens.shape)


def level_logprobs(inputs: HeadInputs, tree: PrefixTree, dense: Dense) -> Tensor:
    """Normalise over the codebook of each position: a slice of the head per level of the tree."""
    codebooks = tree.codebooks[: inputs.tokens.shape[-1]]
    if not codebooks:
        return inputs.hidden.sum(-1)  # [B, N, 0]
    # One slice of the head for all levels first: the gradient of a slice fills the whole head.
    first = min(c.start for c in codebooks)
    last = max(c.stop for c in codebooks)
    weight = inputs.weight[first:last]
    bias = None if inputs.bias is None else inputs.bias[first:last]
    tokens, columns = inputs.marked_tokens, []
    for level in range(tokens.shape[-1]):
        token = tokens[..., level]
        if level < len(codebooks):
            part = slice(codebooks[level].start - first, codebooks[level].stop - first)
            inside = (token >= codebooks[level].start) & (token < codebooks[level].stop)
        else:  # deeper than the tree: no token is possible
            part, inside = slice(0, 1), torch.zeros_like(token, dtype=torch.bool)
        values, _ = dense(
            inputs.hidden[..., level, :].flatten(0, -2),
            weight[part],
            None if bias is None else bias[part],
            torch.where(inside, token - first - part.start, -1).flatten(),
            inputs.temperature,
        )
        impossible = (token >= 0) & ~inside
        columns.append(values.view(token.shape).masked_fill(impossible, -math.inf))
    return torch.stack(columns, -1)


def dense_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of one token per row, and the log-sum-exp of the row's logits, both [T].

    hidden [T, d], weight [V, d], bias [V], tokens [T] int64. A negative token is a masked row:
    its state may hold NaN, its results are 0. The token V stands for one that is elsewhere (in
    another shard of the vocabulary): log_pf = -lse. More than V is no token: log_pf = NaN.
    """
    dtype = compute_dtype(hidden, weight, bias)
    with without_autocast(hidden.device):
        head = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        mask = tokens >= 0
        if not checks.values_readable():
            # Python cannot read the number of valid rows here: compute every row.
            states = hidden.to(dtype).masked_fill(~mask[:, None], 0.0)
            values, lse = _blocked(states, head, bias, tokens.clamp(min=0), temperature)
            return values.masked_fill(~mask, 0.0), lse.masked_fill(~mask, 0.0)
        rows = mask.nonzero().squeeze(-1)
        states = hidden.index_select(0, rows).to(dtype)
        values, lse = _blocked(states, head, bias, tokens[rows], temperature)
        zero = values.new_zeros(tokens.shape)
        return zero.index_copy(0, rows, values), zero.index_copy(0, rows, lse)


def _children_logprobs(inputs: HeadInputs, tree: PrefixTree) -> Tensor:
    """Normalise over the children of each token's node, level by level.

    All rows of a level share one product with the distinct children of the nodes visited there;
    what is not a child of a row's own node is excluded from its softmax.
    """
    shape = inputs.tokens.shape
    mask = inputs.full_mask
    tokens = inputs.tokens.masked_fill(~mask, 0)
    nodes = _nodes_before(tree, tokens, mask).flatten()

    # Valid rows, level by level, gathered once: so their gradient is scattered once.
    level_of, prompt_row = mask.flatten(0, 1).T.nonzero().unbind(-1)
    rows = prompt_row * shape[-1] + level_of
    counts = level_of.bincount(minlength=shape[-1]).tolist()
    states = inputs.hidden.flatten(0, -2).index_select(0, rows).to(inputs.dtype)
    targets = tokens.flatten()[rows]
    levels = [_LevelCandidates.find(tree, n) for n in nodes[rows].split(counts)]

    # The rows of the head in use, gathered once for all levels for the same reason.
    used = torch.cat([rows[:0], *(level.tokens for level in levels)]).unique()
    head = F.embedding(used, inputs.weight).to(inputs.dtype)
    bias = None if inputs.bias is None else inputs.bias[used].to(inputs.dtype)

    # The first piece is empty: it ties head and bias to the result where no level has a valid row.
    empty = states[:0] @ head[:0].sum(0)
    values = [empty if bias is None else empty + bias[:0].sum()]
    for level, level_states, level_targets in zip(
        levels, states.split(counts), targets.split(counts), strict=True
    ):
        within = torch.searchsorted(used, level.tokens)
        columns, known = level.columns_of(level_targets)
        level_values, _ = _blocked(
            level_states,
            head.index_select(0, within),
            None if bias is None else bias[within],
            columns,
            inputs.temperature,
            level.member,
            level.node,
        )
        values.append(torch.where(known, level_values, -math.inf))
    flat = torch.cat(values)
    return flat.new_zeros(tokens.numel()).index_copy(0, rows, flat).view(shape)


def _nodes_before(tree: PrefixTree, tokens: Tensor, mask: Tensor) -> Tensor:
    """The node [B, N, L] from which each token is chosen; 0, the root, for the first."""
    after = tree.walk(tokens, mask=mask)
    return torch.cat([torch.zeros_like(after[..., :1]), after[..., :-1]], -1)


@dataclass(frozen=True)
class _LevelCandidates:
    """The candidate tokens of one level of the tree, and which of them each row may choose."""

    tokens: Tensor  # [C] distinct children of all visited nodes, ascending
    node: Tensor  # [R] index of each row's node among the visited ones
    member: Tensor  # [M, C] bool: the token is a child of the visited node

    @classmethod
    def find(cls, tree: PrefixTree, nodes: Tensor) -> _LevelCandidates:
        visited, node = nodes.unique(return_inverse=True)
        begin, end = tree.child_ranges(visited)
        count = end - begin
        owner = torch.arange(len(visited), device=nodes.device).repeat_interleave(count)
        first = count.cumsum(0) - count
        within = torch.arange(len(owner), device=nodes.device) - first[owner]
        tokens, column = tree.node_tokens(begin[owner] + within).unique(return_inverse=True)
        member = torch.zeros((len(visited), len(tokens)), dtype=torch.bool, device=nodes.device)
        member[owner, column] = True
        return cls(tokens, node, member)

    def columns_of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each row's token, and whether it is a child of the row's node at all."""
        if len(self.tokens) == 0:
            return torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        column = torch.searchsorted(self.tokens, tokens).clamp(max=len(self.tokens) - 1)
        known = (self.tokens[column] == tokens) & self.member[self.node, column]
        return column, known


def _blocked(
    states: Tensor,
    head: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    temperature: float,
    member: Tensor | None = None,
    node: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Blocks of rows of :func:`_block_logprobs`; several are recomputed in the backward pass."""
    rows = states.shape[0]
    step = max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // max(head.shape[0], 1))
    if not checks.values_readable() or transforms.active() or rows <= step:
        return _block_logprobs(states, head, bias, columns, temperature, member, node)
    parts = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        nodes = None if node is None else node[part]
        block = (states[part], head, bias, columns[part], temperature, member, nodes)
        if torch.is_grad_enabled():
            parts.append(
                checkpoint(_block_logprobs, *block, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            parts.append(_block_logprobs(*block))
    values, lse = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(lse)


def _block_logprobs(
    states: Tensor,
    head: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    temperature: float,
    member: Tensor | None,
    node: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [R] of one column each and log-sum-exps [R].

    states [R, d], head [C, d], columns [R]; the column C has the logit 0 here, those beyond NaN.
    """
    if head.shape[0] == 0:  # no candidate: no row, or only rows outside the tree
        nothing = states.sum(-1) - math.inf
        return nothing, nothing
    logits = states @ head.T
    if bias is not None:
        logits = logits + bias
    if temperature != 1.0:
        logits = logits / temperature
    if member is not None and node is not None:
        logits = logits.masked_fill(~member[node], -math.inf)
    here = columns < head.shape[0]
    chosen = logits.gather(1, columns.clamp(max=head.shape[0] - 1)[:, None]).squeeze(1)
    chosen = torch.where(here, chosen, torch.where(columns == head.shape[0], 0.0, math.nan))
    log_sum = logits.logsumexp(-1)
    # Where every candidate is forbidden the difference would be NaN; the probability is zero.
    impossible = (log_sum == -math.inf) & here
    return torch.where(impossible, -math.inf, chosen - log_sum), log_sum
