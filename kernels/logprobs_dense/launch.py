"""Parts of the dense head's calls: blocks, kernel launches and matrix products.

See ``calls.py`` for the whole and ``tiles.py`` for the notation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gflowgr.kernels.logprobs_dense import (
    configs as dense_configs,
)
from gflowgr.kernels.logprobs_dense import (
    rows as dense_rows,
)
from gflowgr.kernels.logprobs_dense import (
    tiles as dense_tiles,
)
from gflowgr.kernels.logprobs_dense.configs import CONFIGURATIONS, Configuration

# Bytes of tile statistics held at a time where nothing else limits the rows.
STATISTICS_BYTES = 2**26
MIN_ROWS = 256
# A multiple of every configuration's rows: a last tile of fewer would leave processors idle.
TILE_ROWS = 256
MIN_COLUMNS = 1024
# Older versions of torch refuse to add a 16-bit product to a float32 sum.
ADDS_WIDE = torch.__version__ >= (2, 10)


class Statistics(NamedTuple):
    """Of the tiles of R rows; see ``dense_tiles_kernel``."""

    maxima: Tensor  # [column tiles, R]
    sums: Tensor
    picked: Tensor  # [R]


@dataclass(frozen=True)
class DenseCall:
    """The inputs of a call, or a block of their rows or columns, in one dtype."""

    hidden: Tensor  # [R, d]
    weight: Tensor  # [C, d]
    bias: Tensor | None
    targets: Tensor  # [R] int64, counted from `first_column` columns before
    scale: float
    first_column: int = 0

    @property
    def block_dtype(self) -> torch.dtype:
        dtype = self.hidden.dtype
        return torch.bfloat16 if dtype == torch.float16 else dtype

    def rows(self, first: int, last: int) -> DenseCall:
        return replace(self, hidden=self.hidden[first:last], targets=self.targets[first:last])

    def columns(self, first: int, last: int) -> DenseCall:
        bias = None if self.bias is None else self.bias[first:last]
        return replace(self, weight=self.weight[first:last], bias=bias, first_column=first)

    def new_block(self, rows: int, columns: int) -> Tensor:
        # Rows are aligned to 128 bytes or more: with an odd V cuBLAS would use its slowest kernels.
        stride = triton.cdiv(columns, 64) * 64
        return self.hidden.new_empty((rows, stride), dtype=self.block_dtype)[:, :columns]

    def states(self) -> Tensor:
        """Hidden states to multiply with logit gradients: 0 in masked rows, as 0 * NaN is NaN."""
        masked = (self.targets < 0)[:, None]
        return self.hidden.to(self.block_dtype).masked_fill(masked, 0.0)


def prepare(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> DenseCall:
    """Bring the inputs into the form that the kernels take; mixed dtypes become float32."""
    same = hidden.dtype == weight.dtype
    dtype = hidden.dtype if same else torch.float32
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"hidden and weight: expected float32 or 16 bits, got {dtype}")
    hidden, weight = (
        t.to(dtype) if t.stride(1) == 1 else t.to(dtype).contiguous() for t in (hidden, weight)
    )
    return DenseCall(hidden, weight, bias, targets.contiguous(), 1.0 / temperature)


class Blocks:
    """[0, total) in equal steps of whole ``unit``s, at most ``largest`` if that holds a unit."""

    def __init__(self, total: int, largest: int, unit: int) -> None:
        self.total = total
        pieces = max(1, triton.cdiv(total, max(unit, largest // unit * unit)))
        self.size = max(1, min(total, triton.cdiv(triton.cdiv(total, pieces), unit) * unit))

    def __len__(self) -> int:
        return triton.cdiv(self.total, self.size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.total, self.size):
            yield first, min(first + self.size, self.total)


def block_bytes(device: torch.device) -> int:
    """Bytes of scores or logit gradients held at a time: 1 GiB on large cards, at least 256 MiB.

    Larger where the weight gradient is. With 16 bits and V = 33024 that is 16,000 rows: 8,000 tiles
    of the product for 132 processors, and a sum of the weight gradient is read again for each.
    """
    if device.type != "cuda":
        return 2**28
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(2**28, min(2**30, memory // 64))


def _budget(head: DenseCall, sums_weight: bool) -> int:
    # Each block of rows reads and writes the whole sum of the weight gradient. A block of its size
    # in 16 bits has 2 d rows, enough products to outweigh that.
    size = max(block_bytes(head.hidden.device), 4 * head.weight.numel() if sums_weight else 0)
    return size // head.block_dtype.itemsize


def row_blocks(head: DenseCall, unit: int, sums_weight: bool) -> Blocks:
    """Blocks of rows, ``unit`` of them kept together, over all columns."""
    largest = _budget(head, sums_weight) // head.weight.shape[0]
    largest = max(MIN_ROWS, largest)
    tiles = math.lcm(unit, TILE_ROWS)
    return Blocks(head.hidden.shape[0], largest, tiles if tiles <= largest else unit)


def column_blocks(head: DenseCall, sums_weight: bool) -> Blocks | None:
    """Blocks of columns over all rows, or None if they would be too narrow."""
    largest = _budget(head, sums_weight) // head.hidden.shape[0]
    return Blocks(head.weight.shape[0], largest, 128) if largest >= MIN_COLUMNS else None


def _launch_tiles(
    head: DenseCall,
    config: Configuration,
    epilogue: int,
    *,
    statistics: Statistics | None = None,
    reference: Tensor | None = None,
    log_pf: Tensor | None = None,
    grad: Tensor | None = None,
    out: Tensor | None = None,
    redo: Tensor | None = None,
) -> None:
    (rows, width), columns = head.hidden.shape, head.weight.shape[0]
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns)
    if redo is not None:
        tiles = min(tiles, 2 * _processors(head.hidden.device))
    maxima, sums, picked = statistics or (None, None, None)
    dense_tiles.dense_tiles_kernel[(tiles,)](
        head.hidden,
        head.weight,
        head.bias,
        head.targets,
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
        head.hidden.stride(0),
        head.weight.stride(0),
        1 if head.bias is None else head.bias.stride(0),
        0 if out is None else out.stride(0),
        head.first_column,
        head.scale,
        **tile_constants(config, epilogue, width),
        PRECISION=dense_configs.precision(config, head.hidden.dtype),
        UPCAST=head.hidden.device.type == "cpu",
        num_warps=config.warps,
        num_stages=config.stages,
    )


def tile_constants(config: Configuration, epilogue: int, width: int) -> dict[str, Any]:
    """Compile-time arguments of ``dense_tiles_kernel`` that follow from the configuration."""
    return {
        "EPILOGUE": epilogue,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "DEPTH": config.depth,
        "GROUP": config.group,
        "EVEN": width % config.depth == 0,
    }


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _choose(head: DenseCall, epilogue: int, run: Any) -> Configuration:
    shape = (head.hidden.shape[0], head.weight.shape[0], head.hidden.shape[1])
    return dense_configs.choose(epilogue, head.hidden.dtype, head.hidden.device, shape, run)


def _new_statistics(head: DenseCall, config: Configuration) -> Statistics:
    rows, tiles = head.hidden.shape[0], triton.cdiv(head.weight.shape[0], config.columns)
    maxima, sums = torch.empty((2, tiles, rows), device=head.hidden.device)
    return Statistics(maxima, sums, torch.empty(rows, device=head.hidden.device))


def _combine(
    head: DenseCall,
    statistics: Statistics,
    lse: Tensor,
    log_pf: Tensor,
    reference: Tensor | None = None,
    totals: Tensor | None = None,
    missed: Tensor | None = None,
) -> None:
    rows, columns = head.hidden.shape[0], head.weight.shape[0]
    dense_rows.dense_combine_kernel[(triton.cdiv(rows, COMBINE["ROWS"]),)](
        *statistics,
        *(head.targets, reference, lse, log_pf, totals, missed),
        *(rows, statistics.maxima.shape[0], columns, head.first_column),
        **COMBINE,
        num_warps=4,
    )


COMBINE = {"ROWS": 32, "TILES": 32}
FACTORS = {"ROWS": 16, "DEPTH": 128}


def log_sums(head: DenseCall, lse: Tensor, log_pf: Tensor) -> None:
    """Fill lse and log_pf [T], nothing else being wanted: STATS in blocks of rows, and combine."""
    per_row = 8 * triton.cdiv(head.weight.shape[0], 64)
    count = head.hidden.shape[0]
    for first, last in (
        Blocks(count, max(MIN_ROWS, STATISTICS_BYTES // per_row), 1) if count else ()
    ):
        part = head.rows(first, last)

        def run(config: Configuration, part: DenseCall = part) -> Statistics:
            statistics = _new_statistics(part, config)
            _launch_tiles(part, config, dense_tiles.STATS, statistics=statistics)
            return statistics

        config = _choose(part, dense_tiles.STATS, run)
        _combine(part, run(config), lse[first:last], log_pf[first:last])


def score(head: DenseCall, scores: Tensor, lse: Tensor, log_pf: Tensor) -> Tensor:
    """Fill scores [R, V] = exp(x - reference), lse and log_pf [R]; return the scores' sums [R]."""
    rows, device = head.hidden.shape[0], head.hidden.device
    reference = _reference(head)

    def run(config: Configuration, redo: Tensor | None = None) -> Statistics:
        statistics = _new_statistics(head, config)
        again(config, statistics, redo)
        return statistics

    def again(config: Configuration, statistics: Statistics, redo: Tensor | None) -> None:
        _launch_tiles(
            head,
            config,
            dense_tiles.SCORES,
            statistics=statistics,
            reference=reference,
            out=scores,
            redo=redo,
        )

    config = _choose(head, dense_tiles.SCORES, run)
    statistics = run(config)
    totals = torch.empty(rows, device=device)
    missed = torch.empty(rows, dtype=torch.int32, device=device)
    _combine(head, statistics, lse, log_pf, reference, totals, missed)
    again(config, statistics, missed.amax())
    _combine(head, statistics, lse, log_pf, reference, totals, missed)
    return totals


def _reference(head: DenseCall) -> Tensor:
    """Where scores are measured from, [R]: the maximum of one tile of columns from all over V."""
    if head.hidden.device.type == "cpu":
        config = CONFIGURATIONS["interpreted"]
    else:
        config = CONFIGURATIONS["low" if head.hidden.element_size() == 2 else "single_wide"]
    columns = head.weight.shape[0]
    taken = min(columns, config.columns)
    every = slice(0, columns // taken * taken, columns // taken)
    bias = None if head.bias is None else head.bias[every]
    # What this writes to `picked` is wrong, and overwritten by the scores' own launch.
    sample = replace(head, weight=head.weight[every], bias=bias)
    statistics = _new_statistics(sample, config)
    _launch_tiles(sample, config, dense_tiles.STATS, statistics=statistics)
    return statistics.maxima[0].add_(dense_rows.HEADROOM)


def factors(
    head: DenseCall,
    scores: Tensor,
    totals: Tensor,
    log_pf: Tensor,
    grad: Tensor | None,
    scale_hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """Factors [R] with d loss / d logits = factors[:, None] * scores, whose targets are set here.

    And factors[:, None] * hidden [R, d] if asked for. ``grad`` None means 1.
    """
    rows, width = head.hidden.shape
    out = torch.empty(rows, device=head.hidden.device)
    scaled = (
        torch.empty((rows, width), dtype=head.block_dtype, device=head.hidden.device)
        if scale_hidden
        else None
    )
    dense_rows.dense_factors_kernel[(triton.cdiv(rows, FACTORS["ROWS"]),)](
        *(scores, head.hidden, head.targets, totals, log_pf, grad, out, scaled),
        *(rows, scores.shape[1], width, scores.stride(0), head.hidden.stride(0), head.scale),
        **FACTORS,
        num_warps=4,
    )
    return out, scaled


def gradient(head: DenseCall, out: Tensor, lse: Tensor, log_pf: Tensor, grad: Tensor) -> None:
    """Fill out [R, C] with d loss / d logits; lse, log_pf, grad [R] float32."""

    def run(config: Configuration) -> None:
        _launch_tiles(
            head,
            config,
            dense_tiles.GRAD,
            reference=lse,
            log_pf=log_pf,
            grad=grad,
            out=out,
        )

    run(_choose(head, dense_tiles.GRAD, run))


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``out`` = a @ b, or += with ``add``; summed in float32, also where a and b have 16 bits."""
    if a.device.type == "cpu":
        value = a.float() @ b.float()
        out.add_(value) if add else out.copy_(value)
    elif out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif out.dtype == torch.float32:
        if add and ADDS_WIDE:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        elif add:
            out.add_(torch.mm(a, b, out_dtype=torch.float32))
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        value = torch.mm(a, b, out_dtype=torch.float32)
        out.add_(value) if add else out.copy_(value)


def row_product(block: Tensor, weight: Tensor, factors: Tensor | None, out: Tensor) -> None:
    """``out`` [R, d] = factors[:, None] * (block . weight), rounded once, from float32."""
    wide = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    product(block, weight, wide)
    if factors is not None:
        torch.mul(wide, factors[:, None], out=out)
    elif wide is not out:
        out.copy_(wide)


class Sum:
    """The sum of some products, written straight to ``out`` if there is only one."""

    def __init__(self, out: Tensor, products: int) -> None:
        self.out = out
        direct = products == 1 or out.dtype == torch.float32 or out.numel() == 0
        self.total = out if direct else torch.empty_like(out, dtype=torch.float32)
        self.empty = True

    def add(self, a: Tensor, b: Tensor) -> None:
        product(a, b, self.total, add=not self.empty)
        self.empty = False

    def finish(self) -> None:
        if self.total is not self.out:
            self.out.copy_(self.total)


def column_sums(block: Tensor, weights: Tensor | None) -> Tensor:
    """Sums over the rows of [R, C], each times its weight (float32 [R]; None means 1), float32."""
    rows, columns = block.shape
    # Three 16-bit parts hold all of a float32; eight columns are what tensor cores take.
    parts = block.new_zeros((rows, 8))
    if weights is None:
        parts[:, 0] = 1.0
    elif block.dtype == torch.float32:
        parts[:, 0] = weights
    else:
        for column in range(3):
            parts[:, column] = weights
            weights = weights - parts[:, column]
    sums = torch.empty((columns, 8), device=block.device)
    product(block.t(), parts, sums)
    return sums[:, :3].sum(1)
