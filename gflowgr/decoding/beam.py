"""Beam search over the valid identifiers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from ..models.backbone import real_prompt
from ..models.normalization import chosen_normalize
from ..models.settings import Normalize
from ..models.wrapped import unwrapped

# Also registers torch.ops.gflowgr.beam_step and beam_step_hidden.
from ..ops.beam_step.op import BeamStep
from ..ops.checks import validation_enabled, values_looked_at
from ..ops.topk import stable_topk
from ..tree import PrefixTree
from ..tree.admissible import Admissible, admissible_for
from ..tree.facts import tree_facts
from .decoders import StepDecoder, decoder_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BeamSearchOutput", "constrained_beam_search"]


@dataclass(frozen=True)
class BeamSearchOutput:
    """The best items of each prompt, best first.

    Attributes:
        items: item ids [B, K]; -1 where there are fewer than K valid items.
        scores: log P(identifier | prompt) [B, K]; -inf where ``items`` is -1.
        tokens: identifiers [B, K, L]; -1 beyond an identifier's end and where ``items`` is -1.
    """

    items: Tensor
    scores: Tensor
    tokens: Tensor

    @property
    def valid(self) -> Tensor:
        """Where there is an item, bool [B, K]."""
        return self.items >= 0


@torch.no_grad()
def constrained_beam_search(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    tree: PrefixTree,
    *,
    num_beams: int = 20,
    num_return: int | None = None,
    normalize: Normalize | None = None,
    temperature: float = 1.0,
    available: Tensor | None = None,
    exclude: Tensor | None = None,
    encoded: Tensor | None = None,
) -> BeamSearchOutput:
    """Find each prompt's most probable items.

    The prompt is processed once, and its keys and values are kept once for all of its beams; a beam
    keeps those of its few identifier tokens. Only children of the beams' tree nodes are candidates,
    so every result is a valid identifier.

    Args:
        model: an encoder-decoder or decoder-only model of ``transformers``, in ``eval`` mode; for
            the ones that run fast see :func:`gflowgr.decoding.decoders.decoder_for`.
        input_ids: prompts [B, S]; padding may be on either side and hold any value.
        attention_mask: 1 for real tokens [B, S]; None: every token is real.
        tree: prefix tree in the model's token ids, on the model's device.
        num_beams: beams K kept at each step.
        num_return: items returned per prompt (default ``num_beams``).
        normalize: token log-probabilities under the softmax over ``"children"``: the children of
            the node; ``"vocab"``: the vocabulary (what ``generate`` does); ``"level"``: the
            codebook of the token's position (:attr:`PrefixTree.codebooks`). None: what the model
            says that it was trained with (a :class:`~gflowgr.GFlowModel` writes it into its
            configuration), else ``"children"``, as in the losses with a tree.
        temperature: divides the logits.
        available: true for items that may be returned [items]; others are pruned up to the root.
        exclude: items [B, E] that a prompt may not get (its seen items), -1 for padding. Prefixes
            that lead to nothing else are pruned for that prompt, just as with ``available``.
        encoded: the encoder's states of the prompts [B, S, d], where they are known already.

    Returns:
        The best items. Equal scores keep the order of the tree (ascending tokens), shorter
        identifiers first. Items sharing one identifier follow each other by ascending id, with the
        same score.

    Raises:
        TypeError: ``available`` is not bool, or ``exclude`` not of integers.
        ValueError: an argument is out of range or of a wrong shape.
        FloatingPointError: the model's scores are NaN, with data checks on (see
            :func:`gflowgr.ops.set_validation`). Without them nothing is read back from a GPU.
    """
    model = unwrapped(model)
    normalize = chosen_normalize(model, normalize)
    input_ids, attention_mask = real_prompt(model, input_ids, attention_mask)
    check_search(input_ids, tree, num_beams, num_return, normalize, temperature)
    count = num_beams if num_return is None else num_return
    batch, device = input_ids.shape[0], input_ids.device
    admissible = admissible_for(tree, batch, available, exclude, look=values_looked_at())
    if batch == 0:
        items = torch.empty(0, count, dtype=torch.long, device=device)
        tokens = torch.empty(0, count, tree.max_length, dtype=torch.long, device=device)
        return BeamSearchOutput(
            items, torch.empty(0, count, dtype=torch.float32, device=device), tokens
        )
    decoder = decoder_for(model, input_ids, attention_mask, encoded)
    search = Search(decoder, tree, admissible, num_beams, normalize, temperature)
    found, nan = search.answer(count)
    check_scores(nan)
    return found


def check_scores(nan: Tensor) -> None:
    """Raise FloatingPointError where ``nan`` [B] is true, with the data checks on."""
    if validation_enabled() and bool(nan.any()):
        row = int(nan.nonzero()[0])
        raise FloatingPointError(f"the model's scores are NaN (first in prompt {row})")


class Search:
    """One search; beams are [B, K], an empty slot has score -inf and node -1."""

    def __init__(
        self,
        decoder: StepDecoder,
        tree: PrefixTree,
        admissible: Admissible,
        num_beams: int,
        normalize: str,
        temperature: float,
    ) -> None:
        self.decoder, self.tree, self.admissible = decoder, tree, admissible
        self.num_beams = num_beams
        barred, leaves = admissible.barred_nodes, admissible.barred_leaves
        self.options = (
            normalize,
            temperature,
            admissible.nodes,
            None if barred is None else barred.keys,
        )
        self.leaf_options = (admissible.leaves, None if leaves is None else leaves.keys)

    def answer(self, count: int) -> tuple[BeamSearchOutput, Tensor]:
        """The ``count`` best items of each prompt, and where their scores are NaN, bool [B]."""
        nodes, scores = self.run(wanted=min(count, self.num_beams))
        # NaN sorts before every number, so looking at the kept scores is enough.
        nan = scores.isnan().any(1)
        return _to_items(nodes, scores, self.tree, count, self.admissible), nan

    def run(self, wanted: int) -> tuple[Tensor, Tensor]:
        """Nodes and scores of the best identifiers [B, F]; only the first ``wanted`` count."""
        tree, decoder = self.tree, self.decoder
        scores = torch.zeros(decoder.batch, 1, dtype=torch.float32, device=decoder.device)
        nodes = torch.zeros(decoder.batch, 1, dtype=torch.long, device=decoder.device)
        ends: tuple[Tensor, Tensor] | None = None
        hidden = decoder.first()
        for depth, size in enumerate(tree.level_sizes, start=1):
            # No more beams than the level has nodes: the rest would be empty.
            step = self._step(hidden, scores, nodes, min(self.num_beams, size))
            last = depth == tree.max_length
            if last or self._ends_at(depth):
                ends = _best(ends, step, self.num_beams)
            if last or self._settled(ends, step.scores, wanted):
                break
            scores, nodes = step.scores, step.nodes
            hidden = decoder.advance(step.tokens, step.parents)
        assert ends is not None  # the last level only has ends
        return ends

    def _step(self, hidden: Tensor, scores: Tensor, nodes: Tensor, width: int) -> BeamStep:
        head = self.decoder.head
        beams = (scores, nodes, self.tree.buffer, *self.options, width, *self.leaf_options)
        if head is None:
            return BeamStep(*torch.ops.gflowgr.beam_step(hidden, *beams))
        return BeamStep(*torch.ops.gflowgr.beam_step_hidden(hidden, *head, *beams))

    def _ends_at(self, depth: int) -> bool:
        """Whether identifiers may end above the last level."""
        return self.tree.layout.leaf_rank > 0

    def _settled(self, ends: tuple[Tensor, Tensor] | None, scores: Tensor, wanted: int) -> bool:
        """Whether no live prefix can come among the ``wanted`` best any more: scores only fall.

        Tested on the CPU only: reading the answer from a GPU would wait for the steps so far. A
        prefix as good as the last wanted identifier is ranked behind it, since it is longer.
        """
        if scores.device.type != "cpu" or ends is None or ends[1].shape[1] < wanted:
            return False
        return bool((scores[:, 0] <= ends[1][:, wanted - 1]).all())


def _best(
    ends: tuple[Tensor, Tensor] | None, step: BeamStep, num_beams: int
) -> tuple[Tensor, Tensor]:
    """The best identifiers so far and of this step, earlier ones first where scores are equal."""
    if ends is None:
        return step.end_nodes, step.end_scores
    scores = torch.cat([ends[1], step.end_scores], dim=1)
    nodes = torch.cat([ends[0], step.end_nodes], dim=1)
    scores, index = stable_topk(scores, min(num_beams, scores.shape[1]))
    return nodes.gather(1, index), scores


def _to_items(
    nodes: Tensor, scores: Tensor, tree: PrefixTree, count: int, admissible: Admissible
) -> BeamSearchOutput:
    """Turn final nodes [B, F] into their items and keep the first ``count``."""
    leaves = tree.terminal(nodes)
    begin, end = tree.leaf_items(leaves)
    if tree.layout.item_begin:  # some identifiers are shared
        group = tree_facts(tree.buffer).most_items
        slot = begin.unsqueeze(-1) + torch.arange(group, device=leaves.device)
        found = slot < end.unsqueeze(-1)
        items = tree.item_ids[slot.clamp_max(tree.item_ids.numel() - 1)].long()
        found &= admissible.filter("items", items)
        items = items.masked_fill(~found, -1).flatten(1)
        scores = scores.unsqueeze(-1).expand_as(slot).flatten(1)
        nodes = nodes.unsqueeze(-1).expand_as(slot).flatten(1)
        # Real items first, in their order.
        order = (items < 0).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
        items, scores, nodes = (x.gather(1, order) for x in (items, scores, nodes))
    else:
        items = tree.item_ids[begin].long().masked_fill(leaves < 0, -1)[:, :count]
        scores, nodes = scores[:, :count], nodes[:, :count]
    missing = count - items.shape[1]
    if missing > 0:
        items = torch.nn.functional.pad(items, (0, missing), value=-1)
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        nodes = torch.nn.functional.pad(nodes, (0, missing), value=-1)
    empty = items < 0
    tokens = tree.identifiers_of_nodes(nodes.masked_fill(empty, -1))
    return BeamSearchOutput(items, scores.masked_fill(empty, -torch.inf), tokens)


def check_search(
    input_ids: Tensor,
    tree: PrefixTree,
    num_beams: int,
    num_return: int | None,
    normalize: str,
    temperature: float,
) -> None:
    """Raise ValueError for an argument of a search that is out of range."""
    if num_beams < 1:
        raise ValueError(f"num_beams must be >= 1; got {num_beams}")
    if num_return is not None and num_return < 1:
        raise ValueError(f"num_return must be >= 1; got {num_return}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite; got {temperature}")
    if tree.device != input_ids.device:
        raise ValueError(f"tree is on {tree.device}, input_ids on {input_ids.device}")
    if normalize not in get_args(Normalize):
        names = ", ".join(map(repr, get_args(Normalize)))
        raise ValueError(f"normalize must be one of {names}; got {normalize!r}")
