"""Prompts of tokens, made from histories of items."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..plain_settings import make_plain
from .vocabulary import EOS_TOKEN, PAD_TOKEN

__all__ = ["TIGER_PROMPT", "PromptLayout", "check_items", "prompt_tokens"]


@dataclass(frozen=True)
class PromptLayout:
    """The tokens around a history's identifiers: prefix, separator, suffix.

    A prompt is ``prefix``, the identifiers (oldest first) with ``separator`` between them, and
    ``suffix``.

    Attributes:
        prefix: tokens before the history.
        separator: tokens between two items.
        suffix: tokens after the history.
        pad_token: fills a batch on the right.
        end_token: the token that ends an identifier of varying length, to leave out of prompts, or
            None to keep it.
        max_items: the oldest items beyond this many are dropped (None: none are).
    """

    prefix: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    pad_token: int = PAD_TOKEN
    end_token: int | None = None
    max_items: int | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        if self.max_items is not None and self.max_items < 1:
            raise ValueError(f"max_items must be >= 1; got {self.max_items}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description, the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PromptLayout:
        """Rebuild from :meth:`to_dict`."""
        parts = {name: tuple(values[name]) for name in ("prefix", "separator", "suffix")}
        return cls(**{**values, **parts})


TIGER_PROMPT = PromptLayout(suffix=(EOS_TOKEN,))
"""The identifiers of a history, oldest first, then ``eos``."""


def prompt_tokens(
    histories: Tensor, item_tokens: Tensor, layout: PromptLayout = TIGER_PROMPT
) -> tuple[Tensor, Tensor]:
    """Prompts of histories. No text is tokenised here: all of it is tensors.

    Args:
        histories: items [B, H], left-aligned, -1 for padding.
        item_tokens: identifiers [items, L], right-padded with -1.
        layout: what stands around them.

    Returns:
        ``input_ids`` and ``attention_mask``, both [B, S] int64, padded on the right, S = longest
        prompt of the batch.

    Raises:
        ValueError: an item of a history is not in the catalogue.
    """
    check_items(histories, item_tokens)
    batch, width = histories.shape
    device = item_tokens.device
    place = torch.arange(width, device=device)
    kept = histories >= 0
    if layout.max_items is not None:
        kept &= place >= kept.sum(1, keepdim=True) - layout.max_items
    tokens = item_tokens[histories.clamp_min(0)]
    if layout.end_token is not None:
        tokens = tokens.masked_fill(tokens == layout.end_token, -1)

    def fixed(part: tuple[int, ...], *shape: int) -> Tensor:
        return torch.tensor(part, dtype=tokens.dtype, device=device).expand(*shape, len(part))

    between = fixed(layout.separator, batch, width)
    if width:
        first = kept.to(torch.int8).argmax(1, keepdim=True)
        between = between.masked_fill((place == first).unsqueeze(-1), -1)
    tokens = torch.cat([between, tokens], dim=2).masked_fill(~kept.unsqueeze(-1), -1)
    ends = (fixed(layout.prefix, batch), fixed(layout.suffix, batch))
    tokens = torch.cat([ends[0], tokens.flatten(1), ends[1]], dim=1)
    padding = tokens < 0
    # Stable: real tokens move to the front and keep their order.
    tokens = tokens.gather(1, padding.to(torch.int8).argsort(dim=1, stable=True))
    lengths = (~padding).sum(1)
    longest = int(lengths.max()) if batch else 1
    mask = torch.arange(longest, device=device) < lengths[:, None]
    return tokens[:, :longest].masked_fill(~mask, layout.pad_token), mask.long()


def check_items(items: Tensor, item_tokens: Tensor) -> None:
    """Check that the items (-1 for padding) are in the catalogue of ``item_tokens`` [items, L].

    Raises:
        ValueError: one is not.
    """
    if items.numel() and int(items.max()) >= len(item_tokens):
        raise ValueError(
            f"histories holds item {int(items.max())}, but the catalogue has {len(item_tokens)}"
        )
