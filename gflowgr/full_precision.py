"""Small modules that stay in float32 beside a backbone in 16 bits.

bfloat16 rounds away the updates of log Z, log F and a learned fusion: near a log Z of 20 its
numbers are 0.125 apart, so a step of 0.01 would change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["FullPrecision", "at_least_float32", "in_float32"]


def at_least_float32(values: Tensor) -> Tensor:
    """``values`` in float32 if they are narrower (a view of the same tensor if they are not)."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def in_float32(module: nn.Module, inputs: Tensor) -> Tensor:
    """``module(inputs)`` in float32 or wider, forward and backward, also under autocast.

    The wider of the two precisions counts: of the module's parameters (which FSDP2 may have
    gathered in 16 bits) and of ``inputs``.
    """
    state = dict(module.named_parameters())
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    for value in state.values():
        dtype = torch.promote_types(dtype, value.dtype)
    with torch.autocast(inputs.device.type, enabled=False):
        if all(value.dtype == dtype for value in state.values()):
            return module(inputs.to(dtype))
        wide = {name: value.to(dtype) for name, value in state.items()}
        return functional_call(module, wide, (inputs.to(dtype),))


class FullPrecision(nn.Module):
    """A module whose parameters ``half()``, ``bfloat16()`` and ``to(dtype)`` leave in float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def widely(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if not changed.is_floating_point() or changed.dtype.itemsize >= 4:
                return changed
            # Convert straight to float32: the narrow type in between would round.
            return at_least_float32(tensor.to(changed.device))

        return super()._apply(widely, recurse)
