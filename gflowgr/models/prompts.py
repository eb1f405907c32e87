"""From histories of items to prompts of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .vocabulary import EOS_TOKEN, PAD_TOKEN

__all__ = ["prompt_tokens"]


def prompt_tokens(histories: Tensor, item_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The identifiers of a history, oldest first, then ``eos``.

    Args:
        histories: items [B, H], left-aligned, -1 for padding.
        item_tokens: identifiers [items, L], right-padded with -1.

    Returns:
        ``input_ids`` and ``attention_mask``, both [B, S] int64, S = longest prompt of the batch.

    Raises:
        ValueError: an item of a history is not in the catalogue.
    """
    if histories.numel() and int(histories.max()) >= len(item_tokens):
        raise ValueError(
            f"histories holds item {int(histories.max())}, but the catalogue has {len(item_tokens)}"
        )
    batch = histories.shape[0]
    tokens = item_tokens[histories.clamp_min(0)]
    tokens = tokens.masked_fill((histories < 0).unsqueeze(-1), -1).reshape(batch, -1)
    end = torch.full((batch, 1), EOS_TOKEN, dtype=tokens.dtype, device=tokens.device)
    tokens = torch.cat([tokens, end], dim=1)
    padding = tokens < 0
    # Stable: real tokens move to the front and keep their order.
    tokens = tokens.gather(1, padding.to(torch.int8).argsort(dim=1, stable=True))
    lengths = (~padding).sum(1)
    longest = int(lengths.max()) if batch else 1
    mask = torch.arange(longest, device=tokens.device) < lengths[:, None]
    return tokens[:, :longest].masked_fill(~mask, PAD_TOKEN), mask.long()
