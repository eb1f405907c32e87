"""Stepwise decoding of T5: cross-attention keys and values once per prompt, beams as queries."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from ...models.backbone import output_head
from ...models.families import is_known_class
from ...models.packed import encode_prompt
from .base import IdentifierCache, StepDecoder, dot_products, mix

__all__ = ["T5Decoder", "why_unsupported_t5"]

_FAMILY = {"T5ForConditionalGeneration", "MT5ForConditionalGeneration", "BareT5"}


def why_unsupported_t5(model: Any) -> str | None:
    """Why :class:`T5Decoder` cannot run ``model``; None when it can."""
    # By name: importing transformers to ask for its classes takes seconds.
    if not any(each.__name__ in _FAMILY for each in type(model).__mro__):
        return f"{type(model).__name__} is not of the T5 family"
    stack: Any = model.get_decoder()
    if not is_known_class(stack):
        return f"its decoder {type(stack).__name__} is not the one of transformers"
    return None


@dataclass(frozen=True)
class _Layer:
    """The modules of one decoder block, and the prompts' keys and values [B, H, S, d_kv]."""

    self_norm: Any
    self_attention: Any
    cross_norm: Any
    cross_attention: Any
    feed_forward: Any
    keys: Tensor
    values: Tensor


class T5Decoder(StepDecoder):
    """T5 in its own modules, except that attention sees the beams of a prompt as its queries.

    Args:
        model: a T5 or mT5 with a language modelling head, in ``eval`` mode.
        input_ids: prompts [B, S].
        attention_mask: 1 for real tokens [B, S].
        encoded: the encoder's states [B, S, d], where they are known already.
    """

    def __init__(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, encoded: Tensor | None = None
    ) -> None:
        self._prepare(model, input_ids)
        if encoded is None:
            encoded = encode_prompt(model, input_ids, attention_mask).hidden
        stack = model.get_decoder()
        self._final_norm = stack.final_layer_norm
        self._layers = [self._layer(block.layer, encoded) for block in stack.block]
        self._cache = IdentifierCache(len(self._layers))
        # As the model's own mask: a prompt without any token attends evenly, rather than NaN.
        lowest = torch.finfo(encoded.dtype).min
        pads = (attention_mask == 0)[:, None, None, :]
        self._mask = torch.zeros_like(pads, dtype=encoded.dtype).masked_fill_(pads, lowest)

    def _prepare(self, model: Any, input_ids: Tensor) -> None:
        """Set the state that T5Decoder and FusedT5Decoder share."""
        config, stack = model.config, model.get_decoder()
        self.batch, self.device = input_ids.shape[0], input_ids.device
        self.head = output_head(model)
        self._heads, self._size = int(config.num_heads), int(config.d_kv)
        self._start = int(config.decoder_start_token_id)
        scaled = getattr(config, "scale_decoder_outputs", False)  # mT5 has no such setting
        self._scale = config.d_model**-0.5 if scaled else None
        self._embed = stack.embed_tokens
        self._bias = stack.block[0].layer[0].SelfAttention
        self._biases = torch.empty(0)

    def _layer(self, parts: Any, encoded: Tensor) -> _Layer:
        cross = parts[1].EncDecAttention
        shape = (*encoded.shape[:2], self._heads, self._size)
        keys, values = (
            project(encoded).view(shape).transpose(1, 2) for project in (cross.k, cross.v)
        )
        return _Layer(
            parts[0].layer_norm,
            parts[0].SelfAttention,
            parts[1].layer_norm,
            cross,
            parts[2],
            keys,
            values,
        )

    def prompt_tensors(self) -> list[Tensor]:
        return [
            self._mask,
            *(part for layer in self._layers for part in (layer.keys, layer.values)),
        ]

    def fork(self) -> T5Decoder:
        twin = copy.copy(self)
        twin._cache = self._cache.fork()
        return twin

    def first(self) -> Tensor:
        start = torch.full((self.batch, 1), self._start, device=self.device)
        return self._step(start, None)

    def advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        rows = self._rows(parents, self._width)
        return self._step(tokens.clamp_min(0), rows)

    def _step(self, tokens: Tensor, rows: Tensor | None) -> Tensor:
        self._width = tokens.shape[1]
        self._cache.begin_step(rows)
        bias = self._position_bias(self._cache.steps)
        hidden = self._embed(tokens)
        for number, layer in enumerate(self._layers):
            normed = _norm(layer.self_norm, hidden)
            hidden = _bounded(hidden + self._self_attend(number, layer, normed, bias))
            normed = _norm(layer.cross_norm, hidden)
            hidden = _bounded(hidden + self._cross_attend(layer, normed))
            normed = _norm(layer.feed_forward.layer_norm, hidden)
            hidden = _bounded(hidden + layer.feed_forward.DenseReluDense(normed))
        hidden = _norm(self._final_norm, hidden)
        return hidden if self._scale is None else hidden * self._scale

    def _self_attend(self, number: int, layer: _Layer, hidden: Tensor, bias: Tensor) -> Tensor:
        """Attention of each beam to its own tokens, the newest included."""
        own = layer.self_attention
        rows, heads, size = hidden.shape[0] * hidden.shape[1], self._heads, self._size
        value = own.v(hidden)
        self._cache.put(number, own.k(hidden).flatten(0, 1), value.flatten(0, 1))
        keys, values = self._cache.of_beams(number)
        if len(keys) == 1:  # one token: attention returns its value
            return own.o(value)
        shape = (rows, heads, size)
        query = own.q(hidden).view(rows, heads, 1, size)
        scores = dot_products(query, [key.view(shape) for key in keys]) + bias
        weights = scores.softmax(0, dtype=torch.float32).to(query.dtype)
        mixed = mix(weights, [value.view(shape) for value in values])
        return own.o(mixed.view(hidden.shape[0], hidden.shape[1], heads * size))

    def _cross_attend(self, layer: _Layer, hidden: Tensor) -> Tensor:
        """Attention of all beams of a prompt to its encoder states."""
        batch, width = hidden.shape[:2]
        query = layer.cross_attention.q(hidden)
        query = query.view(batch, width, self._heads, self._size).transpose(1, 2)
        mixed = scaled_dot_product_attention(
            query,
            layer.keys,
            layer.values,
            attn_mask=self._mask.to(query.dtype).expand(-1, -1, width, -1),
            scale=1.0,
        )
        return layer.cross_attention.o(mixed.transpose(1, 2).reshape(batch, width, -1))

    def _position_bias(self, steps: int) -> Tensor:
        """Relative position bias of the newest of ``steps`` tokens [steps, 1, H, 1]."""
        known = self._biases.shape[-1]
        if steps > known:
            length = max(8, 2 * known)
            self._biases = self._bias.compute_bias(length, length, device=self.device)
        return self._biases[0, :, steps - 1, :steps].T[:, None, :, None]


def _norm(module: Any, hidden: Tensor) -> Tensor:
    """The model's layer norm; one fused operation where all is float32."""
    weight = module.weight
    if hidden.dtype == weight.dtype == torch.float32 and hasattr(module, "variance_epsilon"):
        return rms_norm(hidden, weight.shape, weight, module.variance_epsilon)
    normed: Tensor = module(hidden)
    return normed


def _bounded(hidden: Tensor) -> Tensor:
    """T5 in float16 overflows now and then; its blocks keep what they pass on finite."""
    if hidden.dtype != torch.float16:
        return hidden
    limit = torch.finfo(torch.float16).max - 1000
    return hidden.clamp(-limit, limit)
