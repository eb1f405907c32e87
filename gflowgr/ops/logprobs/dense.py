"""``gflowgr::dense_logprobs``: log-probabilities over the whole vocabulary, and their gradients.

Rows are flat here: ``hidden`` [T, d] with T = B N L, one int64 token per row. A negative one is
a masked row, never read and with zero results; the token V stands for one that is elsewhere
(in another shard of the vocabulary), with the logit 0; a larger one is no token, and all that is
made of its row is NaN. The reference is
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
from gflowgr.ops.logprobs import reference
from gflowgr.ops.precision import compute_dtype, without_autocast

Gradients = tuple[Tensor, Tensor, Tensor]

# ------------------------------------------------------------------ plain PyTorch


def _logprobs_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    jacobian: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        log_pf, lse = reference.dense_logprobs(hidden, weight, bias, tokens, temperature)
    slopes = log_pf.new_zeros((len(tokens) if jacobian else 0, hidden.shape[1]))
    if jacobian:
        # The gradient of the sum: each row's log-probability depends on its own state only.
        wide = hidden.to(log_pf.dtype)
        ones = torch.ones_like(log_pf)
        slopes, _, _ = backward_reference(
            ones, wide, weight, bias, tokens, log_pf, lse, temperature, True, False, False
        )
    return log_pf, lse, slopes


def backward_reference(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
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
    rows = (tokens >= 0).nonzero().squeeze(-1)
    states, head = hidden[rows].to(lse.dtype), weight.to(lse.dtype)
    step = max(reference.MIN_BLOCK_ROWS, reference.BLOCK_ELEMENTS // len(head))
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
        chosen = tokens[index]
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
    if reason is None and not torch.ops.gflowgr_cpp.dense_available():
        return "this torch or CPU has no small matrix products (oneDNN's)"
    return reason


probe_cpp = backends.float32_only(_probe_products)


def _logprobs_cpp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    jacobian: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.gflowgr_cpp.dense_logprobs(
        hidden, weight, None if bias is None else bias.float(), tokens, temperature, jacobian
    )
    return outputs


def _backward_cpp(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    log_pf: Tensor,
    lse: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    d_hidden, d_weight, d_bias = torch.ops.gflowgr_cpp.dense_backward(
        grad,
        hidden,
        weight,
        None if bias is None else bias.float(),
        tokens,
        log_pf,
        lse,
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


# ------------------------------------------------------------------ Triton


probe_triton = backends.float32_only(backends.probe_triton)


def _logprobs_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from gflowgr.kernels.logprobs_dense.calls import dense_logprobs

    outputs: tuple[Tensor, Tensor, Tensor] = dense_logprobs(*arguments)
    return outputs


def _backward_triton(*arguments: Any) -> Gradients:
    from gflowgr.kernels.logprobs_dense.calls import dense_backward

    outputs: Gradients = dense_backward(*arguments)
    return outputs


# ------------------------------------------------------------------ registration

_LOGPROBS = {"torch": _logprobs_torch, "cpp": _logprobs_cpp, "triton": _logprobs_triton}
_BACKWARD = {"torch": backward_reference, "cpp": _backward_cpp, "triton": _backward_triton}
PROBES = {"torch": backends.probe_torch, "cpp": probe_cpp, "triton": probe_triton}


def _dense_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    jacobian: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    transforms.refuse_forward_mode("dense_logprobs")
    name = backends.resolve("dense_logprobs", hidden.device, compute_dtype(hidden, weight, bias))
    inputs = backends.contiguous(hidden, weight, bias, tokens)
    with without_autocast(hidden.device):
        return _LOGPROBS[name](*inputs, temperature, jacobian)


def _dense_logprobs_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    jacobian: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden, weight, bias)
    rows = tokens.new_empty(tokens.shape, dtype=dtype)
    shape = (tokens.shape[0] if jacobian else 0, hidden.shape[1])
    return rows, torch.empty_like(rows), hidden.new_empty(shape, dtype=dtype)


def _dense_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    log_pf: Tensor,
    lse: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    name = backends.resolve("dense_logprobs", hidden.device, compute_dtype(hidden, weight, bias))
    inputs = backends.contiguous(grad, hidden, weight, bias, tokens, log_pf, lse)
    with without_autocast(hidden.device):
        return _BACKWARD[name](*inputs, temperature, need_hidden, need_weight, need_bias)


def _dense_backward_fake(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    log_pf: Tensor,
    lse: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    return (
        hidden.new_empty(hidden.shape) if need_hidden else lse.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else lse.new_empty(0),
        bias.new_empty(bias.shape) if need_bias and bias is not None else lse.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, tokens, ctx.temperature, ctx.jacobian = inputs
    log_pf, lse, slopes = output
    ctx.mark_non_differentiable(lse, slopes)
    ctx.set_materialize_grads(False)
    if ctx.jacobian:
        ctx.save_for_backward(tokens, slopes)
        ctx.dtype = hidden.dtype
    else:
        ctx.save_for_backward(hidden, weight, bias, tokens, log_pf, lse)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    d_hidden = d_weight = d_bias = None
    if grad is not None and ctx.jacobian:
        tokens, slopes = ctx.saved_tensors
        own = grad.masked_fill(tokens < 0, 0.0)
        d_hidden = (own[:, None] * slopes).to(ctx.dtype)
    elif grad is not None:
        hidden, weight, bias, tokens, log_pf, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        found = torch.ops.gflowgr.dense_backward(
            grad, hidden, weight, bias, tokens, log_pf, lse, ctx.temperature, *needs
        )
        d_hidden, d_weight, d_bias = (g if n else None for g, n in zip(found, needs, strict=True))
    return d_hidden, d_weight, d_bias, None, None, None  # tokens, temperature, jacobian


backends.define_op(
    "dense_logprobs",
    _dense_logprobs,
    _dense_logprobs_fake,
    probes=PROBES,
    setup_context=_setup,
    backward=_differentiate,
)
backends.define_op(
    "dense_backward",
    _dense_backward,
    _dense_backward_fake,
    backward=transforms.refuse_second_order("dense_logprobs", "gflowgr.ops.logprobs.reference"),
)


def dense_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log_pf, lse), each [T], of checked inputs; log_pf is differentiable, lse is not.

    Where only the states want a gradient (a frozen head), it is computed in the forward pass: one
    scalar per row scales it, so that two matrix products do in all.
    """
    head_learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    jacobian = torch.is_grad_enabled() and hidden.requires_grad and not head_learns
    log_pf, lse, _ = torch.ops.gflowgr.dense_logprobs(
        hidden, weight, bias, tokens, temperature, jacobian
    )
    return log_pf, lse
