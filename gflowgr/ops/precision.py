"""Dtypes of the ops: the one they compute in, and autocast's conversion of their inputs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["as_autocast", "compute_dtype", "without_autocast"]

# Read once at import: some versions of torch cannot trace this call under torch.compile.
_AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "xla") if torch.amp.is_autocast_available(name)
)


def compute_dtype(*of: Tensor | torch.dtype | None) -> torch.dtype:
    """float64 if any of the tensors or dtypes is float64, float32 otherwise."""
    for each in of:
        dtype = each.dtype if isinstance(each, Tensor) else each
        if dtype == torch.float64:
            return torch.float64
    return torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off, which would turn an op's float32 products into 16-bit ones."""
    if device.type not in _AUTOCAST_DEVICES:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def as_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that autocast gives a matrix product, as an output head is one."""
    device = tensor.device.type
    if (
        device in _AUTOCAST_DEVICES
        and torch.is_autocast_enabled(device)
        and tensor.dtype != torch.float64
    ):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor
