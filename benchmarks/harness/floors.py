"""Lower bounds of a case's time: bare operations timed beside it, a prediction from rates.

The prediction is the larger of FLOPs over the measured matrix-product rate and bytes over the
measured bandwidth; bytes are those that no implementation can avoid (inputs read once, gradients
written once). The bare operations of the head are its three matrix products into buffers that are
there already, so that they pay for no allocation.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.inputs import Inputs

Bare = Callable[[Inputs], object]


@dataclass(frozen=True)
class Floor:
    """The least work of some variants of a case.

    Attributes:
        flops, nbytes: arithmetic and memory traffic that cannot be avoided.
        bare: name of a bare operation (a key of the case's ``bare``) that is part of the work;
            None: the prediction is the floor.
        bare_is_all: the bare operation is the whole floor; otherwise the larger of its time and the
            prediction is.
    """

    flops: float
    nbytes: float
    bare: str | None = None
    bare_is_all: bool = False

    def predict(self, rates: Rates) -> float:
        """Seconds."""
        return max(self.flops / rates.product, self.nbytes / rates.bandwidth_at(self.nbytes))


class Rates:
    """The machine's measured ceilings: products [FLOP/s] in a dtype, triad [bytes/s]."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.product = _product_rate(device, dtype)
        self.bandwidth = self.bandwidth_at(2**30 if device.type == "cuda" else 2**27 * 3)

    def bandwidth_at(self, nbytes: float) -> float:
        """Bandwidth of a triad over as many bytes: small ones stay in a cache."""
        # Rounded to a power of two, so that few sizes are measured.
        size = min(max(int(nbytes), 2**12), 2**30)
        return _triad_rate(self.device, 1 << (size - 1).bit_length())


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of nine calls, on a GPU each of many launches."""
    run()
    launches = 20 if device.type == "cuda" else 1
    times = []
    for _ in range(9):
        _synchronise(device)
        begin = time.perf_counter()
        for _ in range(launches):
            run()
        _synchronise(device)
        times.append((time.perf_counter() - begin) / launches)
    return statistics.median(times)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * n**3 / seconds(lambda: torch.mm(a, b, out=out), device)


@functools.cache
def _triad_rate(device: torch.device, nbytes: int) -> float:
    """a = b + 3 c over three arrays of `nbytes` together; reading `a`'s lines is not counted."""
    n = max(nbytes // 12, 1)
    b, c = (torch.randn(n, device=device) for _ in range(2))
    a = torch.empty_like(b)
    return 12.0 * n / seconds(lambda: torch.add(b, c, alpha=3.0, out=a), device)


class BareProducts:
    """H W^T, G W and G^T H with G [T, V] in one buffer; `fresh` allocates every result anew."""

    def __init__(self, trained: bool, *, fresh: bool) -> None:
        self.trained, self.fresh = trained, fresh
        self._buffers: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, inputs: Inputs) -> None:
        hidden, weight = inputs["hidden"].detach().flatten(0, -2), inputs["weight"].detach()
        if self.fresh:
            logits = hidden @ weight.T
            _ = logits @ weight
            if self.trained:
                _ = logits.T @ hidden
            return
        if self._buffers is None:
            logits = hidden.new_empty(len(hidden), len(weight))
            self._buffers = (logits, torch.empty_like(hidden), torch.empty_like(weight))
        logits, d_hidden, d_weight = self._buffers
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        if self.trained:
            torch.mm(logits.T, hidden, out=d_weight)


def zero_fill(inputs: Inputs) -> None:
    """A new dense gradient of the head, all zeros."""
    torch.zeros_like(inputs["weight"])


def one_launch(inputs: Inputs) -> None:
    """A kernel that does next to nothing."""
    inputs["scores"].neg()
