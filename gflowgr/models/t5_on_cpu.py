"""Temporary changes to attention, T5's feed-forward and dropout during training.

Equal results, or equal up to rounding or to the draws of dropout, in less time:

* **Attention** (T5, mT5 and GPT-2, on a CPU): plain matrix products instead of SDPA, whose backward
  pass is half of the step of a small decoder there. T5's position bias is
  learned, and PyTorch's SDPA has no fast CPU path whose mask takes a gradient: it falls back to
  separate products around a softmax that looks for rows without a key. The prompts here are short,
  so the fused kernel for cross-attention pays for its blocking too. The same products are run
  without those passes, in float32 or in what autocast asks for. On other devices it is SDPA.
* **Feed-forward** (T5 and mT5, under autocast): ``transformers`` takes the hidden activations
  [..., d_ff] to the dtype of the output projection's weight, which autocast keeps in float32, and
  autocast takes them back for the product: two copies forward and two backward of a layer's largest
  tensor, that change nothing. They are left out.
* **Dropout** (any ``nn.Dropout``, on a CPU): PyTorch draws a number for each element, which is a
  third of a training step of a small T5 with a dropout of 0.1. One draw of 64 bits decides for four
  elements, about three times as fast; backward multiplies by the same mask. On other devices it is
  PyTorch's.

Only classes of modules and the name of the attention in configurations are changed, so nothing of
it is saved with a model, and :func:`restore` needs no saved state. The trainer rewires while it
trains, unless ``GFlowGRConfig(t5_on_cpu=False)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2LMHeadModel,
    MT5ForConditionalGeneration,
    T5ForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.mt5.modeling_mt5 import MT5DenseActDense, MT5DenseGatedActDense
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

from .backbone import DENSE_ATTENTION

__all__ = [
    "cheap_dropout",
    "restore",
    "rewired",
    "use_cheap_dropout",
    "use_dense_attention",
    "use_direct_feed_forward",
]

_NAME, _THEIRS = DENSE_ATTENTION, "sdpa"
_LEVELS = 1 << 16


@contextmanager
def rewired(model: nn.Module) -> Iterator[None]:
    """All three changes within, and the model as it was afterwards.

    Args:
        model: any that holds T5, mT5 or GPT-2 models (also in a ``peft.PeftModel``) or dropout;
            what is neither, what is subclassed, and an attention that its user chose are left as
            they are.
    """
    use_dense_attention(model)
    use_direct_feed_forward(model)
    use_cheap_dropout(model)
    try:
        yield
    finally:
        restore(model)


def restore(model: nn.Module) -> None:
    """Undo the changes of :func:`rewired` and of the functions below in ``model``, which may be a
    copy of a changed one; a model without them is left as it is."""
    for module in model.modules():
        theirs = _THEIRS_OF.get(type(module))
        if theirs is not None:
            module.__class__ = theirs
        if isinstance(module, _MODELS):
            for config in _configs(module):
                if config._attn_implementation == _NAME:
                    config._attn_implementation = _THEIRS


# ---- attention ----

_MODELS = (T5ForConditionalGeneration, MT5ForConditionalGeneration, GPT2LMHeadModel)
_LONGEST_ROW = 256
"""Tokens up to which causal attention runs densely: beyond, half of the products are wasted."""


def use_dense_attention(model: nn.Module) -> bool:
    """Have every T5, mT5 and GPT-2 in ``model`` run its attention densely on a CPU.

    Equal up to rounding. GPT-2's does for rows of up to 256 tokens without a mask.

    Returns:
        Whether any does. One whose user chose another attention than ``"sdpa"`` does not.
    """
    found = False
    for module in model.modules():
        if not isinstance(module, _MODELS):
            continue
        if module.config._attn_implementation == _THEIRS:
            AttentionInterface.register(_NAME, _attention)
            AttentionMaskInterface.register(_NAME, partial(_mask, sdpa_mask))
            for config in _configs(module):
                config._attn_implementation = _NAME
        found |= module.config._attn_implementation == _NAME
    return found


def _configs(model: Any) -> list[Any]:
    """The configurations that a model's attention asks for its name."""
    if isinstance(model, GPT2LMHeadModel):
        return [model.config]
    return [module.config for module in (model, model.get_encoder(), model.get_decoder())]


def _mask(make: Callable[..., Tensor | None], *args: Any, **options: Any) -> Tensor | None:
    """None if the mask hides nothing; tested on the CPU only, as elsewhere it would synchronise."""
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
    causal = attention_mask is None and getattr(module, "is_causal", False)
    length = query.shape[2]
    whole = length == key.shape[2] <= _LONGEST_ROW
    if query.device.type != "cpu" or (causal and not (whole and position_bias is None)):
        options |= {"dropout": dropout, "scaling": scaling, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query if scale == 1 else query * scale) @ key.transpose(2, 3)
    bias = _bias(position_bias, attention_mask, scores)
    if causal and length > 1:
        lowest = torch.finfo(scores.dtype).min
        bias = torch.full((length, length), lowest, dtype=scores.dtype).triu_(1)
    if bias is not None:
        scores = scores + bias
    # With an explicit dtype: autocast would compute the softmax in float32, with two copies.
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


# ---- feed-forward ----


class _Direct(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        layer: Any = self
        if not torch.is_autocast_enabled(hidden_states.device.type):
            result: Tensor = super().forward(hidden_states)
        else:
            result = layer.wo(layer.dropout(layer.activations(hidden_states)))
        return result

    def activations(self: Any, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.wi(x))
        return result


class _DirectGated(_Direct):
    def activations(self: Any, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.wi_0(x)) * self.wi_1(x)
        return result


class _T5(_Direct, T5DenseActDense): ...


class _T5Gated(_DirectGated, T5DenseGatedActDense): ...


class _MT5(_Direct, MT5DenseActDense): ...


class _MT5Gated(_DirectGated, MT5DenseGatedActDense): ...


_DIRECT: dict[type[nn.Module], type[nn.Module]] = {
    T5DenseActDense: _T5,
    T5DenseGatedActDense: _T5Gated,
    MT5DenseActDense: _MT5,
    MT5DenseGatedActDense: _MT5Gated,
}


def use_direct_feed_forward(model: nn.Module) -> None:
    """Have all feed-forward layers of T5 and mT5 in ``model`` skip that detour under autocast.

    The results are the same to the last bit. Subclasses are left as they are.
    """
    for module in model.modules():
        direct = _DIRECT.get(type(module))
        if direct is not None:
            module.__class__ = direct


# ---- dropout ----


def cheap_dropout(x: Tensor, p: float) -> Tensor:
    """``x`` [...], each element zero with probability ``p``, the others scaled to the same mean.

    ``p`` is rounded to a multiple of 2**-16, the scale with it. The random bits are those of
    PyTorch's default generator.
    """
    dropped = round(p * _LEVELS)
    if x.device.type != "cpu" or dropped == _LEVELS:
        return nn.functional.dropout(x, p)
    if dropped == 0:
        return x
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
    # Of PyTorch's own dropout, the product of values, mask and scale in one pass; it is its own
    # derivative.
    result: Tensor = torch.ops.aten.native_dropout_backward(x, kept, _LEVELS / (_LEVELS - dropped))
    return result


class _CheapDropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return cheap_dropout(input, self.p) if self.training else input


def use_cheap_dropout(model: nn.Module) -> None:
    """Have all ``nn.Dropout`` of ``model`` draw their masks cheaply on a CPU.

    Subclasses of ``nn.Dropout`` and dropouts in place are left as they are.
    """
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = _CheapDropout


_THEIRS_OF: dict[type[nn.Module], type[nn.Module]] = {_CheapDropout: nn.Dropout} | {
    ours: theirs for theirs, ours in _DIRECT.items()
}
