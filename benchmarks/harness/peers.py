"""Other implementations of per-token log-probabilities, each where it is installed and can run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import plain
from benchmarks.harness.case import Case, Variant
from benchmarks.harness.inputs import Inputs
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


def trl_log_softmax() -> Callable[[Tensor, Tensor], Tensor]:
    """trl's (logits [T, V], tokens [T]) -> log-probabilities [T]; raises Unusable."""
    function = getattr(_module("trl.trainer.utils", "trl"), "selective_log_softmax", None)
    if function is None:
        raise Unusable("this trl has no trl.trainer.utils.selective_log_softmax")

    def run(logits: Tensor, tokens: Tensor) -> Tensor:
        # It loops over the first dimension: pieces of 64 rows keep the loop short, its memory low.
        pieces = 64 if len(tokens) % 64 == 0 else len(tokens)
        found: Tensor = function(logits.unflatten(0, (-1, pieces)), tokens.view(-1, pieces))
        return found.flatten().float()

    return run


def _trl(device: torch.device, dtype: torch.dtype) -> LogProbs:
    function = trl_log_softmax()
    return lambda hidden, weight, targets: function(hidden @ weight.T, targets)


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
            raise ValueError(f"peer must be none, or any of {', '.join(KEYS)}; got {name!r}")
    return tuple(key for key in KEYS if key in names)


def add_vocabulary_peers(
    case: Case, peers: tuple[str, ...], *, loss: bool, floor: str | None
) -> None:
    """Add the wanted ones to a case from hidden states; ``loss`` puts the plain loss on each."""
    for peer in PEERS:
        if peer.key not in peers:
            continue
        try:
            forward = _forward(peer, case, loss=loss)
        except Unusable as reason:
            case.missing.append((peer.name, str(reason)))
            continue
        case.variants.append(
            Variant(peer.name, "vocabulary", forward, "vocabulary", floor, compiles=peer.compiles)
        )


def _forward(peer: Peer, case: Case, *, loss: bool) -> Callable[[Inputs], Tensor]:
    logprobs = peer.make(case.device, case.dtype)

    def whole(
        hidden: Tensor, weight: Tensor, tokens: Tensor, log_reward: Tensor, log_z: Tensor
    ) -> Tensor:
        flat = logprobs(hidden.flatten(0, -2), weight, tokens.flatten())
        log_pf = flat.view(tokens.shape)
        return plain.tb_nll_loss(log_pf, log_reward, log_z) if loss else log_pf

    run = torch.compile(whole, dynamic=False) if peer.compile else whole
    names = ("hidden", "weight", "tokens", "log_reward", "log_z")
    return lambda inputs: run(*(inputs[name] for name in names))
