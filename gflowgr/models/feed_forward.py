"""T5's feed-forward under autocast without its detour over float32.

``transformers`` takes the hidden activations [..., d_ff] to the dtype of the output projection's
weight, which autocast keeps in float32, and autocast takes them back for the product: two copies
forward and two backward of a layer's largest tensor, that change nothing. Here they are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mt5.modeling_mt5 import MT5DenseActDense, MT5DenseGatedActDense
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

__all__ = ["use_direct_feed_forward"]


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

    The results are the same to the last bit. Nothing of it is saved with the model; subclasses are
    left as they are.

    Args:
        model: any; changed in place.
    """
    for module in model.modules():
        direct = _DIRECT.get(type(module))
        if direct is not None:
            module.__class__ = direct
