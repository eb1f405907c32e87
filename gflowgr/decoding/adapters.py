"""The prefix tree as constraints of ``transformers.generate``.

Three ways, from the least to the most change in what runs:

* ``generate(prefix_allowed_tokens_fn=tree.as_prefix_allowed_tokens_fn())``: a list per row;
* ``generate(logits_processor=[PrefixTreeLogitsProcessor(tree)])``: all rows at once;
* ``generate(custom_generate=constrained_generate, tree=tree)``: this package's beam search.

All allow exactly the identifiers of the tree. A row that cannot go on (nothing is available, or
one of the empty beams that ``generate`` carries where beams outnumber the candidates) gets the end
token as its only choice, so it never becomes an identifier that it should not be.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..tree import PrefixTree
from .admissible import admissible_for
from .custom_generate import constrained_generate

__all__ = ["AllowedTokens", "PrefixTreeLogitsProcessor", "constrained_generate"]

Normalize = Literal["vocab", "level", "children"]

_EMPTY_BEAM = -1e6
"""``generate`` gives empty beams -1e9 over a power of the length; no log-probability is so low."""


class PrefixTreeLogitsProcessor(LogitsProcessor):
    """Leaves each row the tokens that continue it to an identifier of the tree; no other.

    A row's node is found by walking its generated tokens down the tree, so it does not matter how
    beams were re-ordered. No Python loop over rows; one bounded scatter per step.

    * After a complete identifier, only ``end_token`` is left (beside the tokens of longer ones).
    * A dead row, which has no valid continuation, is left ``end_token`` alone, at the lowest
      finite score: searches rank it last, its softmax is not NaN, and :meth:`items` gives -1 for
      it. :attr:`dead` says which rows these were at the last step.
    * Scores of other tokens become -inf, by selection, never by adding a number.

    Without ``end_token``, identifiers end by themselves: they carry an end token of their own, or
    generation stops at their length (``max_new_tokens``). Rows that are complete before that, and
    dead rows, are continued by a token that is in no identifier.

    Args:
        tree: prefix tree in the model's token ids, on the model's device.
        prompt_length: tokens before the identifier (1 for the decoder's start token, the padded
            prompt for decoder-only models). None: found at the first step of a generation, which
            is known by its length, its prompt, or tokens behind it that are no beginning of an
            identifier. Give it, or a new processor, where a prompt may be the one before followed
            by just as many tokens of an identifier as were generated.
        end_token: ends an identifier, usually the model's end of sequence.
        available: true for items that may be generated [items], or None for all.
        normalize: what the kept scores are log-probabilities over: ``"vocab"`` leaves them as they
            come (in beam search: over the vocabulary), ``"level"`` normalises over the codebook of
            the position, ``"children"`` over the tokens that continue the row (available or not);
            the end token counts among both where an identifier ends.
        in_place: overwrite the scores instead of allocating [rows, V] at each step, which is most
            of the time where V is large. Not with sampling or greedy search and
            ``output_logits``, where ``generate`` still holds them.

    Raises:
        TypeError: ``available`` is not bool.
        ValueError: an argument is out of range; without ``end_token``, an identifier is the
            beginning of another; ``end_token`` would stand for two things in the tree.
    """

    def __init__(
        self,
        tree: PrefixTree,
        *,
        prompt_length: int | None = None,
        end_token: int | None = None,
        available: Tensor | None = None,
        normalize: Normalize = "vocab",
        in_place: bool = False,
    ) -> None:
        if normalize not in get_args(Normalize):
            raise ValueError(f"normalize must be 'vocab', 'level' or 'children'; got {normalize!r}")
        self.tree = tree
        self.dead: Tensor | None = None
        self._rules = _Rules(tree, end_token, available)
        self._prompt = _Prompt(self._rules, prompt_length)
        self._normalize = normalize
        self._in_place = in_place

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask one step.

        Args:
            input_ids: tokens so far [rows, P + step], prompt or start token in front.
            scores: logits or log-probabilities of the next token [rows, V], any float dtype.

        Returns:
            [rows, V]; every row holds at least one finite score unless the model's are NaN.

        Raises:
            ValueError: the tree has tokens that the model has not, or is on another device.
        """
        tree, rules = self.tree, self._rules
        rules.check(scores.shape[1])
        tokens = input_ids[:, self._prompt.length(input_ids) :]
        step = tokens.shape[1]
        node = rules.node(tokens)
        leaf = tree.terminal(node)
        ends = rules.ends(leaf)
        normaliser = self._normaliser(scores, step, node, leaf >= 0)
        own = (scores[:, rules.end] - normaliser.squeeze(1)).to(scores.dtype)
        has_child = torch.zeros_like(ends)
        if step < tree.max_length:
            child = _child_slots(tree, node, step)
            # Slots beyond the last child repeat it, so equal columns always get equal values.
            column = tree.node_tokens(child, level=step).clamp_min(0)
            value = scores.gather(1, column) - normaliser
            value = value.masked_fill(~rules.live(child), -torch.inf).to(scores.dtype)
            has_child = (value != -torch.inf).any(1)
        # All that is kept was read: the scores may be overwritten from here.
        out = scores.fill_(-torch.inf) if self._in_place else torch.full_like(scores, -torch.inf)
        if step < tree.max_length:
            out.scatter_(1, column, value)
        if not rules.has_end:  # nothing scores a token that only fills the row
            own = torch.zeros_like(own)
            ends = ends & ~has_child
        ends = ends & (own != -torch.inf)
        stuck = ~(has_child | ends)
        lowest = torch.finfo(out.dtype).min
        column = out[:, rules.end]
        out[:, rules.end] = torch.where(stuck, lowest, torch.where(ends, own, column))
        self.dead = stuck & ~(tokens == rules.end).any(1)
        return out

    def items(self, sequences: Tensor, scores: Tensor | None = None) -> Tensor:
        """Item that each generated sequence stands for, int64 [rows]; -1 for none.

        Of items that share an identifier it is the one with the lowest id (of those available).

        Args:
            sequences: what ``generate`` returned [rows, P + tokens].
            scores: its ``sequences_scores`` [rows]: empty beams, which are known by nothing else
                when they repeat an identifier, give -1 too.
        """
        start = self._prompt.known()
        leaf = self._rules.leaf(sequences[:, start:])
        if scores is not None:
            leaf = leaf.masked_fill(scores < _EMPTY_BEAM, -1)
        return self._rules.first_item(leaf)

    def _normaliser(self, scores: Tensor, step: int, node: Tensor, ends: Tensor) -> Tensor:
        """What to subtract from the scores [rows, 1], in float32 unless it is 0."""
        rows = scores.shape[0]
        if self._normalize == "vocab":
            return scores.new_zeros(rows, 1)
        kept = [torch.full_like(scores[:, :1], -torch.inf)]
        if self._rules.has_end:
            kept = [torch.where(ends, scores[:, self._rules.end], -torch.inf).unsqueeze(1)]
        if step < self.tree.max_length and self._normalize == "level":
            codes = self.tree.codebooks[step]
            kept.append(scores[:, codes.start : codes.stop])
        elif step < self.tree.max_length:
            begin, end = self.tree.child_ranges(node)
            column = self.tree.node_tokens(_child_slots(self.tree, node, step), level=step)
            slot = torch.arange(column.shape[1], device=column.device)
            real = slot < (end - begin).unsqueeze(1)
            value = scores.gather(1, column.clamp_min(0))
            kept.append(value.masked_fill(~real, -torch.inf))
        total = torch.cat(kept, dim=1).float().logsumexp(1, keepdim=True)
        return total.masked_fill(total == -torch.inf, 0.0)


class AllowedTokens:
    """``prefix_allowed_tokens_fn`` of a tree; see :meth:`PrefixTree.as_prefix_allowed_tokens_fn`.

    The same tokens as :class:`PrefixTreeLogitsProcessor` leaves, one row at a time.
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
        self._rules = _Rules(tree, end_token, available)
        self._prompt_length = prompt_length
        self._prompts: dict[int, _Prompt] = {}
        self._tokens_of = functools.lru_cache(maxsize=1 << 16)(self._tokens_after)

    def __call__(self, batch_id: int, input_ids: Tensor) -> list[int]:
        """Tokens that may follow ``input_ids`` [length] of prompt ``batch_id``; never none."""
        prompt = self._prompts.get(batch_id)
        if prompt is None:
            prompt = _Prompt(self._rules, self._prompt_length, repeats=True)
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


class _Rules:
    """What may follow a node: live children, and the end where an available identifier ends."""

    def __init__(self, tree: PrefixTree, end_token: int | None, available: Tensor | None) -> None:
        if end_token is not None and end_token < 0:
            raise ValueError(f"end_token = {end_token}, expected a token id or None")
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
            raise ValueError(f"end_token: {self.end}, expected 0..{vocabulary - 1}{reason}")

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
        """Whether each leaf is one, and holds an available item."""
        real = leaf >= 0
        return real if self._leaves is None else real & self._leaves[leaf.clamp_min(0)]

    def leaf(self, tokens: Tensor) -> Tensor:
        """Leaf of generated rows [rows, T], ended by the end token, int64 [rows]; -1 for none."""
        length = (nodes := self.tree.walk(tokens)).ge(0).sum(1)
        # The root in front: where nothing was walked, no identifier ends.
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


class _Prompt:
    """How many tokens stand before the identifier: given, or seen at a generation's first step.

    Args:
        rules: tell tokens of an identifier from others.
        length: the number, or None to find it.
        repeats: one step may be asked for several times (row by row).
    """

    def __init__(self, rules: _Rules, length: int | None, *, repeats: bool = False) -> None:
        if length is not None and length < 0:
            raise ValueError(f"prompt_length = {length}, expected 0 or more, or None")
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
        # Beams change places within a prompt only, so the prompts of all rows stay.
        if rows != first.shape[0] or not torch.equal(input_ids[:, :start], first):
            return False
        return step == 0 or self._rules.go_on(input_ids[:, start:])


def _child_slots(tree: PrefixTree, node: Tensor, step: int) -> Tensor:
    """Children of nodes at depth ``step``, int64 [rows, most children].

    The last one is repeated; -1 where there are none.
    """
    begin, end = (bound.unsqueeze(1) for bound in tree.child_ranges(node))
    slot = torch.arange(tree.layout.max_children[step], device=node.device)
    return torch.minimum(begin + slot, end - 1).masked_fill(begin == end, -1)


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
