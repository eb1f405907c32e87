"""Stepwise decoding of GPT-2 in its own modules, without the forward pass of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...models.backbone import output_head
from ...models.families import is_known_class
from .causal import CausalDecoder
from .fused import does_no_more

__all__ = ["GPT2Decoder", "why_unsupported_gpt2"]

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""Layer, query, key and value [B, H, T, d_head], factor of the scores -> [B, T, H, d_head]."""


def why_unsupported_gpt2(model: Any) -> str | None:
    """Why :class:`GPT2Decoder` cannot run, here and now, a model that :class:`CausalDecoder` can;
    None when it can."""
    if type(model).__name__ != "GPT2LMHeadModel" or not is_known_class(model):
        return f"{type(model).__name__} is not the GPT-2 of transformers"
    if model.training:
        return "it has no dropout, and the model is in training mode"
    stack = model.base_model
    passed_over = [
        stack,
        *stack.h,
        *(part for block in stack.h for part in (block.attn, block.mlp)),
    ]
    for module in passed_over:
        if not is_known_class(module):
            return f"its {type(module).__name__} is not the one of transformers"
        if not does_no_more(module):
            return f"a {type(module).__name__} of it has hooks"
    if not all(
        hasattr(block.attn, "scaling") and hasattr(block.attn, "head_dim") for block in stack.h
    ):
        return "its attention does not say how scores are scaled"
    return None


class GPT2Decoder(CausalDecoder):
    """The same as :class:`CausalDecoder`, to rounding.

    Args:
        model: a GPT-2 of transformers or a :class:`~gflowgr.models.bare.BareGPT2`, in ``eval``
            mode.
        input_ids: prompts [B, S].
        attention_mask: 1 for real tokens [B, S]; padding may be on either side.
    """

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.batch, self.device = input_ids.shape[0], input_ids.device
        self.head = output_head(model)
        self._stack = model.base_model
        mask = attention_mask.long()
        length = mask.shape[1]
        # Each token sees itself, so that padding has states, which nothing looks at.
        before = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=self.device)
        seen = (before & (mask != 0)[:, None, None, :]) | itself
        prompt: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            prompt.append((key, value))
            mixed = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
            return mixed.transpose(1, 2)

        states = self._run(input_ids, (mask.cumsum(1) - 1).clamp_min(0), attend)
        self._begin(states, mask, prompt)

    def _continue(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self._run(tokens, positions, self.attend)

    def _run(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        stack = self._stack
        hidden = stack.wte(tokens) + stack.wpe(positions)
        for number, block in enumerate(stack.h):
            own = block.attn
            query, key, value = (
                part.unflatten(2, (-1, own.head_dim)).transpose(1, 2)
                for part in own.c_attn(block.ln_1(hidden)).chunk(3, dim=-1)
            )
            mixed = attend(number, query, key, value, own.scaling).flatten(2)
            hidden = hidden + own.c_proj(mixed)
            feed = block.mlp
            hidden = hidden + feed.c_proj(feed.act(feed.c_fc(block.ln_2(hidden))))
        states: Tensor = stack.ln_f(hidden)
        return states
