"""The dense head on a GPU: log-probabilities, gradients, and both in three matrix products.

Triton forms the logits tile by tile and reduces or scores them where they are; the products of the
backward pass are plain ones (cuBLAS), over blocks of d loss / d logits. No call
synchronises with the host or uses atomics: each can be captured in a CUDA graph, and repeats its
bits.

**Three products.** ``dense_fused`` and the Jacobian need the softmax of a block of rows before its
normaliser is known. Rescaling the block in place afterwards would read and write it once more
(4 bytes per logit: at d = 512 as long as a product). Instead the scores are exp(x - r) with a
reference r per row, the maximum of 128 logits sampled from all over the vocabulary plus some
headroom. Then d loss / d logits = diag(f) . scores with a factor f per row, which goes to the
[R, d] sides of the two products: d hidden = f * (scores . W), d W = scores^T . (f * hidden). 8
exponent bits hold any score within 60 nats of the reference to full relative precision. A row
further off is seen by its sum; then (a flag on the device) the block is scored again, from the true
maximum of such rows.

**Speed of light** on an H100 SXM (data sheet: 989 TFLOP/s in 16 bit, 3.35 TB/s, 132 SMs; 3.7e12
exponentials/s at 16 per clock and SM). A prediction, not a measurement. With T rows, V columns, d:

- ``dense_logprobs``: 2 T V d FLOP, T V exponentials, and from memory little more than the inputs:
  bound by the product for d > 134 (d 512, V 33024, T 65536: 2.2 ms), below by the exponentials.
- ``dense_fused``: 6 T V d FLOP and 6 T V bytes (the scores stored once, read twice): bound by the
  products for d > 300 (6.7 ms), below by memory, unless the block (T V 2 bytes) fits the L2 cache.
  Per block after the first 8 V d bytes for the sum of the weight gradient: with R rows to a block
  that is 1200 / R of one product's time.
- ``dense_backward``: 6 T V d FLOP, a third of them the logits again, and 6 T V bytes. It goes by
  rows, summing d W, or by slices of the vocabulary, summing d hidden: whichever is less to sum.

In practice the Triton product decides: without bulk tensor copies it is expected at 60-70% of the
peak on Hopper, cuBLAS at 70-80%.

**dtypes.** Products of float16 and bfloat16 are summed in float32. Scores are bfloat16 for both
(float16 ends at e^-16), so for float16 the backward products run on bfloat16 copies. float32 is
multiplied in float32, or in TF32 where torch's own products may. Mixed dtypes become float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gflowgr.kernels.launching import on_device
from gflowgr.kernels.logprobs_dense import launch

Upstream = Callable[[int, Tensor], Tensor]


@on_device
def dense_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    jacobian: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets under softmax((hidden . weight^T + bias) / temperature).

    Args:
        hidden: [T, d] float32, float16 or bfloat16; may be NaN in masked rows.
        weight: [V, d], V >= 1.
        bias: [V] or None; -inf forbids.
        targets: [T] int64: negative = masked; V = a column of another shard; more = no token, NaN.
        temperature: > 0.
        jacobian: whether to form d log_pf / d hidden.

    Returns:
        (log_pf [T], lse [T], jacobian [T, d] or [0]), float32, 0 in masked rows. log_pf is in nats,
        and -lse where the target is a column of another shard.

    Memory besides inputs and outputs, in bytes: 2^26 of statistics (or, if that is more, 8 of them
    per tile of 64 columns or more and each of 256 rows). With the Jacobian: as for `dense_fused`.
    """
    head = launch.prepare(hidden, weight, bias, targets, temperature)
    count, width = head.hidden.shape
    log_pf, lse = (torch.empty(count, device=hidden.device) for _ in range(2))
    if not jacobian:
        launch.log_sums(head, lse, log_pf)
        return log_pf, lse, hidden.new_empty(0, dtype=torch.float32)
    derivative = torch.empty((count, width), device=hidden.device)
    blocks = launch.row_blocks(head, 1, sums_weight=False)
    scores = head.new_block(blocks.size, head.weight.shape[0])
    weight = head.weight.to(head.block_dtype)
    for first, last in blocks:
        part, own = head.rows(first, last), scores[: last - first]
        totals = launch.score(part, own, lse[first:last], log_pf[first:last])
        factors, _ = launch.factors(part, own, totals, log_pf[first:last], None, False)
        launch.row_product(own, weight, factors, derivative[first:last])
    return log_pf, lse, derivative


@on_device
def dense_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(grad * log_pf), given log_pf and lse [T] (of all shards together).

    d logits[t, v] = grad[t] / temperature * (1[v is the target] - exp(x[t, v] - lse[t])), formed in
    blocks of rows or of columns, whichever leaves less to sum up; see the module's docstring.

    Returns:
        (d_hidden [T, d], d_weight [V, d], d_bias [V]) in the dtypes of the inputs, each [0] where
        it is not needed; exactly 0 in masked rows.

    Memory besides inputs and outputs, in bytes, s = 2 (float32: 4) per number: a block of about
    max(M, 4 V d if need_weight), M as of `launch.block_bytes`, at least 256 rows of V;
    its states, (s + 4) d per row; if there
    are several blocks, 4 V d or (by slices) 4 T d for the sum. float16: a bfloat16 copy of
    `weight`.
    """
    head = launch.prepare(hidden, weight, bias, targets, temperature)
    grad, log_pf, lse = (v.float().contiguous() for v in (grad, log_pf, lse))
    count, size = head.hidden.shape[0], head.weight.shape[0]
    d_hidden, d_weight, d_bias = _outputs(hidden, weight, bias, need_hidden, need_weight, need_bias)
    if count == 0 or not (need_hidden or need_weight or need_bias):
        return d_hidden.zero_(), d_weight.zero_(), d_bias.zero_()
    by_rows = launch.row_blocks(head, 1, sums_weight=need_weight)
    by_columns = launch.column_blocks(head, sums_weight=need_weight)
    left_by_rows = (len(by_rows) - 1) * size * need_weight
    if by_columns is not None and (len(by_columns) - 1) * count * need_hidden < left_by_rows:
        block = head.new_block(count, by_columns.size)
        states = head.states()
        total = launch.Sum(d_hidden, len(by_columns))
        for first, last in by_columns:
            part, out = head.columns(first, last), block[:, : last - first]
            launch.gradient(part, out, lse, log_pf, grad)
            if need_weight:
                launch.product(out.t(), states, d_weight[first:last])
            if need_bias:
                d_bias[first:last] = launch.column_sums(out, None)
            if need_hidden:
                total.add(out, part.weight.to(head.block_dtype))
        total.finish()
    else:
        block = head.new_block(by_rows.size, size)
        low_weight = head.weight.to(head.block_dtype) if need_hidden else None
        total = launch.Sum(d_weight, len(by_rows))
        bias_sum = torch.zeros(size if need_bias else 0, device=hidden.device)
        for first, last in by_rows:
            part, out = head.rows(first, last), block[: last - first]
            launch.gradient(part, out, lse[first:last], log_pf[first:last], grad[first:last])
            if low_weight is not None:
                launch.row_product(out, low_weight, None, d_hidden[first:last])
            if need_weight:
                total.add(out.t(), part.states())
            if need_bias:
                bias_sum += launch.column_sums(out, None)
        total.finish()
        d_bias.copy_(bias_sum)
    return d_hidden, d_weight, d_bias


@on_device
def dense_fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    rows_per_prompt: int,
    upstream: Upstream,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities and gradients together, in one pass over blocks of whole prompts.

    Args:
        hidden, weight, bias, targets, temperature: as for `dense_logprobs`; T is a multiple of
            ``rows_per_prompt``, and no target is V (the normaliser must be known here).
        rows_per_prompt: rows that one prompt has, next to each other: N * L.
        upstream: ``upstream(first_row, log_pf [R])`` returns the gradient [R] of the loss with
            respect to log_pf of the rows from ``first_row`` on; called once per block, in order,
            without autograd. What it returns for masked rows is ignored.
        need_hidden, need_weight, need_bias: which gradients; a product is saved for each of the
            first two that is not needed. With none, `upstream` is called once for all rows.

    Returns:
        (log_pf [T] float32, d_hidden [T, d], d_weight [V, d], d_bias [V]); gradients in the dtypes
        of the inputs, [0] where not needed, exactly 0 in masked rows.

    Memory besides inputs and outputs, in bytes, s = 2 (float32: 4): scores of s R V, where
    R = max(256, max(M, 4 V d if need_weight) / (s V)) in whole prompts, M as of
    `launch.block_bytes`; statistics of 8 R per
    tile of 128 columns (s R V / 32 for 16 bit); states of (s + 4) R d; 4 V d for the sum of the
    weight gradient if T > R. float16: a bfloat16 copy of `weight`, and 4 V d also if T <= R.
    """
    head = launch.prepare(hidden, weight, bias, targets, temperature)
    count, size = head.hidden.shape[0], head.weight.shape[0]
    log_pf, lse = (torch.empty(count, device=hidden.device) for _ in range(2))
    d_hidden, d_weight, d_bias = _outputs(hidden, weight, bias, need_hidden, need_weight, need_bias)
    if count == 0 or not (need_hidden or need_weight or need_bias):
        launch.log_sums(head, lse, log_pf)
        upstream(0, log_pf)
        return log_pf, d_hidden.zero_(), d_weight.zero_(), d_bias.zero_()
    blocks = launch.row_blocks(head, rows_per_prompt, sums_weight=need_weight)
    block = head.new_block(blocks.size, size)
    low_weight = head.weight.to(head.block_dtype) if need_hidden else None
    total = launch.Sum(d_weight, len(blocks))
    bias_sum = torch.zeros(size if need_bias else 0, device=hidden.device)
    for first, last in blocks:
        part, scores, own = head.rows(first, last), block[: last - first], log_pf[first:last]
        totals = launch.score(part, scores, lse[first:last], own)
        grad = upstream(first, own).float().contiguous()
        factors, scaled = launch.factors(part, scores, totals, own, grad, need_weight)
        if low_weight is not None:
            launch.row_product(scores, low_weight, factors, d_hidden[first:last])
        if scaled is not None:
            total.add(scores.t(), scaled)
        if need_bias:
            bias_sum += launch.column_sums(scores, factors)
    total.finish()
    d_bias.copy_(bias_sum)
    return log_pf, d_hidden, d_weight, d_bias


def _outputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients, [0] where not needed."""
    if need_bias and bias is None:
        raise ValueError("need_bias = True, but bias = None")

    def new(like: Tensor, needed: bool) -> Tensor:
        return torch.empty(like.shape if needed else 0, dtype=like.dtype, device=like.device)

    return (
        new(hidden, need_hidden),
        new(weight, need_weight),
        new(weight if bias is None else bias, need_bias),
    )
