"""Beam search over the valid identifiers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ..models.backbone import PromptState, branch_hidden_states, encode_prompt, output_head
from ..ops.topk import stable_topk
from ..tree import PrefixTree
from .admissible import Admissible, admissible_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    model: PreTrainedModel,
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
    count = num_beams if num_return is None else num_return
    batch, device = input_ids.shape[0], input_ids.device
    admissible = admissible_for(tree, batch, available, exclude)
    if batch == 0:
        items = torch.empty(0, count, dtype=torch.long, device=device)
        tokens = torch.empty(0, count, tree.max_length, dtype=torch.long, device=device)
        return BeamSearchOutput(items, torch.empty(0, count, device=device), tokens)
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


@dataclass(frozen=True)
class _Candidates:
    """Children of the live beams [B, C]; invalid ones have node -1 and score -inf."""

    nodes: Tensor
    scores: Tensor
    parents: Tensor


def _expand(
    model: PreTrainedModel,
    prompt: PromptState,
    beams: _Beams,
    tree: PrefixTree,
    normalize: Normalize,
    admissible: Admissible,
) -> _Candidates:
    """Score every child of every beam."""
    batch, width = beams.nodes.shape
    start = int(model.config.decoder_start_token_id)
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
    admissible: Admissible,
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
    if not bool((end > begin).any()):
        return False  # the last level
    scores = candidates.scores.masked_fill(end <= begin, -torch.inf)
    keep = min(num_beams, scores.shape[1])
    beams.scores, index = stable_topk(scores, keep)
    beams.nodes = candidates.nodes.gather(1, index).masked_fill(beams.scores == -torch.inf, -1)
    parents = candidates.parents.gather(1, index)
    history = beams.tokens.gather(1, parents.unsqueeze(-1).expand(-1, -1, beams.tokens.shape[2]))
    beams.tokens = torch.cat([history, tree.node_tokens(beams.nodes).unsqueeze(-1)], dim=2)
    return bool((beams.nodes >= 0).any())


def _to_items(
    beams: _Beams, tree: PrefixTree, count: int, admissible: Admissible
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
