"""A prefix tree of dictionaries and lists: the oracle of PrefixTree, simple and slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

Identifier = tuple[int, ...]


class DictTrie:
    """Every prefix of every identifier, numbered by (length, tokens): breadth-first."""

    def __init__(self, identifiers: Sequence[Identifier], items: Sequence[int]) -> None:
        self.items_of: dict[Identifier, list[int]] = {}
        for identifier, item in zip(identifiers, items, strict=True):
            self.items_of.setdefault(identifier, []).append(item)
        found = {ids[:k] for ids in self.items_of for k in range(len(ids) + 1)}
        self.prefixes = sorted(found, key=lambda prefix: (len(prefix), prefix))
        self.node = {prefix: number for number, prefix in enumerate(self.prefixes)}
        self.leaves = [prefix for prefix in self.prefixes if prefix in self.items_of]

    def walk(self, row: Sequence[int], mask: Sequence[bool] | None = None) -> list[int]:
        """Node after each token, -1 from the first invalid or masked one on."""
        nodes = []
        for k in range(len(row)):
            alive = mask is None or all(mask[: k + 1])
            nodes.append(self.node.get(tuple(row[: k + 1]), -1) if alive else -1)
        return nodes

    def children(self, prefix: Identifier) -> list[Identifier]:
        """The longer-by-one prefixes under ``prefix``, by token."""
        size = len(prefix)
        return [p for p in self.prefixes if len(p) == size + 1 and p[:size] == prefix]

    def leaf(self, identifier: Identifier) -> int:
        """Number of a complete identifier, or -1."""
        return self.leaves.index(identifier) if identifier in self.items_of else -1

    def is_live(self, prefix: Identifier, available: Sequence[bool]) -> bool:
        """Whether an available item is left below ``prefix``."""
        size = len(prefix)
        return any(
            available[item]
            for identifier, items in self.items_of.items()
            if identifier[:size] == prefix
            for item in items
        )


@dataclass(frozen=True)
class Catalogue:
    """Identifiers with their items, and rows of tokens to look up (right and wrong ones)."""

    identifiers: list[Identifier]
    items: list[int]
    default_items: bool
    queries: list[list[int]]
    masks: list[list[bool]]

    @property
    def oracle(self) -> DictTrie:
        """The dictionary trie of this catalogue."""
        return DictTrie(self.identifiers, self.items)


@st.composite
def catalogues(draw: st.DrawFn, *, max_rows: int = 24) -> Catalogue:
    """Small catalogues of every kind: ragged or not, shared or not, narrow and wide codes."""
    length = draw(st.integers(1, 5))
    codes = draw(st.sampled_from([1, 2, 3, 300, 70_000]))
    offset = draw(st.sampled_from([0, 2, 1000, 2**31 - 80_000]))
    shortest = draw(st.sampled_from([1, length]))
    token = st.integers(offset, offset + codes - 1)
    row = st.lists(token, min_size=shortest, max_size=length)
    identifiers = draw(st.lists(row.map(tuple), min_size=1, max_size=max_rows))
    count = len(identifiers)
    default_items = draw(st.booleans())
    items = list(range(count))
    if not default_items:
        items = draw(
            st.lists(st.integers(0, 3 * count), min_size=count, max_size=count, unique=True)
        )
    width = length + draw(st.integers(0, 1))
    known = st.sampled_from(identifiers).map(lambda ids: [*ids, *[-1] * (width - len(ids))])
    near = st.integers(max(-1, offset - 2), min(offset + codes + 1, 2**31 - 1))
    wrong = st.lists(near, min_size=width, max_size=width)
    queries = draw(st.lists(known | wrong, min_size=1, max_size=12))
    flags = st.lists(st.booleans(), min_size=width, max_size=width)
    masks = draw(st.lists(flags, min_size=len(queries), max_size=len(queries)))
    return Catalogue(identifiers, items, default_items, queries, masks)
