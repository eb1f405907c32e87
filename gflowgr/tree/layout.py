"""Layout of a prefix tree in one buffer, and the NumPy builder of it.

The buffer is an array of bytes that describes itself, so that a kernel needs nothing else::

    header         16 words of int64 (``WORDS``), then 5 words per level (``LEVEL_WORDS``)
    child_begin    [num_inner + 1] int32 (int64 only past 2**31 nodes)
    leaf_rank      [num_inner + 1] int32, only when the identifiers differ in length
    tokens         per level: (token - the level's smallest token), uint8, uint16 or uint32
    ---------------- end of the structure, begin of the items map ----------------
    item_ids       [num_entries] int32, item ids in leaf order, ascending within a leaf
    item_begin     [num_leaves + 1] int32, only when items share an identifier

Nodes are numbered breadth-first over the whole tree (root 0, then level 1, ...), children of a node
contiguous and sorted by token. So the children of inner node ``i`` are the nodes
``child_begin[i] .. child_begin[i + 1] - 1``: a child's id is its position, and no next-state array
is needed. Leaves are numbered in node order; ``leaf_rank[i]`` counts the leaves among the nodes
before ``i``. Every section starts at a multiple of 64 bytes; the bytes between sections are zero.
``csrc/tree/tree_build.cpp`` builds the same layout bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC = 0x3152_5447_574F_4C46  # "FLOWGTR1" in little-endian bytes
VERSION = 1
WORDS = 16
LEVEL_WORDS = 5
ALIGN = 64
MAX_LENGTH = 1 << 12
MAX_TOKEN = (1 << 31) - 1
MAX_ITEMS = (1 << 31) - 1

Buffer = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TreeLayout:
    """The header, decoded. Offsets and sizes are in bytes; an offset of 0 means "not present".

    ``node_begin[d]`` is the first node at depth ``d`` (``node_begin[0] = 0`` is the root), with
    ``num_nodes`` appended; ``token_*[l]`` describe the tokens on the edges into depth ``l + 1``;
    ``max_children[l]`` is the largest number of children of a node at depth ``l``.
    """

    max_length: int
    num_nodes: int
    num_inner: int
    num_leaves: int
    num_entries: int
    num_items: int
    index_bytes: int
    child_begin: int
    leaf_rank: int
    item_ids: int
    item_begin: int
    structure_bytes: int
    total_bytes: int
    vocab_size: int
    node_begin: tuple[int, ...]
    token_offset: tuple[int, ...]
    token_base: tuple[int, ...]
    token_bytes: tuple[int, ...]
    max_children: tuple[int, ...]


def _aligned(offset: int) -> int:
    return (offset + ALIGN - 1) // ALIGN * ALIGN


def plan_layout(
    *,
    level_sizes: Sequence[int],
    token_base: Sequence[int],
    token_max: Sequence[int],
    max_children: Sequence[int],
    num_leaves: int,
    num_entries: int,
    num_items: int,
    ragged: bool,
    index_bytes: int | None = None,
) -> TreeLayout:
    """Place the sections for the given counts (the one place in Python that knows the order)."""
    length = len(level_sizes)
    node_begin = [0, 1]
    for size in level_sizes:
        node_begin.append(node_begin[-1] + size)
    num_nodes, num_inner = node_begin[-1], node_begin[-2]
    if index_bytes is None:
        index_bytes = 4 if num_nodes < 2**31 else 8
    token_bytes = [
        1 if span < 2**8 else 2 if span < 2**16 else 4
        for span in (high - low for low, high in zip(token_base, token_max, strict=True))
    ]
    child_begin = _aligned(8 * (WORDS + LEVEL_WORDS * length))
    end = child_begin + index_bytes * (num_inner + 1)
    leaf_rank = 0
    if ragged:
        leaf_rank = _aligned(end)
        end = leaf_rank + 4 * (num_inner + 1)
    token_offset = []
    for size, width in zip(level_sizes, token_bytes, strict=True):
        token_offset.append(_aligned(end))
        end = token_offset[-1] + width * size
    item_ids = _aligned(end)
    end = item_ids + 4 * num_entries
    item_begin = 0
    if num_leaves < num_entries:
        item_begin = _aligned(end)
        end = item_begin + 4 * (num_leaves + 1)
    return TreeLayout(
        max_length=length,
        num_nodes=num_nodes,
        num_inner=num_inner,
        num_leaves=num_leaves,
        num_entries=num_entries,
        num_items=num_items,
        index_bytes=index_bytes,
        child_begin=child_begin,
        leaf_rank=leaf_rank,
        item_ids=item_ids,
        item_begin=item_begin,
        structure_bytes=item_ids,
        total_bytes=_aligned(end),
        vocab_size=max(token_max) + 1,
        node_begin=tuple(node_begin),
        token_offset=tuple(token_offset),
        token_base=tuple(token_base),
        token_bytes=tuple(token_bytes),
        max_children=tuple(max_children),
    )


def header_words(layout: TreeLayout) -> npt.NDArray[np.int64]:
    """The header as int64 words, in file order."""
    words = [
        MAGIC,
        VERSION,
        layout.max_length,
        layout.num_nodes,
        layout.num_inner,
        layout.num_leaves,
        layout.num_entries,
        layout.num_items,
        layout.index_bytes,
        layout.child_begin,
        layout.leaf_rank,
        layout.item_ids,
        layout.item_begin,
        layout.structure_bytes,
        layout.total_bytes,
        layout.vocab_size,
    ]
    for level in range(layout.max_length):
        words += [
            layout.node_begin[level + 1],
            layout.token_offset[level],
            layout.token_base[level],
            layout.token_bytes[level],
            layout.max_children[level],
        ]
    return np.array(words, dtype=np.int64)


def decode_header(words: Sequence[int]) -> TreeLayout:
    """Decode ``WORDS + LEVEL_WORDS * max_length`` words; ValueError when they make no tree."""
    if len(words) < WORDS or words[0] != MAGIC:
        raise ValueError("not a prefix tree: the buffer does not begin with its mark")
    if words[1] != VERSION:
        raise ValueError(f"prefix tree: format version must be {VERSION}; got {words[1]}")
    length = words[2]
    if not 1 <= length <= MAX_LENGTH or len(words) < WORDS + LEVEL_WORDS * length:
        raise ValueError(f"damaged prefix tree: max_length {length}")
    starts = range(WORDS, WORDS + LEVEL_WORDS * length, LEVEL_WORDS)
    columns = [tuple(words[start + word] for start in starts) for word in range(LEVEL_WORDS)]
    layout = TreeLayout(
        max_length=length,
        num_nodes=words[3],
        num_inner=words[4],
        num_leaves=words[5],
        num_entries=words[6],
        num_items=words[7],
        index_bytes=words[8],
        child_begin=words[9],
        leaf_rank=words[10],
        item_ids=words[11],
        item_begin=words[12],
        structure_bytes=words[13],
        total_bytes=words[14],
        vocab_size=words[15],
        node_begin=(0, *columns[0], words[3]),
        token_offset=columns[1],
        token_base=columns[2],
        token_bytes=columns[3],
        max_children=columns[4],
    )
    sizes = [b - a for a, b in pairwise(layout.node_begin[1:])]
    sound = (
        layout.node_begin[1] == 1
        and min(sizes) > 0
        and layout.num_inner == layout.node_begin[length]
        and layout.index_bytes in (4, 8)
        and (layout.index_bytes == 8 or layout.num_nodes < 2**31)
        and set(layout.token_bytes) <= {1, 2, 4}
        and all(0 <= base <= MAX_TOKEN for base in layout.token_base)
        and all(1 <= most <= layout.num_nodes for most in layout.max_children)
        and 1 <= layout.vocab_size <= MAX_TOKEN + 1
        and 1 <= layout.num_leaves <= layout.num_entries <= layout.num_items <= MAX_ITEMS
    )
    if sound:
        expected = plan_layout(
            level_sizes=sizes,
            token_base=layout.token_base,
            token_max=[
                base + 256**width - 1
                for base, width in zip(layout.token_base, layout.token_bytes, strict=True)
            ],
            max_children=layout.max_children,
            num_leaves=layout.num_leaves,
            num_entries=layout.num_entries,
            num_items=layout.num_items,
            ragged=layout.leaf_rank > 0,
            index_bytes=layout.index_bytes,
        )
        sound = (
            expected.token_offset == layout.token_offset
            and expected.total_bytes == layout.total_bytes
            and expected.structure_bytes == layout.structure_bytes
            and (expected.child_begin, expected.leaf_rank, expected.item_ids, expected.item_begin)
            == (layout.child_begin, layout.leaf_rank, layout.item_ids, layout.item_begin)
        )
    if not sound:
        raise ValueError("damaged prefix tree: the header's counts and offsets do not agree")
    return layout


def section(buffer: Buffer, offset: int, count: int, dtype: Any) -> npt.NDArray[Any]:
    """View ``count`` values of ``dtype`` at a byte offset of the buffer."""
    return buffer[offset : offset + count * np.dtype(dtype).itemsize].view(dtype)


class IdentifierError(ValueError):
    """An identifier that fits no tree; ``kind``, ``row``, ``column`` say which and why."""

    def __init__(self, kind: str, row: int, column: int) -> None:
        super().__init__(f"{kind} at row {row}, column {column}")
        self.kind, self.row, self.column = kind, row, column


def check_tokens(tokens: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Lengths of the identifiers, or IdentifierError for the first bad row (row-major order)."""
    real = tokens >= 0
    lengths: npt.NDArray[np.int64] = real.sum(1, dtype=np.int64)
    hole = real != (np.arange(tokens.shape[1]) < lengths[:, None])
    wrong = (tokens < -1) | (tokens > MAX_TOKEN)
    bad_row = (lengths == 0) | hole.any(1) | wrong.any(1)
    if bad_row.any():
        row = int(bad_row.argmax())
        if wrong[row].any():
            raise IdentifierError("token", row, int(wrong[row].argmax()))
        if lengths[row] == 0:
            raise IdentifierError("empty", row, 0)
        raise IdentifierError("hole", row, int((~real[row]).argmax()))
    return lengths


def _sort_order(codes: npt.NDArray[np.uint64], bits: Sequence[int]) -> npt.NDArray[np.intp]:
    """Stable order of the rows by their codes, level 0 first: keys packed into 64-bit words."""
    words: list[npt.NDArray[np.uint64]] = []
    used = 64
    for level, width in enumerate(bits):
        if used + width > 64:
            words.append(np.zeros(codes.shape[0], dtype=np.uint64))
            used = 0
        words[-1] = (words[-1] << np.uint64(width)) | codes[:, level]
        used += width
    return np.lexsort(words[::-1])


def build_numpy(
    tokens: npt.NDArray[Any], items: npt.NDArray[np.int64] | None, index_bytes: int | None = None
) -> Buffer:
    """Build the buffer from ``tokens`` [rows, L] and item ids [rows] (default 0, 1, ...).

    Padding is -1. O(rows * L) memory beside the input; one sort of packed keys. ``index_bytes`` is
    chosen by the number of nodes unless given (tests of the 64-bit form). Raises IdentifierError.
    """
    lengths = check_tokens(tokens)
    length = int(lengths.max())
    rows = tokens.shape[0]
    if items is not None:
        by_item = np.argsort(items, kind="stable")
        items, tokens, lengths = items[by_item], tokens[by_item], lengths[by_item]
    real = np.arange(length) < lengths[:, None]
    base = np.where(real, tokens[:, :length], MAX_TOKEN).min(0).astype(np.int64)
    high = np.where(real, tokens[:, :length], 0).max(0).astype(np.int64)
    # 0 stands for "ended", so that an identifier sorts before its extensions.
    codes = np.where(real, tokens[:, :length] - base + 1, 0).astype(np.uint64)
    order = _sort_order(codes, [int(span + 1).bit_length() for span in high - base])
    num_items = rows if items is None else int(items[-1]) + 1
    return assemble(
        codes[order],
        order if items is None else items[order],
        base=base,
        high=high,
        num_items=num_items,
        index_bytes=index_bytes,
    )


def assemble(
    codes: npt.NDArray[np.uint64],
    items: npt.NDArray[Any],
    *,
    base: npt.NDArray[np.int64],
    high: npt.NDArray[np.int64],
    num_items: int,
    index_bytes: int | None = None,
) -> Buffer:
    """The buffer of identifiers in sorted order.

    ``codes`` [rows, L] are token - base + 1, or 0 where the identifier has ended; rows with equal
    codes have ascending ``items`` [rows]. ``base`` and ``high`` [L] bound each level's tokens.
    """
    rows, length = codes.shape
    real = codes > 0
    lengths = real.sum(1, dtype=np.int64)
    order = np.arange(rows)
    differs = np.ones((rows, length), dtype=bool)
    differs[1:] = np.logical_or.accumulate(codes[1:] != codes[:-1], axis=1)
    created = differs & real
    rank = np.cumsum(created, axis=0, dtype=np.int64)  # nodes of the level made up to this row
    level_sizes = rank[-1].tolist()
    node_begin = np.cumsum([0, 1, *level_sizes])
    num_inner, num_nodes = int(node_begin[-2]), int(node_begin[-1])

    child_begin = np.empty(num_inner + 1, dtype=np.int64)
    child_begin[0], child_begin[-1] = 1, num_nodes
    for level in range(length - 1):
        before = rank[:, level + 1] - created[:, level + 1]
        child_begin[node_begin[level + 1] : node_begin[level + 2]] = (
            node_begin[level + 2] + before[created[:, level]]
        )
    children = np.diff(child_begin)
    max_children = [int(children[a:b].max()) for a, b in pairwise(node_begin[:-1])]

    node = node_begin[lengths] + rank[np.arange(rows), lengths - 1] - 1
    ragged = bool((lengths != length).any())
    if ragged:  # leaves are numbered in node order: shorter identifiers first
        by_length = np.argsort(lengths, kind="stable")
        order, node = order[by_length], node[by_length]
    first = np.ones(rows, dtype=bool)
    first[1:] = node[1:] != node[:-1]
    num_leaves = int(first.sum())

    layout = plan_layout(
        level_sizes=level_sizes,
        token_base=base.tolist(),
        token_max=high.tolist(),
        max_children=max_children,
        num_leaves=num_leaves,
        num_entries=rows,
        num_items=num_items,
        ragged=ragged,
        index_bytes=index_bytes,
    )
    buffer: Buffer = np.zeros(layout.total_bytes, dtype=np.uint8)
    words = header_words(layout)
    section(buffer, 0, len(words), np.int64)[:] = words
    section(buffer, layout.child_begin, num_inner + 1, f"i{layout.index_bytes}")[:] = child_begin
    if ragged:
        ends_here = np.zeros(num_inner + 1, dtype=np.int32)
        leaf_nodes = node[first]
        ends_here[leaf_nodes[leaf_nodes < num_inner] + 1] = 1
        section(buffer, layout.leaf_rank, num_inner + 1, np.int32)[:] = np.cumsum(ends_here)
    for level in range(length):
        values = codes[created[:, level], level] - np.uint64(1)
        stored = section(
            buffer, layout.token_offset[level], len(values), f"u{layout.token_bytes[level]}"
        )
        stored[:] = values
    section(buffer, layout.item_ids, rows, np.int32)[:] = items[order]
    if layout.item_begin:
        starts = section(buffer, layout.item_begin, num_leaves + 1, np.int32)
        starts[:] = np.append(np.flatnonzero(first), rows)
    return buffer
