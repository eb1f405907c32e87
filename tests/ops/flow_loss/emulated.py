"""The CUDA kernels of the flow losses in the emulator (see test_emulated.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import emulation

import gflowgr
from gflowgr.ops.flow_loss.reference import FlowOptions, gradient_reference, loss_reference

from .cases import KINDS, REDUCTIONS, FlowCase, check_raw_op

CUDA = torch.ops.gflowgr_cuda


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64(kind: str, reduction: str, masked: bool) -> None:
    check_raw_op(CUDA, FlowCase.make(kind, (70, 3, 4), masked=masked, reduction=reduction))


@settings(max_examples=30)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 9)),
    masked=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    lam=st.sampled_from([0.1, 0.9, 1.0, 3.0]),
    floor=st.sampled_from([None, -0.5]),
    nll_weight=st.sampled_from([0.0, 1.0]),
    clip=st.sampled_from([None, 0.8]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_random_shapes(
    kind: str,
    shape: tuple[int, int, int],
    masked: bool,
    reduction: str,
    lam: float,
    floor: float | None,
    nll_weight: float,
    clip: float | None,
    dtype: torch.dtype,
) -> None:
    options = {"lam": lam, "floor": floor, "nll_weight": nll_weight, "reduction": reduction}
    options["clip"] = None if kind == "subtb" else clip
    check_raw_op(CUDA, FlowCase.make(kind, shape, masked=masked, dtype=dtype, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_too_large_for_shared_memory(kind: str) -> None:
    check_raw_op(CUDA, FlowCase.make(kind, (3, 40, 50), masked=True, dtype=torch.float64))


def test_a_count_that_needs_a_launch_of_its_own() -> None:
    for reduction in ("prompt", "mean"):
        check_raw_op(CUDA, FlowCase.make("tb", (1500, 3, 2), masked=True, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_valid(reduction: str) -> None:
    case = FlowCase.make("db", (5, 2, 3), masked=False, reduction=reduction)
    masked = FlowCase(
        case.log_pf * torch.nan,
        case.log_reward * torch.nan,
        case.target,
        torch.zeros(5, 2, 3, dtype=torch.bool),
        "db",
        reduction=reduction,
        grad=case.grad,
    )
    check_raw_op(CUDA, masked)


@pytest.mark.parametrize("shape", [(0, 2, 3), (3, 0, 2), (3, 2, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty(kind: str, shape: tuple[int, int, int]) -> None:
    check_raw_op(CUDA, FlowCase.make(kind, shape, masked=False, reduction="sum"))


def test_the_order_of_threads_and_blocks_does_not_matter() -> None:
    case = FlowCase.make("subtb", (200, 8, 4), masked=True)
    results = []
    for order in emulation.SCHEDULES:
        with emulation.schedule(order):
            loss = CUDA.flow_loss(*case.arguments())
            grads = CUDA.flow_loss_backward(case.grad.float(), *case.arguments(), True, True, True)
            results.append((loss, *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_through_the_public_functions(kind: str) -> None:
    case = FlowCase.make(
        kind, (6, 3, 4), masked=True, nll_weight=0.0, beta=1.0, grad=torch.ones(())
    )
    targets = [] if case.target is None else [case.target]
    leaves = [t.clone().requires_grad_() for t in (case.log_pf, case.log_reward, *targets)]
    with gflowgr.backend("cuda"):
        loss = getattr(gflowgr, f"{kind}_loss")(*leaves, mask=case.mask)
        grads = torch.autograd.grad(loss, leaves)
    expected_loss, expected = case.expected()
    torch.testing.assert_close(loss.detach().double(), expected_loss, rtol=2e-5, atol=2e-5)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=2e-5, atol=2e-5)


def test_wrong_arguments_are_named() -> None:
    case = FlowCase.make("tb", (3, 2, 4), masked=False)
    with pytest.raises(RuntimeError, match="log_reward must have 6 elements; got 4"):
        CUDA.flow_loss(*replace(case, log_reward=case.log_reward[:2]).arguments())
    with pytest.raises(RuntimeError, match="log_pf must be float32 or float64"):
        CUDA.flow_loss(*replace(case, log_pf=case.log_pf.half()).arguments())
    with pytest.raises(RuntimeError, match="kind must be tb, db, subtb or vargrad; got ab"):
        CUDA.flow_loss(*replace(case, kind="ab").arguments())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_is_no_prefix_makes_its_row_nan(kind: str, reduction: str) -> None:
    case = FlowCase.make(kind, (5, 2, 3), masked=True, reduction=reduction)
    mask = case.mask.clone()
    mask[1, 1] = torch.tensor([False, True, True])
    mask[3, 0] = torch.tensor([True, False, True])
    broken = replace(case, mask=mask)
    arguments = broken.arguments()
    oracle = (*arguments[:4], FlowOptions(*arguments[4:]))
    loss = CUDA.flow_loss(*arguments)
    assert not loss.sum().isfinite()
    torch.testing.assert_close(loss, loss_reference(*oracle), equal_nan=True)
    grad, target = broken.grad.float(), broken.target is not None
    found = CUDA.flow_loss_backward(grad, *arguments, True, True, target)
    expected = gradient_reference(grad, *oracle)
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, equal_nan=True)
