"""The plain PyTorch of the benchmark is what it says: against scalar loops, and the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gflowgr
from benchmarks.harness.inputs import Inputs, catalogue, head_inputs
from benchmarks.harness.plain import (
    log_softmax_gather,
    tb_nll_loss,
    token_logprobs,
    vocabulary_reference,
    whole_reference,
)
from benchmarks.harness.registry import build_case, read_shape
from benchmarks.harness.shapes import CODES
from benchmarks.logprobs_children import PlainRestriction
from gflowgr.tree import PrefixTree

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """Random identifiers, on every machine."""
    monkeypatch.setenv("GFLOWGR_DATA", str(tmp_path))


def test_random_identifiers_have_beautys_prefixes() -> None:
    shape = read_shape("2x2x4x4x1027")
    items = catalogue(shape)
    assert items.source.startswith("random identifiers")
    prefixes = [len(np.unique(items.tokens[:, : length + 1], axis=0)) for length in range(4)]
    assert prefixes == [197, 7931, 11696, 12088]
    for level in range(4):
        first = 1027 - 4 * CODES + level * CODES
        assert first <= items.tokens[:, level].min()
        assert items.tokens[:, level].max() < first + CODES


def test_inputs_are_new_for_every_seed_and_the_same_for_one() -> None:
    make = head_inputs(read_shape("2x2x2x4x30"), CPU, torch.float32, trained=True, upstream=True)
    first, again, other = make(1), make(1), make(2)
    assert set(first.leaves) == {"hidden", "weight", "log_z"}
    for name in first.tensors:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_the_plain_loss_is_the_packages() -> None:
    g = torch.Generator().manual_seed(0)
    log_pf = -torch.rand(3, 2, 4, generator=g, dtype=torch.float64)
    log_reward = torch.randn(3, 2, generator=g, dtype=torch.float64)
    log_z = torch.randn(3, generator=g, dtype=torch.float64)
    wanted = gflowgr.tb_loss(log_pf, log_reward, log_z) - log_pf[:, 0].sum(-1).mean()
    torch.testing.assert_close(tb_nll_loss(log_pf, log_reward, log_z), wanted)


def test_the_plain_restriction_is_the_packages_tree() -> None:
    shape = read_shape("5x3x4x6x1100")
    items = catalogue(shape)
    draw = items.draw(shape, CPU)
    make = head_inputs(shape, CPU, torch.float64, trained=True, upstream=False, tokens=draw)
    inputs = make(3)
    restricted = PlainRestriction(items, shape, CPU)
    tree = PrefixTree.from_identifiers(items.tokens)
    wanted = gflowgr.trajectory_logprobs(
        inputs["hidden"], inputs["weight"], inputs["tokens"], tree=tree
    )
    torch.testing.assert_close(restricted(inputs), wanted)
    # The row-sparse form has the same gradient.
    gradients = []
    for sparse in (False, True):
        inputs.clear()
        restricted(inputs, sparse=sparse).square().sum().backward()
        gradient = inputs["weight"].grad
        assert gradient is not None
        assert gradient.is_sparse is sparse
        gradients.append(gradient.to_dense())
    torch.testing.assert_close(*gradients)


def test_children_are_counted_where_there_is_a_choice() -> None:
    shape = read_shape("4x2x4x4x1027")
    items = catalogue(shape)
    tokens = items.draw(shape, CPU)(torch.Generator().manual_seed(5))
    known = [tuple(row) for row in items.tokens.tolist()]
    total = 0
    for trajectory in tokens.flatten(0, 1).tolist():
        for level in range(4):
            prefix = tuple(trajectory[:level])
            children = {row[level] for row in known if row[:level] == prefix}
            total += len(children) if len(children) > 1 else 0
    assert PlainRestriction(items, shape, CPU).children(tokens) == total


@pytest.mark.parametrize("upstream", [False, True])
def test_a_reference_in_blocks_is_the_whole(
    upstream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = read_shape("5x2x3x4x50")
    inputs = head_inputs(shape, CPU, torch.float32, trained=True, upstream=upstream)(7)

    def forward(wide: Inputs) -> torch.Tensor:
        log_pf = token_logprobs(wide, log_softmax_gather)
        return log_pf if upstream else tb_nll_loss(log_pf, wide["log_reward"], wide["log_z"])

    result, gradients = whole_reference(inputs, forward)
    assert result.dtype == torch.float64
    monkeypatch.setattr("benchmarks.harness.plain._REFERENCE_ELEMENTS", 2 * 2 * 3 * 50)
    blocked, blocked_gradients = vocabulary_reference(inputs)
    torch.testing.assert_close(blocked, result)
    assert set(gradients) == set(blocked_gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(blocked_gradients[name], gradient)
    assert all(leaf.grad is None for leaf in inputs.leaves.values())


def test_the_floor_of_the_head_is_its_products() -> None:
    case = build_case("logprobs_dense.fused", read_shape("2x2x2x4x30"), CPU, torch.float32, ())
    assert case.floors["products"].flops == 3 * 2 * 8 * 4 * 30
    frozen = build_case(
        "logprobs_dense.fused_frozen", read_shape("2x2x2x4x30"), CPU, torch.float32, ()
    )
    assert frozen.floors["products"].flops == 2 * 2 * 8 * 4 * 30
