"""The items each prompt may get: availability for all, exclusions for one, pruned up the tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gflowgr.tree.layout import TreeLayout

if TYPE_CHECKING:
    from gflowgr.tree.prefix_tree import PrefixTree


__all__ = [
    "Admissible",
    "admissible_for",
    "any_in_ranges",
    "check_available",
    "check_rules",
    "live_nodes",
]


_NONE = torch.iinfo(torch.int64).max
"""Key of no pair; it comes after all others."""


class _Pairs:
    """A set of (prompt, id) pairs with ids in 0..size - 1, as sorted int64 keys.

    A ``static`` one may end in empty places, where ``present`` is false, and row and id are 0.
    """

    def __init__(
        self,
        rows: Tensor,
        ids: Tensor,
        size: int,
        real: Tensor,
        *,
        static: bool,
        most: int | None = None,
    ) -> None:
        self.size = size
        self.keys, self.counts = _distinct(rows * size + ids, real, most, static)
        self.present = self.keys != _NONE
        known = torch.where(self.present, self.keys, 0)
        self.rows, self.ids = known // size, known % size

    def find(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each pair is in the set, and where; ids outside the range are not."""
        if self.keys.numel() == 0:
            nowhere = torch.zeros_like(ids)
            return nowhere.bool(), nowhere
        wanted = rows * self.size + ids
        place = torch.searchsorted(self.keys, wanted).clamp_max(self.keys.numel() - 1)
        return (self.keys[place] == wanted) & (ids >= 0) & (ids < self.size), place

    def hit(self, ids: Tensor) -> Tensor:
        """Whether (b, ids[b, ...]) is in the set, bool of the shape of ``ids`` [B, ...]."""
        rows = torch.arange(ids.shape[0], device=ids.device)
        return self.find(rows.reshape(-1, *[1] * (ids.dim() - 1)), ids)[0]


def _distinct(keys: Tensor, real: Tensor, most: int | None, static: bool) -> tuple[Tensor, Tensor]:
    """The distinct real keys, ascending, and how often each occurs.

    Static: without reading how many there are. That would wait for a GPU, and the shapes could not
    be those of the next call. So there are as many places as keys, or ``most``, and the last ones
    are empty.
    """
    if not static:
        once, counts = keys[real].unique(return_counts=True)
        return once, counts
    keys = torch.where(real, keys, _NONE).flatten().sort().values
    again = torch.zeros_like(keys, dtype=torch.bool)
    again[1:] = keys[1:] == keys[:-1]
    once = keys.masked_fill(again, _NONE).sort().values[:most]
    return once, torch.searchsorted(keys, once, right=True) - torch.searchsorted(keys, once)


@dataclass(frozen=True)
class Admissible:
    """The nodes and leaves that may be returned: masks for all prompts, and bars for each prompt.

    None stands for no restriction of that kind. A barred leaf has no admissible item left, a
    barred node no admissible leaf at or below it.
    """

    items: Tensor | None = None
    leaves: Tensor | None = None
    nodes: Tensor | None = None
    barred_items: _Pairs | None = None
    barred_leaves: _Pairs | None = None
    barred_nodes: _Pairs | None = None

    def filter(self, kind: Literal["items", "leaves", "nodes"], ids: Tensor) -> Tensor:
        """Whether each prompt may get ``ids`` [B, ...]; undefined for ids that do not exist."""
        allowed: Tensor | None = getattr(self, kind)
        barred: _Pairs | None = getattr(self, f"barred_{kind}")
        keep = torch.ones_like(ids, dtype=torch.bool)
        if allowed is not None:
            keep &= allowed[ids.clamp(0, allowed.numel() - 1)]
        return keep if barred is None else keep & ~barred.hit(ids)


def admissible_for(
    tree: PrefixTree,
    batch: int,
    available: Tensor | None,
    exclude: Tensor | None,
    *,
    look: bool = True,
    static: bool = False,
) -> Admissible:
    """Prune the tree: once by ``available``, then for each prompt by ``exclude``, leaves upwards.

    Every prompt keeps at most E nodes per level, so nothing of size [B, nodes] is made.

    Args:
        tree: the prefix tree.
        batch: number of prompts B.
        available: true for items that any prompt may get [items], or None for all.
        exclude: items that a prompt may not get [B, E], -1 for padding, or None.
        look: whether to read ``exclude`` for items that do not exist, which waits for a GPU; else
            they count as padding.
        static: whether shapes are to depend on shapes alone, and nothing is read, at some more
            work; always so on a GPU.

    Raises:
        TypeError: ``available`` is not bool, or ``exclude`` not of integers.
        ValueError: one is of a wrong shape, or ``exclude`` names an item that does not exist.
    """
    check_rules(tree, batch, available, exclude, look)
    device = tree.device
    static = static or device.type != "cpu"
    items = None if available is None else available.to(device)
    nodes = None if items is None else tree.available_nodes(items)
    left_items = None if items is None else _counts_before(items[tree.item_ids.long()])
    left_nodes = None if nodes is None else _counts_before(nodes)
    leaves = None
    if left_items is not None:
        leaves = _in_range(left_items, *tree.leaf_items(torch.arange(tree.num_leaves).to(device)))
        leaves = leaves > 0
    if exclude is None:
        return Admissible(items, leaves, nodes)

    exclude = exclude.to(device).long()
    rows = torch.arange(exclude.shape[0], device=device).unsqueeze(1).expand_as(exclude)
    known = (exclude >= 0) & (exclude < tree.num_items)
    barred_items = _Pairs(rows, exclude, tree.num_items, known, static=static)
    rows, ids = barred_items.rows, barred_items.ids
    leaf = tree.leaf_map()[ids].long()  # which reads nothing, and the ids are there
    counted = barred_items.present & (leaf >= 0)
    if items is not None:
        counted &= items[ids]
    touched = _Pairs(rows, leaf, tree.num_leaves, counted, static=static)
    full = touched.counts == _in_range(left_items, *tree.leaf_items(touched.ids))
    full &= touched.present
    barred_leaves = _Pairs(touched.rows, touched.ids, tree.num_leaves, full, static=static)

    # A barred node has a barred leaf, and nodes of one level share none: no level has more of them.
    most = touched.keys.numel()
    leaf_rows, leaf_nodes = barred_leaves.rows, tree.leaf_nodes(barred_leaves.ids)
    nothing = torch.zeros_like(leaf_rows)
    # The barred nodes one level deeper.
    below = _Pairs(nothing, nothing, tree.num_nodes, nothing.bool(), static=static)
    levels = []
    bounds = tree.layout.node_begin
    for depth in range(tree.max_length, 0, -1):
        above = tree.parents(below.ids)
        parents = _Pairs(below.rows, above, tree.num_nodes, below.present, static=static)
        here = (leaf_nodes >= bounds[depth]) & (leaf_nodes < bounds[depth + 1])
        suspects = _Pairs(
            torch.cat([parents.rows, leaf_rows]),
            torch.cat([parents.ids, leaf_nodes]),
            tree.num_nodes,
            torch.cat([parents.present, here & barred_leaves.present]),
            static=static,
            most=most,
        )
        rows, ids = suspects.rows, suspects.ids
        found, place = parents.find(rows, ids)
        gone = torch.zeros_like(ids)
        if parents.keys.numel():
            gone = torch.where(found, parents.counts[place], 0)
        own = tree.terminal(ids)
        ends = (own >= 0) & ~barred_leaves.find(rows, own)[0]
        if leaves is not None:
            ends &= leaves[own.clamp_min(0)]
        barred = (gone == _in_range(left_nodes, *tree.child_ranges(ids))) & ~ends
        below = _Pairs(rows, ids, tree.num_nodes, barred & suspects.present, static=static)
        levels.append(below)
    barred_nodes = _Pairs(
        torch.cat([level.rows for level in levels]),
        torch.cat([level.ids for level in levels]),
        tree.num_nodes,
        torch.cat([level.present for level in levels]),
        static=static,
    )
    return Admissible(items, leaves, nodes, barred_items, barred_leaves, barred_nodes)


def _counts_before(flags: Tensor) -> Tensor:
    """Number of true flags before each position, int64 [n + 1]."""
    return torch.nn.functional.pad(flags.long().cumsum(0), (1, 0))


def _in_range(counts_before: Tensor | None, begin: Tensor, end: Tensor) -> Tensor:
    """Number of counted positions in begin..end; all of them without counts."""
    return end - begin if counts_before is None else counts_before[end] - counts_before[begin]


def check_rules(
    tree: PrefixTree, batch: int, available: Tensor | None, exclude: Tensor | None, look: bool
) -> None:
    """Raise what :func:`admissible_for` raises."""
    if available is not None:
        if available.dtype != torch.bool:
            raise TypeError(f"available must be bool [items]; got {available.dtype}")
        if available.shape != (tree.num_items,):
            raise ValueError(
                f"available must be [items] = ({tree.num_items},); got {tuple(available.shape)}"
            )
    if exclude is None:
        return
    if exclude.dtype == torch.bool or exclude.is_floating_point() or exclude.is_complex():
        raise TypeError(f"exclude must hold integer item ids; got {exclude.dtype}")
    if exclude.dim() != 2 or exclude.shape[0] != batch:
        raise ValueError(f"exclude must be [B, E] with B = {batch}; got {tuple(exclude.shape)}")
    if (
        look
        and exclude.numel()
        and not -1 <= int(exclude.min()) <= int(exclude.max()) < tree.num_items
    ):
        raise ValueError(
            f"exclude must hold items 0..{tree.num_items - 1}, or -1; "
            f"got {int(exclude.min())}..{int(exclude.max())}"
        )


def check_available(available: Any, num_items: int, device: torch.device) -> Tensor:
    """``available`` as bool [num_items] on the device; TypeError or ValueError if it is not."""
    checked = torch.as_tensor(available, device=device)
    if checked.dtype != torch.bool:
        raise TypeError(f"available must be bool; got {checked.dtype}")
    if checked.shape != (num_items,):
        raise ValueError(f"available must have shape [{num_items}]; got {list(checked.shape)}")
    return checked


def any_in_ranges(flags: Tensor, begins: Tensor) -> Tensor:
    """Whether any of ``flags`` is set in ``begins[i]:begins[i + 1]``, bool [len(begins) - 1]."""
    # The width that counts the nodes counts these flags too; int32 halves the memory traffic.
    count = torch.zeros(flags.numel() + 1, dtype=begins.dtype, device=flags.device)
    torch.cumsum(flags, 0, dtype=begins.dtype, out=count[1:])
    at = count.index_select(0, begins)
    return at[1:] > at[:-1]


def live_nodes(
    layout: TreeLayout, begins: Tensor, leaf_rank: Tensor | None, leaf_live: Tensor
) -> Tensor:
    """Nodes with a live leaf at or below them, bool [num_nodes].

    ``begins`` and ``leaf_rank`` are the tree's sections, ``leaf_live`` is bool [num_leaves]. From
    the deepest level up: a node lives if its identifier is live or any of its children is.
    """
    inner, first = layout.num_inner, layout.node_begin
    live = torch.zeros(layout.num_nodes, dtype=torch.bool, device=leaf_live.device)
    if leaf_rank is None:
        live[inner:] = leaf_live
    else:
        shallow = int(leaf_rank[-1])
        live[:inner][leaf_rank[1:] > leaf_rank[:-1]] = leaf_live[:shallow]
        live[inner:] = leaf_live[shallow:]
    for depth in range(layout.max_length - 1, -1, -1):
        here, below, end = first[depth], first[depth + 1], first[depth + 2]
        live[here:below] |= any_in_ranges(live[below:end], begins[here : below + 1] - below)
    return live
