"""The CUDA kernels of the tree-restricted log-probabilities in the emulator (test_emulated.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import emulation
from torch import Tensor

import gflowgr
from gflowgr.ops.flow_kl import op as flow_kl_op

from .cases import ChildrenCase, check_raw_op, shop

CUDA = torch.ops.gflowgr_cuda
FLOAT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_equals_float64(sparse: bool, recompute: bool) -> None:
    """A root of more than one tile of children and rows, nodes of all sizes, padding, a bias."""
    items = shop(300, (90, 20, 4, 3))
    items[::7, 3] = -1
    case = ChildrenCase.make(items, (23, 3), 40, bias=True, padded=True, temperature=0.7)
    check_raw_op(CUDA, case, sparse=sparse, recompute=recompute)


@pytest.mark.parametrize("kind", ["all", "all, float64", "all, NaN", "pool", "pool, floor"])
@pytest.mark.parametrize("recompute", [False, True])
def test_flow_kl_equals_float64(
    kind: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared, ragged and repeated identifiers; prompts without a flow; weights given or not."""
    items = shop(150, (70, 9, 4, 2))
    items[::7, 3] = -1
    items[::9, 2:] = -1
    case = ChildrenCase.make(items, (5, 3), 12, bias=True, padded=True, temperature=0.7)
    if "NaN" in kind:
        case.hidden[4, 1, 1, 3] = torch.nan
        assert case.mask[4, 1, 1]
    g = torch.Generator().manual_seed(1)
    reward = 3 * torch.randn(5, len(items), generator=g, dtype=torch.float64)
    reward[1, ::2] = -torch.inf
    reward[3] = -torch.inf
    given: dict[str, Any] = {}
    if kind.startswith("pool"):
        pool = torch.stack([torch.randperm(len(items), generator=g)[:40] for _ in range(5)])
        pool[2, 30:] = -1
        reward, given = reward.gather(1, pool.clamp(min=0)), {"items": pool}
        given["log_reward_floor"] = -2.0 if "floor" in kind else None
    if "float64" not in kind:
        reward = reward.float()
    rewards = gflowgr.item_flows(case.tree, reward, **given).rewards
    assert case.bias is not None
    monkeypatch.setattr(flow_kl_op, "RECOMPUTED_AT_ONCE", 500)  # some prompts

    def results(wide: bool, weights: Tensor | None, saved: int) -> list[Tensor]:
        kinds = [x.double() if wide else x for x in (case.hidden, case.weight, case.bias)]
        if wide and weights is not None:
            weights = weights.double()
        head = (*kinds, case.tokens, case.mask, case.tree.buffer, case.temperature)
        flows = (rewards.log_reward, rewards.pool, rewards.floor, rewards.root)
        value, log_pf, alive, slopes, plan, invalid = torch.ops.gflowgr.flow_kl(
            *head, saved, weights, *flows
        )
        grad = case.grad.to(value.dtype)
        found = torch.ops.gflowgr.flow_kl_backward(
            grad, *head, weights, *flows, log_pf, slopes, plan, True, True, True
        )
        # Beside given weights nobody asks whether a prefix with one child has a flow.
        return [value, log_pf, *([alive] if weights is None else []), invalid, *found]

    for weights in (None, torch.tensor([0.5, 0.0, 0.0]).expand(5, 3)):
        with gflowgr.backend("torch"):
            wanted = results(True, weights, 0)
        with gflowgr.backend("cuda"):
            found = results(False, weights, 0 if recompute else case.saved())
        if "NaN" in kind:  # the reference multiplies that state by the zeros of other tokens, too
            del found[-2], wanted[-2]
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                got.double(), want.double(), rtol=2e-5, atol=2e-5, equal_nan=True
            )


@pytest.mark.parametrize("weight", FLOAT_DTYPES)
@pytest.mark.parametrize("hidden", FLOAT_DTYPES)
def test_dtypes(hidden: torch.dtype, weight: torch.dtype) -> None:
    for width in (24, 13):  # with and without 16-byte loads
        case = ChildrenCase.make(shop(60, (12, 9)), (5, 3), width, dtypes=(hidden, weight))
        check_raw_op(CUDA, case)


def test_unaligned_tensors() -> None:
    case = ChildrenCase.make(shop(60, (12, 9)), (5, 3), 8)
    hidden = torch.empty(case.hidden.numel() + 1)[1:].view(case.hidden.shape)
    weight = torch.empty(case.weight.numel() + 1)[1:].view(case.weight.shape)
    check_raw_op(
        CUDA, replace(case, hidden=hidden.copy_(case.hidden), weight=weight.copy_(case.weight))
    )


@settings(max_examples=12)
@given(
    items=st.integers(1, 80),
    codes=st.lists(st.sampled_from([1, 2, 7, 30, 300]), min_size=1, max_size=4),
    batch=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    width=st.integers(1, 70),
    bias=st.booleans(),
    padded=st.booleans(),
    sparse=st.booleans(),
    recompute=st.booleans(),
    shared_tokens=st.booleans(),
    seed=st.integers(0, 9),
)
def test_random_trees(
    items: int,
    codes: list[int],
    batch: tuple[int, int],
    width: int,
    bias: bool,
    padded: bool,
    sparse: bool,
    recompute: bool,
    shared_tokens: bool,
    seed: int,
) -> None:
    identifiers = shop(items, tuple(codes), seed)
    if shared_tokens:  # levels have tokens in common
        identifiers %= max(codes)
    case = ChildrenCase.make(
        identifiers, batch, width, bias=bias, padded=padded, seed=seed, vocabulary=1300
    )
    check_raw_op(CUDA, case, sparse=sparse, recompute=recompute)


def test_several_shares_of_the_rows() -> None:
    """Enough rows that the head's gradient is the sum of shares; few of them have a given token."""
    first = np.arange(200)
    identifiers = np.stack([first.repeat(2), 200 + np.arange(400)], 1)
    check_raw_op(CUDA, ChildrenCase.make(identifiers, (70, 4), 8, bias=True))


def test_more_used_tokens_than_a_row_has_bits() -> None:
    """Past 64 buckets of 64 tokens two buckets share a bit; past 16384 tokens the scan loops."""
    identifiers = np.stack([9 * np.arange(4200), 40_000 + np.arange(4200) % 7], 1)
    identifiers = np.concatenate([identifiers, np.add(identifiers[::2], [0, 1])])
    check_raw_op(CUDA, ChildrenCase.make(identifiers, (2, 2), 8))


def test_forbidden_tokens_and_what_is_outside_the_tree() -> None:
    case = ChildrenCase.make(shop(200, (10, 12, 3)), (6, 4), 16, bias=True)
    assert case.bias is not None
    bias = case.bias.clone()
    bias[::3] = -torch.inf
    check_raw_op(CUDA, replace(case, bias=bias))
    tokens = case.tokens.clone()
    tokens[1, 2, 0] = 2**62
    tokens[3, 1, 1] = -(2**62)
    tokens[4, 0, 2] = 0
    grad = case.grad.clone()
    grad[1, 2], grad[3, 1, 1:], grad[4, 0, 2] = torch.nan, torch.inf, torch.nan
    for recompute in (False, True):
        check_raw_op(
            CUDA, replace(case, tokens=tokens, grad=grad), recompute=recompute, valid=False
        )


@pytest.mark.parametrize("change", ["too short", "hole", "none"])
def test_invalid_says_whether_all_trajectories_are_identifiers(change: str) -> None:
    identifiers = shop(50, (5, 6, 4))
    identifiers[::2, 2] = -1
    case = ChildrenCase.make(identifiers[1::2], (3, 2), 8)
    case = replace(case, tree=ChildrenCase.make(identifiers, (1, 1), 1).tree)
    mask = torch.ones_like(case.tokens, dtype=torch.bool)
    mask[1, 0] = False
    if change == "too short":
        mask[2, 1, 1:] = False
    elif change == "hole":
        mask[2, 1, 1] = False
    outputs = replace(case, mask=mask).run(CUDA)
    assert bool(outputs["invalid"] == 0) == (change == "none")


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_extreme_logits(scale: float) -> None:
    case = ChildrenCase.make(shop(200, (80, 10)), (8, 3), 16, seed=3)
    # Powers of two: the scaled logits are as exact as the others.
    factor = 2.0 ** round(np.log2(scale))
    got = replace(case, hidden=case.hidden * factor).run(CUDA)
    expected = replace(case, hidden=case.hidden * factor).expected()
    torch.testing.assert_close(got["log_pf"].double(), expected[0], rtol=2e-6, atol=1e-6 * factor)
    assert bool(torch.isfinite(got["hidden"]).all())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("empty", [(slice(0),), (slice(None), slice(0))])
def test_no_trajectories(empty: tuple[slice, ...], sparse: bool) -> None:
    case = ChildrenCase.make(shop(20, (5, 6)), (2, 3), 8, bias=True)
    nothing = {name: getattr(case, name)[empty] for name in ("hidden", "tokens", "grad")}
    outputs = replace(case, **nothing).run(CUDA, sparse=sparse)
    assert outputs["hidden"].shape == nothing["hidden"].shape
    assert outputs["log_pf"].shape == nothing["tokens"].shape
    assert not bool(outputs["weight"].any())
    assert not bool(outputs["bias"].any())


def test_all_masked() -> None:
    case = ChildrenCase.make(shop(20, (5, 6)), (2, 3), 8, bias=True)
    nothing = replace(
        case,
        hidden=torch.full_like(case.hidden, torch.nan),
        mask=torch.zeros_like(case.tokens, dtype=torch.bool),
        grad=torch.full_like(case.grad, torch.nan),
    )
    check_raw_op(CUDA, nothing, sparse=True)
    check_raw_op(CUDA, nothing)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_order_of_threads_and_blocks_does_not_matter(recompute: bool) -> None:
    batch = (10, 2) if recompute else (30, 3)  # more than 64 trajectories, and 256 rows
    case = ChildrenCase.make(shop(300, (90, 40, 4)), batch, 20, bias=True, padded=True)
    results = []
    for order in emulation.SCHEDULES:
        with emulation.schedule(order):
            results.append(case.run(CUDA, recompute=recompute))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_wrong_arguments_are_named() -> None:
    case = ChildrenCase.make(shop(20, (5, 6)), (2, 3), 8)
    with pytest.raises(RuntimeError, match="hidden must be float32, bfloat16 or float16"):
        replace(case, hidden=case.hidden.double()).run(CUDA)
    with pytest.raises(RuntimeError, match="tokens must be int64"):
        replace(case, tokens=case.tokens.int()).run(CUDA)
    with pytest.raises(RuntimeError, match="temperature must be a number above 0; got -1"):
        replace(case, temperature=-1.0).run(CUDA)
