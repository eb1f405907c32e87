"""``gflowgr::tree_walk``: follow token sequences down a prefix tree.

The reference is :func:`walk_reference`; the fast backends are ``csrc/tree/tree_ops_cpu.cpp``,
``kernels/tree/walk.py`` and ``csrc/tree/tree_walk.cu``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gflowgr import backends
from gflowgr.tree.facts import accept
from gflowgr.tree.layout import TreeLayout

_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def view_section(tree: Tensor, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """View ``count`` values of ``dtype`` at a byte offset of a tree's buffer."""
    return tree[offset : offset + count * dtype.itemsize].view(dtype)


def index_dtype(layout: TreeLayout) -> torch.dtype:
    """Dtype of ``child_begin``."""
    return torch.int32 if layout.index_bytes == 4 else torch.int64


def level_tokens(tree: Tensor, layout: TreeLayout, level: int) -> Tensor:
    """Stored tokens on the edges into depth ``level + 1``, less the base; see :func:`unsigned`."""
    count = layout.node_begin[level + 2] - layout.node_begin[level + 1]
    return view_section(tree, layout.token_offset[level], count, _SIGNED[layout.token_bytes[level]])


def unsigned(values: Tensor, width: int) -> Tensor:
    """int64 values of stored tokens (viewed signed, since PyTorch indexes uint16/32 poorly)."""
    values = values.to(torch.int64)
    return values if width == 1 else values & (256**width - 1)


def walk_reference(tokens: Tensor, mask: Tensor | None, tree: Tensor) -> Tensor:
    """Nodes reached after each token; the plain-PyTorch reference, on any device.

    Args:
        tokens: [..., L] integer token ids.
        mask: [..., L] bool or None; where it is false the sequence ends.
        tree: the buffer of a prefix tree (``PrefixTree.buffer``), on the device of ``tokens``.

    Returns:
        [..., L] int64: the node after each token, -1 from the first invalid or masked token on.

    Method: per level, a binary search of the token among the node's children: O(L log(children))
    gathers.
    """
    layout = accept(tree)
    begins = view_section(tree, layout.child_begin, layout.num_inner + 1, index_dtype(layout))
    out = torch.full(tokens.shape, -1, dtype=torch.int64, device=tokens.device)
    node = torch.zeros(tokens.shape[:-1], dtype=torch.int64, device=tokens.device)
    alive = torch.ones_like(node, dtype=torch.bool)
    for level in range(min(layout.max_length, tokens.shape[-1])):
        width = layout.token_bytes[level]
        stored = level_tokens(tree, layout, level)
        first = layout.node_begin[level + 1]
        code = tokens[..., level].to(torch.int64) - layout.token_base[level]
        alive = alive & (code >= 0) & (code < 256**width)
        if mask is not None:
            alive = alive & mask[..., level]
        node = torch.where(alive, node, layout.node_begin[level])  # any node of the level will do
        low = begins[node].to(torch.int64) - first
        end = begins[node + 1].to(torch.int64) - first
        high, last = end, stored.numel() - 1
        for _ in range(layout.max_children[level].bit_length()):
            middle = (low + high) >> 1
            less = unsigned(stored[middle.clamp(max=last)], width) < code
            low, high = (
                torch.where(less & (low < high), middle + 1, low),
                torch.where(less, high, middle),
            )
        alive = alive & (low < end) & (unsigned(stored[low.clamp(max=last)], width) == code)
        node = low + first
        out[..., level] = torch.where(alive, node, -1)
    return out


def _walk_cpp(tokens: Tensor, mask: Tensor | None, tree: Tensor) -> Tensor:
    return torch.ops.gflowgr_cpp.tree_walk(*backends.contiguous(tokens, mask), tree)


def _walk_cuda(tokens: Tensor, mask: Tensor | None, tree: Tensor) -> Tensor:
    return torch.ops.gflowgr_cuda.tree_walk(*backends.contiguous(tokens, mask), tree)


def _walk_triton(tokens: Tensor, mask: Tensor | None, tree: Tensor) -> Tensor:
    from gflowgr.kernels.tree.walk import tree_walk

    return tree_walk(tokens.contiguous(), None if mask is None else mask.contiguous(), tree)


_RUN = {"torch": walk_reference, "cpp": _walk_cpp, "triton": _walk_triton, "cuda": _walk_cuda}


def _tree_walk(tokens: Tensor, mask: Tensor | None, tree: Tensor) -> Tensor:
    accept(tree)
    name = backends.resolve("tree_walk", tokens.device, tokens.dtype)
    if name != "torch" and tokens.dtype not in (torch.int32, torch.int64):
        tokens = tokens.to(torch.int64)
    return _RUN[name](tokens, mask, tree)


def _tree_walk_fake(tokens: Tensor, mask: Tensor | None, tree: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape, dtype=torch.int64)


def _check(tokens: Tensor, mask: Tensor | None, tree: Tensor) -> None:
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be integers; got {tokens.dtype}")
    if tokens.dim() < 1:
        raise ValueError("tokens must be of shape [..., L]; got a scalar")
    if tokens.device != tree.device:
        raise ValueError(f"tokens are on {tokens.device}, the tree is on {tree.device}")
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool; got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != tokens.shape or mask.device != tokens.device:
        raise ValueError(
            f"mask must be of shape {tuple(tokens.shape)} on {tokens.device}; "
            f"got {tuple(mask.shape)} on {mask.device}"
        )


def tree_walk(tokens: Tensor, mask: Tensor | None, tree: Tensor) -> Tensor:
    """Checked front door of ``torch.ops.gflowgr.tree_walk``; see :func:`walk_reference`.

    Raises TypeError or ValueError for a wrong dtype, shape or device.
    """
    _check(tokens, mask, tree)
    out: Tensor = torch.ops.gflowgr.tree_walk(tokens, mask, tree)
    return out


backends.define_op(
    "tree_walk",
    _tree_walk,
    _tree_walk_fake,
    probes={
        "torch": backends.probe_torch,
        "cpp": backends.probe_cpp,
        "triton": backends.probe_triton,
        "cuda": backends.probe_cuda,
    },
)
