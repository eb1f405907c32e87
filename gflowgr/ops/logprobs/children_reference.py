"""The backend "torch" of ``gflowgr::children_logprobs``: the reference and its gradient.

The gradient is written out because an operator's implementation runs below autograd.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gflowgr.ops import checks
from gflowgr.ops.inputs import HeadInputs
from gflowgr.ops.logprobs import reference
from gflowgr.ops.precision import without_autocast

if TYPE_CHECKING:
    from gflowgr.tree import PrefixTree


def forward(inputs: HeadInputs, tree: PrefixTree) -> tuple[Tensor, bool]:
    """log_pf [B, N, L], and whether some trajectory is no identifier of the tree.

    The second is False while the data checks are off, since the reference needs extra work for it.
    """
    with torch.no_grad():
        log_pf = reference.logprobs_reference(inputs)
    if checks.validation_enabled():
        try:
            tree.validate(inputs.tokens, mask=inputs.mask)
        except ValueError:
            return log_pf, True
    return log_pf, False


def backward(
    grad: Tensor, inputs: HeadInputs, tree: PrefixTree, log_pf: Tensor, *needed: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of hidden, weight (dense) and bias, where `needed`, and the tokens that competed.

    With p the probabilities of a row's candidates and t its token, the gradient with respect to the
    logit of candidate j is ``grad * (1[j == t] - p_j) / temperature``.
    """
    with without_autocast(grad.device):
        return _backward(grad, inputs, tree, log_pf, *needed)


def _backward(
    grad: Tensor,
    inputs: HeadInputs,
    tree: PrefixTree,
    log_pf: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    hidden, weight, bias, dtype = inputs.hidden, inputs.weight, inputs.bias, inputs.dtype
    steps, width = hidden.shape[2:]
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype).view(-1, width)
    d_weight = weight.new_zeros(weight.shape if need_weight else 0, dtype=dtype)
    d_bias = weight.new_zeros(weight.shape[0] if need_bias else 0, dtype=dtype)

    tokens = inputs.tokens.masked_fill(~inputs.full_mask, 0)
    after = tree.walk(tokens, mask=inputs.mask)
    before = torch.cat([torch.zeros_like(after[..., :1]), after[..., :-1]], -1).flatten()
    begin, end = tree.child_ranges(before)
    # A row outside the tree or with a forbidden token passes no gradient; with an only child the
    # gradient is zero.
    active = (after.flatten() >= 0) & (end - begin > 1)
    level_of = torch.arange(before.numel(), device=before.device) % max(steps, 1)
    used = [tokens.new_empty(0)]
    for level in range(steps):
        rows = (active & (level_of == level)).nonzero().squeeze(-1)
        candidates = reference._LevelCandidates.find(tree, before[rows])
        used.append(candidates.tokens)
        columns, _ = candidates.columns_of(tokens.flatten()[rows])
        head = weight[candidates.tokens].to(dtype)
        size = max(1, reference.BLOCK_ELEMENTS // max(1, len(candidates.tokens)))
        for at in range(0, len(rows), size):
            block = rows[at : at + size]
            states = hidden.reshape(-1, width)[block].to(dtype)
            logits = states @ head.T
            if bias is not None:
                logits = logits + bias[candidates.tokens].to(dtype)
            member = candidates.member[candidates.node[at : at + size]]
            logits = (logits / inputs.temperature).masked_fill(~member, -math.inf)
            alive = ~log_pf.flatten()[block, None].isneginf()
            slopes = -logits.softmax(-1)
            slopes.scatter_add_(1, columns[at : at + size, None], torch.ones_like(slopes[:, :1]))
            slopes = torch.where(alive, slopes * grad.flatten()[block, None].to(dtype), 0.0)
            slopes = slopes / inputs.temperature
            d_hidden[block] = slopes @ head
            if need_weight:
                d_weight.index_add_(0, candidates.tokens, slopes.T @ states)
            if need_bias:
                d_bias.index_add_(0, candidates.tokens, slopes.sum(0))
    return (
        d_hidden.view(hidden.shape).to(hidden.dtype) if need_hidden else None,
        d_weight.to(weight.dtype) if need_weight else None,
        d_bias.to(bias.dtype) if need_bias and bias is not None else None,
        torch.cat(used).unique(),
    )
