"""Flow KL from hidden states: the divergence from the exact flows' policy, at every child at once.

With the exact flows F of a prompt (:func:`gflowgr.item_flows`) the loss of a trajectory is

    sum over its prefixes s of KL(P*_F(. | s) || P_F(. | s)),    P*_F(c | s) = F(c) / sum over the
    children c' of s of F(c'),

the expectation of detailed balance's gradient, ``P_F - P*_F``, instead of one sampled child. With a
score model's softmax as reward it is distillation of that model along the tree.

- Items that share an identifier are one leaf with the sum of their rewards. Where an identifier
  ends at an inner node, P*_F is renormalised over the children, since the model's policy has no
  token for stopping there.
- A prefix without a flow, and one whose only flow ends there, has the divergence 0 and passes no
  gradient. Over "children" a node with one child costs nothing.
- A child with a flow that the bias forbids (-inf) makes the loss infinite, and so does a token off
  the tree where the data checks are off.
- ``nll_weight`` and ``reduction`` are those of the other fused losses, see
  :mod:`gflowgr.ops.flow_loss.fused`: the supervised term is that of trajectory n = 0.
- No gradient passes to the flows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gflowgr.ops import checks, transforms
from gflowgr.ops.flow_kl.op import flow_kl_rows
from gflowgr.ops.flow_kl.reference import flow_kl_reference
from gflowgr.ops.flow_loss.reference import reduce_trajectories
from gflowgr.ops.inputs import HeadInputs, check_allowed, check_head_inputs
from gflowgr.ops.logprobs.trajectory import check_trajectories, compute_logprobs
from gflowgr.tree import ItemFlows, PrefixTree

__all__ = ["FusedFlowKL", "fused_flow_kl", "fused_flow_kl_loss"]


class FusedFlowKL(NamedTuple):
    """A flow-KL loss and what it was made of.

    Attributes:
        loss: a scalar, or [B, N] for reduction "none".
        kl: [B, N, L] divergence at the prefix before each token, nats, detached; 0 under a false
            mask.
        log_pf: [B, N, L] token log-probabilities, nats, detached.
    """

    loss: Tensor
    kl: Tensor
    log_pf: Tensor


def fused_flow_kl_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    flows: ItemFlows,
    *,
    tree: PrefixTree,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: str = "children",
    reduction: str = "prompt",
    nll_weight: float = 0.0,
) -> Tensor:
    """Sum over the prefixes of each trajectory of KL(P*_F(. | s) || P_F(. | s)), nats.

    Args:
        hidden: [B, N, L, d]; ``hidden[b, n, l]`` predicts ``tokens[b, n, l]``.
        weight: [V, d] output head.
        tokens: [B, N, L] integer token ids, identifiers of the tree; trajectory n = 0 is the
            observed positive.
        flows: the exact flows of the B prompts, :func:`gflowgr.item_flows`, on the same tree.
        tree: the prefix tree of the identifiers, on the device of `hidden`.
        bias: [V] added to the logits; -inf forbids a token.
        mask: [B, N, L] bool, a prefix of each row (true = real token); None = all true. Under a
            false mask states and tokens may hold anything.
        temperature: divides the logits, bias included; > 0.
        normalize: over what P_F sums to 1: "children" of the prefix, the whole "vocab", or the
            "level", the codebook of the position.
        reduction: "none" ([B, N]), "sum", "mean" over valid trajectories or "prompt" = mean over
            prompts of the sum over their trajectories.
        nll_weight: weight >= 0 of the negative log-likelihood of trajectory 0.

    Returns:
        A scalar, or [B, N] for "none"; float32, or float64 if hidden, weight or bias is. For the
        divergences and log_pf beside it: :func:`fused_flow_kl`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or option; flows of another tree; a trajectory that is no
            identifier of the tree; a valid token that the bias forbids.

    Source: exact flows on the tree of identifiers of GFlowGR (arXiv 2506.16114); detailed balance
    (Bengio et al. 2023, arXiv 2111.09266) taken at all children at once.
    """
    return fused_flow_kl(
        hidden,
        weight,
        tokens,
        flows,
        tree=tree,
        bias=bias,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        reduction=reduction,
        nll_weight=nll_weight,
    ).loss


def fused_flow_kl(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    flows: ItemFlows,
    *,
    tree: PrefixTree,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: str = "children",
    reduction: str = "prompt",
    nll_weight: float = 0.0,
) -> FusedFlowKL:
    """:func:`fused_flow_kl_loss`, with divergences and log_pf beside it: for trainers that log.

    Arguments and errors are those of that function.

    Returns:
        :class:`FusedFlowKL`; its loss is what :func:`fused_flow_kl_loss` returns.
    """
    reduction = checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    nll_weight = checks.check_number("nll_weight", nll_weight, least=0.0)
    if tree is None:
        raise ValueError("tree must be the flows' prefix tree; got None")
    data = checks.DataChecks()
    inputs = check_head_inputs(
        hidden,
        weight,
        tokens,
        bias=bias,
        tree=tree,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        sparse_grad=False,
        data=data,
    )
    _check_flows(flows, tree, inputs)
    check_allowed("bias", inputs.bias, inputs.tokens, inputs.mask, data)
    data.run()
    if transforms.reference_only("flow_kl"):
        log_pf = compute_logprobs(inputs, look_up=data.enabled)
        kl = flow_kl_reference(inputs, tree, flows.node_log_flow)
        loss = _reduced(kl, log_pf, inputs, reduction, nll_weight)
    elif inputs.normalize == "children":
        return _among_children(inputs, tree, flows, reduction, nll_weight, look_up=data.enabled)
    else:
        # What the children's softmax and the larger one differ by is the difference of the token's
        # log-probabilities, so that no target over the vocabulary is needed.
        log_pf = compute_logprobs(inputs, look_up=data.enabled)
        children = replace(inputs, normalize="children", tree=tree)
        rows, _, alive, _ = flow_kl_rows(children, tree, flows.rewards, None)
        kl = torch.where(alive, rows - log_pf, 0.0)
        loss = _reduced(kl, log_pf, inputs, reduction, nll_weight)
    return FusedFlowKL(loss, kl.detach(), log_pf.detach())


def _among_children(
    inputs: HeadInputs,
    tree: PrefixTree,
    flows: ItemFlows,
    reduction: str,
    nll_weight: float,
    *,
    look_up: bool,
) -> FusedFlowKL:
    valid = inputs.full_mask.any(-1)
    weights = torch.zeros(valid.shape, dtype=inputs.dtype, device=valid.device)
    if nll_weight > 0.0:
        weights[:, :1] = nll_weight
        if reduction == "mean":  # the supervised term is a mean over prompts
            weights *= valid.sum().to(weights.dtype) / valid.any(-1).sum().clamp(min=1)
    rows, log_pf, _, invalid = flow_kl_rows(inputs, tree, flows.rewards, weights)
    if look_up and invalid.item() != 0:
        check_trajectories(inputs, tree)
    loss = _reduced(rows, log_pf, inputs, reduction, 0.0)
    kl = rows.detach()
    if nll_weight > 0.0:
        kl = torch.where(weights[..., None] > 0, kl + weights[..., None] * log_pf, kl)
    return FusedFlowKL(loss, kl, log_pf.detach())


def _reduced(
    kl: Tensor, log_pf: Tensor, inputs: HeadInputs, reduction: str, nll_weight: float
) -> Tensor:
    mask = inputs.full_mask
    losses, valid = kl.sum(-1), mask.any(-1)
    # Where the values were not looked at, nobody takes the loss of a broken mask for one.
    losses = losses.masked_fill(checks.mask_rises(mask).any(-1), math.nan)
    # Nor that of a token which is none, whose prefixes alone have finite divergences.
    found = log_pf.detach()
    losses = losses - torch.where(mask & ~found.isfinite(), found, 0.0).sum(-1)
    loss = reduce_trajectories(losses, valid, reduction)
    if nll_weight > 0.0:
        nll = -log_pf.sum(-1)
        nll = nll * nll.new_tensor([1.0] + [0.0] * (nll.shape[1] - 1))
        over_prompts = "prompt" if reduction == "mean" else reduction
        loss = loss + nll_weight * reduce_trajectories(nll, valid, over_prompts)
    return loss


def _check_flows(flows: object, tree: PrefixTree, inputs: HeadInputs) -> None:
    if not isinstance(flows, ItemFlows):
        raise TypeError(f"flows must be gflowgr.ItemFlows; got {type(flows).__name__}")
    if len(flows) != inputs.tokens.shape[0]:
        raise ValueError(
            f"flows must be of the B={inputs.tokens.shape[0]} prompts of hidden; "
            f"got flows of {len(flows)}"
        )
    if flows.tree is not tree and flows.tree.buffer is not tree.buffer:
        raise ValueError("flows must be of the tree that is given; got flows of another one")
