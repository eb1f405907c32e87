"""``gflowgr::dense_flow_loss``: loss and gradients over the whole vocabulary, in one pass.

The gradient of a flow-matching loss with respect to each log-probability is known as soon as
the trajectories of a prompt are summed. So a block of rows that holds whole prompts forms the
gradients of its logits while it still has them: logits, gradient of the states and gradient of the
head are three products, where a separate backward pass takes a fourth for the logits. The gradients
are made in the forward pass, for an upstream gradient of 1, and scaled in the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gflowgr import backends
from gflowgr.ops import transforms
from gflowgr.ops.flow_loss.reference import FlowOptions
from gflowgr.ops.inputs import HeadInputs
from gflowgr.ops.logprobs import dense, reference
from gflowgr.ops.precision import compute_dtype, without_autocast

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""loss [], log_pf [B, N, L], then gradients (empty where not needed) of hidden, weight, bias,
log_reward, balance."""

_NUMBER_OF_KIND = {
    "tb": 0,
    "db": 1,
    "subtb": 2,
    "vargrad": 3,
}  # FlowKind of csrc/flow_loss/flow_loss.h
_NUMBER_OF_REDUCTION = {"none": 0, "sum": 1, "mean": 2, "prompt": 3}  # FlowReduction


def dense_flow_loss(
    inputs: HeadInputs, log_reward: Tensor, balance: Tensor | None, flow: FlowOptions
) -> tuple[Tensor, Tensor]:
    """(loss [], log_pf [B, N, L] detached) of checked inputs; a reduction other than "none"."""
    dtype = compute_dtype(inputs.hidden, inputs.weight, inputs.bias, log_reward, balance)
    log_reward = log_reward.to(dtype)
    if balance is not None:
        balance = balance.to(dtype)
    recording = torch.is_grad_enabled()
    learning = (inputs.hidden, inputs.weight, inputs.bias, log_reward, balance)
    needs = [recording and x is not None and x.requires_grad for x in learning]
    outputs: Outputs = torch.ops.gflowgr.dense_flow_loss(
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        inputs.marked_tokens,
        inputs.temperature,
        log_reward,
        balance,
        *flow,
        *needs,
    )
    return outputs[0], outputs[1]


# ------------------------------------------------------------------ the backends


class _Call(NamedTuple):
    """The arguments of the op, contiguous."""

    hidden: Tensor  # [B, N, L, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    tokens: Tensor  # [B, N, L] int64, -1 under a false mask
    temperature: float
    log_reward: Tensor  # [B, N], float32; float64 where any floating input is
    balance: Tensor | None  # [B] or [B, N, L], of the same dtype
    flow: FlowOptions


class _Needs(NamedTuple):
    """Of which inputs the gradient is wanted."""

    hidden: bool
    weight: bool
    bias: bool
    log_reward: bool
    balance: bool


def _loss_torch(call: _Call, needs: _Needs) -> Outputs:
    states, flat_tokens = call.hidden.flatten(0, 2), call.tokens.flatten()
    head = (states, call.weight, call.bias, flat_tokens)
    with torch.no_grad():
        flat, lse = reference.dense_logprobs(*head, call.temperature)
    log_pf = flat.view(call.tokens.shape).to(call.log_reward.dtype)
    arguments = (log_pf, call.log_reward, call.balance, call.tokens >= 0, *call.flow)
    loss = torch.ops.gflowgr.flow_loss(*arguments)
    slopes, d_log_reward, d_balance = torch.ops.gflowgr.flow_loss_backward(
        torch.ones_like(loss), *arguments, True, needs.log_reward, needs.balance
    )
    d_hidden, d_weight, d_bias = dense.backward_reference(
        slopes.flatten().to(flat.dtype),
        *head,
        flat,
        lse,
        call.temperature,
        needs.hidden,
        needs.weight,
        needs.bias,
    )
    if needs.hidden:
        d_hidden = d_hidden.view(call.hidden.shape)
    return loss, log_pf.clone(), d_hidden, d_weight, d_bias, d_log_reward, d_balance


def _loss_cpp(call: _Call, needs: _Needs) -> Outputs:
    flow, hidden, balance = call.flow, call.hidden, call.balance
    loss, log_pf, d_hidden, d_weight, d_bias, d_log_reward, d_balance = (
        torch.ops.gflowgr_cpp.dense_flow_loss(
            hidden,
            call.weight,
            None if call.bias is None else call.bias.float(),
            call.tokens,
            call.temperature,
            call.log_reward,
            balance,
            _NUMBER_OF_KIND[flow.kind],
            flow.lam,
            flow.beta,
            flow.floor,
            _NUMBER_OF_REDUCTION[flow.reduction],
            flow.nll_weight,
            flow.clip,
            *needs,
        )
    )
    if needs.hidden:
        d_hidden = d_hidden.to(hidden.dtype).view(hidden.shape)
    if needs.balance and balance is not None:
        d_balance = d_balance.view(balance.shape)
    d_weight = d_weight.to(call.weight.dtype)
    d_bias = d_bias if call.bias is None else d_bias.to(call.bias.dtype)
    return loss, log_pf, d_hidden, d_weight, d_bias, d_log_reward, d_balance


class _Upstream:
    """The loss of the log-probabilities as they come, in one block or in several.

    Attributes:
        loss: [], once all blocks have come.
        rewards, balances: gradients of log_reward and balance, where they are needed.
    """

    def __init__(self, call: _Call, needs: _Needs) -> None:
        self._call, self._needs = call, needs
        self._mask = call.tokens >= 0
        self._wanted = (True, needs.log_reward, needs.balance and call.balance is not None)
        self.loss = self.rewards = self.balances = call.log_reward.new_zeros(())
        self._scales: tuple[Tensor | float, Tensor | float] | None = None

    def __call__(self, first_row: int, log_pf: Tensor) -> Tensor:
        # The reductions have no Triton kernel, so this op lets them use the fastest backend.
        with backends.backend(None):
            if log_pf.shape[0] == self._call.tokens.numel():
                return self._whole(log_pf)
            return self._part(first_row, log_pf)

    def _whole(self, log_pf: Tensor) -> Tensor:
        """All rows at once: the loss's own reduction, two launches."""
        call = self._call
        block = log_pf.view(call.tokens.shape)
        arguments = (block, call.log_reward, call.balance, self._mask, *call.flow)
        self.loss = torch.ops.gflowgr.flow_loss(*arguments)
        slopes, self.rewards, self.balances = torch.ops.gflowgr.flow_loss_backward(
            torch.ones_like(self.loss), *arguments, *self._wanted
        )
        return slopes.view(-1)

    def _part(self, first_row: int, log_pf: Tensor) -> Tensor:
        """Some prompts: summed with the divisor of the whole batch, which no block can compute."""
        call, needs, flow = self._call, self._needs, self._call.flow
        _, branches, steps = call.tokens.shape
        if self._scales is None:
            self._scales = self._divisors()
            self.rewards = torch.zeros_like(call.log_reward)
            self.balances = self.rewards if call.balance is None else torch.zeros_like(call.balance)
        flow_scale, nll_scale = self._scales
        begin = first_row // (branches * steps)
        part = slice(begin, begin + log_pf.shape[0] // (branches * steps))
        block, mask = log_pf.view(-1, branches, steps), self._mask[part]
        own_balance = None if call.balance is None else call.balance[part]
        in_blocks = flow._replace(reduction="none", nll_weight=0.0)
        arguments = (block, call.log_reward[part], own_balance, mask, *in_blocks)
        flow_part = torch.ops.gflowgr.flow_loss(*arguments)
        grad = torch.ones_like(flow_part) * flow_scale
        slopes, d_reward, d_balance = torch.ops.gflowgr.flow_loss_backward(
            grad, *arguments, *self._wanted
        )
        slopes[:, 0] -= flow.nll_weight * nll_scale * mask[:, 0]
        nll = -block[:, 0].masked_fill(~mask[:, 0], 0.0).sum(-1)
        summed = flow_part.sum(-1) * flow_scale + flow.nll_weight * nll_scale * nll
        self.loss = self.loss + summed.sum()
        if needs.log_reward:
            self.rewards[part] = d_reward
        if self._wanted[2]:
            self.balances[part] = d_balance
        return slopes.view(-1)

    def _divisors(self) -> tuple[Tensor | float, Tensor | float]:
        """What the flow loss and the supervised term are multiplied with."""
        reduction = self._call.flow.reduction
        if reduction == "sum":
            return 1.0, 1.0
        valid = self._mask.any(-1)
        prompts = 1.0 / valid.any(-1).sum().clamp(min=1)
        return 1.0 / valid.sum().clamp(min=1) if reduction == "mean" else prompts, prompts


def _loss_triton(call: _Call, needs: _Needs) -> Outputs:
    from gflowgr.kernels.logprobs_dense.calls import dense_fused

    upstream = _Upstream(call, needs)
    log_pf, d_hidden, d_weight, d_bias = dense_fused(
        call.hidden.flatten(0, 2),
        call.weight,
        call.bias,
        call.tokens.flatten(),
        call.temperature,
        call.tokens.shape[1] * call.tokens.shape[2],
        upstream,
        needs.hidden,
        needs.weight,
        needs.bias,
    )
    return (
        upstream.loss,
        log_pf.view(call.tokens.shape),
        d_hidden.view(call.hidden.shape) if needs.hidden else d_hidden,
        d_weight,
        d_bias,
        upstream.rewards,
        upstream.balances,
    )


_RUN = {"torch": _loss_torch, "cpp": _loss_cpp, "triton": _loss_triton}


# ------------------------------------------------------------------ the registered op


def _dense_flow_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    log_reward: Tensor,
    balance: Tensor | None,
    kind: str,
    lam: float,
    beta: float,
    floor: float | None,
    reduction: str,
    nll_weight: float,
    clip: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_log_reward: bool,
    need_balance: bool,
) -> Outputs:
    transforms.refuse_forward_mode("dense_flow_loss")
    call = _Call(
        hidden.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        tokens.contiguous(),
        temperature,
        log_reward.contiguous(),
        None if balance is None else balance.contiguous(),
        FlowOptions(kind, lam, beta, floor, reduction, nll_weight, clip),
    )
    needs = _Needs(need_hidden, need_weight, need_bias, need_log_reward, need_balance)
    dtype = compute_dtype(hidden, weight, bias, log_reward)
    name = backends.resolve("dense_flow_loss", hidden.device, dtype)
    with without_autocast(hidden.device):
        loss, log_pf, *gradients = _RUN[name](call, needs)
    # An operator's outputs must not be one another: a tensor without elements for each.
    first, second, third, fourth, fifth = (
        x if n else x.new_zeros(0) for x, n in zip(gradients, needs, strict=True)
    )
    return loss, log_pf, first, second, third, fourth, fifth


def _dense_flow_loss_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    log_reward: Tensor,
    balance: Tensor | None,
    kind: str,
    lam: float,
    beta: float,
    floor: float | None,
    reduction: str,
    nll_weight: float,
    clip: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_log_reward: bool,
    need_balance: bool,
) -> Outputs:
    def gradient(like: Tensor | None, needed: bool) -> Tensor:
        if like is None:
            return log_reward.new_empty(0)
        return like.new_empty(like.shape if needed else 0)

    return (
        log_reward.new_empty(()),
        log_reward.new_empty(tokens.shape),
        gradient(hidden, need_hidden),
        gradient(weight, need_weight),
        gradient(bias, need_bias),
        gradient(log_reward, need_log_reward),
        gradient(balance, need_balance),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    _, log_pf, *gradients = output
    ctx.mark_non_differentiable(log_pf, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.num_inputs = len(inputs)


class _Once(torch.autograd.Function):
    """The identity, whose derivative is refused."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.view_as(value)

    backward = staticmethod(
        transforms.refuse_second_order("dense_flow_loss", "gflowgr.ops.flow_loss.reference")
    )


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # create_graph=True
        with torch.no_grad():
            scaled = gradient * upstream.to(gradient.dtype)
        refused: Tensor = _Once.apply(scaled, torch.zeros((), requires_grad=True))
        return refused
    # The upstream gradient is usually 1. On the CPU testing for it needs no synchronisation, and
    # it saves a pass over the gradient of the head and a copy of it.
    if upstream.device.type == "cpu" and type(upstream) is Tensor and upstream.item() == 1.0:
        return gradient
    return gradient * upstream.to(gradient.dtype)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    result: list[Tensor | None] = [None] * ctx.num_inputs
    if grad is not None:
        hidden, weight, bias, log_reward, balance = ctx.saved_tensors
        # By their places among the op's arguments.
        gradients = {0: hidden, 1: weight, 2: bias, 5: log_reward, 6: balance}
        for place, gradient in gradients.items():
            if ctx.needs_input_grad[place]:
                result[place] = _scaled(gradient, grad)
    return tuple(result)


backends.define_op(
    "dense_flow_loss",
    _dense_flow_loss,
    _dense_flow_loss_fake,
    probes=dense.PROBES,
    setup_context=_setup,
    backward=_differentiate,
)
