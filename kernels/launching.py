"""Decorator of every function that launches a Triton kernel: device, autograd and autocast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_device(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run on the device of the first tensor, without autograd, and with autocast off.

    Triton launches on the current device, whatever the tensors' is. Autocast would turn a kernel's
    float32 matrix products around it into 16-bit ones.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = next(a.device for a in args if isinstance(a, Tensor))
        current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with current, torch.no_grad(), torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return run
