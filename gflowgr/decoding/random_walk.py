"""Random walks down the tree, with replacement and without."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tree.admissible import Admissible
from ..tree.facts import tree_facts
from .decoders import StepDecoder
from .keyed_noise import keyed_gumbel, keyed_uniform
from .node_rows import distinct, parents_of
from .tree_head import TreeHead


@dataclass(frozen=True)
class Draws:
    """Nodes, in the end items, that were drawn: [B, S], -1 for none; all numbers float64.

    Attributes:
        ids: node or item ids.
        log_q: log-probability of the sampling distribution.
        log_model: log-probability of the model.
        noise: perturbed log-probability, or None with replacement.
    """

    ids: Tensor
    log_q: Tensor
    log_model: Tensor
    noise: Tensor | None = None

    def take(self, index: Tensor) -> Draws:
        """Columns ``index`` [B, S'] of each row."""
        noise = None if self.noise is None else self.noise.gather(1, index)
        ids, log_q = self.ids.gather(1, index), self.log_q.gather(1, index)
        return Draws(ids, log_q, self.log_model.gather(1, index), noise)

    def cleared(self, gone: Tensor) -> Draws:
        """A copy without the draws where ``gone`` [B, S] is true."""
        ids = self.ids.masked_fill(gone, -1)
        log_q = self.log_q.masked_fill(gone, -torch.inf)
        log_model = self.log_model.masked_fill(gone, -torch.inf)
        noise = None if self.noise is None else self.noise.masked_fill(gone, -torch.inf)
        return Draws(ids, log_q, log_model, noise)


def nothing(batch: int, count: int, device: torch.device) -> Draws:
    """Draws [batch, count], all empty."""
    empty = torch.full((batch, count), -torch.inf, dtype=torch.float64, device=device)
    return Draws(torch.full_like(empty, -1, dtype=torch.int64), empty, empty, empty)


class TreeWalk:
    """The arguments that all walks of one call share.

    Args:
        head: scores edges, at temperature 1.
        admissible: what each prompt may be given.
        seed: seeds all noise.
        keys: of each prompt [B]; what its noise depends on.
        temperature: divides the logits that are sampled from.
        top_p: probability of the nucleus.
    """

    def __init__(
        self,
        head: TreeHead,
        admissible: Admissible,
        seed: int,
        keys: Tensor,
        *,
        temperature: float,
        top_p: float,
    ) -> None:
        self.head, self.tree, self.admissible = head, head.tree, admissible
        self.seed, self.keys = seed, keys.unsqueeze(1)
        self.temperature, self.top_p = temperature, top_p

    # ------------------------------------------------------------------ with replacement

    def with_replacement(self, decoder: StepDecoder, count: int) -> Draws:
        """``count`` independent items for each prompt."""
        tree, device = self.tree, self.keys.device
        sample = torch.arange(count, device=device)
        zeros = torch.zeros(decoder.batch, count, dtype=torch.float64, device=device)
        drawn = Draws(zeros.long(), zeros, zeros)
        hidden = decoder.first()
        above = torch.zeros_like(drawn.ids)
        for depth in range(tree.max_length):
            open_ = self._open(drawn.ids)
            if not bool(open_.any()):
                break
            # Samples at one node share its hidden state.
            nodes, place = distinct(drawn.ids.masked_fill(~open_, -1))
            if depth:
                tokens = tree.node_tokens(nodes, level=depth - 1).clamp_min(0)
                parents = parents_of(nodes.shape[1], place, above)
                hidden = decoder.advance(tokens, parents)
            above = place
            below = self._children(hidden, depth, nodes)
            number = keyed_uniform(self.seed, self.keys, sample, depth)
            index = _pick(below.log_q, place.clamp_min(0), number)
            chosen = Draws(*(p.flatten(1) for p in (below.ids, below.log_q, below.log_model)))
            chosen = chosen.take(index)
            drawn = Draws(
                torch.where(open_, chosen.ids, drawn.ids),
                drawn.log_q + torch.where(open_, chosen.log_q, 0.0),
                drawn.log_model + torch.where(open_, chosen.log_model, 0.0),
            )
            drawn = drawn.cleared(drawn.log_q == -torch.inf)
        items, allowed, share = self._items(drawn.ids)
        number = keyed_uniform(self.seed, self.keys, sample, tree.max_length)
        rank = (number * allowed.sum(-1)).long()
        index = (allowed.cumsum(-1) > rank.unsqueeze(-1)).long().argmax(-1, keepdim=True)
        ids = items.gather(-1, index).squeeze(-1)
        return Draws(ids, drawn.log_q + share, drawn.log_model).cleared(drawn.ids < 0)

    # ------------------------------------------------------------------ without replacement

    def without_replacement(self, decoder: StepDecoder, count: int) -> Draws:
        """The ``count`` items with the largest perturbed log-probabilities, largest first.

        A node's perturbed log-probability is the largest among the items below it: its children's
        are drawn given that their maximum is the node's, so the best ``count`` nodes of a level
        have the best ``count`` items below them.
        """
        tree = self.tree
        zeros = torch.zeros(decoder.batch, 1, dtype=torch.float64, device=self.keys.device)
        root = zeros.long()
        beams = Draws(root, zeros, zeros, keyed_gumbel(self.seed, self.keys, root))
        hidden = decoder.first()
        parents = root
        for depth in range(tree.max_length):
            open_ = self._open(beams.ids)
            if not bool(open_.any()):
                break
            nodes = beams.ids.masked_fill(~open_, -1)
            if depth:
                # Empty and finished beams run along with any token; nothing is read from them.
                tokens = tree.node_tokens(nodes, level=depth - 1).clamp_min(0)
                hidden = decoder.advance(tokens, parents)
            grown = self._grow(beams, self._children(hidden, depth, nodes), self._noise_keys)
            finished = beams.cleared(open_)
            width, fanout = nodes.shape[1], grown.ids.shape[1] // nodes.shape[1]
            beams, index = _best(_joined(finished, grown), count)
            parents = torch.where(index < width, index, (index - width) // fanout)
        items, allowed, share = self._items(beams.ids)
        log_q = torch.where(allowed, share.unsqueeze(-1), -torch.inf)
        below = Draws(items, log_q, torch.zeros_like(log_q))
        # The keys of items start after those of nodes, so that no noise is used twice.
        items_drawn = self._grow(beams, below, lambda ids: ids + tree.num_nodes)
        drawn, _ = _best(items_drawn, count)
        missing = count - drawn.ids.shape[1]
        if missing > 0:
            drawn = _joined(drawn, nothing(decoder.batch, missing, beams.ids.device))
        return drawn

    @staticmethod
    def _noise_keys(ids: Tensor) -> Tensor:
        return ids

    def _grow(self, beams: Draws, below: Draws, keys: Callable[[Tensor], Tensor]) -> Draws:
        """What lies below the beams [B, K, F] as [B, K F], perturbed given the beams' noise."""
        assert beams.noise is not None
        log_q = beams.log_q.unsqueeze(-1) + below.log_q
        log_model = beams.log_model.unsqueeze(-1) + below.log_model
        free = log_q + keyed_gumbel(self.seed, self.keys.unsqueeze(-1), keys(below.ids))
        noise = _given_maximum(free, beams.noise.unsqueeze(-1))
        noise = noise.masked_fill(log_q == -torch.inf, -torch.inf)
        return Draws(*(part.flatten(1) for part in (below.ids, log_q, log_model, noise)))

    # ------------------------------------------------------------------ both

    def _open(self, nodes: Tensor) -> Tensor:
        begin, end = self.tree.child_ranges(nodes)
        return end > begin

    def _children(self, hidden: Tensor, depth: int, nodes: Tensor) -> Draws:
        """Children of ``nodes`` [B, K]: [B, K, F], with the log-probabilities of their edges."""
        tree = self.tree
        begin, end = tree.child_ranges(nodes)
        fanout = max(1, int((end - begin).max()))
        child = begin.unsqueeze(-1) + torch.arange(fanout, device=begin.device)
        child = child.masked_fill(child >= end.unsqueeze(-1), -1)
        allowed = (child >= 0) & self.admissible.filter("nodes", child)
        tokens = tree.node_tokens(child, level=depth)
        tokens = torch.where(child >= 0, tokens, tree.codebooks[depth].start).flatten(1)
        parents = torch.arange(nodes.shape[1], device=nodes.device).repeat_interleave(fanout)
        logits, normaliser = self.head.edges(hidden, depth, nodes, parents.unsqueeze(0), tokens)
        logits = logits.double().view(child.shape)
        log_model = logits - normaliser.unsqueeze(-1)
        log_q = (logits / self.temperature).masked_fill(~allowed, -torch.inf)
        log_q = self._nucleus(log_q.log_softmax(-1).masked_fill(~allowed, -torch.inf))
        return Draws(child, log_q, log_model)

    def _nucleus(self, log_q: Tensor) -> Tensor:
        if self.top_p == 1:
            return log_q
        ordered, order = log_q.sort(dim=-1, descending=True, stable=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        keep = torch.zeros_like(order, dtype=torch.bool)
        keep.scatter_(-1, order, before < self.top_p)
        kept = log_q.masked_fill(~keep, -torch.inf)
        return torch.where(kept == -torch.inf, kept, kept.log_softmax(-1))

    def _items(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Items of leaf nodes [B, S, G], which are admissible, and the log share of each [B, S]."""
        tree = self.tree
        begin, end = tree.leaf_items(tree.terminal(nodes))
        group = tree_facts(tree.buffer).most_items
        slot = begin.unsqueeze(-1) + torch.arange(group, device=nodes.device)
        items = tree.item_ids[slot.clamp_max(tree.item_ids.numel() - 1)].long()
        allowed = (slot < end.unsqueeze(-1)) & self.admissible.filter("items", items)
        return items, allowed, -allowed.sum(-1).clamp_min(1).double().log()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, without cancellation (Maechler, 2012)."""
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def _given_maximum(free: Tensor, maximum: Tensor) -> Tensor:
    """Gumbel variables [..., F] moved so that their maximum is ``maximum`` [..., 1].

    The stable form of -log(exp(-T) - exp(-Z) + exp(-G)), Z the maximum of G and T the wanted one
    (Kool et al., 2019, appendix B.3).
    """
    gap = maximum - free + log1mexp(free - free.amax(-1, keepdim=True))
    return maximum - gap.clamp_min(0) - torch.log1p((-gap.abs()).exp())


def _pick(log_q: Tensor, place: Tensor, number: Tensor) -> Tensor:
    """For each sample the column of [K F] that inverts the distribution function of its node.

    Args:
        log_q: of children [B, K, F].
        place: node of each sample [B, S].
        number: uniform [B, S].
    """
    fanout = log_q.shape[-1]
    mass = log_q.exp().cumsum(-1)
    total = mass[..., -1:]
    # The functions of a prompt's nodes one above the other: one search, no copy per sample.
    raised = mass / total.clamp_min(torch.finfo(mass.dtype).tiny)
    raised += torch.arange(log_q.shape[1], device=log_q.device).unsqueeze(-1)
    found = torch.searchsorted(raised.flatten(1), place + number, right=True) - place * fanout
    # Rounding must lead neither to another node nor to a child without probability.
    last = (mass >= total).long().argmax(-1).gather(1, place)
    return place * fanout + torch.minimum(found.clamp_min(0), last)


def _joined(left: Draws, right: Draws) -> Draws:
    assert left.noise is not None
    assert right.noise is not None
    return Draws(
        torch.cat([left.ids, right.ids], dim=1),
        torch.cat([left.log_q, right.log_q], dim=1),
        torch.cat([left.log_model, right.log_model], dim=1),
        torch.cat([left.noise, right.noise], dim=1),
    )


def _best(draws: Draws, count: int) -> tuple[Draws, Tensor]:
    """The ``count`` columns with the most noise, and which they are."""
    assert draws.noise is not None
    index = draws.noise.topk(min(count, draws.noise.shape[1]), dim=1).indices
    best = draws.take(index)
    assert best.noise is not None
    return best.cleared(best.noise == -torch.inf), index
