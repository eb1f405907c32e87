"""``gflowgr::flow_loss``: TB, DB, SubTB(lambda) and VarGrad-TB from log-probabilities, in one pass.

The reference is :mod:`gflowgr.ops.flow_loss.reference`; the fast backends share
``csrc/flow_loss/flow_loss.h``. The public functions, with their checks, are in
:mod:`gflowgr.ops.flow_loss.losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gflowgr import backends
from gflowgr.ops import transforms
from gflowgr.ops.flow_loss.reference import FlowOptions, gradient_reference, loss_reference
from gflowgr.ops.precision import compute_dtype

Gradients = tuple[Tensor, Tensor, Tensor]


def flow_loss(
    flow: FlowOptions,
    log_pf: Tensor,
    log_reward: Tensor,
    balance: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Front door of ``torch.ops.gflowgr.flow_loss`` for checked arguments.

    Args:
        flow: which loss, and its options.
        log_pf: [B, N, L] log-probabilities, nats.
        log_reward: [B, N], nats, before shaping.
        balance: log_z [B] for "tb", log_flow [B, N, L] for "db" and "subtb", None for "vargrad".
        mask: [B, N, L] bool, a prefix of each row; None = all true.

    Returns:
        A scalar, or [B, N] for "none"; float64 if any input is, else float32.

    Second derivatives raise RuntimeError where a kernel runs. Forward-mode ones, and the transforms
    of ``torch.func``, are left to the reference. So is all on the backend ``torch``: autograd keeps
    the residuals for the backward pass, which the op would compute again.
    """
    dtype = compute_dtype(log_pf, log_reward, balance)
    if log_pf.dtype != dtype:  # tested first: a .to() that changes nothing costs 1 us
        log_pf = log_pf.to(dtype)
    if log_reward.dtype != dtype:
        log_reward = log_reward.to(dtype)
    if balance is not None and balance.dtype != dtype:
        balance = balance.to(dtype)
    if transforms.reference_only("flow_loss") or _runs_as_reference(log_pf):
        return loss_reference(log_pf, log_reward, balance, mask, flow)
    loss: Tensor = torch.ops.gflowgr.flow_loss.default(log_pf, log_reward, balance, mask, *flow)
    return loss


def _runs_as_reference(log_pf: Tensor) -> bool:
    # While torch.compile traces, the op stays in the graph: which backend runs is decided later.
    if torch.compiler.is_compiling():
        return False
    return backends.resolve("flow_loss", log_pf.device, log_pf.dtype) == "torch"


def _flow_loss(
    log_pf: Tensor,
    log_reward: Tensor,
    balance: Tensor | None,
    mask: Tensor | None,
    kind: str,
    lam: float,
    beta: float,
    floor: float | None,
    reduction: str,
    nll_weight: float,
    clip: float | None,
) -> Tensor:
    flow = FlowOptions(kind, lam, beta, floor, reduction, nll_weight, clip)
    name = backends.resolve("flow_loss", log_pf.device, log_pf.dtype)
    if name == "torch":
        return loss_reference(log_pf, log_reward, balance, mask, flow)
    loss: Tensor = getattr(torch.ops, f"gflowgr_{name}").flow_loss(
        *backends.contiguous(log_pf, log_reward, balance, mask), *flow
    )
    return loss


def _flow_loss_backward(
    grad: Tensor,
    log_pf: Tensor,
    log_reward: Tensor,
    balance: Tensor | None,
    mask: Tensor | None,
    kind: str,
    lam: float,
    beta: float,
    floor: float | None,
    reduction: str,
    nll_weight: float,
    clip: float | None,
    need_log_pf: bool,
    need_log_reward: bool,
    need_balance: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    flow = FlowOptions(kind, lam, beta, floor, reduction, nll_weight, clip)
    needs = (need_log_pf, need_log_reward, need_balance)
    name = backends.resolve("flow_loss", log_pf.device, log_pf.dtype)
    if name != "torch":
        gradients: Gradients = getattr(torch.ops, f"gflowgr_{name}").flow_loss_backward(
            *backends.contiguous(grad, log_pf, log_reward, balance, mask), *flow, *needs
        )
        return gradients
    found = gradient_reference(grad, log_pf, log_reward, balance, mask, flow)
    # The results of an op may share no memory with its inputs or one another.
    first, second, third = (
        g.clone(memory_format=torch.contiguous_format)
        if needed and g is not None
        else _none(log_pf)
        for g, needed in zip(found, needs, strict=True)
    )
    return first, second, third


def _none(like: Tensor) -> Tensor:
    """The empty tensor that stands for a gradient which is not needed."""
    return like.new_empty(0)


def _flow_loss_fake(
    log_pf: Tensor,
    log_reward: Tensor,
    balance: Tensor | None,
    mask: Tensor | None,
    kind: str,
    lam: float,
    beta: float,
    floor: float | None,
    reduction: str,
    nll_weight: float,
    clip: float | None,
) -> Tensor:
    return log_pf.new_empty(log_pf.shape[:2] if reduction == "none" else ())


def _flow_loss_backward_fake(
    grad: Tensor,
    log_pf: Tensor,
    log_reward: Tensor,
    balance: Tensor | None,
    mask: Tensor | None,
    kind: str,
    lam: float,
    beta: float,
    floor: float | None,
    reduction: str,
    nll_weight: float,
    clip: float | None,
    need_log_pf: bool,
    need_log_reward: bool,
    need_balance: bool,
) -> Gradients:
    return (
        log_pf.new_empty(log_pf.shape) if need_log_pf else _none(log_pf),
        log_reward.new_empty(log_reward.shape) if need_log_reward else _none(log_pf),
        balance.new_empty(balance.shape) if need_balance and balance is not None else _none(log_pf),
    )


class _FlowLoss(torch.autograd.Function):
    """Written out, since what ``torch.library.register_autograd`` makes costs 0.1 ms per call."""

    @staticmethod
    def forward(
        ctx: Any,
        log_pf: Tensor,
        log_reward: Tensor,
        balance: Tensor | None,
        mask: Tensor | None,
        flow: FlowOptions,
    ) -> Tensor:
        ctx.flow = flow
        ctx.save_for_backward(log_pf, log_reward, balance, mask)
        arguments = (log_pf, log_reward, balance, mask, *flow)
        loss: Tensor = _below_autograd("flow_loss", _flow_loss, arguments)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:3]
        arguments = (grad, *ctx.saved_tensors, *ctx.flow, *need)
        if torch.is_grad_enabled():  # so that a second derivative is refused
            gradients = torch.ops.gflowgr.flow_loss_backward.default(*arguments)
        else:
            gradients = _below_autograd("flow_loss_backward", _flow_loss_backward, arguments)
        first, second, third = (g if n else None for g, n in zip(gradients, need, strict=True))
        return first, second, third, None, None


class _FlowLossBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Gradients:
        gradients: Gradients = _below_autograd("flow_loss_backward", _flow_loss_backward, arguments)
        return gradients

    backward = staticmethod(
        transforms.refuse_second_order("flow_loss", "gflowgr.ops.flow_loss.reference")
    )


def _below_autograd(op: str, implementation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call an op without its autograd.

    Without dispatch modes, and with plain tensors only, it calls the implementation directly: each
    pass through the dispatcher and back into Python costs 10 us.
    """
    with torch._C._AutoDispatchBelowAutograd():
        if torch._C._len_torch_dispatch_stack() == 0 and all(map(_plain, arguments)):
            return implementation(*arguments)
        return getattr(torch.ops.gflowgr, op).default(*arguments)


def _plain(argument: object) -> bool:
    return not isinstance(argument, Tensor) or type(argument) in (Tensor, torch.nn.Parameter)


def _tracked(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _flow_loss_autograd(
    log_pf: Tensor,
    log_reward: Tensor,
    balance: Tensor | None,
    mask: Tensor | None,
    kind: str,
    lam: float,
    beta: float,
    floor: float | None,
    reduction: str,
    nll_weight: float,
    clip: float | None,
) -> Tensor:
    transforms.refuse_forward_mode("flow_loss")
    flow = FlowOptions(kind, lam, beta, floor, reduction, nll_weight, clip)
    loss: Tensor
    if _tracked(log_pf, log_reward, balance):
        loss = _FlowLoss.apply(log_pf, log_reward, balance, mask, flow)
    else:
        arguments = (log_pf, log_reward, balance, mask, *flow)
        loss = _below_autograd("flow_loss", _flow_loss, arguments)
    return loss


def _flow_loss_backward_autograd(
    grad: Tensor,
    log_pf: Tensor,
    log_reward: Tensor,
    balance: Tensor | None,
    *options: Any,
) -> Gradients:
    arguments = (grad, log_pf, log_reward, balance, *options)
    if _tracked(grad, log_pf, log_reward, balance):
        gradients: Gradients = _FlowLossBackward.apply(*arguments)
    else:
        gradients = _below_autograd("flow_loss_backward", _flow_loss_backward, arguments)
    return gradients


_PROBES = {
    "torch": backends.probe_torch,
    "cpp": backends.probe_cpp,
    "cuda": backends.probe_cuda,
}
backends.define_op(
    "flow_loss",
    _flow_loss,
    _flow_loss_fake,
    probes=_PROBES,
    autograd=_flow_loss_autograd,
)
backends.define_op(
    "flow_loss_backward",
    _flow_loss_backward,
    _flow_loss_backward_fake,
    autograd=_flow_loss_backward_autograd,
)
