"""Walk token sequences down a prefix tree: one row per lane, one binary search per level.

Every level costs a row two loads for the child range and ``log2(children)`` for the search, each
dependent on the one before, so memory latency bounds it; many rows in flight hide the latency
(small blocks, many programs). The tree describes itself (see ``gflowgr/tree/layout.py``), so the
launch reads nothing back to the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gflowgr.kernels.launching import on_device

# Words of the header and of each level, as in csrc/tree/tree_layout.h.
_MAX_LENGTH = tl.constexpr(2)
_INDEX_BYTES = tl.constexpr(8)
_CHILD_BEGIN = tl.constexpr(9)
_WORDS = tl.constexpr(16)
_LEVEL_WORDS = tl.constexpr(5)


@triton.jit
def _load_begin(begins, index_bytes, node, live):
    if index_bytes == 4:
        value = tl.load(begins.to(tl.pointer_type(tl.int32)) + node, mask=live, other=0).to(
            tl.int64
        )
    else:
        value = tl.load(begins.to(tl.pointer_type(tl.int64)) + node, mask=live, other=0)
    return value


@triton.jit
def _load_token(stored, width, index, live):
    if width == 1:
        value = tl.load(stored + index, mask=live, other=0).to(tl.int64)
    else:
        if width == 2:
            value = tl.load(stored.to(tl.pointer_type(tl.uint16)) + index, mask=live, other=0).to(
                tl.int64
            )
        else:
            value = tl.load(stored.to(tl.pointer_type(tl.uint32)) + index, mask=live, other=0).to(
                tl.int64
            )
    return value


@triton.jit
def tree_walk_kernel(
    tokens, mask, tree, nodes, rows, columns, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):
    """nodes[row, l] = node after tokens[row, :l + 1], or -1; ``tree`` is a pointer to uint8."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    inside = live
    header = tree.to(tl.pointer_type(tl.int64))
    depth = tl.minimum(tl.load(header + _MAX_LENGTH), columns)
    index_bytes = tl.load(header + _INDEX_BYTES)
    begins = tree + tl.load(header + _CHILD_BEGIN)
    node = tl.zeros([BLOCK], dtype=tl.int64)
    level = depth * 0
    while level < depth:
        word = header + _WORDS + _LEVEL_WORDS * level
        first = tl.load(word)
        stored = tree + tl.load(word + 1)
        width = tl.load(word + 3)
        at = row * columns + level
        code = tl.load(tokens + at, mask=live, other=-1).to(tl.int64)
        if HAS_MASK:
            live = live & (tl.load(mask + at, mask=live, other=0) != 0)
        # The subtraction must not wrap around for a garbage token.
        live = live & (code >= 0)
        code -= tl.load(word + 2)
        low = _load_begin(begins, index_bytes, node, live) - first
        end = _load_begin(begins, index_bytes, node + 1, live) - first
        high = end
        left = tl.load(word + 4)
        while left > 0:
            middle = (low + high) >> 1
            open_ = live & (low < high)
            less = open_ & (_load_token(stored, width, middle, open_) < code)
            low = tl.where(less, middle + 1, low)
            high = tl.where(less, high, middle)
            left = left >> 1
        live = live & (low < end)
        live = live & (_load_token(stored, width, low, live) == code)
        node = tl.where(live, low + first, 0)
        tl.store(nodes + at, tl.where(live, node, -1), mask=inside)
        level += 1
    while level < columns:
        tl.store(nodes + row * columns + level, tl.full([BLOCK], -1, dtype=tl.int64), mask=inside)
        level += 1


@on_device
def tree_walk(tokens: Tensor, mask: Tensor | None, tree: Tensor) -> Tensor:
    """Launch the kernel: tokens [..., L] int32 or int64, mask bool like them or None; contiguous.

    Returns the nodes, int64 [..., L].
    """
    nodes = torch.empty(tokens.shape, dtype=torch.int64, device=tokens.device)
    if tokens.numel() == 0:
        return nodes
    columns = tokens.shape[-1]
    rows = tokens.numel() // columns
    block = 128
    flags = tokens if mask is None else mask.view(torch.uint8)
    tree_walk_kernel[(triton.cdiv(rows, block),)](
        tokens,
        flags,
        tree,
        nodes,
        rows,
        columns,
        HAS_MASK=mask is not None,
        BLOCK=block,
        num_warps=4,
    )
    return nodes
