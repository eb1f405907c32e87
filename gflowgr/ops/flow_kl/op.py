"""``gflowgr::flow_kl``: divergences among the children of each prefix, with its log-probabilities.

Of every row (a prefix and its next token) the op gives ``KL(P*_F || P_F) + w * NLL`` over the
children; where no weights are given, w is -1 at prefixes with a flow and 0 elsewhere: then what is
left is ``sum of P*_F (log P*_F - log P_F) + log P_F(token)``, in which the softmax cancels, and the
token's log-probability over a larger set makes it the divergence there.

The slopes ``(1 + w) P_F - P*_F - w [token]`` are formed where the logits are and kept for the
backward pass, which is that of ``gflowgr::children_logprobs``. P*_F is summed from the rewards of
the items under the prefix, row by row. The reference is
:mod:`gflowgr.ops.flow_kl.reference`; C++ and CUDA are in ``csrc/logprobs_children``.

Memory besides inputs, outputs and gradients: 4 bytes for every child of every row's node, kept for
the backward pass as long as they can be no more than
``gflowgr.ops.logprobs.children.SAVED_LIMIT``, else computed again there, 2**24 at a time; and 32
bytes a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gflowgr import backends
from gflowgr.ops import checks, transforms
from gflowgr.ops.flow_kl.reference import Level
from gflowgr.ops.inputs import HeadInputs
from gflowgr.ops.logprobs.children import (
    backward_compiled,
    compiled,
    empty_gradients,
    products_kept,
    reference_inputs,
)
from gflowgr.ops.logprobs.reference import logprobs_reference
from gflowgr.ops.precision import compute_dtype, without_autocast
from gflowgr.tree import PrefixTree
from gflowgr.tree.facts import check_head
from gflowgr.tree.flows import FlowRewards
from gflowgr.tree.flows_reference import item_flows_reference

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""value, log_pf, alive [B, N, L], slopes, plan, invalid [1]."""
Gradients = tuple[Tensor, Tensor, Tensor]
HeadArguments = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor, float]
"""hidden, weight, bias, tokens, mask, the tree's buffer, temperature."""

RECOMPUTED_AT_ONCE = 2**24
"""Slopes that the backward pass computes at a time where they were not kept (64 MiB)."""


def flow_kl_rows(
    inputs: HeadInputs, tree: PrefixTree, rewards: FlowRewards, nll_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of checked inputs over the children of `tree`; nll_weights [B, N], or None: see above.

    Returns:
        value [B, N, L] (differentiable), log_pf [B, N, L] over the children (detached), alive
        [B, N, L] bool: whether the prefix has a child with a flow, and invalid [1] as of
        :func:`gflowgr.ops.logprobs.children.children_logprobs`.
    """
    outputs: Outputs = torch.ops.gflowgr.flow_kl(
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        inputs.tokens,
        inputs.mask,
        tree.buffer,
        inputs.temperature,
        products_kept(inputs, tree),
        None if nll_weights is None else nll_weights.to(inputs.dtype),
        rewards.log_reward,
        rewards.pool,
        rewards.floor,
        rewards.root,
    )
    value, log_pf, alive, _, _, invalid = outputs
    return value, log_pf, alive, invalid


def _levels(
    inputs: HeadInputs, tree: PrefixTree, log_reward: Tensor, pool: Tensor | None, floor: float
) -> list[Level]:
    flows = item_flows_reference(log_reward, pool, floor, tree)
    return Level.of(
        inputs,
        tree,
        lambda nodes: flows.gather(1, nodes.clamp(min=0)).masked_fill(nodes < 0, -math.inf),
    )


def _row_weights(inputs: HeadInputs, alive: Tensor, nll_weights: Tensor | None) -> Tensor:
    """w [B, N, L] of every row."""
    if nll_weights is None:
        return -alive.to(inputs.dtype)
    return nll_weights[..., None].expand(inputs.tokens.shape)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
    saved: int,
    nll_weights: Tensor | None,
    log_reward: Tensor,
    pool: Tensor | None,
    floor: float,
    root: Tensor,
) -> Outputs:
    transforms.refuse_forward_mode("flow_kl")
    check_head(tree, weight.shape[0], "the rows of weight")
    head = (hidden, weight, bias, tokens, mask, tree, temperature)
    name = backends.resolve("flow_kl", hidden.device, compute_dtype(hidden, weight, bias))
    if name != "torch":
        rewards = FlowRewards(log_reward, pool, floor, root)
        if name == "cuda" and saved == 0:  # its logits need the room of the slopes
            return _forward_in_parts(head, nll_weights, rewards)
        return _forward_compiled(compiled(name), head, saved, nll_weights, rewards)
    inputs, found = reference_inputs(*head)
    value, log_pf, alive, slopes, plan, invalid = _empty_outputs(
        hidden, weight, bias, tokens, saved
    )
    with without_autocast(hidden.device):
        for depth, level in enumerate(_levels(inputs, found, log_reward, pool, floor)):
            value[..., depth] = level.divergence().view(tokens.shape[:-1])
            alive[..., depth] = (level.target > 0).any(-1).view(tokens.shape[:-1])
    log_pf = logprobs_reference(inputs)
    weights = _row_weights(inputs, alive, nll_weights)
    value = value + torch.where(weights == 0, 0.0, -weights * log_pf)
    wrong = False
    if checks.validation_enabled():
        try:
            found.validate(tokens, mask=mask)
        except ValueError:
            wrong = True
    return value, log_pf, alive, slopes.zero_(), plan.zero_(), invalid.fill_(wrong)


def _forward_compiled(
    namespace: Any,
    head: HeadArguments,
    saved: int,
    nll_weights: Tensor | None,
    rewards: FlowRewards,
) -> Outputs:
    *tensors, temperature = head
    out: Outputs = namespace.children_flow_kl(
        *backends.contiguous(*tensors),
        temperature,
        saved,
        *backends.contiguous(nll_weights, rewards.log_reward, rewards.pool),
        rewards.floor,
        rewards.root.contiguous(),
    )
    return out


def _parts(
    namespace: Any, head: HeadArguments, nll_weights: Tensor | None, rewards: FlowRewards
) -> Iterator[tuple[slice, HeadArguments, Outputs]]:
    """Forward passes with slopes, of as many prompts at a time as RECOMPUTED_AT_ONCE allows."""
    hidden, weight, bias, tokens, mask, tree, temperature = head
    _, branches, steps = tokens.shape
    each = branches * sum(PrefixTree(tree).layout.max_children[:steps])
    prompts = max(RECOMPUTED_AT_ONCE // max(each, 1), 1)
    for begin in range(0, len(tokens), prompts):
        part = slice(begin, begin + prompts)
        m, w, pool = (None if x is None else x[part] for x in (mask, nll_weights, rewards.pool))
        own = (hidden[part], weight, bias, tokens[part], m, tree, temperature)
        flows = FlowRewards(rewards.log_reward[part], pool, rewards.floor, rewards.root[part])
        saved = len(own[0]) * each
        yield part, own, _forward_compiled(namespace, own, saved, w, flows)


def _forward_in_parts(
    head: HeadArguments, nll_weights: Tensor | None, rewards: FlowRewards
) -> Outputs:
    hidden, weight, bias, tokens, *_ = head
    value, log_pf, alive, slopes, plan, invalid = _empty_outputs(hidden, weight, bias, tokens, 0)
    invalid.zero_()
    for part, _, found in _parts(compiled("cuda"), head, nll_weights, rewards):
        value[part], log_pf[part], alive[part] = found[:3]
        invalid |= found[5]
    return value, log_pf, alive, slopes, plan.zero_(), invalid


def _empty_outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, saved: int
) -> Outputs:
    dtype = compute_dtype(hidden, weight, bias)
    return (
        tokens.new_empty(tokens.shape, dtype=dtype),
        tokens.new_empty(tokens.shape, dtype=dtype),
        tokens.new_empty(tokens.shape, dtype=torch.bool),
        tokens.new_empty(saved, dtype=torch.float32),
        tokens.new_empty(4 * tokens.numel() + 8),
        tokens.new_empty(1),
    )


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
    saved: int,
    nll_weights: Tensor | None,
    log_reward: Tensor,
    pool: Tensor | None,
    floor: float,
    root: Tensor,
) -> Outputs:
    return _empty_outputs(hidden, weight, bias, tokens, saved)


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
    nll_weights: Tensor | None,
    log_reward: Tensor,
    pool: Tensor | None,
    floor: float,
    root: Tensor,
    log_pf: Tensor,
    slopes: Tensor,
    plan: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    check_head(tree, weight.shape[0], "the rows of weight")
    head = (hidden, weight, bias, tokens, mask, tree, temperature)
    needs = (need_hidden, need_weight, need_bias)
    dtype = compute_dtype(hidden, weight, bias)
    name = backends.resolve("flow_kl", hidden.device, dtype)
    if name != "torch":
        namespace = compiled(name)
        if slopes.numel() == 0:
            rewards = FlowRewards(log_reward, pool, floor, root)
            return _backward_recomputed(namespace, grad, head, nll_weights, rewards, needs)
        return backward_compiled(namespace, grad, *head, log_pf, slopes, plan, *needs, False)[:3]
    inputs, found = reference_inputs(*head)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype)
    d_weight = weight.new_zeros(weight.shape, dtype=dtype)
    d_bias = weight.new_zeros(weight.shape[0], dtype=dtype)
    with without_autocast(hidden.device):
        for depth, level in enumerate(_levels(inputs, found, log_reward, pool, floor)):
            mass = (level.target > 0).any(-1)
            shape = (*tokens.shape[:-1], 1)
            w = _row_weights(inputs, mass.view(shape), nll_weights)[..., :1].reshape(-1, 1)
            picked = level.tokens == tokens[..., depth].reshape(-1, 1)
            policy = torch.where(level.member, (level.logits - level.log_sum[:, None]).exp(), 0.0)
            rise = (mass[:, None] + w) * policy - level.target - w * picked.to(dtype)
            # What left the tree or is forbidden, and what is masked, passes nothing on.
            active = (log_pf[..., depth] != -math.inf) & inputs.full_mask[..., depth]
            rise = rise * grad[..., depth].reshape(-1, 1) / temperature
            rise = torch.where(active.reshape(-1, 1) & level.member, rise, 0.0)
            d_hidden[..., depth, :] = (rise @ weight[level.tokens].to(dtype)).view_as(
                d_hidden[..., depth, :]
            )
            d_weight.index_add_(0, level.tokens, rise.T @ level.states)
            d_bias.index_add_(0, level.tokens, rise.sum(0))
    return (
        d_hidden.to(hidden.dtype) if need_hidden else hidden.new_empty(0),
        d_weight.to(weight.dtype) if need_weight else weight.new_empty(0),
        d_bias.to(bias.dtype) if need_bias and bias is not None else weight.new_empty(0),
    )


def _backward_recomputed(
    namespace: Any,
    grad: Tensor,
    head: HeadArguments,
    nll_weights: Tensor | None,
    rewards: FlowRewards,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients where the slopes were not kept: some prompts at a time, forward and backward."""
    hidden, weight, bias, *_ = head
    d_hidden = torch.empty_like(hidden) if needs[0] else hidden.new_empty(0)
    sums = [
        x.new_zeros(x.shape, dtype=torch.float32) if x is not None and need else weight.new_empty(0)
        for x, need in zip((weight, bias), needs[1:], strict=True)
    ]
    for part, own, made in _parts(namespace, head, nll_weights, rewards):
        _, log_pf, _, slopes, plan, _ = made
        found = backward_compiled(namespace, grad[part], *own, log_pf, slopes, plan, *needs, False)
        if needs[0]:
            d_hidden[part] = found[0]
        for total, one, need in zip(sums, found[1:3], needs[1:], strict=True):
            if need:
                total += one
    d_weight, d_bias = sums
    return d_hidden, d_weight.to(weight.dtype), d_bias if bias is None else d_bias.to(bias.dtype)


def _backward_fake(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
    nll_weights: Tensor | None,
    log_reward: Tensor,
    pool: Tensor | None,
    floor: float,
    root: Tensor,
    log_pf: Tensor,
    slopes: Tensor,
    plan: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    return empty_gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.temperature, ctx.floor = inputs[6], inputs[11]
    _, log_pf, alive, slopes, plan, invalid = output
    ctx.mark_non_differentiable(log_pf, alive, slopes, plan, invalid)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *inputs[8:11], inputs[12], log_pf, slopes, plan)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    others = [None] * (len(ctx.needs_input_grad) - 3)
    if grad is None:
        return None, None, None, *others
    need = ctx.needs_input_grad[:3]
    *head, nll_weights, log_reward, pool, root, log_pf, slopes, plan = ctx.saved_tensors
    flows = (nll_weights, log_reward, pool, ctx.floor, root)
    gradients = torch.ops.gflowgr.flow_kl_backward(
        grad, *head, ctx.temperature, *flows, log_pf, slopes, plan, *need
    )
    return *(g if n else None for g, n in zip(gradients, need, strict=True)), *others


backends.define_op(
    "flow_kl",
    _forward,
    _forward_fake,
    probes={
        "torch": backends.probe_torch,
        "cpp": backends.float32_only(backends.probe_cpp),
        "cuda": backends.float32_only(backends.probe_cuda),
    },
    setup_context=_setup_context,
    backward=_differentiate,
)
backends.define_op(
    "flow_kl_backward",
    _backward,
    _backward_fake,
    backward=transforms.refuse_second_order("flow_kl", "gflowgr.ops.flow_kl.reference"),
)
