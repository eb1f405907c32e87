"""GPT-2 in C++ on the CPU: the prompts, and each step, are one operation each.

The reference is :class:`GPT2Decoder`; ``csrc/gpt2`` computes the same in float32 and reads the
model's weights in place. Models that it does not support run on the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...models.backbone import output_head
from ...models.families import is_known_class
from .base import IdentifierCache
from .fused import LANES, does_no_more, why_unsupported_fused
from .gpt2 import GPT2Decoder

__all__ = ["FusedGPT2Decoder", "why_unsupported_gpt2_fused"]

_ACTIVATIONS = {"ReLU": "relu", "ReLUActivation": "relu", "NewGELUActivation": "gelu_new"}
_PLAIN = ("transformers.pytorch_utils.Conv1D", "torch.nn.modules.normalization.LayerNorm")


def why_unsupported_gpt2_fused(model: Any) -> str | None:
    """Why :class:`FusedGPT2Decoder` cannot run, here and now, a model that :class:`GPT2Decoder`
    can; None when it can."""
    reason = why_unsupported_fused(model)
    if reason is not None:
        return reason
    stack = model.base_model
    for block in stack.h:
        activation = type(block.mlp.act).__name__
        if activation not in _ACTIVATIONS:
            return f"its activation {activation} is none of {', '.join(_ACTIVATIONS)}"
        if block.attn.head_dim % LANES or block.mlp.c_fc.weight.shape[1] % LANES:
            return f"its heads and feed-forward layers are no multiples of {LANES} wide"
        if block.attn.scaling != stack.h[0].attn.scaling:
            return "its layers scale scores differently"
    for module in _modules(stack):
        if not _plain(module):
            return f"a {type(module).__name__} of it is not plain in float32"
    return None


def _plain(module: Any) -> bool:
    """Whether ``module`` does no more than its weight and bias say."""
    parts = [module._parameters.get(name) for name in ("weight", "bias")]
    name = f"{type(module).__module__}.{type(module).__name__}"
    return (
        (is_known_class(module) or name in _PLAIN)
        and all(
            part is not None and part.dtype == torch.float32 and part.is_contiguous()
            for part in parts
        )
        and does_no_more(module)
    )


def _modules(stack: Any) -> list[Any]:
    """Modules with the weights of a stack, in the order in which they are used."""
    found = []
    for block in stack.h:
        attention, feed = block.attn, block.mlp
        found += [block.ln_1, attention.c_attn, attention.c_proj]
        found += [block.ln_2, feed.c_fc, feed.c_proj]
    return [*found, stack.ln_f]


class FusedGPT2Decoder(GPT2Decoder):
    """The same as :class:`GPT2Decoder`, to rounding; see :func:`why_unsupported_gpt2_fused`.

    Args:
        model: a GPT-2 of transformers or a :class:`~gflowgr.models.bare.BareGPT2`, in ``eval``
            mode.
        input_ids: prompts [B, S], not empty.
        attention_mask: 1 for real tokens [B, S]; padding may be on either side.
    """

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.batch, self.device = input_ids.shape[0], input_ids.device
        self.head = output_head(model)
        self._stack = stack = model.base_model
        self._weights = [
            module._parameters[name] for module in _modules(stack) for name in ("weight", "bias")
        ]
        attention, feed = stack.h[0].attn, stack.h[0].mlp
        heads = self._weights[0].shape[0] // attention.head_dim
        activation = _ACTIVATIONS[type(feed.act).__name__]
        self._options = (heads, activation, float(stack.ln_f.eps), float(attention.scaling))
        mask = attention_mask.long()
        length = mask.shape[1]
        beyond = -length % LANES
        self._pads = torch.zeros(self.batch, length + beyond).masked_fill_(
            pad(mask == 0, (0, beyond), value=True), -torch.inf
        )
        last = (mask * torch.arange(length)).argmax(1)
        embedded = stack.wte(input_ids) + stack.wpe((mask.cumsum(1) - 1).clamp_min(0))
        states, self._prompt_keys, self._prompt_values = torch.ops.gflowgr_cpp.gpt2_prompt(
            embedded, self._pads, last, self._weights, *self._options
        )
        self._first = states.unsqueeze(1)
        self._next = mask.sum(1, keepdim=True)  # position of the next token [B, 1]
        self._cache = IdentifierCache(0)  # of ancestors only
        self._widths: tuple[int, ...] = ()
        self._stored: list[Tensor] = []

    def prompt_tensors(self) -> list[Tensor]:
        return [self._first, self._pads, self._next, self._prompt_keys, self._prompt_values]

    def advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        rows = self._rows(parents, self._widths[-1]) if self._widths else None
        self._widths = (*self._widths, tokens.shape[1])
        self._cache.begin_step(rows)
        positions = self._next + (self._cache.steps - 1)
        embedded = self._stack.wte(tokens.clamp_min(0)) + self._stack.wpe(positions)
        hidden, stored = torch.ops.gflowgr_cpp.gpt2_step(
            embedded,
            self._prompt_keys,
            self._prompt_values,
            self._pads,
            self._stored,
            self._cache.ancestors,
            self._weights,
            *self._options,
        )
        self._stored = [*self._stored, stored]
        return hidden
