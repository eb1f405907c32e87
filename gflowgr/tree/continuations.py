"""The tokens that may follow a prefix: an allowed-tokens function for ``transformers.generate``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gflowgr.tree.admissible import admissible_for

if TYPE_CHECKING:
    from gflowgr.tree.prefix_tree import PrefixTree

__all__ = ["AllowedTokens", "Continuations", "PromptLength"]


class AllowedTokens:
    """``prefix_allowed_tokens_fn`` of a tree; see :meth:`PrefixTree.as_prefix_allowed_tokens_fn`.

    It allows the same tokens as :class:`PrefixTreeLogitsProcessor`, one row at a time.
    """

    def __init__(
        self,
        tree: PrefixTree,
        *,
        prompt_length: int | None = None,
        end_token: int | None = None,
        available: Tensor | None = None,
    ) -> None:
        self.tree = tree
        self._rules = Continuations(tree, end_token, available)
        self._prompt_length = prompt_length
        self._prompts: dict[int, PromptLength] = {}
        self._tokens_of = functools.lru_cache(maxsize=1 << 16)(self._tokens_after)

    def __call__(self, batch_id: int, input_ids: Tensor) -> list[int]:
        """Tokens that may follow ``input_ids`` [length] of prompt ``batch_id``; never none."""
        prompt = self._prompts.get(batch_id)
        if prompt is None:
            prompt = PromptLength(self._rules, self._prompt_length, repeats=True)
            self._prompts[batch_id] = prompt
        row = input_ids.unsqueeze(0)
        return self._tokens_of(int(self._rules.node(row[:, prompt.length(row) :])))

    def _tokens_after(self, node: int) -> list[int]:
        rules, tokens = self._rules, []
        at = torch.tensor([node], device=self.tree.device)
        if node >= 0:
            token, child = self.tree.children(node)
            tokens = token[rules.live(child)].tolist()
        if rules.has_end and bool(rules.ends(self.tree.terminal(at))):
            tokens.append(rules.end)
        return tokens or [rules.end]


class Continuations:
    """The continuations of a node: live children; the end token where an item can be had."""

    def __init__(self, tree: PrefixTree, end_token: int | None, available: Tensor | None) -> None:
        if end_token is not None and end_token < 0:
            raise ValueError(f"end_token must be a token id or None; got {end_token}")
        self.tree = tree
        self.available = None if available is None else available.to(tree.device)
        admissible = admissible_for(tree, 1, available, None)
        self._nodes, self._leaves = admissible.nodes, admissible.leaves
        self.has_end = end_token is not None
        self.end = _unused_token(tree) if end_token is None else end_token
        self._check_ends(end_token)

    def check(self, vocabulary: int) -> None:
        """Raise ValueError unless the model has the tree's tokens and the end token."""
        if self.tree.vocab_size > vocabulary:
            raise ValueError(
                f"tree: tokens up to {self.tree.vocab_size - 1}, the model has {vocabulary} tokens"
            )
        if self.end >= vocabulary:
            reason = "" if self.has_end else " (none was given, and all tokens are in use)"
            raise ValueError(f"end_token must be 0..{vocabulary - 1}; got {self.end}{reason}")

    def node(self, tokens: Tensor) -> Tensor:
        """Node after ``tokens`` [rows, step], int64 [rows]; -1 where they are no prefix."""
        if tokens.shape[1] == 0:
            return torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
        return self.tree.walk(tokens)[:, -1]

    def go_on(self, tokens: Tensor) -> bool:
        """Whether any row of ``tokens`` [rows, step] is an identifier's beginning, or has ended."""
        node = self.node(tokens)
        begin, end = self.tree.child_ranges(node)
        alive = (node >= 0) & (self.has_end | (end > begin))
        return bool((alive | (tokens == self.end).any(1)).any())

    def live(self, nodes: Tensor) -> Tensor:
        """Whether an available item is at or below each node; false for -1."""
        real = nodes >= 0
        return real if self._nodes is None else real & self._nodes[nodes.clamp_min(0)]

    def ends(self, leaf: Tensor) -> Tensor:
        """Whether each leaf exists (is not -1) and holds an available item."""
        real = leaf >= 0
        return real if self._leaves is None else real & self._leaves[leaf.clamp_min(0)]

    def leaf(self, tokens: Tensor) -> Tensor:
        """Leaf of generated rows [rows, T], ended by the end token, int64 [rows]; -1 for none."""
        length = (nodes := self.tree.walk(tokens)).ge(0).sum(1)
        # Prepend the root, where no identifier ends, for rows without a generated token.
        last = torch.nn.functional.pad(nodes, (1, 0)).gather(1, length.unsqueeze(1)).squeeze(1)
        after = torch.nn.functional.pad(tokens, (0, 1), value=-1).gather(1, length.unsqueeze(1))
        begin, end = self.tree.child_ranges(last)
        complete = (begin == end) | (after.squeeze(1) == self.end)
        leaf = self.tree.terminal(last)
        return leaf.masked_fill(~(complete & self.ends(leaf)), -1)

    def first_item(self, leaf: Tensor) -> Tensor:
        """Lowest available item of each leaf, int64 [rows]; -1 for -1."""
        begin, _ = self.tree.leaf_items(leaf)
        ids = self.tree.item_ids
        if self.available is not None:
            # Item ids ascend within a leaf: the next available place is the lowest id.
            places = self.available[ids.long()].nonzero().squeeze(1)
            begin = torch.nn.functional.pad(places, (0, 1))[torch.searchsorted(places, begin)]
        return torch.where(leaf >= 0, ids[begin.clamp(0, ids.numel() - 1)].long(), -1)

    def _check_ends(self, end_token: int | None) -> None:
        tree, inner = self.tree, self.tree.layout.num_inner
        if tree.layout.leaf_rank == 0:
            return  # all of one length
        nodes = torch.arange(inner, device=tree.device)
        begin, end = tree.child_ranges(nodes)
        both = nodes[(tree.terminal(nodes) >= 0) & (end > begin)]
        if both.numel() == 0:
            return
        if end_token is None:
            raise ValueError(
                "end_token is None, but an identifier is the beginning of another: "
                f"{_tokens_to(tree, int(both[0]))}"
            )
        for depth, codes in enumerate(tree.codebooks):
            if end_token not in codes:
                continue
            first, last = tree.layout.node_begin[depth + 1 : depth + 3]
            child = torch.arange(first, last, device=tree.device)
            child = child[tree.node_tokens(child, level=depth) == end_token]
            parent = tree.parents(child)
            twice = parent[tree.terminal(parent) >= 0]
            if twice.numel():
                raise ValueError(
                    f"end_token = {end_token} both ends and continues the identifier "
                    f"{_tokens_to(tree, int(twice[0]))}"
                )


class PromptLength:
    """The number of tokens before the identifier: given, or found at a generation's first step.

    Args:
        rules: tell tokens of an identifier from others.
        length: the number, or None to find it.
        repeats: one step may be asked for several times (row by row).
    """

    def __init__(self, rules: Continuations, length: int | None, *, repeats: bool = False) -> None:
        if length is not None and length < 0:
            raise ValueError(f"prompt_length must be 0 or more, or None; got {length}")
        self._rules = rules
        self._given = length
        self._repeats = repeats
        self._first: Tensor | None = None
        self._last = -1

    def length(self, input_ids: Tensor) -> int:
        """Tokens of ``input_ids`` [rows, length] that are the prompt."""
        size = input_ids.shape[1]
        if self._given is not None:
            if size < self._given:
                raise ValueError(f"prompt_length = {self._given}, but only {size} tokens are there")
            return self._given
        if self._first is None or not self._continues(input_ids, self._first):
            self._first = input_ids.clone()
        self._last = size
        return self._first.shape[1]

    def known(self) -> int:
        """The number, after the first step. Raises ValueError before it."""
        if self._given is not None:
            return self._given
        if self._first is None:
            raise ValueError("prompt_length is not known before the first step: give it")
        return self._first.shape[1]

    def _continues(self, input_ids: Tensor, first: Tensor) -> bool:
        rows, size = input_ids.shape
        step, start = size - self._last, first.shape[1]
        if step != 1 and not (self._repeats and step == 0):
            return False
        # Beams are re-ordered within a prompt only, so every row keeps its prompt.
        if rows != first.shape[0] or not torch.equal(input_ids[:, :start], first):
            return False
        return step == 0 or self._rules.go_on(input_ids[:, start:])


def _unused_token(tree: PrefixTree) -> int:
    """The lowest token that is in no codebook."""
    token = 0
    while any(token in codes for codes in tree.codebooks):
        token = min(codes.stop for codes in tree.codebooks if token in codes)
    return token


def _tokens_to(tree: PrefixTree, node: int) -> tuple[int, ...]:
    """The tokens from the root to a node."""
    at, tokens = torch.tensor([node], device=tree.device), []
    while int(at) > 0:
        tokens.append(int(tree.node_tokens(at)))
        at = tree.parents(at)
    return tuple(reversed(tokens))
