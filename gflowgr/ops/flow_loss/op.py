"""``gflowgr::flow_loss``: TB, DB, SubTB(lambda) and VarGrad-TB from log-probabilities, in one pass.

The definition is :mod:`gflowgr.ops.flow_loss.reference`; the fast backends share
``csrc/flow_loss/flow_loss.h``. The public functions, with their checks, are in
:mod:`gflowgr.ops.flow_loss.losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from gflowgr import backends
from gflowgr.ops import transforms
from gflowgr.ops.flow_loss.reference import compute_dtype, gradient_definition, loss_definition

Gradients = tuple[Tensor, Tensor, Tensor]

FLOW_ARGUMENTS = (
    "Tensor log_pf, Tensor log_reward, Tensor? target, Tensor? mask, str kind, float lam, "
    "float beta, float? floor, str reduction, float sft_weight"
)


def flow_loss(
    kind: str,
    log_pf: Tensor,
    log_reward: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    *,
    lam: float = 1.0,
    beta: float = 1.0,
    floor: float | None = None,
    reduction: str = "prompt",
    sft_weight: float = 0.0,
) -> Tensor:
    """Front door of ``torch.ops.gflowgr.flow_loss`` for checked arguments.

    Args:
        kind: "tb", "db", "subtb" or "vargrad".
        log_pf: [B, N, L] log-probabilities, nats.
        log_reward: [B, N], nats, before shaping.
        target: log_z [B] for "tb", log_flow [B, N, L] for "db" and "subtb", None for "vargrad".
        mask: [B, N, L] bool, a prefix of each row; None = all true.
        lam: lambda of "subtb", > 0.
        beta, floor, reduction: as in :func:`gflowgr.tb_loss`.
        sft_weight: weight of the NLL of trajectory 0, reduced over prompts; 0 = without.

    Returns:
        A scalar, or [B, N] for "none"; float64 if any input is, else float32.

    Second derivatives raise RuntimeError. Forward-mode ones, and the transforms of ``torch.func``,
    are left to the definition.
    """
    floating = [log_pf, log_reward] if target is None else [log_pf, log_reward, target]
    dtype = compute_dtype(*floating)
    tensors = [
        t if t is None or t.dtype == dtype else t.to(dtype) for t in (log_pf, log_reward, target)
    ]
    if transforms.definition_only("flow_loss"):
        wide = None if target is None else target.to(dtype)
        options = (kind, lam, beta, floor, reduction, sft_weight)
        return loss_definition(log_pf.to(dtype), log_reward.to(dtype), wide, mask, *options)
    loss: Tensor = torch.ops.gflowgr.flow_loss.default(
        *tensors,
        mask,
        kind,
        lam,
        beta,
        floor,
        reduction,
        sft_weight,
    )
    return loss


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _flow_loss(
    log_pf: Tensor, log_reward: Tensor, target: Tensor | None, mask: Tensor | None, *options: Any
) -> Tensor:
    name = backends.resolve("flow_loss", log_pf.device, log_pf.dtype)
    if name == "torch":
        return loss_definition(log_pf, log_reward, target, mask, *options)
    tensors = _contiguous(log_pf, log_reward, target, mask)
    loss: Tensor = getattr(torch.ops, f"gflowgr_{name}").flow_loss(*tensors, *options)
    return loss


def _flow_loss_backward(
    grad: Tensor,
    log_pf: Tensor,
    log_reward: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    *options: Any,
) -> Gradients:
    name = backends.resolve("flow_loss", log_pf.device, log_pf.dtype)
    tensors = _contiguous(grad, log_pf, log_reward, target, mask)
    if name != "torch":
        gradients: Gradients = getattr(torch.ops, f"gflowgr_{name}").flow_loss_backward(
            *tensors, *options
        )
        return gradients
    found = gradient_definition(grad, log_pf, log_reward, target, mask, *options[:-3])
    first, second, third = (
        g.clone(memory_format=torch.contiguous_format)
        if needed and g is not None
        else _none(log_pf)
        for g, needed in zip(found, options[-3:], strict=True)
    )
    return first, second, third


def _copy(gradient: Tensor) -> Tensor:
    """The results of an op may share no memory with its inputs or one another."""
    return gradient.clone(memory_format=torch.contiguous_format)


def _none(like: Tensor) -> Tensor:
    """What stands for a gradient that nobody asked for."""
    return like.new_empty(0)


def _flow_loss_fake(
    log_pf: Tensor, log_reward: Tensor, target: Tensor | None, mask: Tensor | None, *options: Any
) -> Tensor:
    reduction = options[4]
    return log_pf.new_empty(log_pf.shape[:2] if reduction == "none" else ())


def _flow_loss_backward_fake(
    grad: Tensor,
    log_pf: Tensor,
    log_reward: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    *options: Any,
) -> Gradients:
    need_log_pf, need_log_reward, need_target = options[-3:]
    return (
        log_pf.new_empty(log_pf.shape) if need_log_pf else _none(log_pf),
        log_reward.new_empty(log_reward.shape) if need_log_reward else _none(log_pf),
        target.new_empty(target.shape) if need_target and target is not None else _none(log_pf),
    )


class _FlowLoss(torch.autograd.Function):
    """Written out, since what ``torch.library.register_autograd`` makes costs 0.1 ms per call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.options = arguments
        ctx.save_for_backward(*tensors)
        loss: Tensor = _below_autograd("flow_loss", _flow_loss, (*tensors, *ctx.options))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:3]
        arguments = (grad, *ctx.saved_tensors, *ctx.options, *need)
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

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            "gflowgr::flow_loss has no second derivative: its gradients cannot be differentiated; "
            "use the definition in gflowgr.ops.flow_loss.reference for that"
        )


def _below_autograd(op: str, implementation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call an op without its autograd.

    Where nothing watches the dispatcher, and nothing but plain tensors is given, its implementation
    is called itself: each way through the dispatcher and back into Python costs 10 us.
    """
    with torch._C._AutoDispatchBelowAutograd():
        if torch._C._len_torch_dispatch_stack() == 0 and all(map(_plain, arguments)):
            return implementation(*arguments)
        return getattr(torch.ops.gflowgr, op).default(*arguments)


def _plain(argument: object) -> bool:
    return not isinstance(argument, Tensor) or type(argument) in (Tensor, torch.nn.Parameter)


def _tracked(tensors: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _flow_loss_autograd(*arguments: Any) -> Tensor:
    transforms.refuse_forward_mode("flow_loss")
    if _tracked(arguments[:3]):
        loss: Tensor = _FlowLoss.apply(*arguments[:4], arguments[4:])
    else:
        loss = _below_autograd("flow_loss", _flow_loss, arguments)
    return loss


def _flow_loss_backward_autograd(*arguments: Any) -> Gradients:
    if _tracked(arguments[:4]):
        gradients: Gradients = _FlowLossBackward.apply(*arguments)
    else:
        gradients = _below_autograd("flow_loss_backward", _flow_loss_backward, arguments)
    return gradients


_library = torch.library.Library("gflowgr", "FRAGMENT")
_library.define(f"flow_loss({FLOW_ARGUMENTS}) -> Tensor")
_library.define(
    f"flow_loss_backward(Tensor grad, {FLOW_ARGUMENTS}, bool need_log_pf, bool need_log_reward, "
    "bool need_target) -> (Tensor, Tensor, Tensor)"
)
_library.impl("flow_loss", _flow_loss, "CompositeExplicitAutograd")
_library.impl("flow_loss_backward", _flow_loss_backward, "CompositeExplicitAutograd")
torch.library.register_fake("gflowgr::flow_loss", _flow_loss_fake, lib=_library)
torch.library.register_fake("gflowgr::flow_loss_backward", _flow_loss_backward_fake, lib=_library)
_library.impl("flow_loss", _flow_loss_autograd, "Autograd")
_library.impl("flow_loss_backward", _flow_loss_backward_autograd, "Autograd")

for _name, _probe in (
    ("torch", backends.probe_torch),
    ("cpp", backends.probe_cpp),
    ("cuda", backends.probe_cuda),
):
    backends.register("flow_loss", _name, _probe)
