"""Trajectory log-probabilities in plain PyTorch: the definition.

Exact for float32 and float64 on any device, the oracle of every faster backend and what they fall
back to.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gflowgr.ops import checks

if TYPE_CHECKING:
    from gflowgr.tree import PrefixTree

BLOCK_ELEMENTS = 2**24
"""Logits held at once (64 MiB in float32)."""

MIN_BLOCK_ROWS = 256
"""Rows per block at least: fewer would spend the time on re-reading the head."""


# Asked once: not every torch can trace the question under torch.compile.
_AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "xla") if torch.amp.is_autocast_available(name)
)


@dataclass(frozen=True)
class HeadInputs:
    """Checked arguments of :func:`trajectory_logprobs`."""

    hidden: Tensor  # [B, N, L, d]
    weight: Tensor  # [V, d]
    tokens: Tensor  # [B, N, L]
    bias: Tensor | None  # [V]
    mask: Tensor | None  # [B, N, L]; None = all true
    tree: PrefixTree | None  # given only where it normalises
    temperature: float

    @property
    def full_mask(self) -> Tensor:
        """The mask, all true where none was given."""
        if self.mask is None:
            return torch.ones(self.tokens.shape, dtype=torch.bool, device=self.tokens.device)
        return self.mask

    @property
    def dtype(self) -> torch.dtype:
        """float64 if any input is float64, float32 otherwise."""
        floating = [t for t in (self.hidden, self.weight, self.bias) if t is not None]
        wide = any(t.dtype == torch.float64 for t in floating)
        return torch.float64 if wide else torch.float32


def logprobs_definition(inputs: HeadInputs) -> Tensor:
    """log_pf [B, N, L] of checked inputs."""
    with _without_autocast(inputs.hidden.device):
        if inputs.tree is not None:
            children = _children_logprobs
            if torch.compiler.is_compiling():
                # It reads sizes from values. Not a decorator: that imports the compiler at once.
                children = torch.compiler.disable(children)
            return children(inputs, inputs.tree)
        return _vocab_logprobs(inputs)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would turn the float32 products below back into 16-bit ones."""
    if device.type not in _AUTOCAST_DEVICES:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _vocab_logprobs(inputs: HeadInputs) -> Tensor:
    hidden, tokens = inputs.hidden.flatten(0, -2), inputs.tokens.flatten()
    head = inputs.weight.to(inputs.dtype)
    bias = None if inputs.bias is None else inputs.bias.to(inputs.dtype)

    if inputs.mask is None or not checks.values_readable():
        # The number of valid rows cannot be known, or is all of them: compute every row.
        mask = inputs.full_mask.flatten()
        states = hidden.to(inputs.dtype).masked_fill(~mask[:, None], 0.0)
        safe = tokens.masked_fill(~mask, 0)
        values = _blocked(states, head, bias, safe, inputs.temperature)
        return values.masked_fill(~mask, 0.0).view(inputs.tokens.shape)

    rows = inputs.mask.flatten().nonzero().squeeze(-1)
    states = hidden.index_select(0, rows).to(inputs.dtype)
    values = _blocked(states, head, bias, tokens[rows], inputs.temperature)
    result = values.new_zeros(tokens.shape)
    return result.index_copy(0, rows, values).view(inputs.tokens.shape)


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
        level_values = _blocked(
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
) -> Tensor:
    """Blocks of rows of :func:`_block_logprobs`; several are recomputed in the backward pass."""
    rows = states.shape[0]
    step = max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // max(head.shape[0], 1))
    if not checks.values_readable() or rows <= step:
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
    return torch.cat(parts)


def _block_logprobs(
    states: Tensor,
    head: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    temperature: float,
    member: Tensor | None,
    node: Tensor | None,
) -> Tensor:
    """Log-probabilities [R] of one column each: states [R, d], head [C, d], columns [R]."""
    if head.shape[0] == 0:  # no candidate: no row, or only rows outside the tree
        return states.sum(-1) - math.inf
    logits = states @ head.T
    if bias is not None:
        logits = logits + bias
    if temperature != 1.0:
        logits = logits / temperature
    if member is not None and node is not None:
        logits = logits.masked_fill(~member[node], -math.inf)
    chosen = logits.gather(1, columns[:, None]).squeeze(1)
    # Where every candidate is forbidden the difference would be NaN; the probability is zero.
    log_sum = logits.logsumexp(-1)
    return torch.where(log_sum == -math.inf, -math.inf, chosen - log_sum)
