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

from typing import get_args

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..models.settings import Normalize
from ..tree import PrefixTree
from ..tree.continuations import Continuations, PromptLength
from .custom_generate import constrained_generate

__all__ = ["PrefixTreeLogitsProcessor", "constrained_generate"]

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
        normalize: what the kept scores are log-probabilities over: ``"children"`` normalises over
            the tokens that continue the row (available or not), ``"level"`` over the codebook of
            the position; the end token counts among both where an identifier ends. ``"vocab"``
            leaves scores as they come (in beam search: over the vocabulary), for a model that was
            trained so.
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
        normalize: Normalize = "children",
        in_place: bool = False,
    ) -> None:
        if normalize not in get_args(Normalize):
            raise ValueError(f"normalize must be 'vocab', 'level' or 'children'; got {normalize!r}")
        self.tree = tree
        self.dead: Tensor | None = None
        self._rules = Continuations(tree, end_token, available)
        self._prompt = PromptLength(self._rules, prompt_length)
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
        # The scores to keep are gathered by now, so `scores` may be overwritten.
        out = scores.fill_(-torch.inf) if self._in_place else torch.full_like(scores, -torch.inf)
        if step < tree.max_length:
            out.scatter_(1, column, value)
        if not rules.has_end:  # a token that only fills the row has no score
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


def _child_slots(tree: PrefixTree, node: Tensor, step: int) -> Tensor:
    """Children of nodes at depth ``step``, int64 [rows, most children].

    The last one is repeated; -1 where there are none.
    """
    begin, end = (bound.unsqueeze(1) for bound in tree.child_ranges(node))
    slot = torch.arange(tree.layout.max_children[step], device=node.device)
    return torch.minimum(begin + slot, end - 1).masked_fill(begin == end, -1)
