"""Triton kernels of the dense head that work row by row, between and after the matrix products.

Both are bound by latency and touch little: the statistics of the tiles (8 bytes per row and tile)
and the hidden states. Notation as in ``tiles.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gflowgr.kernels.logprobs_dense.tiles import _expm1, _finite

# A row is scored as exp(x - reference). The reference is the maximum of a sample of its logits plus
# HEADROOM; a row whose sum of scores is not between e^LOWEST and e^HIGHEST gets its true maximum
# instead and is scored again. float32 and bfloat16 hold e^-87 to e^88: whatever is e^-50 of the sum
# or more is held to full precision, and so is the factor that undoes the reference.
HEADROOM = 24.0
_LOWEST = tl.constexpr(9.4e-14)  # e^-30
_HIGHEST = tl.constexpr(7.0e20)  # e^48


@triton.jit(
    do_not_specialize=["rows", "first_column"],
    do_not_specialize_on_alignment=[
        *("maxima", "sums", "picked", "targets", "reference"),
        *("lse", "log_pf", "totals", "missed"),
    ],
)
def dense_combine_kernel(
    maxima,
    sums,
    picked,
    targets,
    reference,
    lse,
    log_pf,
    totals,
    missed,
    rows,
    tiles,
    columns,
    first_column,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Tile statistics [tiles, R] -> log-sum-exp and log-probability of the target, [R].

    ``log_pf`` = x at the target - log-sum-exp, at most 0; -log-sum-exp where the target is no
    column here, NaN where it is beyond even ``columns``; both are 0 in masked rows. ``reference``
    None: ``sums`` are relative to ``maxima`` (STATS). Otherwise they are relative to it (SCORES):
    ``totals`` [R] are their sums over all tiles; rows whose total left the window are marked in
    ``missed`` [R], int32, and their reference becomes their true maximum.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=-1)
    live = target >= 0
    local = target - first_column
    maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        at = tile.to(tl.int64)[:, None] * rows + row[None, :]
        mask = (tile < tiles)[:, None] & live[None, :]
        top = tl.load(maxima + at, mask=mask, other=float("-inf"))
        part = tl.load(sums + at, mask=mask, other=0.0)
        highest = tl.maximum(maximum, tl.max(top, axis=0))
        if reference is None:
            base = tl.where(highest == float("-inf"), 0.0, highest)
            total = total * tl.exp(maximum - base)
            total += tl.sum(part * tl.exp(top - base[None, :]), axis=0)
        else:
            total += tl.sum(part, axis=0)
        maximum = highest
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    if reference is not None:
        start = _finite(tl.load(reference + row, mask=live, other=0.0))
        bad = live & (((total >= _LOWEST) & (total <= _HIGHEST)) == 0)
        tl.store(reference + row, tl.where(bad, _finite(maximum), start), mask=inside)
        tl.store(missed + row, bad.to(tl.int32), mask=inside)
        tl.store(totals + row, total, mask=inside)
        # From the reference to the maximum, by the rounded difference that its own score was made
        # from: a row that is sure of its target keeps the digits of 1 - p.
        total *= tl.exp(start - base)
    log_sum = tl.log(total)
    value = base + log_sum
    here = live & (local >= 0) & (local < columns)
    # The difference first: at logits of 1e4 the log-sum-exp itself is good to three decimals.
    score = tl.load(picked + row, mask=here, other=0.0) - base - log_sum
    elsewhere = tl.where(local > columns, float("nan"), -value)
    score = tl.where(here, tl.where(score > 0.0, 0.0, score), elsewhere)
    tl.store(lse + row, tl.where(live, value, 0.0), mask=inside)
    tl.store(log_pf + row, tl.where(live, score, 0.0), mask=inside)


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["targets", "totals", "log_pf", "grad", "factors"],
)
def dense_factors_kernel(
    scores,
    hidden,
    targets,
    totals,
    log_pf,
    grad,
    factors,
    scaled,
    rows,
    columns,
    width,
    scores_stride,
    hidden_stride,
    scale,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Split d loss / d logits [R, C] = factors[:, None] * scores, without touching most scores.

    factors[r] = -grad[r] * scale / totals[r], 0 in masked rows; the score at the target becomes
    expm1(log_pf) * totals[r], so that the one-hot part is formed in float32 and
    rounded once. ``grad`` None means 1. ``scaled`` (or None) [R, d] = factors[:, None] * hidden.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=-1)
    live = target >= 0
    total = tl.load(totals + row, mask=live, other=1.0)
    factor = -scale / total
    if grad is not None:
        factor *= tl.load(grad + row, mask=live, other=0.0)
    own = tl.load(log_pf + row, mask=live, other=0.0)
    factor = tl.where(own == own, factor, own)  # of no token: NaN
    factor = tl.where(live, factor, 0.0)
    tl.store(factors + row, factor, mask=inside)
    hit = _expm1(own) * total
    at = scores + row.to(tl.int64) * scores_stride + target
    tl.store(at, hit.to(scores.dtype.element_ty), mask=live & (target < columns))
    if scaled is not None:
        start = row.to(tl.int64)[:, None]
        for first in range(0, width, DEPTH):
            depth = first + tl.arange(0, DEPTH)[None, :]
            mask = live[:, None] & (depth < width)
            state = tl.load(hidden + start * hidden_stride + depth, mask=mask, other=0.0)
            value = (state.to(tl.float32) * factor[:, None]).to(scaled.dtype.element_ty)
            tl.store(scaled + start * width + depth, value, mask=inside[:, None] & (depth < width))
