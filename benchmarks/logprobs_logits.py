"""Log-probabilities of tokens from logits that are there already, and the logits' gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import gflowgr
from benchmarks.harness.case import Case, Variant
from benchmarks.harness.floors import Floor
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.peers import Unusable, trl_log_softmax
from benchmarks.harness.plain import Reference, gather_log_softmax
from benchmarks.harness.registry import Table, register
from benchmarks.harness.shapes import LossShape, named

Rows = Callable[[Tensor, Tensor], Tensor]
"""(logits [T, V], tokens [T]) -> log-probabilities [T]."""


def _build(
    table: str,
    shape: LossShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    case = Case(
        table,
        shape,
        device,
        dtype,
        partial(_make_inputs, shape, device, dtype),
        {"float64": _reference},
    )
    # Logits are read, their gradient is written.
    case.floors["bytes"] = Floor(0.0, 2.0 * shape.rows * shape.V * dtype.itemsize)
    case.add_ours("logits_logprobs", _ours, "float64", floor="bytes")

    def add(name: str, rows: Rows, *, compiles: bool = False) -> None:
        forward = partial(_plain, rows)
        case.variants.append(
            Variant(name, "vocabulary", forward, "float64", "bytes", compiles=compiles)
        )

    if "torch" in peers:
        add("torch log_softmax", gather_log_softmax)
    if "compile" in peers:
        compiled = torch.compile(gather_log_softmax, dynamic=False)
        add("torch.compile log_softmax", compiled, compiles=True)
    if "trl" in peers:
        name = "trl selective_log_softmax"
        try:
            add(name, trl_log_softmax())
        except Unusable as reason:
            case.missing.append((name, str(reason)))
    return case


def _make_inputs(shape: LossShape, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Logits of unit variance, uniform tokens, a random gradient of the result."""
    g = torch.Generator(device).manual_seed(seed)
    size = (shape.B, shape.N, shape.L)
    logits = torch.randn(*size, shape.V, generator=g, device=device, dtype=dtype)
    tokens = torch.randint(shape.V, size, generator=g, device=device)
    upstream = torch.randn(size, generator=g, device=device)
    return Inputs({"logits": logits.requires_grad_(), "tokens": tokens}, upstream)


def _ours(inputs: Inputs) -> Tensor:
    return gflowgr.logprobs_from_logits(inputs["logits"], inputs["tokens"])


def _plain(rows: Rows, inputs: Inputs) -> Tensor:
    tokens = inputs["tokens"]
    return rows(inputs["logits"].flatten(0, -2), tokens.flatten()).view(tokens.shape)


def _reference(inputs: Inputs) -> Reference:
    """In float64, a prompt at a time: its gradient alone is as large as all that is compared."""
    logits, upstream = inputs["logits"].detach(), inputs.upstream
    assert upstream is not None
    gradient = torch.empty_like(logits, dtype=torch.float64)
    parts = []
    for prompt in range(len(logits)):
        wide = logits[prompt].double().requires_grad_()
        tokens = inputs["tokens"][prompt].unsqueeze(-1)
        log_pf = wide.log_softmax(-1).gather(-1, tokens).squeeze(-1)
        (gradient[prompt],) = torch.autograd.grad(log_pf, wide, upstream[prompt].double())
        parts.append(log_pf.detach())
    return torch.stack(parts), {"logits": gradient}


register(
    Table(
        "logprobs_logits",
        _build,
        LossShape,
        on_cpu=named("letter", "tiger"),
        on_gpu=named("letter-gpu", "tiger-gpu"),
        low_precision=("cpu", "cuda"),
    )
)
