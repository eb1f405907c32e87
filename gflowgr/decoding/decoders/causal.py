"""Stepwise decoding of decoder-only models: the prompt's cache once, beams as its queries.

The model's own forward runs unchanged, on [B, K] tokens that are K beams and not K positions; only
its attention function is another one, by the attention interface of transformers. It looks at the
prompt's keys, shared by all beams of a prompt, and at the beam's own few, under one softmax.

Where the beams are few beside the prompt, each sees the keys of all of them, and a mask hides the
others': one operation, which costs less than to gather each beam's own. Where they are many, their
own keys are gathered.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from ...models.backbone import output_head
from ...models.families import why_unsupported_causal
from .base import IdentifierCache, StepDecoder, dot_products, mix

__all__ = ["CausalDecoder", "why_unsupported_causal"]

_ATTENTION = "gflowgr_shared_prompt"
_FEW = 128
"""Keys of beams, beyond as many as the prompt has, up to which the mask is cheaper."""


class CausalDecoder(StepDecoder):
    """The models that :func:`~gflowgr.models.families.why_unsupported_causal` does not refuse.

    Args:
        model: the model with its language modelling head, in ``eval`` mode.
        input_ids: prompts [B, S].
        attention_mask: 1 for real tokens [B, S]; padding may be on either side.
    """

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> None:
        from transformers import DynamicCache

        self.batch, self.device = input_ids.shape[0], input_ids.device
        self.head = output_head(model)
        mask = attention_mask.long()
        cache = DynamicCache(config=model.config)
        states = model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        layers: list[Any] = cache.layers
        self._view = _view_of(model.base_model)
        self._begin(states, mask, [(part.keys, part.values) for part in layers])

    def _begin(self, states: Tensor, mask: Tensor, prompt: list[tuple[Tensor, Tensor]]) -> None:
        """Set the state of the first step.

        Args:
            states: of the prompts' tokens [B, S, d].
            mask: 1 for real tokens [B, S], int64.
            prompt: keys and values [B, H_kv, S, d_head] of each layer.
        """
        last = (mask * torch.arange(mask.shape[1], device=self.device)).argmax(1)
        self._first = states[torch.arange(self.batch, device=self.device), last].unsqueeze(1)
        self._prompt = prompt
        self._pads = torch.zeros_like(mask, dtype=torch.float32)
        self._pads = self._pads.masked_fill_(mask == 0, -torch.inf)[:, None, None, :]
        self._next = mask.sum(1, keepdim=True)  # position of the next token [B, 1]
        self._cache = IdentifierCache(len(prompt))
        self._widths: tuple[int, ...] = ()  # beams of each step
        self._mask: Tensor | None = None  # of the step, where the beams are few

    def prompt_tensors(self) -> list[Tensor]:
        return [self._first, self._pads, self._next, *(part for kv in self._prompt for part in kv)]

    def fork(self) -> CausalDecoder:
        twin = copy.copy(self)
        twin._cache = self._cache.fork()
        return twin

    def first(self) -> Tensor:
        return self._first

    def advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        rows = self._rows(parents, self._widths[-1]) if self._widths else None
        self._widths = (*self._widths, tokens.shape[1])
        self._cache.begin_step(rows)
        few = sum(self._widths) <= self._pads.shape[-1] + _FEW
        self._mask = self._sight() if few else None
        positions = self._next + (self._cache.steps - 1)
        return self._continue(tokens.clamp_min(0), positions.expand_as(tokens))

    def _continue(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """States [B, K, d] of one more token of each beam [B, K], at ``positions`` [B, K]."""
        hidden: Tensor = self._view(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            gflowgr_decoder=self,
        ).last_hidden_state
        return hidden

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Attention of K beams per prompt to the prompt and to their own tokens.

        Args:
            layer: number of the layer.
            query: [B, H, K, d_head], rotated.
            key: [B, H_kv, K, d_head], rotated.
            value: [B, H_kv, K, d_head].
            scaling: factor of the scores.

        Returns:
            [B, K, H, d_head].
        """
        batch, heads, width, size = query.shape
        kv_heads = key.shape[1]
        kept = self._cache.put(
            layer,
            key.transpose(1, 2).reshape(batch * width, -1),
            value.transpose(1, 2).reshape(batch * width, -1),
        )
        if self._mask is None:
            return self._attend_apart(layer, query, kv_heads, scaling)
        keys, values = (
            torch.cat(
                [of_prompt, *(x.view(batch, -1, kv_heads, size).transpose(1, 2) for x in own)], 2
            )
            for of_prompt, own in zip(self._prompt[layer], zip(*kept, strict=True), strict=True)
        )
        mask = self._mask.to(query.dtype)
        if heads > kv_heads:
            mask = mask.repeat(1, 1, heads // kv_heads, 1)
        # Query heads of one group share keys: [B, H_kv, G * K, d_head], no copy of the keys.
        grouped = query.reshape(batch, kv_heads, -1, size)
        mixed = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
        return mixed.view(batch, heads, width, size).transpose(1, 2)

    def _sight(self) -> Tensor:
        """What each beam sees of the keys of prompt and beams [B, 1, K, S + all beams so far]: 0 or
        -inf."""
        beams = self._widths[-1]
        of_row = torch.arange(self.batch, device=self.device).unsqueeze(1)
        parts = [self._pads.expand(-1, -1, beams, -1)]
        own = [rows.view(self.batch, beams) for rows in self._cache.ancestors]
        own.append(torch.arange(self.batch * beams, device=self.device).view(self.batch, beams))
        for rows, width in zip(own, self._widths, strict=True):
            place = (rows - of_row * width)[:, None, :, None]
            others = torch.arange(width, device=self.device) != place
            parts.append(
                torch.zeros_like(others, dtype=torch.float32).masked_fill_(others, -torch.inf)
            )
        return torch.cat(parts, dim=-1)

    def _attend_apart(self, layer: int, query: Tensor, kv_heads: int, scaling: float) -> Tensor:
        """:meth:`attend` with each beam's own keys gathered, the newest stored already."""
        batch, _, width, size = query.shape
        keys, values = self._cache.of_beams(layer)
        query = query * scaling
        grouped = query.reshape(batch, kv_heads, -1, size)
        prompt_keys, prompt_values = self._prompt[layer]
        to_prompt = (grouped @ prompt_keys.transpose(2, 3)).float() + self._pads
        rows = (batch, width, kv_heads, size)
        own_query = query.view(batch, kv_heads, -1, width, size).permute(0, 3, 1, 2, 4)
        to_own = dot_products(own_query, [key.view(rows) for key in keys]).float()
        # [steps, B, K, H_kv, G] to [B, H_kv, G * K, steps]
        to_own = to_own.permute(1, 3, 4, 2, 0).flatten(2, 3)
        weights = torch.cat([to_prompt, to_own], dim=-1).softmax(-1).to(query.dtype)
        length = prompt_keys.shape[2]
        of_own = weights[..., length:].unflatten(2, (-1, width)).permute(4, 0, 3, 1, 2)
        mixed = (weights[..., :length] @ prompt_values).unflatten(2, (-1, width))
        mixed = mixed.permute(0, 3, 1, 2, 4) + mix(of_own, [value.view(rows) for value in values])
        return mixed.flatten(2, 3)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    gflowgr_decoder: CausalDecoder | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that models call; their forward passes ``gflowgr_decoder`` to it."""
    if gflowgr_decoder is None:
        raise RuntimeError(f"the attention {_ATTENTION!r} runs in a CausalDecoder only")
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return gflowgr_decoder.attend(layer, query, key, value, scale), None


class _RMSNorm(nn.Module):
    """The norm of T5 and of most decoder-only models: a launch on a GPU where theirs takes six.

    It takes the place of a module with ``weight`` [d] and ``variance_epsilon``.
    """

    _own: Any
    variance_epsilon: float

    def forward(self, hidden: Tensor) -> Tensor:
        weight: Any = self.weight
        if weight.dtype != hidden.dtype:  # what the result is then, models differ in
            own: Tensor = self._own(hidden)
            return own
        return rms_norm(hidden, weight.shape, weight, self.variance_epsilon)

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Whether a module is such a norm; Gemma's, which adds 1 to its weight, has other names."""
        names = [name for name, _ in module.named_parameters()]
        return (
            type(module).__name__.endswith("RMSNorm")
            and type(module).__module__.startswith("transformers.models.")
            and names == ["weight"]
            and hasattr(module, "variance_epsilon")
        )


@dataclass(frozen=True)
class _Known:
    """A view, and what it was made of: modules may be put into a model, or set to train."""

    parts: list[nn.Module]  # without the model itself, which would then never be freed
    training: list[bool]
    view: Any


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def _view_of(model: nn.Module) -> Any:
    """:func:`_view` of a model, made once: at 28 layers it takes as long as a step of a GPU."""
    parts = list(model.modules())[1:]
    training = [part.training for part in parts]
    known = _known.get(model)
    if known is None or known.parts != parts or known.training != training:
        known = _known[model] = _Known(parts, training, _view(model))
    return known.view


def _view(model: Any) -> Any:
    """``model`` with the attention and norms above: other module objects, the same parameters.

    The model itself, which others may be using, is left alone.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
    config = copy.copy(model.config)
    config._attn_implementation = _ATTENTION
    config.pad_token_id = None  # else every step looks for it among the tokens, to warn of it

    def share(module: nn.Module) -> nn.Module:
        # Not copy.copy: a module sharded by FSDP2 would be constructed anew.
        norm = _RMSNorm.replaces(module)
        twin: Any = object.__new__(_RMSNorm if norm else type(module))
        twin.__dict__ = module.__dict__.copy()
        if norm:
            twin.__dict__["_own"] = module.forward
        twin._modules = {
            name: None if child is None else share(child) for name, child in module._modules.items()
        }
        if getattr(module, "config", None) is model.config:
            twin.config = config
        return cast(nn.Module, twin)

    return share(model)
