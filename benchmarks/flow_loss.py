"""The losses TB, DB, SubTB and VarGrad from log-probabilities, and their gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import gflowgr
from benchmarks.harness import plain
from benchmarks.harness.case import Case, Variant
from benchmarks.harness.floors import Floor
from benchmarks.harness.inputs import Inputs, MakeInputs
from benchmarks.harness.registry import Table, register
from benchmarks.harness.shapes import LossShape, named
from gflowgr.ops.flow_loss import reference
from gflowgr.ops.precision import compute_dtype

_LAM = 0.9
KINDS = ("tb", "db", "subtb", "vargrad")


def _build(
    table: str,
    shape: LossShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    kind = table.partition(".")[2]
    definition = partial(_definition, kind=kind)
    case = Case(
        table,
        shape,
        device,
        dtype,
        _make_inputs(shape, device, dtype, kind),
        {"definition": partial(plain.whole_reference, forward=definition)},
    )
    # log_pf and log_flow are read, and their gradients written; rewards are read.
    numbers = 2 * shape.rows + shape.B * shape.N
    numbers += {"tb": 2 * shape.B, "vargrad": 0}.get(kind, 2 * shape.rows)
    case.floors["bytes"] = Floor(0.0, float(numbers * dtype.itemsize))
    case.add_ours("flow_loss", partial(_ours, kind=kind), "definition", floor="bytes")
    if "torch" in peers:
        name = "plain torch definition"
        case.variants.append(Variant(name, "reduction", definition, "definition", "bytes"))
    if "compile" in peers:
        name, compiled = "torch.compile definition", torch.compile(definition, dynamic=False)
        case.variants.append(
            Variant(name, "reduction", compiled, "definition", "bytes", compiles=True)
        )
    return case


def _make_inputs(
    shape: LossShape, device: torch.device, dtype: torch.dtype, kind: str
) -> MakeInputs:
    """Log-probabilities, rewards, and log Z (tb) or flows (db, subtb)."""
    trajectories = (shape.B, shape.N)

    def make(seed: int) -> Inputs:
        g = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=g, device=device).mul_(2.0).to(dtype)

        tensors = {
            "log_pf": (-normal(*trajectories, shape.L).abs()).requires_grad_(),
            "log_reward": normal(*trajectories),
        }
        if kind == "tb":
            tensors["log_z"] = normal(shape.B).requires_grad_()
        elif kind != "vargrad":
            tensors["log_flow"] = normal(*trajectories, shape.L).requires_grad_()
        return Inputs(tensors)

    return make


def _ours(inputs: Inputs, kind: str) -> Tensor:
    log_pf, log_reward = inputs["log_pf"], inputs["log_reward"]
    if kind == "tb":
        return gflowgr.tb_loss(log_pf, log_reward, inputs["log_z"])
    if kind == "db":
        return gflowgr.db_loss(log_pf, log_reward, inputs["log_flow"])
    if kind == "subtb":
        return gflowgr.subtb_loss(log_pf, log_reward, inputs["log_flow"], lam=_LAM)
    return gflowgr.vargrad_loss(log_pf, log_reward)


def _definition(inputs: Inputs, kind: str) -> Tensor:
    """The package's definition in plain PyTorch, without checks; reduction "prompt"."""
    log_pf, log_reward = inputs["log_pf"], inputs["log_reward"]
    dtype = compute_dtype(log_pf, log_reward)
    batch = reference.prepare(log_pf, log_reward, None, beta=1.0, floor=None, dtype=dtype)
    if kind == "tb":
        values = reference.tb_reference(batch, inputs["log_z"])
    elif kind == "db":
        values = reference.db_reference(batch, inputs["log_flow"])
    elif kind == "subtb":
        values = reference.subtb_reference(batch, inputs["log_flow"], _LAM)
    else:
        values = reference.vargrad_reference(batch)
    return reference.reduce_trajectories(values, batch.valid, "prompt")


for _kind in KINDS:
    register(
        Table(
            f"flow_loss.{_kind}",
            _build,
            LossShape,
            on_cpu=named("losses"),
            on_gpu=named("losses-gpu"),
        )
    )
