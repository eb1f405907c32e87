"""Collisions: unique or shared identifiers for items whose codes are all the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np

from gflowgr.identifiers.quantisation import (
    Quantisation,
    blocks,
    number_within_group,
    squared_distances,
)

Collisions = Literal["reassign", "extra", "shared"]


def resolve_collisions(quantised: Quantisation, how: Collisions) -> np.ndarray:
    """Identifiers of all items.

    Args:
        quantised: codes [items, L], with the vectors and codebooks [L, K, d] that they come from.
        how: ``"reassign"``: among items that share all codes, the one nearest to its last code
            keeps it and the others move to the nearest free code of the last level. Where more
            than K items share the first L - 1 codes, the farthest of them move to another code of
            level L - 1 first (and so on upwards), and are coded anew below it.
            ``"extra"``: one more token, the item's number (0, 1, ...) within its group in the order
            of item ids; 0 for an item that is alone.
            ``"shared"``: the codes as they are; items that share an identifier are one leaf.

    Returns:
        int32 [items, L], or [items, L + 1] for ``"extra"``. Unique per item but for ``"shared"``.
        Ties are broken by the smaller item id, then the smaller code.

    Raises:
        ValueError: another ``how``, or ``"reassign"`` with more items than identifiers (K ** L).
    """
    if how not in get_args(Collisions):
        raise ValueError(f"collisions must be one of {get_args(Collisions)}; got {how!r}")
    if how == "shared":
        return quantised.codes.copy()
    if how == "extra":
        return np.column_stack([quantised.codes, number_within_group(quantised.codes)])
    return _reassign(quantised)


def _reassign(quantised: Quantisation) -> np.ndarray:
    """Top down: below a code there is room for K ** (levels below it) items, and no more."""
    levels, size, _ = quantised.codebooks.shape
    codes = quantised.codes.copy()
    _check_room(len(codes), levels, size)
    residual = quantised.vectors.copy()
    moved = np.zeros(len(codes), dtype=bool)
    for level, codebook in enumerate(quantised.codebooks):
        anew = np.flatnonzero(moved)
        for block in blocks(len(anew)):
            rows = anew[block]
            codes[rows, level] = squared_distances(residual[rows], codebook).argmin(axis=1)
        room = size ** (levels - 1 - level)
        for items in _crowded(codes[:, : level + 1], room):
            cost = squared_distances(residual[items], codebook)
            places = _spread(cost, codes[items, level], room)
            moved[items[places != codes[items, level]]] = True
            codes[items, level] = places
        residual -= codebook[codes[:, level]]
    return codes


def _check_room(items: int, levels: int, size: int) -> None:
    if items <= size**levels:
        return
    wider = next(k for k in itertools.count(2) if k**levels >= items)
    ways = [f"codebook_size = {wider} or more"]
    if size > 1:
        deeper = next(n for n in itertools.count(levels) if size**n >= items)
        ways.append(f"levels = {deeper} or more")
    raise ValueError(
        f"{items:,} items cannot all differ in {levels} tokens of {size} codes each; use "
        f'{", ".join(ways)}, or collisions = "extra" or "shared"'
    )


def _crowded(codes: np.ndarray, room: int) -> Iterator[np.ndarray]:
    """Items (sorted) of each prefix with more than ``room`` items under one of its next codes.

    Args:
        codes: int [items, l]; the last column is the next code.
        room: items that fit under it.
    """
    if len(codes) <= room:
        return
    _, child, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    crowded = (counts > room)[child.reshape(-1)]
    if not crowded.any():
        return
    parents = codes[:, :-1]
    group = np.zeros(len(codes), dtype=np.int64)
    if parents.shape[1]:
        group = np.unique(parents, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 2))
    for parent in np.unique(group[crowded]):
        yield order[starts[parent] : starts[parent + 1]]


def _spread(cost: np.ndarray, codes: np.ndarray, room: int) -> np.ndarray:
    """New codes with at most ``room`` items each; the nearest items keep theirs.

    Args:
        cost: [n, K] distance of each item to each code; n <= K * room.
        codes: int [n], the code of each item so far.
        room: items that fit under a code.

    Returns:
        int [n]. The others move, the nearest pair of item and code with room first.
    """
    own = cost[np.arange(len(codes)), codes]
    nearest_first = np.lexsort((own, codes))
    rank = np.empty(len(codes), dtype=np.int64)
    rank[nearest_first] = number_within_group(codes[nearest_first, None])
    result = codes.copy()
    movers = np.flatnonzero(rank >= room)
    free = room - np.bincount(codes[rank < room], minlength=cost.shape[1])
    columns = np.flatnonzero(free > 0)
    placed = np.zeros(len(movers), dtype=bool)
    # A stable sort of the pairs in order of item, then code: that is how ties are broken.
    for pair in np.argsort(cost[np.ix_(movers, columns)], axis=None, kind="stable").tolist():
        mover, column = divmod(pair, len(columns))
        if placed[mover] or free[columns[column]] == 0:
            continue
        result[movers[mover]] = columns[column]
        placed[mover] = True
        free[columns[column]] -= 1
        if placed.all():
            break
    return result
