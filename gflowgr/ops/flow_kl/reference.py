"""KL divergence from the exact flows' policy to the model's, in plain PyTorch: the reference.

KL(P*_F(. | s) || P_F(. | s)) = sum over the children c of s of P*_F(c | s) (log P*_F(c | s) - log
P_F(c | s)), with P*_F(c | s) = F(c) / sum of F over the children: where an identifier ends at s,
stopping there has no probability of its own, as in the model's own softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gflowgr.ops.inputs import HeadInputs
from gflowgr.ops.precision import without_autocast

if TYPE_CHECKING:
    from gflowgr.tree import PrefixTree

LogFlow = Callable[[Tensor], Tensor]
"""Nodes [B, ...] int64 to their log F, -inf for -1."""


def flow_kl_reference(inputs: HeadInputs, tree: PrefixTree, log_flow: LogFlow) -> Tensor:
    """KL [B, N, L] of checked inputs at the prefix before each token, nats; differentiable.

    0 under a false mask, off the tree, and where no child has a flow.
    """
    with without_autocast(inputs.hidden.device):
        levels = Level.of(inputs, tree, log_flow)
        values = [level.divergence() for level in levels]
    shape = inputs.tokens.shape
    return torch.stack(values, -1).view(shape) if values else inputs.hidden.sum(-1)


@dataclass(frozen=True)
class Level:
    """The rows of one position, with the children that compete: R = B N rows, C tokens."""

    states: Tensor  # [R, d], 0 under a false mask
    tokens: Tensor  # [C] distinct children of the visited nodes, ascending
    member: Tensor  # [R, C] the token is a child of the row's node
    target: Tensor  # [R, C] P*_F; all 0 where there is no flow
    logits: Tensor  # [R, C] -inf where the token is no child
    log_sum: Tensor  # [R] log-sum-exp of the logits that the policy is normalised over

    @classmethod
    def of(cls, inputs: HeadInputs, tree: PrefixTree, log_flow: LogFlow) -> list[Level]:
        """The levels of the trajectories, the first token's first."""
        mask = inputs.full_mask
        tokens = inputs.tokens.masked_fill(~mask, 0)
        after = tree.walk(tokens, mask=inputs.mask)
        before = torch.cat([torch.zeros_like(after[..., :1]), after[..., :-1]], -1)
        before = before.masked_fill(~mask, -1)
        count = inputs.tokens.shape[-1]
        return [
            cls._one(inputs, tree, log_flow, before[..., depth], depth) for depth in range(count)
        ]

    @classmethod
    def _one(
        cls, inputs: HeadInputs, tree: PrefixTree, log_flow: LogFlow, nodes: Tensor, depth: int
    ) -> Level:
        tokens, children = children_of(tree, nodes.flatten())
        member = children >= 0
        flow = log_flow(children.view(nodes.shape[0], -1)).view(children.shape).to(inputs.dtype)
        largest = flow.amax(-1, keepdim=True) if len(tokens) else flow.new_empty(flow.shape[0], 1)
        target = torch.where(largest > -math.inf, flow, 0.0).softmax(-1)
        target = target.masked_fill(~(member & (largest > -math.inf)), 0.0)

        states = inputs.hidden[..., depth, :].flatten(0, -2).to(inputs.dtype)
        states = torch.where((nodes.flatten() >= 0)[:, None], states, 0.0)

        def logits_of(rows: Tensor | slice) -> Tensor:
            logits = states @ inputs.weight[rows].to(inputs.dtype).T
            if inputs.bias is not None:
                logits = logits + inputs.bias[rows].to(inputs.dtype)
            return logits / inputs.temperature

        logits = logits_of(tokens).masked_fill(~member, -math.inf)
        if inputs.normalize == "children":
            log_sum = torch.where(member.any(-1, keepdim=True), logits, 0.0).logsumexp(-1)
        else:
            codebook = slice(None)
            if inputs.normalize == "level" and depth < tree.max_length:
                codebook = slice(tree.codebooks[depth].start, tree.codebooks[depth].stop)
            log_sum = logits_of(codebook).logsumexp(-1)
        return cls(states, tokens, member, target, logits, log_sum)

    def divergence(self) -> Tensor:
        """KL [R] of the rows."""
        positive = self.target > 0
        log_target = torch.where(positive, self.target, 1.0).log()
        log_policy = (
            torch.where(positive, self.logits, 0.0)
            - torch.where(positive.any(-1), self.log_sum, 0.0)[:, None]
        )
        return torch.where(positive, self.target * (log_target - log_policy), 0.0).sum(-1)


def children_of(tree: PrefixTree, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct tokens [C] of the children of nodes [R], and the child by each [R, C] (-1: none)."""
    visited, index = nodes.unique(return_inverse=True)
    begin, end = tree.child_ranges(visited)
    count = end - begin
    owner = torch.arange(len(visited), device=nodes.device).repeat_interleave(count)
    first = count.cumsum(0) - count
    child = begin[owner] + torch.arange(len(owner), device=nodes.device) - first[owner]
    tokens, column = tree.node_tokens(child).unique(return_inverse=True)
    table = nodes.new_full((len(visited), len(tokens)), -1)
    table[owner, column] = child
    return tokens, table[index]
