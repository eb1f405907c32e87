"""Exact flows: log Z and the first level's policy from rewards of all items, or of pools.

``dense`` reads a reward of every item, ``pooled`` those of candidates (CPU only). Identifiers are
random, 4 tokens of 256 codes a level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

import gflowgr
from benchmarks.harness.case import Case, Variant
from benchmarks.harness.constraints import random_catalogue
from benchmarks.harness.floors import Floor
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.judging import judge_numbers
from benchmarks.harness.registry import Table, register
from benchmarks.harness.shapes import BEAUTY_ITEMS, CODES, LENGTH, Shape
from gflowgr.tree import ItemFlows, PrefixTree

_CPU = torch.device("cpu")
_CANDIDATES = 1000
_TOLERANCE = 1e-6  # in norm


@dataclass(frozen=True)
class FlowShape(Shape):
    """Prompts, items."""

    kind: ClassVar[str] = "item_flows"
    example: ClassVar[str] = "128x12101"
    few: ClassVar[dict[str, int]] = {"prompts": 2, "items": 1000}
    prompts: int
    items: int


def _build(
    table: str,
    shape: FlowShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    found = random_catalogue(shape.items, LENGTH * CODES, _CPU)
    pooled = table.endswith(".pooled")
    # The first level's codes of all items, 0 .. CODES - 1, numbered as the root's children are.
    codes = found.tokens[:, 0].long().unique(return_inverse=True)[1]
    children = int(codes.max()) + 1
    make = _pooled_inputs if pooled else _dense_inputs
    case = Case(
        table,
        shape,
        _CPU,
        dtype,
        partial(make, shape),
        {"sums": lambda inputs: _plain(codes, children, inputs.double())},
        judge=lambda result, wanted: judge_numbers(result, wanted, _TOLERANCE),
        tolerance=_TOLERANCE,
    )
    rewards = shape.prompts * (min(_CANDIDATES, shape.items) if pooled else shape.items)
    case.floors["rewards, read once"] = Floor(0.0, (12.0 if pooled else 4.0) * rewards)
    if not pooled:
        out = torch.empty(shape.prompts, shape.items)
        # The floor counts bytes alone; this is what an exponential of each reward costs besides.
        case.bare["exponentials"] = lambda inputs: torch.exp(inputs["rewards"], out=out)
    case.notes.append("compared: log Z, and the policy over the root's children")
    run = partial(_ours, found.tree)
    case.add_ours("item_flows", run, "sums", floor="rewards, read once", trains=False)
    if "torch" in peers:
        forward: Callable[[Inputs], Tensor] = partial(_plain, codes, children)
        case.variants.append(
            Variant(
                *("index_add, plain torch", "torch", forward, "sums", "rewards, read once"),
                trains=False,
            )
        )
    return case


def _dense_inputs(shape: FlowShape, seed: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    return Inputs({"rewards": 2 * torch.randn(shape.prompts, shape.items, generator=g)})


def _pooled_inputs(shape: FlowShape, seed: int) -> Inputs:
    """Distinct items in random order: one of each of equal parts of the catalogue."""
    g = torch.Generator().manual_seed(seed)
    count = min(_CANDIDATES, shape.items)
    part = shape.items // count
    pool = torch.randint(part, (shape.prompts, count), generator=g)
    pool = pool + part * torch.arange(count)
    pool = pool[:, torch.randperm(count, generator=g)]
    rewards = 2 * torch.randn(shape.prompts, count, generator=g)
    return Inputs({"pool": pool, "rewards": rewards})


def _ours(tree: PrefixTree, inputs: Inputs) -> Tensor:
    flows = gflowgr.item_flows(tree, inputs["rewards"], items=inputs.tensors.get("pool"))
    return _compared(flows)


def _compared(flows: ItemFlows) -> Tensor:
    root = flows.rewards.root
    return torch.cat([root[:, :1], (root[:, 1:] - root[:, :1]).exp()], 1)


def _plain(codes: Tensor, children: int, inputs: Inputs) -> Tensor:
    """Exponentials, and their sums by the item's first token."""
    rewards = inputs["rewards"]
    top = rewards.amax(1, keepdim=True)
    values = (rewards - top).exp()
    sums = rewards.new_zeros(len(rewards), children)
    if "pool" in inputs.tensors:
        sums.scatter_add_(1, codes[inputs["pool"]], values)
    else:
        sums.index_add_(1, codes, values)
    whole = sums.sum(1, keepdim=True)
    return torch.cat([top + whole.log(), sums / whole], 1)


_BEAUTY = FlowShape(128, BEAUTY_ITEMS)
_SHAPES = {"dense": (_BEAUTY,), "pooled": (_BEAUTY, FlowShape(128, 1_000_000))}

for _part in _SHAPES:
    register(
        Table(
            f"item_flows.{_part}",
            _build,
            FlowShape,
            on_cpu=_SHAPES[_part],
        )
    )
