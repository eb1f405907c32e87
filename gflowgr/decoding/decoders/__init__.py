"""Stepwise decoders: prompts processed once, then one token of all beams at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...models.backbone import real_prompt
from ...models.bare import BareGPT2
from .base import IdentifierCache, StepDecoder
from .causal import CausalDecoder, why_unsupported_causal
from .generic import GenericDecoder
from .gpt2 import GPT2Decoder, why_unsupported_gpt2
from .gpt2_fused import FusedGPT2Decoder, why_unsupported_gpt2_fused
from .t5 import T5Decoder, why_unsupported_t5
from .t5_fused import FusedT5Decoder, why_unsupported_t5_fused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "CausalDecoder",
    "FusedGPT2Decoder",
    "FusedT5Decoder",
    "GPT2Decoder",
    "GenericDecoder",
    "IdentifierCache",
    "StepDecoder",
    "T5Decoder",
    "decoder_for",
    "decoder_kind",
]


def decoder_kind(model: PreTrainedModel | Any) -> tuple[type[StepDecoder], str | None]:
    """Which decoder runs ``model``; for the generic one, also why no fast one can."""
    if isinstance(model, BareGPT2):
        return _of_gpt2(model), None
    reason = why_unsupported_t5(model)
    if reason is None:
        return T5Decoder if why_unsupported_t5_fused(model) else FusedT5Decoder, None
    other = why_unsupported_causal(model)
    if other is None:
        return CausalDecoder if why_unsupported_gpt2(model) else _of_gpt2(model), None
    return GenericDecoder, f"{reason}; {other}"


def _of_gpt2(model: Any) -> type[StepDecoder]:
    return GPT2Decoder if why_unsupported_gpt2_fused(model) else FusedGPT2Decoder


def decoder_for(
    model: PreTrainedModel | Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    encoded: Tensor | None = None,
) -> StepDecoder:
    """Process prompts, and return what continues them step by step.

    Args:
        model: an encoder-decoder or decoder-only model of ``transformers``, in ``eval`` mode.
            T5 and the families of :mod:`gflowgr.models.families` run fast, any other by whole
            sequences. T5 and GPT-2 in float32 on a CPU run in C++ where no gradients are recorded.
        input_ids: prompts [B, S], at least one; padding may be on either side and hold any value.
        attention_mask: 1 for real tokens [B, S]; None: every token is real.
        encoded: the encoder's states [B, S, d], where they are known already.

    Raises:
        ValueError: an argument is of a wrong shape, or the model has no encoder.
    """
    given: tuple[Tensor, ...] = real_prompt(model, input_ids, attention_mask)
    if encoded is not None:
        if not getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(f"encoded: {type(model).__name__} has no encoder")
        if encoded.dim() != 3 or encoded.shape[:2] != input_ids.shape:
            raise ValueError(
                f"encoded must be [B, S, d] with B, S = {tuple(input_ids.shape)}; "
                f"got {tuple(encoded.shape)}"
            )
        given = (*given, encoded)
    decoder: Any = decoder_kind(model)[0]
    made: StepDecoder = decoder(model, *given)
    return made
