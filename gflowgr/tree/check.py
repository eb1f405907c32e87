"""Check that the arrays of a prefix tree agree with its header, before anything uses them.

:func:`gflowgr.tree.layout.decode_header` has compared the header's counts and offsets with each
other and with the buffer's size. The checks here, in this order, in one pass:

- ``child_begin`` ascends, and begins at each level with the first node of the next one: so every
  child range lies within the next level;
- ``leaf_rank`` counts at most one leaf a node, none at the root, and together with the deepest
  level as many as ``num_leaves``;
- a node without children ends an identifier; ``max_children`` is the largest number of children;
- the tokens of a node's children ascend strictly; ``token_base`` is the smallest token of its
  level; no token is above ``MAX_TOKEN``; ``vocab_size`` is the largest token + 1;
- ``item_ids`` are distinct, from 0 to ``num_items - 1``, which is there;
- ``item_begin`` ascends strictly from 0 to ``num_entries``, and so do the ids of a leaf's items.

``csrc/tree/tree_check.cpp`` makes the same checks with the same messages, about ten times as fast.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gflowgr.tree.build import host_module
from gflowgr.tree.layout import (
    LEVEL_WORDS,
    MAX_LENGTH,
    MAX_TOKEN,
    WORDS,
    Buffer,
    TreeLayout,
    decode_header,
    section,
)


def read_layout(buffer: Buffer) -> TreeLayout:
    """The decoded header of a whole buffer; ValueError when it is none or of another size."""
    if len(buffer) < 8 * WORDS:
        raise ValueError(f"not a prefix tree: {len(buffer)} bytes, a header alone has {8 * WORDS}")
    words = buffer[: len(buffer) // 8 * 8].view(np.int64)
    length = max(0, min(int(words[2]), MAX_LENGTH))
    layout = decode_header(words[: WORDS + LEVEL_WORDS * length].tolist())
    if len(buffer) != layout.total_bytes:
        raise ValueError(
            f"damaged prefix tree: it must be {layout.total_bytes} bytes; got {len(buffer)}"
        )
    return layout


def check_tree(buffer: Buffer, layout: TreeLayout) -> list[int]:
    """The largest token + 1 of each level; ValueError for the first value that is wrong."""
    host = host_module()
    if host is None:
        return check_numpy(buffer, layout)
    ends: list[int] = host.check_tree(buffer)
    return ends


def largest_tokens(buffer: Buffer, layout: TreeLayout) -> list[int]:
    """The largest token + 1 of each level, read from a trusted tree without checking it."""
    return [
        base + int(_stored(buffer, layout, level).max()) + 1
        for level, base in enumerate(layout.token_base)
    ]


def check_numpy(buffer: Buffer, layout: TreeLayout) -> list[int]:
    """The reference of :func:`check_tree`."""
    inner = layout.num_inner
    begins = section(buffer, layout.child_begin, inner + 1, f"i{layout.index_bytes}")
    _check_child_begin(begins, layout)
    rank = None
    if layout.leaf_rank:
        rank = section(buffer, layout.leaf_rank, inner + 1, np.int32).astype(np.int64)
    _check_leaf_rank(rank, layout)
    _check_fanout(begins, rank, layout)
    ends = [_check_tokens(buffer, begins, layout, level) for level in range(layout.max_length)]
    if max(ends) != layout.vocab_size:
        _damaged(f"vocab_size = {layout.vocab_size}, but the largest token is {max(ends) - 1}")
    _check_items(buffer, layout)
    return ends


def _damaged(what: str) -> None:
    raise ValueError(f"damaged prefix tree: {what}")


def _first(wrong: npt.NDArray[np.bool_]) -> int:
    """Index of the first true value, -1 if there is none."""
    index = int(wrong.argmax()) if len(wrong) else 0
    return index if len(wrong) and wrong[index] else -1


def _stored(buffer: Buffer, layout: TreeLayout, level: int) -> npt.NDArray[Any]:
    count = layout.node_begin[level + 2] - layout.node_begin[level + 1]
    return section(buffer, layout.token_offset[level], count, f"u{layout.token_bytes[level]}")


def _check_child_begin(begins: npt.NDArray[Any], layout: TreeLayout) -> None:
    first = layout.node_begin
    bounds = dict(pairwise(first))
    falls = np.zeros(len(begins), dtype=bool)
    falls[1:] = begins[1:] < begins[:-1]
    falls[list(bounds)] = False
    fall = _first(falls)
    for index, expected in bounds.items():
        if 0 <= fall < index:
            break
        if begins[index] != expected:
            _damaged(f"child_begin[{index}] must be {expected}; got {begins[index]}")
        if index > 0 and begins[index - 1] > expected:
            before = begins[index - 1]
            _damaged(f"child_begin[{index - 1}] must be at most {expected}; got {before}")
    if fall >= 0:
        _damaged(f"child_begin[{fall}] = {begins[fall]} is below the one before it")


def _check_leaf_rank(rank: npt.NDArray[np.int64] | None, layout: TreeLayout) -> None:
    shallow = 0
    if rank is not None:
        step = np.diff(rank, prepend=0)
        most = np.ones_like(rank)
        most[:2] = 0  # no identifier ends at the root
        wrong = _first((step < 0) | (step > most))
        if wrong >= 0:
            _damaged(f"leaf_rank[{wrong}] = {rank[wrong]} does not count leaves")
        shallow = int(rank[-1])
        if shallow == 0:
            _damaged("leaf_rank counts no leaf")
    found = shallow + layout.num_nodes - layout.num_inner
    if found != layout.num_leaves:
        _damaged(f"num_leaves = {layout.num_leaves}, but there are {found}")


def _check_fanout(
    begins: npt.NDArray[Any], rank: npt.NDArray[np.int64] | None, layout: TreeLayout
) -> None:
    children = np.diff(begins)
    dead = children == 0
    if rank is not None:
        dead &= np.diff(rank) == 0
    for depth, (begin, end) in enumerate(pairwise(layout.node_begin[:-1])):
        node = _first(dead[begin:end])
        if node >= 0:
            _damaged(f"node {begin + node} has no child and ends no identifier")
        most, said = int(children[begin:end].max()), layout.max_children[depth]
        if most != said:
            _damaged(f"max_children[{depth}] = {said}, but it is {most}")


def _check_tokens(buffer: Buffer, begins: npt.NDArray[Any], layout: TreeLayout, level: int) -> int:
    first, base = layout.node_begin[level + 1], layout.token_base[level]
    stored = _stored(buffer, layout, level)
    starts = begins[layout.node_begin[level] : first] - first
    wrong = np.zeros(len(stored), dtype=bool)
    wrong[1:] = stored[1:] <= stored[:-1]
    wrong[starts[starts < len(stored)]] = False  # a node's first child follows another's last
    node = _first(wrong)
    if node >= 0:
        _damaged(f"the token of node {first + node} is not above the one of the child before it")
    low, high = int(stored.min()), int(stored.max())
    if low:
        _damaged(f"token_base[{level}] = {base}, but the smallest token is {base + low}")
    if base + high > MAX_TOKEN:
        _damaged(f"token_base[{level}] = {base} makes a token of {base + high}")
    return base + high + 1


def _check_items(buffer: Buffer, layout: TreeLayout) -> None:
    ids = layout.num_items
    items = section(buffer, layout.item_ids, layout.num_entries, np.int32)
    wrong = _first((items < 0) | (items >= ids))
    if wrong >= 0:
        _damaged(f"item_ids[{wrong}] must be 0..{ids - 1}; got {items[wrong]}")
    order = np.argsort(items, kind="stable")
    ascending = items[order]
    if ascending[-1] != ids - 1:
        _damaged(f"num_items = {ids}, but the largest item id is {ascending[-1]}")
    twice = order[1:][ascending[1:] == ascending[:-1]]
    if len(twice):
        _damaged(f"item_ids[{twice.min()}] = {items[twice.min()]} is there twice")
    if not layout.item_begin:
        return
    entries, leaves = layout.num_entries, layout.num_leaves
    begin = section(buffer, layout.item_begin, leaves + 1, np.int32)
    if begin[0] != 0:
        _damaged(f"item_begin[0] must be 0; got {begin[0]}")
    leaf = _first((begin[1:] <= begin[:-1]) | (begin[1:] > entries))
    falls = np.zeros(entries, dtype=bool)
    falls[1:] = items[1:] < items[:-1]
    sound = begin if leaf < 0 else begin[: leaf + 1]
    falls[sound[sound < entries]] = False
    entry = _first(falls if leaf < 0 else falls[: begin[leaf]])
    if entry >= 0:
        _damaged(f"item_ids[{entry}] = {items[entry]} is below the one before it of its leaf")
    if leaf >= 0:
        _damaged(
            f"item_begin[{leaf + 1}] = {begin[leaf + 1]} is not above the one before it, or beyond "
            "the items"
        )
    if begin[leaves] != entries:
        _damaged(f"item_begin[{leaves}] must be {entries}; got {begin[leaves]}")
