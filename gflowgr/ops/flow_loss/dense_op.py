"""Registered op of the joint losses over the whole vocabulary, in three matrix products.

The gradient of a flow-matching loss with respect to each log-probability is known as soon as
the trajectories of a prompt are summed. So a block of rows that holds whole prompts forms the
gradients of its logits while it still has them: logits, gradient of the states and gradient of the
head are three products, where a separate backward pass takes a fourth for the logits. The gradients
are made in the forward pass, for an upstream gradient of 1, and scaled in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gflowgr import backends
from gflowgr.ops import transforms
from gflowgr.ops.logprobs import dense as head
from gflowgr.ops.logprobs import reference as definitions

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""loss [], log_pf [B, N, L], then gradients (empty where not needed) of hidden, weight, bias,
log_reward, target."""

_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, "
    "Tensor log_reward, Tensor? target, str kind, float lam, float beta, float? floor, "
    "str reduction, float sft_weight"
)
_NEEDS = (
    "bool need_hidden, bool need_weight, bool need_bias, bool need_log_reward, bool need_target"
)
_LIBRARY = torch.library.Library("gflowgr", "FRAGMENT")
_LIBRARY.define(
    f"head_flow_loss({_ARGUMENTS}, {_NEEDS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_NUMBER_OF_KIND = {
    "tb": 0,
    "db": 1,
    "subtb": 2,
    "vargrad": 3,
}  # FlowKind of csrc/flow_loss/flow_loss.h
_NUMBER_OF_REDUCTION = {"none": 0, "sum": 1, "mean": 2, "prompt": 3}  # FlowReduction


def _loss_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    log_reward: Tensor,
    target: Tensor | None,
    *rest: Any,
) -> Outputs:
    *options, need_hidden, need_weight, need_bias, need_log_reward, need_target = rest
    states, flat_targets = hidden.flatten(0, 2), targets.flatten()
    with torch.no_grad():
        flat, lse = definitions.dense_logprobs(states, weight, bias, flat_targets, temperature)
    log_pf = flat.view(targets.shape)
    arguments = (log_pf.to(log_reward.dtype), log_reward, target, targets >= 0, *options)
    loss = torch.ops.gflowgr.flow_loss(*arguments)
    slopes, d_log_reward, d_target = torch.ops.gflowgr.flow_loss_backward(
        torch.ones_like(loss), *arguments, True, need_log_reward, need_target
    )
    needs = (need_hidden, need_weight, need_bias)
    grad = slopes.flatten().to(flat.dtype)
    d_hidden, d_weight, d_bias = head.backward_definition(
        grad, states, weight, bias, flat_targets, flat, lse, temperature, *needs
    )
    if need_hidden:
        d_hidden = d_hidden.view(hidden.shape)
    return loss, arguments[0].clone(), d_hidden, d_weight, d_bias, d_log_reward, d_target


def _loss_cpp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    log_reward: Tensor,
    target: Tensor | None,
    kind: str,
    lam: float,
    beta: float,
    floor: float | None,
    reduction: str,
    sft_weight: float,
    *needs: bool,
) -> Outputs:
    loss, log_pf, d_hidden, d_weight, d_bias, d_log_reward, d_target = (
        torch.ops.gflowgr_cpp.head_flow_loss(
            hidden.contiguous(),
            weight.contiguous(),
            head.floats(bias),
            targets.contiguous(),
            temperature,
            log_reward.contiguous(),
            None if target is None else target.contiguous(),
            _NUMBER_OF_KIND[kind],
            lam,
            beta,
            floor,
            _NUMBER_OF_REDUCTION[reduction],
            sft_weight,
            *needs,
        )
    )
    if needs[0]:
        d_hidden = d_hidden.to(hidden.dtype).view(hidden.shape)
    if needs[4] and target is not None:
        d_target = d_target.view(target.shape)
    d_weight = d_weight.to(weight.dtype)
    d_bias = d_bias if bias is None else d_bias.to(bias.dtype)
    return loss, log_pf, d_hidden, d_weight, d_bias, d_log_reward, d_target


def _loss_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    log_reward: Tensor,
    target: Tensor | None,
    *rest: Any,
) -> Outputs:
    from gflowgr.kernels.logprobs_dense.calls import head_joint

    *options, need_hidden, need_weight, need_bias, need_log_reward, need_target = rest
    kind, lam, beta, floor, reduction, sft_weight = options
    prompts, branches, steps = targets.shape
    mask = targets >= 0
    valid = mask.any(-1)
    # The blocks are summed with what the whole batch divides by: no block knows it alone.
    counted = (valid if reduction == "mean" else valid.any(-1)).sum().clamp(min=1)
    flow_scale = 1.0 if reduction == "sum" else 1.0 / counted
    nll_scale = 1.0 if reduction == "sum" else 1.0 / valid.any(-1).sum().clamp(min=1)
    rewards = torch.zeros_like(log_reward)
    balances = None if target is None else torch.zeros_like(target)
    losses = log_reward.new_zeros(prompts)

    def upstream(first_row: int, log_pf: Tensor) -> Tensor:
        # The reductions have no Triton kernel: whatever is fastest serves this one.
        with backends.backend(None):
            return block_upstream(first_row, log_pf)

    def block_upstream(first_row: int, log_pf: Tensor) -> Tensor:
        begin = first_row // (branches * steps)
        part = slice(begin, begin + log_pf.shape[0] // (branches * steps))
        block = log_pf.view(-1, branches, steps)
        balance = None if target is None else target[part]
        arguments = (block, log_reward[part], balance, mask[part], kind, lam, beta, floor, "none")
        flow_part = torch.ops.gflowgr.flow_loss(*arguments, 0.0)
        grad = torch.ones_like(flow_part) * flow_scale
        slopes, d_reward, d_balance = torch.ops.gflowgr.flow_loss_backward(
            grad, *arguments, 0.0, True, need_log_reward, need_target and target is not None
        )
        slopes[:, 0] -= sft_weight * nll_scale * mask[part, 0]
        nll = -block[:, 0].masked_fill(~mask[part, 0], 0.0).sum(-1)
        losses[part] = flow_part.sum(-1) * flow_scale + sft_weight * nll_scale * nll
        if need_log_reward:
            rewards[part] = d_reward
        if balances is not None and need_target:
            balances[part] = d_balance
        return slopes.view(-1)

    log_pf, d_hidden, d_weight, d_bias = head_joint(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        temperature,
        branches * steps,
        upstream,
        need_hidden,
        need_weight,
        need_bias,
    )
    return (
        losses.sum(),
        log_pf.view(targets.shape),
        d_hidden.view(hidden.shape) if need_hidden else d_hidden,
        d_weight,
        d_bias,
        rewards,
        rewards if balances is None else balances,
    )


_RUN = {"torch": _loss_torch, "cpp": _loss_cpp, "triton": _loss_triton}


def _head_flow_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any
) -> Outputs:
    log_reward = rest[1]
    transforms.refuse_forward_mode("head_flow_loss")
    dtype = torch.promote_types(head.wide_dtype(hidden, weight, bias), log_reward.dtype)
    name = backends.resolve("head_flow_loss", hidden.device, dtype)
    with definitions.without_autocast(hidden.device):
        outputs = _RUN[name](hidden, weight, bias, targets, *rest)
    needs = rest[-5:]
    # An operator's outputs must not be one another: a tensor without elements for each.
    gradients = [x if n else x.new_zeros(0) for x, n in zip(outputs[2:], needs, strict=True)]
    return (*outputs[:2], *gradients)  # type: ignore[return-value]


def _head_flow_loss_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    log_reward: Tensor,
    target: Tensor | None,
    *rest: Any,
) -> Outputs:
    needs = rest[-5:]
    like = (hidden, weight, bias, log_reward, target)
    gradients = [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if n and x is not None
        else log_reward.new_empty(0, dtype=log_reward.dtype if x is None else x.dtype)
        for x, n in zip(like, needs, strict=True)
    ]
    loss = log_reward.new_empty(())
    log_pf = log_reward.new_empty(targets.shape)
    return (loss, log_pf, *gradients)  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    _, log_pf, *gradients = output
    ctx.mark_non_differentiable(log_pf, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)


class _Once(torch.autograd.Function):
    """The identity, whose derivative is refused."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.view_as(value)

    backward = staticmethod(head.refuse_second_order("head_flow_loss"))


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # create_graph=True
        with torch.no_grad():
            scaled = gradient * upstream.to(gradient.dtype)
        refused: Tensor = _Once.apply(scaled, torch.zeros((), requires_grad=True))
        return refused
    # The usual upstream gradient is 1; on the CPU that costs nothing to know, and saves a pass over
    # the gradient of the head and a copy of it.
    if upstream.device.type == "cpu" and type(upstream) is Tensor and upstream.item() == 1.0:
        return gradient
    return gradient * upstream.to(gradient.dtype)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 18
    needs = ctx.needs_input_grad
    positions = (0, 1, 2, 5, 6)  # hidden, weight, bias, log_reward, target
    result: list[Tensor | None] = [None] * 18
    for position, gradient in zip(positions, ctx.saved_tensors, strict=True):
        if needs[position]:
            result[position] = _scaled(gradient, grad)
    return tuple(result)


_LIBRARY.impl("head_flow_loss", _head_flow_loss, "CompositeExplicitAutograd")
torch.library.register_fake("gflowgr::head_flow_loss", _head_flow_loss_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "gflowgr::head_flow_loss", _differentiate, setup_context=_setup, lib=_LIBRARY
)
for _name, _probe in {
    "torch": backends.probe_torch,
    "cpp": head.probe_cpp,
    "triton": head.probe_triton,
}.items():
    backends.register("head_flow_loss", _name, _probe)


def head_flow_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    log_reward: Tensor,
    target: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """(loss [], log_pf [B, N, L] detached) of checked inputs.

    hidden [B, N, L, d], targets [B, N, L] int64 with -1 under a false mask; log_reward and target
    float32 (float64 where any floating input is); `options` are those of
    :func:`gflowgr.ops.flow_loss.op.flow_loss`, with a reduction other than "none".
    """
    recording = torch.is_grad_enabled()
    needs = [
        recording and x is not None and x.requires_grad
        for x in (hidden, weight, bias, log_reward, target)
    ]
    outputs: Outputs = torch.ops.gflowgr.head_flow_loss(
        hidden, weight, bias, targets, temperature, log_reward, target, *options, *needs
    )
    return outputs[0], outputs[1]
