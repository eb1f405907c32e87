"""Exact log P(item | prompt), of given items or of the whole catalogue.

Scoring every item's identifier by itself decodes each prefix once per item that has it, and the
prompt's cross-attention once per item. Here the tree is walked: every inner node on the way to a
wanted item is decoded once per prompt, from its parent's keys and values, and its children are
scored from its one hidden state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models.backbone import evaluating, real_prompt
from ..models.normalization import chosen_normalize
from ..models.settings import Normalize
from ..models.wrapped import unwrapped
from ..ops.precision import compute_dtype
from ..tree import PrefixTree
from .decoders import GenericDecoder, StepDecoder, decoder_for, decoder_kind
from .node_rows import distinct, parents_of
from .tree_head import TreeHead, check_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["item_logprobs"]

_PROMPTS = 8


@torch.no_grad()
def item_logprobs(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    tree: PrefixTree,
    items: Tensor | None = None,
    *,
    normalize: Normalize | None = None,
    temperature: float = 1.0,
    batch_bytes: int | None = None,
) -> Tensor:
    """Log-probability of each item's whole identifier.

    Each inner node above a wanted item is decoded once per prompt and block. A node whose outcome
    is certain (with ``"children"``, a single child) adds 0 and is not decoded, unless a node below
    it is.

    Args:
        model: any that :func:`constrained_beam_search` takes; runs in evaluation mode and is left
            as it was.
        input_ids: prompts [B, S]; padding may be on either side and hold any value.
        attention_mask: 1 for real tokens [B, S]; None: every token is real.
        tree: prefix tree in the model's token ids, on the model's device.
        items: item ids [M], the same for all prompts, or [B, M], -1 for padding; None for the whole
            catalogue in the order of item ids.
        normalize: over what each token's probability is normalised, as in
            :func:`constrained_beam_search`. With ``"children"`` the identifiers' probabilities sum
            to 1 when none is a prefix of another.
        temperature: divides the logits.
        batch_bytes: memory for a block of leaves, about: its activations and its nodes' keys and
            values, beside the result and the prompts' own keys and values, of at least 8 prompts
            (default 32 MiB on a CPU, 1 GiB elsewhere). More makes fewer, larger steps.

    Returns:
        [B, items] in nats, float32 (float64 for a float64 model). Items that share an identifier
        have the same value, that of the identifier; padding and items without an identifier have
        -inf.

    Raises:
        TypeError: ``items`` holds other than integers.
        ValueError: an argument is out of range or of a wrong shape.
        FloatingPointError: a result is NaN, which the model's weights or states must be.
    """
    model = unwrapped(model)
    normalize = chosen_normalize(model, normalize)
    input_ids, attention_mask = real_prompt(model, input_ids, attention_mask)
    _check(input_ids, tree, items, normalize, temperature, batch_bytes)
    batch, device = input_ids.shape[0], input_ids.device
    if batch_bytes is None:
        batch_bytes = 2**25 if device.type == "cpu" else 2**30
    if items is None:
        leaves = torch.arange(tree.num_leaves, device=device).unsqueeze(0)
        place = tree.leaf_of(torch.arange(tree.num_items, device=device)).unsqueeze(0)
    else:
        leaves, place = distinct(tree.leaf_of(items if items.dim() == 2 else items.unsqueeze(0)))
    dtype = compute_dtype(model.dtype)
    if batch == 0 or place.shape[1] == 0:
        return torch.empty(batch, place.shape[1], dtype=dtype, device=device)
    scores = torch.empty(batch, leaves.shape[1], dtype=dtype, device=device)
    rows = max(1, batch_bytes // (4 * _floats_per_leaf(model, input_ids.shape[1], tree.max_length)))
    # At least a few prompts at a time, even if memory then needs narrow blocks: the plan of what to
    # decode is made once for all of them.
    together = min(batch, max(_PROMPTS, rows // leaves.shape[1]))
    with evaluating(model):
        for begin in range(0, batch, together):
            end = min(begin + together, batch)
            decoder = decoder_for(model, input_ids[begin:end], attention_mask[begin:end])
            head = TreeHead(
                decoder.head,
                tree,
                normalize=normalize,
                temperature=temperature,
                block_bytes=batch_bytes,
            )
            part = leaves if leaves.shape[0] == 1 else leaves[begin:end]
            _score_leaves(decoder, head, part, max(1, rows // (end - begin)), scores[begin:end])
    if bool(scores.isnan().any()):
        row = int(scores.isnan().any(1).nonzero()[0])
        raise FloatingPointError(f"the model's scores are NaN (first in prompt {row})")
    place = place.expand(batch, -1)
    return scores.gather(1, place.clamp_min(0)).masked_fill_(place < 0, -torch.inf)


def _score_leaves(
    decoder: StepDecoder, head: TreeHead, leaves: Tensor, width: int, scores: Tensor
) -> None:
    """Fill ``scores`` [B, W] of ``leaves`` [B or 1, W], ``width`` leaves at a time.

    Leaves next to each other share ancestors, so a block decodes few nodes that another block
    decodes too: those on the path to its first leaf.
    """
    first = decoder.first()
    for begin in range(0, leaves.shape[1], width):
        part = leaves[:, begin : begin + width]
        levels = _levels(head, part)
        total = torch.zeros(decoder.batch, part.shape[1], dtype=torch.float64, device=part.device)
        hidden, branch = first, decoder.fork()
        for depth, level in enumerate(levels):
            if depth:
                tokens = head.tree.node_tokens(level.nodes, level=depth - 1).clamp_min(0)
                shape = (decoder.batch, tokens.shape[1])
                hidden = branch.advance(tokens.expand(shape), level.parents.expand(shape))
            if not bool(level.scored.any()):
                continue
            place = level.place.clamp_min(0)
            logits, normaliser = head.edges(hidden, depth, level.nodes, place, level.tokens)
            edge = logits - normaliser.gather(1, place.expand(decoder.batch, -1))
            total += torch.where(level.scored, edge.double(), 0.0)
        scores[:, begin : begin + width] = total


def _floats_per_leaf(model: PreTrainedModel, prompt_length: int, depth: int) -> int:
    """Numbers that a walk to ``depth`` holds for each prompt and leaf, about."""
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    if issubclass(decoder_kind(model)[0], GenericDecoder):
        return 3 * int(config.vocab_size) + depth
    heads, width = int(config.num_attention_heads), int(config.hidden_size)
    size = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or width // heads
    feed = getattr(config, "d_ff", None) or getattr(config, "intermediate_size", None) or 4 * width
    inner, layers = heads * int(size), int(config.num_hidden_layers)
    own = 2 * inner * int(getattr(config, "num_key_value_heads", None) or heads) // heads
    step = max(8 * inner, 2 * heads * prompt_length) + 2 * int(feed) + 4 * width
    return step + own * layers * (depth - 1)


@dataclass(frozen=True)
class _Level:
    """The nodes of one depth to decode, and for each leaf [B or 1, W] which it needs.

    Attributes:
        nodes: distinct node ids [B or 1, K], ascending, then -1.
        parents: place of each node's parent in the level above.
        place: for each leaf the place of its ancestor, -1 where none is needed.
        tokens: for each leaf the token that follows its ancestor.
        scored: whether that token's probability is a factor of the leaf's.
    """

    nodes: Tensor
    parents: Tensor
    place: Tensor
    tokens: Tensor
    scored: Tensor


def _levels(head: TreeHead, leaves: Tensor) -> list[_Level]:
    """What to decode for ``leaves`` [B or 1, W] (-1 for padding), from the root down."""
    tree = head.tree
    path = _path(tree, leaves)
    needed, plans = torch.zeros_like(leaves, dtype=torch.bool), []
    for depth in range(tree.max_length - 1, -1, -1):
        scored = (path[depth + 1] >= 0) & ~head.certain(path[depth], depth)
        needed = needed | scored
        plans.append((depth, scored, needed))
    levels: list[_Level] = []
    for depth, scored, needed in reversed(plans):
        if not bool(needed.any()):
            break
        nodes, place = distinct(path[depth].masked_fill(~needed, -1))
        above = levels[-1].place if levels else torch.zeros_like(place)
        parents = parents_of(nodes.shape[1], place, above)
        tokens = tree.node_tokens(path[depth + 1], level=depth)
        tokens = torch.where(scored, tokens, tree.codebooks[depth].start)
        levels.append(_Level(nodes, parents, place, tokens, scored))
    return levels


def _path(tree: PrefixTree, leaves: Tensor) -> list[Tensor]:
    """Nodes at depth 0, 1, ..., max_length on the way to each leaf; -1 beyond it."""
    node, path = tree.leaf_nodes(leaves), []
    bounds = tree.layout.node_begin
    for depth in range(tree.max_length, 0, -1):
        here = (node >= bounds[depth]) & (node < bounds[depth + 1])
        path.append(torch.where(here, node, -1))
        node = torch.where(here, tree.parents(node), node)
    path.append(node)
    return path[::-1]


def _check(
    input_ids: Tensor,
    tree: PrefixTree,
    items: Tensor | None,
    normalize: str,
    temperature: float,
    batch_bytes: int | None,
) -> None:
    check_options(normalize, temperature)
    if tree.device != input_ids.device:
        raise ValueError(f"tree is on {tree.device}, input_ids on {input_ids.device}")
    if batch_bytes is not None and batch_bytes < 1:
        raise ValueError(f"batch_bytes must be >= 1; got {batch_bytes}")
    batch = input_ids.shape[0]
    if items is not None and not (
        items.dim() == 1 or (items.dim() == 2 and items.shape[0] == batch)
    ):
        raise ValueError(f"items must be [M], or [B, M] with B = {batch}; got {tuple(items.shape)}")
