"""The prefix tree of the items' identifiers: one structure for decoding, sampling and losses."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gflowgr.errors import DataError
from gflowgr.tree.admissible import any_in_ranges, check_available, live_nodes
from gflowgr.tree.build import build, check_range, integer_tensor
from gflowgr.tree.continuations import AllowedTokens
from gflowgr.tree.export import ExportKind, exported
from gflowgr.tree.facts import accept, codebooks_of, moved
from gflowgr.tree.layout import Buffer, TreeLayout
from gflowgr.tree.storage import read_buffer, write_buffer
from gflowgr.tree.update import updated
from gflowgr.tree.walk import index_dtype, level_tokens, tree_walk, unsigned, view_section


class PrefixTree:
    """Immutable prefix tree (trie) over item identifiers, on one device, in one buffer.

    Nodes are numbered breadth-first over the whole tree: the root is 0, then level 1, level 2, ...;
    a node's children are the contiguous range ``child_ranges`` gives, sorted by token. Leaves
    (complete identifiers) are numbered in node order. An identifier may be a prefix of another, and
    several items may share one. The layout is described in ``gflowgr/tree/layout.py``.

    Everything is vectorised on the tree's device. "-1" always means "none": no node, leaf or item.
    """

    def __init__(self, buffer: Tensor, *, trust: bool = False) -> None:
        """Wrap the :attr:`buffer` of a tree (uint8 [nbytes], contiguous, at a multiple of 8 bytes).

        The whole structure is proved, once per buffer (0.1 s per 100 MB): the header's counts and
        offsets against each other and the size, then every child range, token, leaf and item id
        (:mod:`gflowgr.tree.check`). Raises ValueError naming the first value that is wrong,
        TypeError for what is no tensor.

        With ``trust`` only the header is looked at: for a buffer that you made yourself. One that
        is damaged then gives wrong results or ends the process.
        """
        layout = accept(buffer, trust=trust)
        self._codebooks = None if trust else codebooks_of(buffer)
        self._buffer = buffer
        self._layout = layout
        rows = layout.num_inner + 1
        self._begins = view_section(buffer, layout.child_begin, rows, index_dtype(layout))
        self._leaf_rank = (
            view_section(buffer, layout.leaf_rank, rows, torch.int32) if layout.leaf_rank else None
        )
        self._tokens = [level_tokens(buffer, layout, level) for level in range(layout.max_length)]
        self._item_ids = view_section(buffer, layout.item_ids, layout.num_entries, torch.int32)
        self._item_begin = (
            view_section(buffer, layout.item_begin, layout.num_leaves + 1, torch.int32)
            if layout.item_begin
            else None
        )
        self._leaf_of_item: Tensor | None = None

    # ------------------------------------------------------------------ making, saving, moving

    @classmethod
    def from_identifiers(cls, tokens: Any, *, items: Any | None = None) -> PrefixTree:
        """Build a tree on the CPU.

        Args:
            tokens: integers [rows, L], padded on the right with -1, or a sequence of sequences.
            items: item id of each row (distinct, from 0); default 0, 1, 2, ...

        Raises:
            TypeError: tokens or items are not integers.
            ValueError: no rows, an empty identifier, a negative token, padding before a token, an
                item given twice; the message names the row.
        """
        return cls._built(torch.from_numpy(build(tokens, items)))

    @classmethod
    def _built(cls, buffer: Tensor) -> PrefixTree:
        """The tree of a buffer that this package has just made."""
        tree = cls(buffer, trust=True)
        tree._codebooks = codebooks_of(buffer)  # now, while the CPU caches hold the buffer
        return tree

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file holding the buffer (whole or not at all)."""
        write_buffer(path, self._buffer)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, mmap: bool = False, trust: bool = False
    ) -> PrefixTree:
        """Read a tree written by :meth:`save`; a damaged or hostile file is refused.

        Args:
            mmap: map the file instead of reading it; processes share its pages. Whoever changes the
                file while it is mapped changes the tree.
            trust: check the header alone, for a file that you made yourself. Then a mapped file's
                pages are read when touched; else the proof of the structure reads them all, once
                (0.1 s per 100 MB).

        Raises DataError naming the file, and OSError where it cannot be opened.
        """
        try:
            return cls(torch.from_numpy(read_buffer(path, mmap=mmap)), trust=trust)
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error

    def to(self, device: torch.device | str) -> PrefixTree:
        """This tree on ``device`` (itself when it is there already)."""
        there = moved(self._buffer, device)
        return self if there is self._buffer else PrefixTree(there)

    def share_memory_(self) -> PrefixTree:
        """Move the buffer to shared memory, so that worker processes get it without a copy."""
        self._buffer.share_memory_()
        return self

    def __reduce__(self) -> tuple[Callable[[Tensor], PrefixTree], tuple[Tensor]]:
        return PrefixTree, (self._buffer,)  # so that unpickling checks the buffer again

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixTree:
        return self  # immutable

    def __repr__(self) -> str:
        return (
            f"PrefixTree({self._layout.num_entries} items, {self.num_leaves} leaves, "
            f"{self.num_nodes} nodes, max_length={self.max_length}, {self.nbytes} bytes, "
            f"device='{self.device}')"
        )

    @property
    def buffer(self) -> Tensor:
        """The whole tree, uint8 [nbytes]: what kernels take."""
        return self._buffer

    @property
    def layout(self) -> TreeLayout:
        """Counts and offsets of the buffer's sections."""
        return self._layout

    @property
    def device(self) -> torch.device:
        """Where the tree is."""
        return self._buffer.device

    @property
    def num_items(self) -> int:
        """Size of the item id space: the highest item id + 1."""
        return self._layout.num_items

    @property
    def num_leaves(self) -> int:
        """Number of distinct identifiers."""
        return self._layout.num_leaves

    @property
    def num_nodes(self) -> int:
        """Number of nodes, the root included."""
        return self._layout.num_nodes

    @property
    def max_length(self) -> int:
        """Tokens of the longest identifier."""
        return self._layout.max_length

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Nodes at depth 1, 2, ..., max_length."""
        begin = self._layout.node_begin
        return tuple(b - a for a, b in pairwise(begin[1:]))

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1."""
        return max(codebook.stop for codebook in self.codebooks)

    @property
    def codebooks(self) -> tuple[range, ...]:
        """Per position of the identifiers, the range from the smallest to the largest token."""
        if self._codebooks is None:
            self._codebooks = codebooks_of(self._buffer)
        return self._codebooks

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, the items map included."""
        return self._layout.total_bytes

    @property
    def nbytes_structure(self) -> int:
        """Bytes of the buffer without the items map (4 bytes an item)."""
        return self._layout.structure_bytes

    def walk(self, tokens: Any, *, mask: Tensor | None = None) -> Tensor:
        """Node after each token, int64 [..., L]; -1 from the first invalid or masked token on.

        Args:
            tokens: [..., L] integers, any L; -1 is no token, so right padding ends the walk.
            mask: [..., L] bool, false where the sequence has ended.

        Raises TypeError or ValueError for a wrong dtype, shape or device.
        """
        return tree_walk(integer_tensor(tokens, "tokens", self.device), mask, self._buffer)

    def leaves(self, tokens: Any, *, mask: Tensor | None = None) -> Tensor:
        """Leaf index of each identifier, int64 [...]; -1 where it is no complete identifier.

        An identifier ends before the first -1 or masked position, or with the row.
        """
        # int64 before comparing with -1: that is 255 in uint8, a token as good as others.
        tokens = integer_tensor(tokens, "tokens", self.device).to(torch.int64)
        nodes = self.walk(tokens, mask=mask)
        given = tokens != -1 if mask is None else (tokens != -1) & mask
        length = given.to(torch.int64).cumprod(-1).sum(-1)
        if tokens.shape[-1] == 0:
            return torch.full(length.shape, -1, dtype=torch.int64, device=self.device)
        last = nodes.gather(-1, (length - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return self.terminal(torch.where(length > 0, last, -1))

    def validate(self, tokens: Any, mask: Tensor | None = None, *, name: str = "tokens") -> None:
        """Raise ValueError for the first row of ``tokens`` [..., L] that is not in the tree.

        With a mask, a row's identifier is its true prefix, and all-false rows are padding; without
        one, an identifier ends before the first -1. A -1 where the mask is true is an error. The
        message calls the argument ``name``. Raises TypeError for other than integers.
        """
        tokens = integer_tensor(tokens, name, self.device).to(torch.int64)
        nodes = self.walk(tokens, mask=mask)
        given = tokens != -1 if mask is None else mask
        length = given.to(torch.int64).cumprod(-1).sum(-1)
        if mask is not None and bool((mask.sum(-1) != length).any()):
            raise ValueError("mask must be a run of true, then false, in each row")
        if mask is not None and bool((hole := mask & (tokens == -1)).any()):
            place = ", ".join(map(str, torch.nonzero(hole)[0].tolist()))
            raise ValueError(f"{name}[{place}] = -1 is no token, but the mask is true there")
        bad = self.leaves(tokens, mask=mask) < 0
        if mask is not None:
            bad &= length > 0
        if not bool(bad.any()):
            return
        row = tuple(torch.nonzero(bad)[0].tolist())
        count = int(length[row])
        identifier = tuple(tokens[row][:count].tolist())
        depth = int((nodes[row][:count] >= 0).sum())
        if depth < count:
            reason = f"no child {identifier[depth]} under {identifier[:depth]}"
        else:
            reason = "no item ends there" if count else "it is empty"
        place = f"{name}[{', '.join(map(str, row))}]" if row else name
        raise ValueError(f"{place} = {identifier} is not an identifier of the tree: {reason}")

    def children(self, node: int) -> tuple[Tensor, Tensor]:
        """Children of one node: (token ids, node ids), both int64 1-D, ascending."""
        check_range("node", node, self.num_nodes)
        begin, end = self.child_ranges(torch.tensor(node, device=self.device))
        nodes = torch.arange(int(begin), int(end), device=self.device)
        return self.node_tokens(nodes), nodes

    def child_ranges(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """(first child, last child + 1) of each node, int64 [...]; empty where there are none.

        ``nodes`` [...] are node ids; -1 has no children.
        """
        inner = (nodes >= 0) & (nodes < self._layout.num_inner)
        index = torch.where(inner, nodes, 0)
        begin = torch.where(inner, self._begins[index].to(torch.int64), 0)
        end = torch.where(inner, self._begins[index + 1].to(torch.int64), 0)
        return begin, end

    def node_tokens(self, nodes: Tensor, *, level: int | None = None) -> Tensor:
        """Token id on the edge into each node, int64 [...]; -1 for the root and for -1.

        ``level``: given when all nodes are at depth ``level + 1`` (or -1), saves L - 1 gathers.
        """
        out = torch.full_like(nodes, -1, dtype=torch.int64)
        for depth in range(1, self.max_length + 1) if level is None else (level + 1,):
            out = torch.where(self._at_depth(nodes, depth), self._tokens_at(nodes, depth), out)
        return out

    def parents(self, nodes: Tensor) -> Tensor:
        """Parent of each node, int64 [...]; -1 for the root and for -1."""
        wanted = nodes.to(self._begins.dtype)
        # Child ranges follow each other: the parent is the last node whose range begins by then.
        found = torch.searchsorted(self._begins, wanted, right=True) - 1
        return torch.where(nodes > 0, found, -1)

    def terminal(self, nodes: Tensor) -> Tensor:
        """Leaf index of each node, int64 [...]; -1 where no identifier ends (and for -1)."""
        inner_nodes = self._layout.num_inner
        if self._leaf_rank is None:
            return torch.where(nodes >= inner_nodes, nodes - inner_nodes, -1)
        inner = (nodes >= 0) & (nodes < inner_nodes)
        index = torch.where(inner, nodes, 0)
        rank = self._leaf_rank[index].to(torch.int64)
        ends = inner & (self._leaf_rank[index + 1] > rank)
        deepest = nodes - inner_nodes + self._leaf_rank[-1].to(torch.int64)
        return torch.where(ends, rank, torch.where(nodes >= inner_nodes, deepest, -1))

    def leaf_nodes(self, leaves: Tensor) -> Tensor:
        """Node of each leaf, int64 [...]; -1 for -1."""
        inner_nodes = self._layout.num_inner
        rank = self._leaf_rank
        if rank is None:
            return torch.where(leaves >= 0, leaves + inner_nodes, -1)
        shallow = torch.searchsorted(rank, leaves.to(torch.int32), right=True) - 1
        deep = leaves - rank[-1].to(torch.int64) + inner_nodes
        return torch.where(leaves < 0, -1, torch.where(leaves < rank[-1], shallow, deep))

    # ------------------------------------------------------------------ items

    @property
    def item_ids(self) -> Tensor:
        """Item ids in leaf order, int32 [number of items]; ``leaf_items`` indexes it."""
        return self._item_ids

    def leaf_items(self, leaves: Tensor) -> tuple[Tensor, Tensor]:
        """(begin, end) into :attr:`item_ids` of each leaf's items, int64 [...]; empty for -1."""
        real = leaves >= 0
        index = torch.where(real, leaves, 0)
        if self._item_begin is None:
            return index, torch.where(real, index + 1, index)
        begin = self._item_begin[index].to(torch.int64)
        end = self._item_begin[index + 1].to(torch.int64)
        return begin, torch.where(real, end, begin)

    def items(self, leaf: int) -> Tensor:
        """Items that share the identifier of one leaf, int64 1-D, ascending."""
        check_range("leaf", leaf, self.num_leaves)
        begin, end = self.leaf_items(torch.tensor(leaf, device=self.device))
        return self._item_ids[int(begin) : int(end)].to(torch.int64)

    def leaf_of(self, items: Any) -> Tensor:
        """Leaf of each item, int64 [...]; -1 for -1 and for ids that were not given an identifier.

        The first call makes the inverse of the items map (4 bytes an item, kept).
        Raises ValueError for ids outside -1..num_items - 1.
        """
        items = integer_tensor(items, "items", self.device)
        if items.numel() and (int(items.min()) < -1 or int(items.max()) >= self.num_items):
            found = f"{int(items.min())}..{int(items.max())}"
            raise ValueError(f"items must be 0..{self.num_items - 1} or -1; got ids {found}")
        leaf = self.leaf_map()[items.clamp(min=0)].to(torch.int64)
        return torch.where(items >= 0, leaf, -1)

    def leaf_map(self) -> Tensor:
        """Leaf of every item, int32 [num_items]; -1 where it has no identifier."""
        if self._leaf_of_item is None:
            leaves = torch.arange(self.num_leaves, dtype=torch.int32, device=self.device)
            if self._item_begin is not None:
                leaves = leaves.repeat_interleave(self._item_begin.diff().to(torch.int64))
            inverse = self._item_ids.new_full((self.num_items,), -1)
            inverse[self._item_ids.to(torch.int64)] = leaves
            self._leaf_of_item = inverse  # only when filled: other threads read it
        return self._leaf_of_item

    def identifiers(self, items: Any) -> Tensor:
        """Identifier of each item, int64 [..., max_length], padded with -1; see :meth:`leaf_of`."""
        return self.identifiers_of_nodes(self.leaf_nodes(self.leaf_of(items)))

    def identifiers_of_nodes(self, node: Tensor) -> Tensor:
        """Tokens from the root to each node [...], int64 [..., max_length], padded with -1."""
        out = torch.full((*node.shape, self.max_length), -1, dtype=torch.int64, device=self.device)
        for depth in range(self.max_length, 0, -1):
            here = self._at_depth(node, depth)
            out[..., depth - 1] = torch.where(here, self._tokens_at(node, depth), -1)
            node = torch.where(here, self.parents(node), node)
        return out

    def available_nodes(self, available: Any) -> Tensor:
        """Nodes below which an available item is left, bool [num_nodes].

        ``available`` is bool [num_items] (out of stock, region, already seen: false). A node
        without one below it is dead, up to the root, so no search ends in a dead end. O(nodes).
        Raises TypeError or ValueError for a wrong dtype or shape.
        """
        available = check_available(available, self.num_items, self.device)
        leaf_live = available[self._item_ids.to(torch.int64)]
        if self._item_begin is not None:
            leaf_live = any_in_ranges(leaf_live, self._item_begin)
        return live_nodes(self._layout, self._begins, self._leaf_rank, leaf_live)

    def with_items(self, tokens: Any, items: Any) -> PrefixTree:
        """A tree with more items; this one stays as it is. One pass over it, no new sort.

        Args:
            tokens: their identifiers, as for :meth:`from_identifiers`.
            items: their ids [rows], distinct and not in the tree.

        Raises TypeError or ValueError; the message names the row, or the id that is there already.
        """
        return self._changed(updated(self._buffer.cpu(), tokens, items))

    def without_items(self, items: Any) -> PrefixTree:
        """A tree without some items (distinct ids); this one stays as it is.

        Raises TypeError, or ValueError for an id that is not there or when none would be left.
        """
        return self._changed(updated(self._buffer.cpu(), removed=items))

    def with_identifiers(self, tokens: Any, items: Any) -> PrefixTree:
        """A tree in which ``items``, all of this one, have other identifiers ``tokens``.

        Raises as :meth:`with_items`, and ValueError for an id that is not there.
        """
        return self._changed(updated(self._buffer.cpu(), tokens, items, removed=items))

    def _changed(self, buffer: Buffer | None) -> PrefixTree:
        return (
            self if buffer is None else PrefixTree._built(torch.from_numpy(buffer)).to(self.device)
        )

    def export(self, kind: ExportKind, *, dense_levels: int = 2) -> dict[str, Any]:
        """The tree in the form that other servers take; docs/decoding.md, "Other servers".

        Raises ValueError where it has no such form (the message says why).
        """
        return exported(self, kind, dense_levels=dense_levels)

    def as_prefix_allowed_tokens_fn(
        self,
        *,
        prompt_length: int | None = None,
        end_token: int | None = None,
        available: Tensor | None = None,
    ) -> Callable[[int, Tensor], list[int]]:
        """For ``generate(prefix_allowed_tokens_fn=...)``: (batch id, tokens [length]) -> tokens.

        The list is never empty. For the arguments, and faster ways, see
        :class:`gflowgr.decoding.adapters.PrefixTreeLogitsProcessor`.
        """
        return AllowedTokens(
            self, prompt_length=prompt_length, end_token=end_token, available=available
        )

    def _at_depth(self, nodes: Tensor, depth: int) -> Tensor:
        begin = self._layout.node_begin
        return (nodes >= begin[depth]) & (nodes < begin[depth + 1])

    def _tokens_at(self, nodes: Tensor, depth: int) -> Tensor:
        """Tokens of nodes at ``depth``; any value for others."""
        layout, stored = self._layout, self._tokens[depth - 1]
        index = (nodes - layout.node_begin[depth]).clamp(0, stored.numel() - 1)
        return unsigned(stored[index], layout.token_bytes[depth - 1]) + layout.token_base[depth - 1]
