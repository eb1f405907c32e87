"""Log-probabilities over the whole vocabulary from hidden states, and the fused loss on them.

``fused`` is the TB + NLL loss in one op, ``logprobs`` the per-token op with a random gradient of
its result; each also with a frozen head.
"""

from __future__ import annotations

import torch
from torch import Tensor

import gflowgr
from benchmarks.harness import floors, ours, plain
from benchmarks.harness.case import Case
from benchmarks.harness.floors import Floor
from benchmarks.harness.inputs import Inputs, head_inputs
from benchmarks.harness.peers import add_vocabulary_peers
from benchmarks.harness.registry import Table, register
from benchmarks.harness.shapes import LossShape, named

_PRODUCTS = "bare products"


def _build(
    table: str,
    shape: LossShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    part = table.partition(".")[2]
    trained, fused = not part.endswith("_frozen"), part.startswith("fused")
    case = Case(
        table,
        shape,
        device,
        dtype,
        head_inputs(shape, device, dtype, trained=trained, upstream=not fused),
        {"vocabulary": plain.vocabulary_reference},
    )
    case.floors["products"] = _floor(shape, dtype, trained)
    case.bare = {
        _PRODUCTS: floors.BareProducts(trained, fresh=False),
        f"{_PRODUCTS}, allocating": floors.BareProducts(trained, fresh=True),
    }
    forward = ours.fused_loss if fused else _logprobs
    case.add_ours("dense_", forward, "vocabulary", floor="products")
    add_vocabulary_peers(case, peers, loss=fused, floor="products")
    return case


def _logprobs(inputs: Inputs) -> Tensor:
    return gflowgr.trajectory_logprobs(inputs["hidden"], inputs["weight"], inputs["tokens"])


def _floor(shape: LossShape, dtype: torch.dtype, trained: bool) -> Floor:
    product = 2.0 * shape.rows * shape.d * shape.V
    states, head = shape.rows * shape.d, shape.V * shape.d
    # States and head are read, their gradients written.
    numbers = 2 * states + head * (2 if trained else 1)
    return Floor(product * (3 if trained else 2), float(numbers * dtype.itemsize), _PRODUCTS, True)


for _part in ("fused", "fused_frozen", "logprobs", "logprobs_frozen"):
    register(
        Table(
            f"logprobs_dense.{_part}",
            _build,
            LossShape,
            on_cpu=named("letter", "llm", "tiger"),
            on_gpu=named("letter-gpu", "llm-gpu", "tiger-gpu"),
            low_precision=("cpu", "cuda"),
        )
    )
