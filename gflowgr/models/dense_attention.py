"""Attention of T5 in training on a CPU: plain matrix products instead of SDPA.

T5's position bias is learned, and PyTorch's SDPA has no fast CPU path whose mask takes a gradient:
it falls back to separate products around a softmax that looks for rows without a key. The prompts
here are short, so the fused kernel for cross-attention pays for its blocking too. This function
runs the same products without those passes, in float32 or in what autocast asks for. On other
devices it is SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .cheap_dropout import cheap_dropout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["use_dense_attention"]

_NAME = "gflowgr_dense"


def use_dense_attention(model: PreTrainedModel) -> bool:
    """Have ``model`` run its attention densely on a CPU; equal to SDPA up to rounding.

    Args:
        model: a T5 or mT5, also in a ``peft.PeftModel``. Any other model, and one whose user chose
            another attention than ``"sdpa"``, is left as it is.

    Returns:
        Whether it does. Nothing of it is saved with the model.
    """
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        MT5ForConditionalGeneration,
        T5ForConditionalGeneration,
    )
    from transformers.masking_utils import sdpa_mask

    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    if not isinstance(base, (T5ForConditionalGeneration, MT5ForConditionalGeneration)):
        return False
    if base.config._attn_implementation != "sdpa":
        return base.config._attn_implementation == _NAME
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, partial(_mask, sdpa_mask))
    for module in (base, base.get_encoder(), base.get_decoder()):
        module.config._attn_implementation = _NAME
    return True


def _mask(make: Callable[..., Tensor | None], *args: Any, **options: Any) -> Tensor | None:
    """None where a mask would hide nothing; on other devices the host would wait to see that."""
    if torch.device(options["device"]).type != "cpu":
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return make(*args, **options)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of queries [B, H, T, D] to keys and values [B, H, S, D] -> [B, T, H, D]."""
    unmasked = attention_mask is None and getattr(module, "is_causal", False)
    if query.device.type != "cpu" or unmasked:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options |= {"dropout": dropout, "scaling": scaling, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query if scale == 1 else query * scale) @ key.transpose(2, 3)
    bias = _bias(position_bias, attention_mask, scores)
    if bias is not None:
        scores = scores + bias
    # Said outright: autocast would take the softmax to float32, and copy it there and back.
    weights = torch.softmax(scores, -1, dtype=scores.dtype)
    if dropout:
        weights = cheap_dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _bias(position_bias: Tensor | None, mask: Tensor | None, scores: Tensor) -> Tensor | None:
    """What is added to the scores, in their dtype; the lowest number (never -inf) where masked."""
    if mask is None:
        return None if position_bias is None else position_bias.to(scores.dtype)
    lowest = torch.finfo(scores.dtype).min
    if mask.dtype == torch.bool:
        if position_bias is None:
            zeros = torch.zeros((), dtype=scores.dtype, device=mask.device)
            return torch.where(mask, zeros, lowest)
        return torch.where(mask, position_bias.to(scores.dtype), lowest)
    bias = mask if position_bias is None else mask + position_bias
    return bias.clamp_min(lowest).to(scores.dtype)
