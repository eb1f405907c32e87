"""T5 in C++ on the CPU: encoder, prompt keys and each step are one operation each.

The reference is :class:`T5Decoder` with the model's own encoder; ``csrc/t5/t5_cpu.cpp`` computes
the same in float32 and reads the model's weights in place. Models that it does not support run on
the reference.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models.bare import BareLinear, position_buckets
from ...models.families import is_known_class
from .base import IdentifierCache
from .fused import LANES, does_no_more, why_unsupported_fused
from .t5 import T5Decoder, why_unsupported_t5

__all__ = ["FusedT5Decoder", "why_unsupported_t5_fused"]

_ACTIVATIONS = {"ReLU": "relu", "NewGELUActivation": "gelu_new"}


def why_unsupported_t5_fused(model: Any) -> str | None:
    """Why :class:`FusedT5Decoder` cannot run ``model`` here and now; None when it can."""
    reason = why_unsupported_t5(model)
    if reason is not None:
        return reason
    reason = why_unsupported_fused(model)
    if reason is not None:
        return reason
    if not is_known_class(model.get_encoder()):
        return f"its encoder {type(model.get_encoder()).__name__} is not the one of transformers"
    if model.config.d_kv % LANES:
        return f"d_kv = {model.config.d_kv} is no multiple of {LANES}"
    for stack in (model.get_encoder(), model.get_decoder()):
        activation = type(stack.block[0].layer[-1].DenseReluDense.act).__name__
        if activation not in _ACTIVATIONS:
            return f"its activation {activation} is none of {', '.join(_ACTIVATIONS)}"
        for module in _modules(stack):
            if not _plain(module):
                return f"a {type(module).__name__} of it is not plain in float32"
    return None


def _plain(module: Any) -> bool:
    """Whether ``module`` does no more than its weight says."""
    weight = module._parameters.get("weight")
    linear = type(module) in (nn.Linear, BareLinear) and module.bias is None
    return (
        weight is not None
        and (linear or hasattr(module, "variance_epsilon"))
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and does_no_more(module)
    )


def _modules(stack: Any) -> list[Any]:
    """Modules with the weights of a stack, in the order in which they are used."""
    found = []
    for block in stack.block:
        own, *cross, last = block.layer
        attention, feed = own.SelfAttention, last.DenseReluDense
        found += [own.layer_norm, attention.q, attention.k, attention.v, attention.o]
        for part in cross:
            found += [part.layer_norm, part.EncDecAttention.q, part.EncDecAttention.o]
        into = [feed.wi_0, feed.wi_1] if hasattr(feed, "wi_0") else [feed.wi]
        found += [last.layer_norm, *into, feed.wo]
    return [*found, stack.final_layer_norm]


@dataclass(frozen=True)
class _Stack:
    """The weights and options of an encoder or decoder, as the ops take them."""

    weights: list[Tensor]
    options: tuple[int, bool, str, float]  # heads, gated, activation, epsilon

    @classmethod
    def of(cls, stack: Any, heads: int) -> _Stack:
        feed = stack.block[0].layer[-1].DenseReluDense
        activation = _ACTIVATIONS[type(feed.act).__name__]
        epsilon = float(stack.final_layer_norm.variance_epsilon)
        weights = [module._parameters["weight"] for module in _modules(stack)]
        return cls(weights, (heads, hasattr(feed, "wi_0"), activation, epsilon))


class FusedT5Decoder(T5Decoder):
    """The same as :class:`T5Decoder`, to rounding; see :func:`why_unsupported_t5_fused`.

    Args:
        model: a T5 or mT5 with a language modelling head, in ``eval`` mode.
        input_ids: prompts [B, S], not empty.
        attention_mask: 1 for real tokens [B, S].
        encoded: the encoder's states [B, S, d], where they are known already.
    """

    def __init__(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, encoded: Tensor | None = None
    ) -> None:
        self._prepare(model, input_ids)
        lowest = torch.finfo(torch.float32).min
        self._mask = (attention_mask == 0).float().mul_(lowest)
        if encoded is None:
            encoded = self._encode(model.get_encoder(), input_ids)
        stack = model.get_decoder()
        self._stack = _Stack.of(stack, self._heads)
        cross = [block.layer[1].EncDecAttention for block in stack.block]
        weights = [module.weight for part in cross for module in (part.k, part.v)]
        self._prompt = torch.ops.gflowgr_cpp.t5_prompt(encoded.contiguous(), weights, self._heads)
        self._cache = IdentifierCache(0)  # of ancestors only
        self._stored: list[Tensor] = []

    def prompt_tensors(self) -> list[Tensor]:
        return [self._mask, *self._prompt]

    def _encode(self, encoder: Any, input_ids: Tensor) -> Tensor:
        stack = _Stack.of(encoder, self._heads)
        bias = _encoder_bias(encoder.block[0].layer[0].SelfAttention, input_ids.shape[1])
        embedded = encoder.embed_tokens(input_ids)
        states: Tensor = torch.ops.gflowgr_cpp.t5_encode(
            embedded, self._mask, bias, stack.weights, *stack.options
        )
        return states

    def _step(self, tokens: Tensor, rows: Tensor | None) -> Tensor:
        self._width = tokens.shape[1]
        self._cache.begin_step(rows)
        hidden, stored = torch.ops.gflowgr_cpp.t5_step(
            self._embed(tokens),
            *self._prompt,
            self._mask,
            self._own_bias(self._cache.steps),
            self._stored,
            self._cache.ancestors,
            self._stack.weights,
            *self._stack.options,
        )
        self._stored = [*self._stored, stored]
        return hidden if self._scale is None else hidden * self._scale

    def _own_bias(self, steps: int) -> Tensor:
        """Relative position bias of the newest of ``steps`` tokens [steps, H]."""
        known = self._biases.shape[0]
        if steps > known:
            known = max(8, 2 * known)
            newest_first = _bias(self._bias, 0, -known, bidirectional=False)
            self._biases = newest_first.flip(0)
        return self._biases[known - steps :]


def _encoder_bias(attention: Any, length: int) -> Tensor:
    """Relative position bias [H, S16 + S - 1]: of query i and key j at i - j + S - 1.

    S16 is S rounded up to whole vectors, whose last queries are none.
    """
    padded = -(-length // LANES) * LANES
    return _bias(attention, length - 1, -padded, bidirectional=True).T.contiguous()


def _bias(attention: Any, first: int, end: int, *, bidirectional: bool) -> Tensor:
    """Bias of keys ``first``, ``first`` - 1, ..., ``end`` + 1 places behind a query [places, H]."""
    sizes = attention.relative_attention_num_buckets, attention.relative_attention_max_distance
    buckets = _buckets(first, end, bidirectional, *sizes)
    bias: Tensor = attention.relative_attention_bias(buckets)
    return bias


@functools.lru_cache(maxsize=128)
def _buckets(
    first: int, end: int, bidirectional: bool, num_buckets: int, max_distance: int
) -> Tensor:
    """T5's buckets of relative positions, which take as long as a layer."""
    return position_buckets(
        torch.arange(first, end, -1),
        bidirectional=bidirectional,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )
