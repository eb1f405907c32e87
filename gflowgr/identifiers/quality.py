"""Measures of identifiers: collisions, use of the codes, agreement with item spaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gflowgr.data.index import Identifiers
from gflowgr.identifiers.quantisation import checked_vectors
from gflowgr.report.tables import Table, TableCell, render_table

_BLOCK = 1024  # rows of similarities at a time


@dataclass(frozen=True)
class Agreement:
    """Whether items with the same first tokens are neighbours in a space of item vectors.

    Attributes:
        neighbours: share of each item's k nearest neighbours that have the item's first token, its
            first two tokens, and so on; the mean over items.
        chance: the same share among all other items.
    """

    neighbours: tuple[float, ...]
    chance: tuple[float, ...]


@dataclass(frozen=True)
class Quality:
    """Measures of one set of identifiers.

    Attributes:
        items: number of items.
        levels: most tokens of an identifier.
        sharing: items that share their identifier with another one.
        groups: identifiers with several items.
        largest_group: items of the most crowded identifier.
        codes_used: different tokens per level.
        perplexity: per level, exp of the entropy of the tokens over items: how many equally
            frequent tokens would be as varied.
        prefixes: different prefixes per length 1 .. L.
        frequencies: per level, items per token, the most frequent first.
        agreement: by space, such as "text" and "cf".
    """

    items: int
    levels: int
    sharing: int
    groups: int
    largest_group: int
    codes_used: tuple[int, ...]
    perplexity: tuple[float, ...]
    prefixes: tuple[int, ...]
    frequencies: tuple[tuple[int, ...], ...]
    agreement: dict[str, Agreement]

    @property
    def collision_rate(self) -> float:
        """Share of the items that share their identifier with another one."""
        return self.sharing / self.items

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; without the frequencies, which plots need only."""
        values = asdict(self) | {"collision_rate": self.collision_rate}
        del values["frequencies"]
        return values


def nearest_neighbours(vectors: np.ndarray, k: int = 10) -> np.ndarray:
    """The k items of greatest cosine to each item, itself left out.

    Args:
        vectors: float [items, d], finite; a zero vector has cosine 0 with all.
        k: how many; fewer where there are no more items.

    Returns:
        int64 [items, min(k, items - 1)], nearest first; ties go to the smaller item id.

    Raises:
        ValueError: a wrong shape, a vector that is not finite, k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    unit = checked_vectors(vectors, "vectors")
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    count = len(unit)
    k = min(k, count - 1)
    result = np.empty((count, k), dtype=np.int64)
    for start in range(0, count if k else 0, _BLOCK):
        # Rounded, so that equal vectors tie whatever the order of the sums was.
        cosine = np.round(unit[start : start + _BLOCK] @ unit.T, 5)
        rows = np.arange(len(cosine))
        cosine[rows, start + rows] = -np.inf
        last = -np.partition(-cosine, k - 1, axis=1)[:, k - 1]
        for row in rows:
            found = np.flatnonzero(cosine[row] >= last[row])
            order = np.argsort(-cosine[row, found], kind="stable")
            result[start + row] = found[order[:k]]
    return result


def measure_quality(
    identifiers: Identifiers,
    neighbours: Mapping[str, np.ndarray] | None = None,
    *,
    depth: int = 2,
) -> Quality:
    """Measure identifiers.

    Args:
        identifiers: of all items.
        neighbours: by space, the nearest neighbours of each item, [items, k]
            (:func:`nearest_neighbours`).
        depth: prefix lengths 1 .. depth for which the agreement is measured.

    Raises:
        ValueError: neighbours of another number of items.
    """
    codes = identifiers.codes
    items, levels = codes.shape
    groups = [_prefix_groups(codes, length) for length in range(1, levels + 1)]
    sizes = np.bincount(groups[-1])
    frequencies = [
        np.sort(np.bincount(column[column >= 0]))[::-1] for column in codes.T.astype(np.int64)
    ]
    agreement = {}
    for space, near in (neighbours or {}).items():
        if len(near) != items:
            raise ValueError(
                f"neighbours[{space!r}] has {len(near):,} rows, there are {items:,} items"
            )
        shares = [_agreement(group, near) for group in groups[:depth]]
        agreement[space] = Agreement(
            tuple(share for share, _ in shares), tuple(chance for _, chance in shares)
        )
    return Quality(
        items=items,
        levels=levels,
        sharing=int(sizes[sizes > 1].sum()),
        groups=int((sizes > 1).sum()),
        largest_group=int(sizes.max()),
        codes_used=tuple(identifiers.level_sizes),
        perplexity=tuple(_perplexity(counts) for counts in frequencies),
        prefixes=tuple(int(group.max()) + 1 for group in groups),
        frequencies=tuple(tuple(counts.tolist()) for counts in frequencies),
        agreement=agreement,
    )


def quality_table(rows: Mapping[str, Quality], *, style: str = "text") -> str:
    """A table of several sets of identifiers, one per row.

    Args:
        rows: by name, in the order shown.
        style: "text" (aligned for a terminal) or "markdown".

    Raises:
        ValueError: unknown style, or no rows.
    """
    if not rows:
        raise ValueError("rows must not be empty")
    spaces = list(dict.fromkeys(space for row in rows.values() for space in row.agreement))
    header = ["identifiers", "sharing", "largest", "codes used", "perplexity", "prefixes"]
    header += [f"{space}, first {n}" for space in spaces for n in ("token", "two tokens")]
    lines = []
    for name, row in rows.items():
        line = [
            name,
            f"{row.sharing:,} ({row.collision_rate:.2%})",
            str(row.largest_group),
            _list(row.codes_used),
            _list(round(value) for value in row.perplexity),
            _list(row.prefixes),
        ]
        for space in spaces:
            line += [_share(row.agreement.get(space), place) for place in range(2)]
        lines.append([TableCell(text) for text in line])
    return render_table(Table("", header, lines), style)


def table_note(k: int | None = None) -> str:
    """Notes on the columns of :func:`quality_table`; ``k`` neighbours, or None without spaces."""
    note = (
        "sharing: items that share their identifier with another one; largest: items of the\n"
        "most crowded identifier; codes used, perplexity: per level; prefixes: different ones\n"
        "per length."
    )
    if k is not None:
        note += (
            f"\nLast columns: share of each item's {k} nearest neighbours (cosine) in the space\n"
            "with the same first token(s); in brackets, how many times the share among all items."
        )
    return note


def _share(agreement: Agreement | None, place: int) -> str:
    if agreement is None or place >= len(agreement.neighbours):
        return "-"
    share, chance = agreement.neighbours[place], agreement.chance[place]
    return f"{share:.3f} ({share / chance:.0f}x)" if chance > 0 else f"{share:.3f} (-)"


def _list(values: Any) -> str:
    return " / ".join(f"{value}" for value in values)


def _prefix_groups(codes: np.ndarray, length: int) -> np.ndarray:
    """int64 [items]: which of the different prefixes of ``length`` an item has."""
    return np.unique(codes[:, :length], axis=0, return_inverse=True)[1].reshape(-1)


def _agreement(group: np.ndarray, near: np.ndarray) -> tuple[float, float]:
    sizes = np.bincount(group).astype(np.float64)
    pairs = len(group) * (len(group) - 1)
    chance = float((sizes * (sizes - 1)).sum() / pairs) if pairs else 0.0
    share = float((group[near] == group[:, None]).mean()) if near.size else 0.0
    return share, chance


def _perplexity(counts: Sequence[int] | np.ndarray) -> float:
    share = np.asarray(counts, np.float64) / np.sum(counts)
    return float(np.exp(-(share * np.log(share)).sum()))
