"""Whole sequences: one pass over a user's items, every one of which is the target of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .backbone import without_peft
from .families import why_unsupported_causal
from .prompts import PromptLayout, check_items

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "SequencePrompts",
    "check_sequences",
    "sequence_hidden_states",
    "sequence_prompts",
]


class SequencePrompts(NamedTuple):
    """Item sequences as one row of tokens each, and where in it each item is predicted.

    Attributes:
        input_ids: int64 [W, S], padded on the right.
        attention_mask: int64 [W, S], 1 for real tokens.
        tokens: identifiers of the items after the first [W, P, L]; 0 under a false mask.
        mask: true for real tokens [W, P, L]; P = items of the longest sequence - 1.
        states: int64 [W, P, L]: state ``states[w, p, l]`` of the row predicts
            ``tokens[w, p, l]``; 0 under a false mask.
    """

    input_ids: Tensor
    attention_mask: Tensor
    tokens: Tensor
    mask: Tensor
    states: Tensor


def check_sequences(model: PreTrainedModel | Any, layout: PromptLayout, max_items: int) -> None:
    """Check that each prompt of a sequence is the beginning of the next one.

    Args:
        model: the backbone.
        layout: of its prompts.
        max_items: items of the longest sequence.

    Raises:
        ValueError: whole sequences would not be what the prompts are; the message says why.
    """
    why = why_unsupported_causal(without_peft(model))
    if why is not None:
        raise ValueError(f"sequences must be off: they need a decoder-only model, and {why}")
    if layout.suffix != layout.separator:
        raise ValueError(
            "sequences must be off for this prompt layout: what follows a history must be what "
            f"stands between two items; got {list(layout.suffix)} and {list(layout.separator)}"
        )
    if layout.max_items is not None and layout.max_items < max_items - 1:
        raise ValueError(
            f"sequences must be off: a prompt may have {layout.max_items} items, and the longest "
            f"sequence has {max_items - 1} before its last"
        )


def sequence_prompts(items: Tensor, item_tokens: Tensor, layout: PromptLayout) -> SequencePrompts:
    """Rows of tokens in which items 1, 2, ... of a sequence are predicted from those before.

    Args:
        items: [W, H], left-aligned, -1 for padding; at least two in each row.
        item_tokens: identifiers [items, L], right-padded with -1.
        layout: what stands around them; see :func:`check_sequences`.

    Raises:
        ValueError: an item is not in the catalogue, or no row has two items.
    """
    check_items(items, item_tokens)
    if items.dim() != 2 or items.shape[1] < 2:
        raise ValueError(f"items must be [W, H] with H >= 2; got {list(items.shape)}")
    rows, width = items.shape
    device = item_tokens.device
    kept = items >= 0
    tokens = item_tokens[items.clamp_min(0)].masked_fill(~kept.unsqueeze(-1), -1)
    read = tokens
    if layout.end_token is not None:
        read = tokens.masked_fill(tokens == layout.end_token, -1)

    # The place of each item's first token in its row, and the tokens of the row.
    between = len(layout.separator)
    sizes = (read >= 0).sum(-1)
    first = len(layout.prefix) + sizes.cumsum(1) - sizes
    first = first + between * torch.arange(width, device=device)
    place = first.unsqueeze(-1) + torch.arange(tokens.shape[-1], device=device)
    lengths = len(layout.prefix) + sizes.sum(1) + between * (kept.sum(1) - 1)
    total = int(lengths.max())
    ids = torch.full((rows, total + 1), layout.pad_token, dtype=torch.int64, device=device)
    for at, token in enumerate(layout.prefix):
        ids[:, at] = token
    # What is no token goes into one column too many, which is cut off.
    ids.scatter_(1, torch.where(read >= 0, place, total).flatten(1), read.clamp_min(0).flatten(1))
    for back, token in enumerate(reversed(layout.separator), start=1):
        before = torch.where(kept[:, 1:], first[:, 1:] - back, total)
        ids.scatter_(1, before, token)
    real = torch.arange(total, device=device) < lengths[:, None]
    mask = (tokens >= 0)[:, 1:]
    return SequencePrompts(
        ids[:, :total].masked_fill(~real, layout.pad_token),
        real.long(),
        tokens[:, 1:].masked_fill(~mask, 0),
        mask,
        (place[:, 1:] - 1).masked_fill(~mask, 0),
    )


def sequence_hidden_states(
    model: PreTrainedModel | Any, input_ids: Tensor, states: Tensor, valid: Tensor
) -> Tensor:
    """States that predict the targets of whole sequences, from one pass.

    Args:
        model: the decoder-only backbone.
        input_ids: [W, S], padded on the right: so no real token sees padding.
        states: int64 [W, P, L] of :class:`SequencePrompts`.
        valid: true for the positions that have a target [W, P]; T of them.

    Returns:
        [T, 1, L, d], as the states of T prompts with one trajectory each.
    """
    plain: Any = without_peft(model)
    hidden: Tensor = plain.base_model(
        input_ids=input_ids, attention_mask=None, use_cache=False
    ).last_hidden_state
    row, _ = valid.nonzero(as_tuple=True)
    chosen: Tensor = hidden[row.unsqueeze(1), states[valid]]
    return chosen.unsqueeze(1)
