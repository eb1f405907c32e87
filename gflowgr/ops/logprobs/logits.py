"""``gflowgr::logits_logprobs``: log-probabilities from logits that a trainer already holds.

One pass over the logits forward and one backward, in float32 whatever their dtype. The reference
is in this file; the C++ backend is ``csrc/logprobs_logits/logits_cpu.cpp``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gflowgr import backends
from gflowgr.ops import checks, transforms
from gflowgr.ops.logprobs.reference import BLOCK_ELEMENTS
from gflowgr.ops.precision import compute_dtype

Forward = tuple[Tensor, Tensor, Tensor]


def logprobs_from_logits(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> Tensor:
    """Log-probability of each token under the softmax of its logits.

    Args:
        logits: [B, N, L, V], any floating dtype; read in place where contiguous, else copied.
        tokens: [B, N, L] integers, 0..V-1 where the mask is true.
        mask: [B, N, L] bool, a prefix of each row; None = all true. Under a false mask logits may
            hold anything, the result is 0 and so is the gradient.
        temperature: the logits are divided by it, > 0.
        inplace_backward: write the gradient over the logits instead of into new memory. This
            DESTROYS the logits in the backward pass: ask for it only where nothing reads them
            later, neither your code (metrics, another loss, a tensor that shares their memory) nor
            autograd. Autograd detects it and raises where the operation that made the logits needs
            its result in its own backward pass, and on a second backward pass through this
            function; other reads cannot be detected. Under ``torch.compile`` and the transforms of
            ``torch.func`` it has no effect.

    Returns:
        [B, N, L], nats: float32, float64 for float64 logits. -inf for a token whose logit is.

    Extra memory: 12 bytes per row; the gradient, of the logits' size and dtype, unless in place.

    Errors: TypeError for a wrong type or dtype; ValueError for a wrong shape, device or range, a
    token outside the vocabulary, a mask that is not a prefix, and for ``inplace_backward`` with
    logits that are not contiguous, or are a leaf that requires a gradient (its values are yours).
    RuntimeError for second derivatives.
    """
    logits = checks.check_tensor("logits", logits, (None,) * 4, "BNLV", dtypes=checks.FLOAT_DTYPES)
    *batch, vocab_size = logits.shape
    tokens = checks.check_tensor(
        "tokens",
        tokens,
        batch,
        "BNL",
        dtypes=checks.INTEGER_DTYPES,
        device=logits.device,
        source="logits",
    )
    temperature = checks.check_number("temperature", temperature, above=0.0)
    if vocab_size == 0:
        raise ValueError(f"logits must have at least one column; got shape {list(logits.shape)}")
    if not isinstance(inplace_backward, bool):
        raise TypeError(f"inplace_backward must be a bool; got {inplace_backward!r}")
    if inplace_backward:
        _check_inplace(logits)
    data = checks.DataChecks()
    valid = checks.check_mask(mask, batch, logits.device, "logits", data)
    data.add(
        lambda: valid & ((tokens < 0) | (tokens >= vocab_size)),
        lambda i: (
            f"{checks.at('tokens', i)} = {tokens[i].item()} is outside the vocabulary: logits have "
            f"{vocab_size} columns, so tokens must be 0..{vocab_size - 1}"
        ),
    )
    data.run()
    tokens = checks.mark_tokens(
        tokens, None if mask is None else valid, vocab_size, looked_at=data.enabled
    )
    if transforms.reference_only("logits_logprobs"):
        return differentiable_reference(logits, tokens, temperature)
    log_pf: Tensor = torch.ops.gflowgr.logits_logprobs(
        logits.reshape(-1, vocab_size),
        tokens.reshape(-1),
        temperature,
        inplace_backward and not torch.compiler.is_compiling(),
    )[0]
    return log_pf.view(batch)


def _check_inplace(logits: Tensor) -> None:
    if not logits.is_contiguous():
        raise ValueError(
            "inplace_backward: logits must be contiguous to take their own gradient; got strides "
            f"{list(logits.stride())} for shape {list(logits.shape)}"
        )
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "inplace_backward: logits are a leaf that requires a gradient; the backward pass would "
            "destroy its values. Pass the result of an operation, or inplace_backward=False"
        )


# ------------------------------------------------------------------ reference


def _blocks(logits: Tensor, tokens: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows in the dtype of the arithmetic, masked rows zeroed: (rows, logits, mask)."""
    dtype = compute_dtype(logits)
    rows, vocab_size = logits.shape
    step = max(1, BLOCK_ELEMENTS // max(vocab_size, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        valid = tokens[part] >= 0
        yield part, logits[part].to(dtype).masked_fill(~valid[:, None], 0.0), valid


def forward_reference(logits: Tensor, tokens: Tensor, temperature: float) -> Forward:
    """log_pf, row_max and log_sum, each [T], of logits [T, V] and tokens [T].

    With x = (logits - row_max) / temperature, ``log_pf = x_target - log_sum`` and ``log_sum =
    log(sum(exp(x)))``. A negative token marks a masked row. With the token V the one meant is not
    among these logits: log_pf is minus the log-sum-exp. More than V is no token: log_pf is NaN.
    """
    dtype = compute_dtype(logits)
    log_pf, row_max, log_sum = (logits.new_zeros(logits.shape[0], dtype=dtype) for _ in range(3))
    lowest = torch.finfo(torch.float32).min
    for part, block, valid in _blocks(logits, tokens):
        top = block.amax(-1, keepdim=True).clamp(min=lowest)  # finite where all are -inf
        x = (block - top) / temperature
        sums = x.exp().sum(-1).log()
        here = tokens[part] < block.shape[-1]
        chosen = x.gather(1, tokens[part].clamp(0, block.shape[-1] - 1)[:, None]).squeeze(1)
        chosen = torch.where(here, chosen, -top.squeeze(1) / temperature)
        # Where every token is forbidden the difference would be NaN; the probability is zero.
        found = torch.where(sums == -torch.inf, -torch.inf, chosen - sums)
        found = found.masked_fill(tokens[part] > block.shape[-1], torch.nan)
        for result, values in ((log_pf, found), (row_max, top.squeeze(1)), (log_sum, sums)):
            result[part] = values.masked_fill(~valid, 0.0)
    return log_pf, row_max, log_sum


def backward_reference(
    out: Tensor,
    grad: Tensor,
    logits: Tensor,
    tokens: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    temperature: float,
) -> None:
    """Write the gradient of the logits to `out` [T, V], which may be the logits themselves."""
    for part, block, valid in _blocks(logits, tokens):
        none = tokens[part] > block.shape[-1]
        used = none | (valid & (log_sum[part] > -torch.inf) & (grad[part] != 0))
        x = (block - row_max[part][:, None]) / temperature - log_sum[part][:, None]
        slope = (grad[part] / temperature).masked_fill(~used, 0.0).masked_fill(none, torch.nan)
        slope = slope[:, None]
        gradient = -slope * x.exp()
        target = tokens[part][:, None].clamp(0, block.shape[-1] - 1)
        # 1 - p without cancellation.
        own = -slope * torch.expm1(x.gather(1, target))
        own = torch.where(tokens[part][:, None] < block.shape[-1], own, gradient.gather(1, target))
        gradient = gradient.scatter(1, target, own)
        out[part] = gradient.masked_fill(~used[:, None], 0.0).to(out.dtype)


def differentiable_reference(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log_pf of :func:`forward_reference`, [...] of logits [..., V], for any derivative."""
    valid = tokens >= 0
    wide = logits.to(compute_dtype(logits))
    scaled = wide.masked_fill(~valid[..., None], 0.0) / temperature
    sums = scaled.logsumexp(-1)
    last = logits.shape[-1] - 1
    chosen = scaled.gather(-1, tokens.clamp(0, last)[..., None]).squeeze(-1)
    chosen = chosen.masked_fill(tokens > last, torch.nan)
    log_pf = torch.where(sums == -torch.inf, -torch.inf, chosen - sums)
    return log_pf.masked_fill(~valid, 0.0)


# ------------------------------------------------------------------ the registered ops


def _backend(logits: Tensor) -> str:
    return backends.resolve("logits_logprobs", logits.device, logits.dtype)


def _logits_logprobs(
    logits: Tensor, tokens: Tensor, temperature: float, inplace_backward: bool
) -> Forward:
    transforms.refuse_forward_mode("logits_logprobs")
    if _backend(logits) == "torch":
        return forward_reference(logits, tokens, temperature)
    found: Forward = torch.ops.gflowgr_cpp.logits_logprobs(
        *backends.contiguous(logits, tokens), temperature
    )
    return found


def _logits_backward(
    grad: Tensor,
    logits: Tensor,
    tokens: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    temperature: float,
) -> Tensor:
    if _backend(logits) == "torch":
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        backward_reference(out, grad, logits, tokens, row_max, log_sum, temperature)
        return out
    inputs = backends.contiguous(grad, logits, tokens, row_max, log_sum)
    gradient: Tensor = torch.ops.gflowgr_cpp.logits_backward(*inputs, temperature)
    return gradient


def _logits_backward_inplace(
    grad: Tensor,
    logits: Tensor,
    tokens: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    temperature: float,
) -> None:
    if _backend(logits) == "torch":
        backward_reference(logits, grad, logits, tokens, row_max, log_sum, temperature)
    else:
        grad_here, *saved = backends.contiguous(grad, tokens, row_max, log_sum)
        torch.ops.gflowgr_cpp.logits_backward_(grad_here, logits, *saved, temperature)
        # Autograd does not see that the kernel writes to the logits.
        torch.autograd.graph.increment_version(logits)


def _logits_logprobs_fake(
    logits: Tensor, tokens: Tensor, temperature: float, inplace_backward: bool
) -> Forward:
    found = [logits.new_empty(logits.shape[0], dtype=compute_dtype(logits)) for _ in range(3)]
    return found[0], found[1], found[2]


def _logits_backward_fake(
    grad: Tensor,
    logits: Tensor,
    tokens: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    temperature: float,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    logits, tokens, ctx.temperature, ctx.inplace = inputs
    _, row_max, log_sum = output
    ctx.mark_non_differentiable(row_max, log_sum)
    ctx.save_for_backward(logits, tokens, row_max, log_sum)


def _differentiate(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    gradient = None
    if ctx.needs_input_grad[0]:
        logits, tokens, row_max, log_sum = ctx.saved_tensors
        saved = (tokens, row_max, log_sum, ctx.temperature)
        if ctx.inplace and not torch.is_grad_enabled():
            gradient = logits.detach()
            torch.ops.gflowgr.logits_backward_(grad, gradient, *saved)
        else:
            gradient = torch.ops.gflowgr.logits_backward(grad, logits, *saved)
    return gradient, None, None, None


backends.define_op(
    "logits_logprobs",
    _logits_logprobs,
    _logits_logprobs_fake,
    probes={
        "torch": backends.probe_torch,
        "cpp": backends.float32_only(backends.probe_cpp),
    },
    setup_context=_setup_context,
    backward=_differentiate,
)
backends.define_op(
    "logits_backward",
    _logits_backward,
    _logits_backward_fake,
    backward=transforms.refuse_second_order("logits_logprobs", "torch.log_softmax"),
)
backends.define_op(
    "logits_backward_",
    _logits_backward_inplace,
    lambda *_: None,
    mutates=("logits",),
)
