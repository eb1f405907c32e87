"""Registered ops of the dense head: log-probabilities over the whole vocabulary, and joint losses.

Rows are flat here: ``hidden`` [T, d] with T = B N L, one int64 target per row. A negative target is
a masked row, never read and with zero results; the target V stands for a token that is elsewhere
(in another shard of the vocabulary), with the logit 0; a larger one is no token, and all that is
made of its row is NaN. The definition is
:func:`gflowgr.ops.logprobs.reference.dense_logprobs`; the fast backends are
``csrc/logprobs_dense`` and ``kernels/logprobs_dense``.

Derivatives of the gradients are refused: the ops are differentiable once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gflowgr import backends
from gflowgr.ops import transforms
from gflowgr.ops.logprobs import reference as definitions

Gradients = tuple[Tensor, Tensor, Tensor]

_LIBRARY = torch.library.Library("gflowgr", "FRAGMENT")
_LIBRARY.define(
    "head_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, "
    "bool jacobian) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "head_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    "Tensor log_pf, Tensor lse, float temperature, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)"
)


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, float32 otherwise."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def wide_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """What the backends are chosen by: the widest floating dtype of a head's inputs."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return dtype if bias is None else torch.promote_types(dtype, bias.dtype)


# ------------------------------------------------------------------ plain PyTorch


def _logprobs_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    jacobian: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        log_pf, lse = definitions.dense_logprobs(hidden, weight, bias, targets, temperature)
    slopes = log_pf.new_zeros((len(targets) if jacobian else 0, hidden.shape[1]))
    if jacobian:
        # The gradient of the sum: each row's log-probability depends on its own state only.
        wide = hidden.to(log_pf.dtype)
        ones = torch.ones_like(log_pf)
        slopes, _, _ = backward_definition(
            ones, wide, weight, bias, targets, log_pf, lse, temperature, True, False, False
        )
    return log_pf, lse, slopes


def backward_definition(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_pf: Tensor,
    lse: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    """Gradients of ``(grad * log_pf).sum()``, in closed form: an op runs below autograd."""
    # p = exp(logit - lse) with the lse given, which may be that of a larger vocabulary: so only the
    # chosen logit and the given lse enter, not the log-sum-exp of these logits.
    rows = (targets >= 0).nonzero().squeeze(-1)
    states, head = hidden[rows].to(lse.dtype), weight.to(lse.dtype)
    step = max(definitions.MIN_BLOCK_ROWS, definitions.BLOCK_ELEMENTS // len(head))
    d_states = torch.zeros_like(states) if need_hidden else None
    d_head = torch.zeros_like(head) if need_weight else None
    d_bias = torch.zeros_like(head[:, 0]) if need_bias else None
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        index = rows[part]
        logits = states[part] @ head.T
        if bias is not None:
            logits = logits + bias.to(lse.dtype)
        slopes = -torch.exp(logits / temperature - lse[index, None])
        chosen = targets[index]
        here = (chosen < len(head)).nonzero().squeeze(-1)
        slopes[here, chosen[here]] = -torch.expm1(log_pf[index[here]])  # 1 - p
        upstream = grad[index].masked_fill(chosen > len(head), torch.nan)
        slopes = slopes * (upstream[:, None] / temperature)
        if d_states is not None:
            d_states[part] = slopes @ head
        if d_head is not None:
            d_head.addmm_(slopes.T, states[part])
        if d_bias is not None:
            d_bias += slopes.sum(0)
    d_hidden = lse.new_zeros(0)
    if d_states is not None:
        d_hidden = hidden.new_zeros(hidden.shape).index_copy(0, rows, d_states.to(hidden.dtype))
    return (
        d_hidden,
        lse.new_zeros(0) if d_head is None else d_head.to(weight.dtype),
        lse.new_zeros(0) if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


# ------------------------------------------------------------------ C++


def _probe_products(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = backends.probe_cpp(device, dtype)
    if reason is None and not torch.ops.gflowgr_cpp.head_available():
        return "this torch or CPU has no small matrix products (oneDNN's)"
    return reason


probe_cpp = backends.float32_only(_probe_products)


def _logprobs_cpp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    jacobian: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.gflowgr_cpp.head_logprobs(
        *(hidden.contiguous(), weight.contiguous(), floats(bias), targets.contiguous()),
        *(temperature, jacobian),
    )
    return outputs


def _backward_cpp(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_pf: Tensor,
    lse: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    d_hidden, d_weight, d_bias = torch.ops.gflowgr_cpp.head_backward(
        grad.contiguous(),
        hidden.contiguous(),
        weight.contiguous(),
        floats(bias),
        targets.contiguous(),
        log_pf.contiguous(),
        lse.contiguous(),
        temperature,
        need_hidden,
        need_weight,
        need_bias,
    )
    return (
        d_hidden.to(hidden.dtype),
        d_weight.to(weight.dtype),
        d_bias if bias is None else d_bias.to(bias.dtype),
    )


def floats(tensor: Tensor | None) -> Tensor | None:
    """A float32, contiguous copy where it is not that already."""
    return None if tensor is None else tensor.float().contiguous()


# ------------------------------------------------------------------ Triton


probe_triton = backends.float32_only(backends.probe_triton)


def _logprobs_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from gflowgr.kernels.logprobs_dense.calls import head_logprobs

    outputs: tuple[Tensor, Tensor, Tensor] = head_logprobs(*arguments)
    return outputs


def _backward_triton(*arguments: Any) -> Gradients:
    from gflowgr.kernels.logprobs_dense.calls import head_backward

    outputs: Gradients = head_backward(*arguments)
    return outputs


# ------------------------------------------------------------------ registration

_LOGPROBS = {"torch": _logprobs_torch, "cpp": _logprobs_cpp, "triton": _logprobs_triton}
_BACKWARD = {"torch": backward_definition, "cpp": _backward_cpp, "triton": _backward_triton}
_PROBES = {"torch": backends.probe_torch, "cpp": probe_cpp, "triton": probe_triton}


def _head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    jacobian: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    transforms.refuse_forward_mode("head_logprobs")
    name = backends.resolve("head_logprobs", hidden.device, wide_dtype(hidden, weight, bias))
    with definitions.without_autocast(hidden.device):
        return _LOGPROBS[name](hidden, weight, bias, targets, temperature, jacobian)


def _head_logprobs_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    jacobian: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = result_dtype(hidden, weight, bias)
    rows = targets.new_empty(targets.shape, dtype=dtype)
    shape = (targets.shape[0] if jacobian else 0, hidden.shape[1])
    return rows, torch.empty_like(rows), hidden.new_empty(shape, dtype=dtype)


def _head_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Gradients:
    name = backends.resolve("head_logprobs", hidden.device, wide_dtype(hidden, weight, bias))
    with definitions.without_autocast(hidden.device):
        return _BACKWARD[name](grad, hidden, weight, bias, *rest)


def _head_backward_fake(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_pf: Tensor,
    lse: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    return (
        torch.empty_like(hidden).contiguous() if need_hidden else lse.new_empty(0),
        torch.empty_like(weight).contiguous() if need_weight else lse.new_empty(0),
        torch.empty_like(bias).contiguous() if need_bias and bias is not None else lse.new_empty(0),
    )


def refuse_second_order(op: str) -> Any:
    """The autograd formula of a backward op: an error that says what is not possible."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"gflowgr::{op} has no second derivative: it was reached by a backward pass through a "
            "backward pass (create_graph=True). Use gflowgr.ops.logprobs.reference for that."
        )

    return backward


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, targets, ctx.temperature, ctx.jacobian = inputs
    log_pf, lse, slopes = output
    ctx.mark_non_differentiable(lse, slopes)
    ctx.set_materialize_grads(False)
    if ctx.jacobian:
        ctx.save_for_backward(targets, slopes)
        ctx.dtype = hidden.dtype
    else:
        ctx.save_for_backward(hidden, weight, bias, targets, log_pf, lse)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    if ctx.jacobian:
        targets, slopes = ctx.saved_tensors
        own = grad.masked_fill(targets < 0, 0.0)
        return ((own[:, None] * slopes).to(ctx.dtype), *(None,) * 5)
    hidden, weight, bias, targets, log_pf, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad
    d_hidden, d_weight, d_bias = torch.ops.gflowgr.head_backward(
        grad, hidden, weight, bias, targets, log_pf, lse, ctx.temperature, *needs[:3]
    )
    gradients = (d_hidden, d_weight, d_bias)
    return (*(g if n else None for g, n in zip(gradients, needs, strict=False)), None, None, None)


_LIBRARY.impl("head_logprobs", _head_logprobs, "CompositeExplicitAutograd")
_LIBRARY.impl("head_backward", _head_backward, "CompositeExplicitAutograd")
torch.library.register_fake("gflowgr::head_logprobs", _head_logprobs_fake, lib=_LIBRARY)
torch.library.register_fake("gflowgr::head_backward", _head_backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "gflowgr::head_logprobs", _differentiate, setup_context=_setup, lib=_LIBRARY
)
torch.library.register_autograd(
    "gflowgr::head_backward", refuse_second_order("head_backward"), lib=_LIBRARY
)
for _name, _probe in _PROBES.items():
    backends.register("head_logprobs", _name, _probe)


def head_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log_pf, lse), each [T], of checked inputs; log_pf is differentiable, lse is not.

    Where only the states want a gradient (a frozen head), it is computed in the forward pass: one
    scalar per row scales it, so that two matrix products do in all.
    """
    head_learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    jacobian = torch.is_grad_enabled() and hidden.requires_grad and not head_learns
    log_pf, lse, _ = torch.ops.gflowgr.head_logprobs(
        hidden, weight, bias, targets, temperature, jacobian
    )
    return log_pf, lse
