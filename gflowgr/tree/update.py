"""A tree with items added or removed, made from the old one by merging; nothing is sorted anew.

The identifiers of a tree, read depth first, are in sorted order; so are the added ones once they
are sorted among themselves. Merging the two is linear in the tree, and gives the very bits that
building from all identifiers would. The C++ (``csrc/tree/tree_merge.h``) does not hold the rows;
the NumPy form of it, where that was not built, does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gflowgr.tree.build import explain, host_module, item_array, token_array
from gflowgr.tree.check import check_numpy, read_layout
from gflowgr.tree.layout import Buffer, IdentifierError, TreeLayout, assemble, check_tokens, section

_NO_TOKENS = np.empty((0, 1), dtype=np.int64)
_NO_ITEMS = np.empty(0, dtype=np.int64)


def updated(
    buffer: Tensor, tokens: Any = None, items: Any = None, *, removed: Any = None
) -> Buffer | None:
    """The buffer of a tree without ``removed`` and with ``items`` of identifiers ``tokens``.

    Removals come first, so an item may be removed and added: it gets another identifier.

    Args:
        buffer: the old tree's, on the CPU; only read.
        tokens: as for ``PrefixTree.from_identifiers`` [rows, L]; None or no rows: nothing is added.
        items: ids [rows] of the added items, distinct and not in the tree.
        removed: ids of items in the tree, distinct.

    Returns:
        The new buffer, or None when there is nothing to do.

    Raises:
        TypeError: tokens or items are not integers.
        ValueError: a damaged tree; a bad identifier; an id given twice, added though it is there,
            or removed though it is not (the lowest such id is named); no item would be left.
    """
    gone = _ids(removed, "removed")
    if tokens is None or len(tokens) == 0:
        if items is not None and len(items):
            raise ValueError(f"items: {len(items)} ids, but tokens has no rows")
        if len(gone) == 0:
            return None
        array, ids = _NO_TOKENS, _NO_ITEMS
    else:
        array = token_array(tokens)
        ids = item_array(items, array.shape[0])
    host = host_module()
    old = buffer.numpy()
    layout = read_layout(old)
    try:
        if host is None:
            check_numpy(old, layout)
            return _update_numpy(old, layout, array, ids, gone)
        new, error = host.update_tree(old, array, ids, gone)
        if error is not None:
            raise IdentifierError(*error)
        return np.asarray(new)
    except IdentifierError as error:
        raise ValueError(explain(error, array)) from None


def _ids(items: Any, name: str) -> npt.NDArray[np.int64]:
    if items is None or len(items) == 0:
        return _NO_ITEMS
    return item_array(items, len(items), name=name)


def _update_numpy(
    old: Buffer,
    layout: TreeLayout,
    tokens: npt.NDArray[Any],
    items: npt.NDArray[np.int64],
    removed: npt.NDArray[np.int64],
) -> Buffer:
    """The reference; see :func:`updated`."""
    old_tokens, old_items = _rows(old, layout)
    keep = ~np.isin(old_items, removed)
    if (~keep).sum() < len(removed):
        raise IdentifierError("absent", int(np.setdiff1d(removed, old_items).min()), 0)
    old_tokens, old_items = old_tokens[keep], old_items[keep]
    present = np.intersect1d(items, old_items)
    if len(present):
        raise IdentifierError("present", int(present[0]), 0)
    check_tokens(tokens)
    if len(old_items) + len(items) == 0:
        raise IdentifierError("nothing", 0, 0)

    length = max(old_tokens.shape[1], tokens.shape[1])
    old_keys, keys = (
        _keys(_widened(rows, length), ids)
        for rows, ids in ((old_tokens, old_items), (tokens, items))
    )
    order = np.argsort(keys)
    places = np.searchsorted(old_keys, keys[order])
    merged = np.insert(
        _widened(old_tokens, length), places, _widened(tokens, length)[order], axis=0
    )
    ids = np.insert(old_items, places, items[order])

    merged = merged[:, : int((merged >= 0).sum(1).max())]
    real = merged >= 0
    base = np.where(real, merged, np.iinfo(np.int64).max).min(0)
    codes = np.where(real, merged - base + 1, 0).astype(np.uint64)
    return assemble(codes, ids, base=base, high=merged.max(0), num_items=int(ids.max()) + 1)


def _rows(buffer: Buffer, layout: TreeLayout) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Tokens [entries, L] (-1 beyond the end) and item ids [entries], in sorted order."""
    inner, first = layout.num_inner, layout.node_begin
    begins = section(buffer, layout.child_begin, inner + 1, f"i{layout.index_bytes}").astype(int)
    ends = np.ones(layout.num_nodes, dtype=np.int64)  # leaves at each node
    ends[:inner] = 0
    if layout.leaf_rank:
        ends[:inner] = np.diff(section(buffer, layout.leaf_rank, inner + 1, np.int32))
    own = ends.copy()  # entries at each node, then (size) at or below it
    if layout.item_begin:
        begin = section(buffer, layout.item_begin, layout.num_leaves + 1, np.int32)
        own[ends > 0] = np.diff(begin)
    size = own.copy()
    for depth in range(layout.max_length - 1, -1, -1):
        nodes = slice(first[depth], first[depth + 1])
        before = _before(size[first[depth + 1] : first[depth + 2]])
        bounds = begins[first[depth] : first[depth + 1] + 1] - first[depth + 1]
        size[nodes] += np.diff(before[bounds])

    # A node's entries, its own first, then those of its children, are a run: `start` is where.
    start = np.zeros(layout.num_nodes, dtype=np.int64)
    tokens = np.full((layout.num_entries, layout.max_length), -1, dtype=np.int64)
    for level in range(layout.max_length):
        nodes = slice(first[level], first[level + 1])
        below = slice(first[level + 1], first[level + 2])
        bounds = begins[first[level] : first[level + 1] + 1] - first[level + 1]
        before = _before(size[below])
        shift = start[nodes] + own[nodes] - before[bounds[:-1]]
        start[below] = before[:-1] + np.repeat(shift, np.diff(bounds))
        count = first[level + 2] - first[level + 1]
        stored = section(buffer, layout.token_offset[level], count, f"u{layout.token_bytes[level]}")
        values = stored.astype(np.int64) + layout.token_base[level]
        tokens[_runs(start[below], size[below]), level] = np.repeat(values, size[below])
    items = np.empty(layout.num_entries, dtype=np.int64)
    items[_runs(start, own)] = section(buffer, layout.item_ids, layout.num_entries, np.int32)
    return tokens, items


def _before(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sum of the counts before each place, [n + 1]."""
    return np.concatenate([[0], np.cumsum(counts)])


def _runs(start: npt.NDArray[np.int64], count: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The places start[i] .. start[i] + count[i] - 1 of all runs, one after the other."""
    before = _before(count)
    return np.repeat(start - before[:-1], count) + np.arange(before[-1])


def _widened(tokens: npt.NDArray[Any], length: int) -> npt.NDArray[np.int64]:
    missing = length - tokens.shape[1]
    return np.pad(tokens.astype(np.int64), ((0, 0), (0, missing)), constant_values=-1)


def _keys(tokens: npt.NDArray[np.int64], items: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A key for each row that sorts as (tokens, item): big-endian bytes, 0 where it has ended."""
    columns = np.concatenate([tokens + 1, items[:, None]], axis=1).astype(">u4")
    return np.ascontiguousarray(columns).view(f"S{4 * columns.shape[1]}")[:, 0]
