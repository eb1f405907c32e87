"""Triton kernels of the dense head: logit tiles, their combination, and what scales them.

``launch.py`` launches them, and ``calls.py`` states the cost of the whole. Notation: R rows of
hidden states, C columns (vocabulary entries, or a slice of them), x[r, c] =
(hidden[r] . weight[c] + bias[c]) * scale, scale = 1 / temperature; a row with a negative target is
masked, and its hidden state reaches no output. Statistics are in natural units: at logits of 1e4 a
base-2 scale would cost a digit.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Epilogues of `dense_tiles_kernel`.
STATS, SCORES, GRAD = 0, 1, 2
_STATS = tl.constexpr(STATS)
_SCORES = tl.constexpr(SCORES)
_GRAD = tl.constexpr(GRAD)

# A chunk's offset changes the alignment of its per-row vectors; compile once all the same.
_UNALIGNED = ["targets", "reference", "log_pf", "grad", "maxima", "sums", "picked", "redo"]


@triton.jit
def _finite(x):
    """``x`` where it is finite, else 0 (also for NaN)."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _expm1(x):
    """``exp(x) - 1`` for x <= 0, relative error about 2^-20 (libdevice cannot be interpreted)."""
    near = x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6)))))
    return tl.where(x > -0.125, near, tl.exp(x) - 1.0)


@triton.jit
def _tile(
    index,
    hidden,
    weight,
    bias,
    targets,
    reference,
    log_pf,
    grad,
    maxima,
    sums,
    picked,
    out,
    rows,
    columns,
    width,
    hidden_stride,
    weight_stride,
    bias_stride,
    out_stride,
    first_column,
    scale,
    EPILOGUE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Programs go down GROUP tiles of rows before the next tile of columns: a wave of them shares
    # few rows of both matrices, which then come from the L2 cache.
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    in_group = GROUP * column_tiles
    group = index // in_group
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    row_tile = group * GROUP + (index % in_group) % height
    column_tile = (index % in_group) // height

    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < rows
    # Past the edge the last row or column is read again, which needs no mask in the loop. A masked
    # row may be NaN: that stays in its row of the product and is dropped below.
    row_at = tl.minimum(row, rows - 1).to(tl.int64)
    column_at = tl.minimum(column, columns - 1).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    a = hidden + row_at[:, None] * hidden_stride + depth[None, :]
    b = weight + column_at[None, :] * weight_stride + depth[:, None]
    product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for k in range(tl.cdiv(width, DEPTH)):
        if EVEN:
            left = tl.load(a)
            right = tl.load(b)
        else:
            here = depth < width - k * DEPTH
            left = tl.load(a, mask=here[None, :], other=0.0)
            right = tl.load(b, mask=here[:, None], other=0.0)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        product = tl.dot(left, right, product, input_precision=PRECISION)
        a += DEPTH
        b += DEPTH
    if bias is not None:
        product += tl.load(bias + column_at * bias_stride).to(tl.float32)[None, :]
    x = tl.where((column < columns)[None, :], product * scale, float("-inf"))

    target = tl.load(targets + row, mask=inside, other=-1)
    live = target >= 0
    # Negative as well where the target lies in an earlier slice of the vocabulary.
    local = target - first_column

    if EPILOGUE == _GRAD:
        lse = tl.load(reference + row, mask=live, other=0.0)
        factor = tl.load(grad + row, mask=live, other=0.0) * scale
        own = tl.load(log_pf + row, mask=live, other=0.0)
        factor = tl.where(own == own, factor, own)  # of no token: NaN
        hit = -factor * _expm1(own)
        value = -factor[:, None] * tl.exp(x - lse[:, None])
        value = tl.where(column[None, :] == local[:, None], hit[:, None], value)
        value = tl.where(live[:, None], value, 0.0)
    else:
        # One program per row has its target: no two write the same place. Most tiles have none.
        # (First, so that x need not outlive the scores: registers are scarce here.)
        start = column_tile * COLUMNS
        here = live & (local >= start) & (local < tl.minimum(start + COLUMNS, columns))
        if tl.max(here.to(tl.int32), axis=0) > 0:
            found = tl.where(column[None, :] == local[:, None], x, 0.0)
            tl.store(picked + row, tl.sum(found, axis=1), mask=here)
        maximum = tl.max(x, axis=1)
        if EPILOGUE == _SCORES:
            base = _finite(tl.load(reference + row, mask=live, other=0.0))
        else:
            base = tl.where(maximum == float("-inf"), 0.0, maximum)
        value = tl.where(live[:, None], tl.exp(x - base[:, None]), 0.0)
        partial = column_tile.to(tl.int64) * rows + row
        tl.store(maxima + partial, maximum, mask=inside)
        tl.store(sums + partial, tl.sum(value, axis=1), mask=inside)
    if EPILOGUE != _STATS:
        place = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
        stored = inside[:, None] & (column < columns)[None, :]
        tl.store(place, value.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["rows", "first_column"], do_not_specialize_on_alignment=_UNALIGNED)
def dense_tiles_kernel(
    hidden,
    weight,
    bias,
    targets,
    reference,
    log_pf,
    grad,
    maxima,
    sums,
    picked,
    out,
    redo,
    rows,
    columns,
    width,
    hidden_stride,
    weight_stride,
    bias_stride,
    out_stride,
    first_column,
    scale,
    EPILOGUE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tiles of logits, [ROWS, COLUMNS] each, with one of three epilogues.

    - STATS: ``maxima``, ``sums`` [column tiles, R]: a tile row's maximum and its sum of
      exp(x - that maximum); ``picked`` [R]: x at the row's target, where that is a column here.
    - SCORES (reference [R]): ``out`` = exp(x - reference), 0 in masked rows; ``sums`` are of these.
    - GRAD (reference = log-sum-exp, log_pf, grad [R]): ``out`` = grad * scale *
      (1[c is the target] - exp(x - reference)), 0 in masked rows.

    ``targets`` [R] count from ``first_column`` columns before this matrix's. With ``redo`` (one
    int32 on the device) nothing happens unless it is set; then a few programs do all tiles.
    """
    if redo is None:
        _tile(
            *(tl.program_id(0), hidden, weight, bias, targets, reference, log_pf, grad),
            *(maxima, sums, picked, out, rows, columns, width, hidden_stride, weight_stride),
            *(bias_stride, out_stride, first_column, scale),
            *(EPILOGUE, ROWS, COLUMNS, DEPTH, GROUP, EVEN, PRECISION, UPCAST),
        )
    else:
        tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
        count = tl.where(tl.load(redo) != 0, tiles, 0)
        for index in range(tl.program_id(0), count, tl.num_programs(0)):
            _tile(
                *(index, hidden, weight, bias, targets, reference, log_pf, grad),
                *(maxima, sums, picked, out, rows, columns, width, hidden_stride, weight_stride),
                *(bias_stride, out_stride, first_column, scale),
                *(EPILOGUE, ROWS, COLUMNS, DEPTH, GROUP, EVEN, PRECISION, UPCAST),
            )
