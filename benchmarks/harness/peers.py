"""Other implementations of per-token log-probabilities, each where it is installed and can run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.plain import LogProbs, log_softmax_gather

# Its own rules for the chunk collapse to a few rows where V is large and T small.
_CHUNK_ROWS = 512


class Unusable(Exception):
    """A peer that cannot run here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One way of computing log-probabilities over the whole vocabulary.

    Attributes:
        key: what ``--peers`` calls it; several variants may share one.
        name: what the tables call it.
        make: the function for a device and dtype; raises Unusable.
        compile: run the whole forward pass, loss included, under torch.compile.
        compiles: compiles on its own.
    """

    key: str
    name: str
    make: Callable[[torch.device, torch.dtype], LogProbs]
    compile: bool = False
    compiles: bool = False


def _module(name: str, package: str) -> Any:
    """Import an optional package's module; Unusable with the reason."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        # RuntimeError: how transformers reports that a lazily imported module failed.
        if getattr(error, "name", None) == package.replace("-", "_"):
            raise Unusable(f"{package} is not installed") from error
        raise Unusable(f"{package} cannot be imported: {error}") from error


def _eager(device: torch.device, dtype: torch.dtype) -> LogProbs:
    return log_softmax_gather


def _linear_cross_entropy(device: torch.device, dtype: torch.dtype) -> LogProbs:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Unusable(f"torch {torch.__version__} has no linear_cross_entropy")
    options_type = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options_type is None:
        raise Unusable(f"linear_cross_entropy of torch {torch.__version__} has no chunks")
    options = options_type(batch_chunk_size=_CHUNK_ROWS, chunking_method=None)

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -function(hidden, weight, targets, reduction="none", options=options).float()

    return run


def _cut_cross_entropy(device: torch.device, dtype: torch.dtype) -> LogProbs:
    module = _module("cut_cross_entropy", "cut-cross-entropy")
    # Its kernels need a GPU; elsewhere it recommends its compiled implementation.
    kind = "cce" if device.type == "cuda" else "torch_compile"

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss = module.linear_cross_entropy(hidden, weight, targets, reduction="none", impl=kind)
        return -loss.float()

    return run


def _liger_fused(device: torch.device, dtype: torch.dtype) -> LogProbs:
    if device.type != "cuda":
        raise Unusable("its Triton kernels need a GPU")
    module = _module("liger_kernel.transformers.functional", "liger-kernel")

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -module.liger_fused_linear_cross_entropy(
            hidden, weight, targets, reduction="none"
        ).float()

    return run


def _liger_chunked(device: torch.device, dtype: torch.dtype) -> LogProbs:
    module = _module("liger_kernel.chunked_loss.fused_linear_ppo", "liger-kernel")
    base = getattr(module, "LigerFusedLinearPPOBase", None)
    if not hasattr(base, "chunk_forward"):
        raise Unusable("this liger-kernel has no LigerFusedLinearPPOBase.chunk_forward")

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return base.chunk_forward(hidden[None], weight, targets[None])[0]  # type: ignore[union-attr]

    return run


def _trl(device: torch.device, dtype: torch.dtype) -> LogProbs:
    function = getattr(_module("trl.trainer.utils", "trl"), "selective_log_softmax", None)
    if function is None:
        raise Unusable("this trl has no trl.trainer.utils.selective_log_softmax")

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # It loops over the first dimension: pieces of 64 rows keep the loop short, its memory low.
        pieces = 64 if len(targets) % 64 == 0 else len(targets)
        logits = (hidden @ weight.T).unflatten(0, (-1, pieces))
        return function(logits, targets.view(-1, pieces)).flatten().float()

    return run


PEERS = (
    Peer("torch", "torch log_softmax", _eager),
    Peer("compile", "torch.compile log_softmax", _eager, compile=True, compiles=True),
    Peer("linear_cross_entropy", "torch linear_cross_entropy", _linear_cross_entropy),
    Peer("cut-cross-entropy", "cut-cross-entropy", _cut_cross_entropy, compiles=True),
    Peer("liger", "liger fused linear CE", _liger_fused),
    Peer("liger", "liger chunked log-prob", _liger_chunked),
    Peer("trl", "trl selective_log_softmax", _trl),
)

KEYS = (*dict.fromkeys(peer.key for peer in PEERS), "csr", "transformers")
"""What ``--peers`` knows: those above, and the constraints of others in the decode benchmarks."""


def read_peers(names: list[str] | None) -> tuple[str, ...]:
    """Keys of the wanted peers: all for None, none for ``["none"]``. ValueError if unknown."""
    if names is None:
        return KEYS
    if names == ["none"]:
        return ()
    for name in names:
        if name not in KEYS:
            raise ValueError(
                f"peer {name!r} is unknown; expected none, or any of {', '.join(KEYS)}"
            )
    return tuple(key for key in KEYS if key in names)
