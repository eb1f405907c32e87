"""Beam search over the valid identifiers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..models.backbone import PromptState, branch_hidden_states, encode_prompt, output_head
from ..ops.topk import stable_topk
from ..tree import PrefixTree

__all__ = ["BeamSearchOutput", "constrained_beam_search"]

Normalize = Literal["vocab", "children"]


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


@dataclass
class _Beams:
    """Live prefixes [B, K] and finished identifiers [B, F]; an empty slot has score -inf."""

    nodes: Tensor
    scores: Tensor
    tokens: Tensor
    leaves: Tensor
    leaf_scores: Tensor


@torch.no_grad()
def constrained_beam_search(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    tree: PrefixTree,
    *,
    num_beams: int = 20,
    num_return: int | None = None,
    normalize: Normalize = "vocab",
    available: Tensor | None = None,
    exclude: Tensor | None = None,
) -> BeamSearchOutput:
    """Find each prompt's most probable items.

    The prompt is encoded once. At every step all beams of a prompt run as branches of one packed
    decoder sequence, so that cross-attention keys and values are held once per prompt and nothing
    is re-ordered. Only children of the beams' tree nodes are candidates, so every result is a valid
    identifier. Equal scores keep the order of the tree (ascending tokens).

    Args:
        model: a T5-family model.
        input_ids: prompts [B, S].
        attention_mask: 1 for real tokens [B, S].
        tree: prefix tree in the model's token ids, on the model's device.
        num_beams: beams K kept at each step.
        num_return: items returned per prompt (default ``num_beams``).
        normalize: ``"vocab"``: token log-probabilities under the softmax over the vocabulary (what
            ``generate`` does); ``"children"``: over the children of the node.
        available: true for items that may be returned [items]; others are pruned up to the root.
        exclude: items [B, E] that a prompt may not get (its seen items), -1 for padding. Prefixes
            that lead to nothing else are pruned for that prompt, just as with ``available``.

    Returns:
        Items sharing one identifier follow each other by ascending id, with the same score.

    Raises:
        TypeError: ``available`` is not bool, or ``exclude`` not of integers.
        ValueError: an argument is out of range or of a wrong shape.
        FloatingPointError: the model's scores are NaN.
    """
    _check(input_ids, attention_mask, tree, num_beams, num_return, normalize)
    _check_filters(tree, input_ids.shape[0], available, exclude)
    count = num_beams if num_return is None else num_return
    batch, device = input_ids.shape[0], input_ids.device
    if batch == 0:
        items = torch.empty(0, count, dtype=torch.long, device=device)
        tokens = torch.empty(0, count, tree.max_length, dtype=torch.long, device=device)
        return BeamSearchOutput(items, torch.empty(0, count, device=device), tokens)
    admissible = _admissible(tree, available, exclude)
    prompt = encode_prompt(model, input_ids, attention_mask)
    beams = _Beams(
        nodes=torch.zeros(batch, 1, dtype=torch.long, device=device),
        scores=torch.zeros(batch, 1, device=device),
        tokens=torch.empty(batch, 1, 0, dtype=torch.long, device=device),
        leaves=torch.empty(batch, 0, dtype=torch.long, device=device),
        leaf_scores=torch.empty(batch, 0, device=device),
    )
    for _ in range(tree.max_length):
        candidates = _expand(model, prompt, beams, tree, normalize, admissible)
        _finish(beams, candidates, tree, admissible, num_beams)
        if not _keep_best(beams, candidates, tree, num_beams):
            break
    # NaN sorts before every number, so a look at what was kept is enough.
    if bool(beams.leaf_scores.isnan().any()) or bool(beams.scores.isnan().any()):
        row = int((beams.leaf_scores.isnan().any(1) | beams.scores.isnan().any(1)).nonzero()[0])
        raise FloatingPointError(f"the model's scores are NaN (first in prompt {row})")
    return _to_items(beams, tree, count, admissible)


class _Pairs:
    """A set of (prompt, id) pairs with ids in 0..size - 1, as sorted int64 keys."""

    def __init__(self, rows: Tensor, ids: Tensor, size: int) -> None:
        self.size = size
        self.keys, self.counts = (rows * size + ids).unique(return_counts=True)

    @property
    def rows(self) -> Tensor:
        return self.keys // self.size

    @property
    def ids(self) -> Tensor:
        return self.keys % self.size

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


@dataclass(frozen=True)
class _Admissible:
    """What may be returned: masks for all prompts, and what each prompt bars besides.

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
        """Whether each prompt may get ``ids`` [B, ...]; any answer for ids that do not exist."""
        allowed: Tensor | None = getattr(self, kind)
        barred: _Pairs | None = getattr(self, f"barred_{kind}")
        keep = torch.ones_like(ids, dtype=torch.bool)
        if allowed is not None:
            keep &= allowed[ids.clamp(0, allowed.numel() - 1)]
        return keep if barred is None else keep & ~barred.hit(ids)


def _admissible(tree: PrefixTree, available: Tensor | None, exclude: Tensor | None) -> _Admissible:
    """Prune the tree: once by ``available``, then for each prompt by ``exclude``, leaves upwards.

    Every prompt keeps at most E nodes per level, so nothing of size [B, nodes] is made.
    """
    device = tree.device
    items = None if available is None else available.to(device)
    nodes = None if items is None else tree.available_nodes(items)
    left_items = None if items is None else _counts_before(items[tree.item_ids.long()])
    left_nodes = None if nodes is None else _counts_before(nodes)
    leaves = None
    if left_items is not None:
        leaves = _in_range(left_items, *tree.leaf_items(torch.arange(tree.num_leaves).to(device)))
        leaves = leaves > 0
    if exclude is None:
        return _Admissible(items, leaves, nodes)

    exclude = exclude.to(device).long()
    rows = torch.arange(exclude.shape[0], device=device).unsqueeze(1).expand_as(exclude)
    barred_items = _Pairs(rows[exclude >= 0], exclude[exclude >= 0], tree.num_items)
    rows, ids = barred_items.rows, barred_items.ids
    leaf = tree.leaf_of(ids)
    counted = leaf >= 0 if items is None else (leaf >= 0) & items[ids]
    touched = _Pairs(rows[counted], leaf[counted], tree.num_leaves)
    full = touched.counts == _in_range(left_items, *tree.leaf_items(touched.ids))
    barred_leaves = _Pairs(touched.rows[full], touched.ids[full], tree.num_leaves)

    leaf_rows, leaf_nodes = barred_leaves.rows, tree.leaf_nodes(barred_leaves.ids)
    below = _Pairs(rows[:0], rows[:0], tree.num_nodes)  # the barred nodes one level deeper
    levels = []
    bounds = tree.layout.node_begin
    for depth in range(tree.max_length, 0, -1):
        parents = _Pairs(below.rows, tree.parents(below.ids), tree.num_nodes)
        here = (leaf_nodes >= bounds[depth]) & (leaf_nodes < bounds[depth + 1])
        suspects = _Pairs(
            torch.cat([parents.rows, leaf_rows[here]]),
            torch.cat([parents.ids, leaf_nodes[here]]),
            tree.num_nodes,
        )
        rows, ids = suspects.rows, suspects.ids
        found, place = parents.find(rows, ids)
        gone = torch.zeros_like(ids)
        gone[found] = parents.counts[place[found]]
        own = tree.terminal(ids)
        ends = (own >= 0) & ~barred_leaves.find(rows, own)[0]
        if leaves is not None:
            ends &= leaves[own.clamp_min(0)]
        barred = (gone == _in_range(left_nodes, *tree.child_ranges(ids))) & ~ends
        below = _Pairs(rows[barred], ids[barred], tree.num_nodes)
        levels.append(below)
    barred_nodes = _Pairs(
        torch.cat([level.rows for level in levels]),
        torch.cat([level.ids for level in levels]),
        tree.num_nodes,
    )
    return _Admissible(items, leaves, nodes, barred_items, barred_leaves, barred_nodes)


def _counts_before(flags: Tensor) -> Tensor:
    """Number of true flags before each position, int64 [n + 1]."""
    return torch.nn.functional.pad(flags.long().cumsum(0), (1, 0))


def _in_range(counts_before: Tensor | None, begin: Tensor, end: Tensor) -> Tensor:
    """Number of counted positions in begin..end; all of them without counts."""
    return end - begin if counts_before is None else counts_before[end] - counts_before[begin]


@dataclass(frozen=True)
class _Candidates:
    """Children of the live beams [B, C]; invalid ones have node -1 and score -inf."""

    nodes: Tensor
    scores: Tensor
    parents: Tensor


def _expand(
    model: nn.Module,
    prompt: PromptState,
    beams: _Beams,
    tree: PrefixTree,
    normalize: Normalize,
    admissible: _Admissible,
) -> _Candidates:
    """Score every child of every beam."""
    batch, width = beams.nodes.shape
    start = int(model.config.decoder_start_token_id)  # type: ignore[union-attr, arg-type]
    first = torch.full((batch, width, 1), start, dtype=torch.long, device=beams.nodes.device)
    # Tokens of empty slots are -1: any real token does, their scores stay -inf.
    prefixes = torch.cat([first, beams.tokens.clamp_min(0)], dim=2)
    hidden = branch_hidden_states(model, prompt, prefixes)[:, :, -1]
    weight, bias = output_head(model)
    logits = torch.nn.functional.linear(hidden, weight, bias).float()

    begin, end = tree.child_ranges(beams.nodes)
    fanout = max(1, int((end - begin).max()))
    nodes = begin.unsqueeze(-1) + torch.arange(fanout, device=begin.device)
    valid = nodes < end.unsqueeze(-1)
    valid &= admissible.filter("nodes", nodes)
    nodes = nodes.masked_fill(~valid, -1)
    tokens = tree.node_tokens(nodes).clamp_min(0)
    chosen = logits.gather(-1, tokens)
    if normalize == "vocab":
        normaliser = logits.logsumexp(-1, keepdim=True)
    else:
        in_range = torch.arange(fanout, device=begin.device) < (end - begin).unsqueeze(-1)
        normaliser = chosen.masked_fill(~in_range, -torch.inf).logsumexp(-1, keepdim=True)
    scores = beams.scores.unsqueeze(-1) + (chosen - normaliser)
    scores = torch.where(valid, scores, -torch.inf)
    parents = torch.arange(width, device=begin.device)[:, None].expand(width, fanout).reshape(1, -1)
    return _Candidates(nodes.flatten(1), scores.flatten(1), parents.expand(batch, -1))


def _finish(
    beams: _Beams,
    candidates: _Candidates,
    tree: PrefixTree,
    admissible: _Admissible,
    num_beams: int,
) -> None:
    """Move candidates that complete an identifier to the finished ones; keep the best K."""
    leaves = tree.terminal(candidates.nodes)
    if not bool((leaves >= 0).any()):
        return  # no identifier ends at this depth
    ends = (leaves >= 0) & admissible.filter("leaves", leaves)
    scores = candidates.scores.masked_fill(~ends, -torch.inf)
    all_leaves = torch.cat([beams.leaves, leaves], dim=1)
    all_scores = torch.cat([beams.leaf_scores, scores], dim=1)
    keep = min(num_beams, all_scores.shape[1])
    beams.leaf_scores, index = stable_topk(all_scores, keep)
    beams.leaves = all_leaves.gather(1, index)


def _keep_best(beams: _Beams, candidates: _Candidates, tree: PrefixTree, num_beams: int) -> bool:
    """Keep the best K unfinished prefixes; false when none is left."""
    begin, end = tree.child_ranges(candidates.nodes)
    scores = candidates.scores.masked_fill(end <= begin, -torch.inf)
    keep = min(num_beams, scores.shape[1])
    beams.scores, index = stable_topk(scores, keep)
    beams.nodes = candidates.nodes.gather(1, index).masked_fill(beams.scores == -torch.inf, -1)
    parents = candidates.parents.gather(1, index)
    history = beams.tokens.gather(1, parents.unsqueeze(-1).expand(-1, -1, beams.tokens.shape[2]))
    beams.tokens = torch.cat([history, tree.node_tokens(beams.nodes).unsqueeze(-1)], dim=2)
    return bool((beams.nodes >= 0).any())


def _to_items(
    beams: _Beams, tree: PrefixTree, count: int, admissible: _Admissible
) -> BeamSearchOutput:
    """Expand leaves to their items and keep the first ``count``."""
    leaves = beams.leaves.masked_fill(beams.leaf_scores == -torch.inf, -1)
    begin, end = tree.leaf_items(leaves)
    group = max(1, int((end - begin).max())) if leaves.numel() else 1
    slot = begin.unsqueeze(-1) + torch.arange(group, device=leaves.device)
    valid = slot < end.unsqueeze(-1)
    items = tree.item_ids[slot.clamp(0, tree.item_ids.numel() - 1)].long()
    valid &= admissible.filter("items", items)
    items = items.masked_fill(~valid, -1).flatten(1)
    scores = beams.leaf_scores.unsqueeze(-1).expand_as(slot).flatten(1)
    # Valid entries first, in their order; then cut or pad to the asked number.
    order = (items < 0).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    items = items.gather(1, order)
    scores = scores.gather(1, order).masked_fill(items < 0, -torch.inf)
    missing = count - items.shape[1]
    if missing > 0:
        items = torch.nn.functional.pad(items, (0, missing), value=-1)
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    tokens = tree.identifiers(items.clamp_min(0)).masked_fill((items < 0).unsqueeze(-1), -1)
    return BeamSearchOutput(items, scores, tokens)


def _check(
    input_ids: Tensor,
    attention_mask: Tensor,
    tree: PrefixTree,
    num_beams: int,
    num_return: int | None,
    normalize: str,
) -> None:
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            "input_ids and attention_mask must both be [B, S]; got "
            f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
        )
    if num_beams < 1:
        raise ValueError(f"num_beams must be >= 1; got {num_beams}")
    if num_return is not None and num_return < 1:
        raise ValueError(f"num_return must be >= 1; got {num_return}")
    if tree.device != input_ids.device:
        raise ValueError(f"tree is on {tree.device}, input_ids on {input_ids.device}")
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize must be 'vocab' or 'children'; got {normalize!r}")


def _check_filters(
    tree: PrefixTree, batch: int, available: Tensor | None, exclude: Tensor | None
) -> None:
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
    if exclude.numel() and not -1 <= int(exclude.min()) <= int(exclude.max()) < tree.num_items:
        raise ValueError(
            f"exclude must hold items 0..{tree.num_items - 1}, or -1; "
            f"got {int(exclude.min())}..{int(exclude.max())}"
        )
