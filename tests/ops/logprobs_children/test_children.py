"""Log-probabilities among the children of a node: every backend against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gflowgr.ops import set_validation, trajectory_logprobs
from gflowgr.ops.inputs import HeadInputs
from gflowgr.ops.logprobs import children
from gflowgr.tree import PrefixTree

from .cases import FLOATS, TOLERANCE, check, define, make_case, run

# ------------------------------------------------------------------ values and gradients


@settings(max_examples=60)
@given(
    prompts=st.integers(0, 5),
    branches=st.integers(0, 5),
    width=st.integers(1, 40),
    items=st.integers(1, 60),
    steps=st.integers(1, 5),
    codes=st.integers(1, 20),
    bias=st.booleans(),
    padding=st.booleans(),
    temperature=st.sampled_from([1.0, 0.3, 2.0]),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3),
    seed=st.integers(0, 2**20),
)
def test_equals_the_reference(dtypes: Any, **shape: Any) -> None:
    """Whatever backend is chosen here: the fastest that can run."""
    check(make_case(**shape).to(*dtypes))


@pytest.mark.parametrize(
    "dtypes", [(torch.float64,) * 3, (torch.float32, torch.float64, torch.float16)]
)
def test_a_float64_input_makes_all_float64(dtypes: Any) -> None:
    case = make_case(prompts=4).to(*dtypes)
    log_pf, *grads = run(case)
    assert log_pf.dtype == torch.float64
    for actual, expected in zip(grads, define(case)[1:], strict=True):
        tolerance = TOLERANCE[actual.dtype]
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 63, 64, 100, 513, 1024, 8192])
@pytest.mark.parametrize("dtype", FLOATS)
def test_any_width(cpp: None, width: int, dtype: torch.dtype) -> None:
    check(make_case(width=width, prompts=4, branches=4).to(dtype, dtype, torch.float32))


@pytest.mark.parametrize("codes", [30, 300, 5000, 70_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_nodes_and_tokens_of_all_sizes(cpp: None, codes: int, dtype: torch.dtype) -> None:
    """Blocks of rows and of children; tokens stored in 1, 2 and 4 bytes."""
    case = make_case(
        items=2 * codes, codes=codes, steps=2, prompts=50, branches=4, width=5, first=9
    )
    check(case.to(dtype, dtype, dtype))


def test_one_of_everything(backend: str) -> None:
    case = make_case(prompts=1, branches=1, width=1, items=9, steps=1, codes=2, padding=False)
    check(case.to(*[torch.float32] * 3))


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)])
def test_no_rows(backend: str, shape: tuple[int, int]) -> None:
    case = make_case(prompts=shape[0], branches=shape[1])
    log_pf, d_hidden, d_weight, d_bias = run(case.to(*[torch.float32] * 3))
    assert log_pf.shape == (*shape, 3)
    assert d_hidden.numel() == 0
    assert not d_weight.any()
    assert not d_bias.any()


def test_strides_do_not_matter(backend: str) -> None:
    case = make_case(prompts=4).to(*[torch.float32] * 3)
    strided = replace(
        case,
        hidden=case.hidden.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        weight=case.weight.T.contiguous().T,
        bias=torch.stack([case.bias, case.bias], 1)[:, 0],
        tokens=case.tokens.transpose(0, 1).contiguous().transpose(0, 1),
        mask=case.mask.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not strided.hidden.is_contiguous()
    assert not strided.bias.is_contiguous()
    for actual, expected in zip(run(strided), run(case), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias: bool) -> None:
    """In float64, so of the gradient that the reference's backend writes out."""
    case = make_case(prompts=2, branches=2, width=3, items=12, codes=4, bias=bias)
    parameters = [x.requires_grad_() for x in case.parameters()]

    def log_pf(*given: Tensor) -> Tensor:
        return children.children_logprobs(case.inputs(*given), case.tree)[0]

    assert torch.autograd.gradcheck(log_pf, parameters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_rounded_once(cpp: None, dtype: torch.dtype) -> None:
    """The float32 gradient to the nearest, down to subnormal numbers and up to infinity."""
    case = make_case(prompts=20, branches=5, width=33).to(dtype, dtype, dtype)
    case.upstream *= torch.logspace(-12, 6, case.upstream.numel()).view(case.upstream.shape)
    actual, exact = run(case), run(case.to(*[torch.float32] * 3))
    for rounded, wide in zip(actual[1:], exact[1:], strict=True):
        assert torch.equal(rounded, wide.to(dtype))
    if dtype == torch.float16:
        assert actual[1].isinf().any()
        assert ((actual[1] != 0) & (actual[1].abs() < 2**-14)).any()


# ------------------------------------------------------------------ rows without a choice


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_padding_may_hold_anything(backend: str, poison: float) -> None:
    case = make_case(prompts=6).to(*[torch.float32] * 3)
    masked = ~case.mask
    assert masked.any()
    poisoned = replace(
        case,
        hidden=case.hidden.masked_fill(masked[..., None], poison),
        tokens=case.tokens.masked_fill(masked, 10**15),
        upstream=case.upstream.masked_fill(masked, poison),
    )
    log_pf, d_hidden, *others = run(poisoned)
    assert (log_pf[masked] == 0).all()
    assert (d_hidden[masked] == 0).all()
    for actual, expected in zip([log_pf, d_hidden, *others], run(case), strict=True):
        assert torch.equal(actual, expected)


def test_an_only_child_costs_nothing(cpp: None) -> None:
    """Its state is not even read: it may be NaN."""
    tree = PrefixTree.from_identifiers([[1, 4], [2, 5]])
    hidden = torch.randn(1, 2, 2, 4)
    hidden[:, :, 1] = math.nan
    hidden.requires_grad_()
    weight = torch.randn(6, 4, requires_grad=True)
    log_pf = trajectory_logprobs(hidden, weight, torch.tensor([[[1, 4], [2, 5]]]), tree=tree)
    log_pf.sum().backward()
    assert (log_pf[..., 1] == 0).all()
    assert (hidden.grad[:, :, 1] == 0).all()
    assert weight.grad.abs().sum(-1).nonzero().flatten().tolist() == [1, 2]
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, -math.inf, 0.0])
    log_pf = trajectory_logprobs(
        hidden, weight, torch.tensor([[[1, 4], [2, 5]]]), tree=tree, bias=bias
    )
    assert log_pf[0, :, 1].tolist() == [-math.inf, 0.0]


def test_forbidden_children_do_not_compete(backend: str) -> None:
    """They get no gradient; a row whose own token is forbidden passes none on, whatever comes."""
    case = make_case(items=200, prompts=6, branches=6, padding=False).to(*[torch.float32] * 3)
    case.bias[[3, 5]] = -math.inf
    log_pf, d_hidden, d_weight, d_bias = run(case)
    forbidden = case.mask & ((case.tokens == 3) | (case.tokens == 5))
    assert forbidden.any()
    assert torch.equal(log_pf.isneginf(), forbidden)
    assert (d_hidden[forbidden] == 0).all()
    assert not d_weight[[3, 5]].any()
    assert not d_bias[[3, 5]].any()
    # In the reference without infinities: a logit of -1e30 has the probability 0 just as well.
    finite = replace(
        case,
        bias=case.bias.clamp(min=-1e30),
        upstream=case.upstream.masked_fill(forbidden, 0.0),
    )
    for actual, expected in zip([d_hidden, d_weight, d_bias], define(finite)[1:], strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-5)
    wild = replace(case, upstream=case.upstream.masked_fill(forbidden, math.nan))
    for actual, expected in zip(run(wild), [log_pf, d_hidden, d_weight, d_bias], strict=True):
        assert torch.equal(actual, expected)


def test_outside_the_tree_the_probability_is_zero(backend: str) -> None:
    """Unchecked, a trajectory outside the tree is -inf from there on and passes no gradient."""
    tree = PrefixTree.from_identifiers([[0, 2], [0, 3], [1, 3]])
    far = 2**62
    tokens = torch.tensor([[[0, 9], [1, 3], [4, 2], [-far, far], [far, 0]]])
    hidden = torch.randn(1, 5, 2, 4, requires_grad=True)
    previous = set_validation(False)
    try:
        log_pf = trajectory_logprobs(hidden, torch.randn(5, 4), tokens, tree=tree)
    finally:
        set_validation(previous)
    outside = log_pf.isneginf()
    assert outside[0].tolist() == [[False, True], [False, False], *[[True, True]] * 3]
    log_pf.backward(torch.full_like(log_pf, math.nan).where(outside, 1.0))
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[outside].any()


@pytest.mark.parametrize(
    ("tokens", "mask", "bad"),
    [
        ([[0, 2], [1, 3]], None, False),
        ([[0, 2], [1, 9]], [[1, 1], [0, 0]], False),  # the second is padding
        ([[0, 2], [4, 9]], [[1, 1], [1, 0]], False),  # (4,) is an identifier, and a prefix
        ([[0, 2], [1, 3]], [[1, 1], [1, 0]], True),  # (1,) is only a prefix
        ([[0, 2], [1, 3]], [[1, 1], [0, 1]], True),  # a hole
        ([[0, 2], [1, 2]], None, True),
        ([[0, 2], [-1, -1]], None, True),
    ],
)
def test_knows_which_trajectories_are_identifiers(
    backend: str, tokens: Any, mask: Any, bad: bool
) -> None:
    tree = PrefixTree.from_identifiers([[0, 2], [1, 3], [4, -1], [4, 1]])
    inputs = HeadInputs(
        torch.randn(1, 2, 2, 3),
        torch.randn(10, 3),
        torch.tensor([tokens]),
        None,
        None if mask is None else torch.tensor([mask]).bool(),
        tree,
        1.0,
        "children",
    )
    _, invalid = children.children_logprobs(inputs, tree)
    assert (invalid.item() != 0) == bad


# ------------------------------------------------------------------ extremes


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float16,) * 3])
def test_logits_far_beyond_what_exp_can_take(cpp: None, dtypes: Any) -> None:
    """Logits of +-1e5; an error of 2e-7 of the largest is one rounding of a product."""
    case = make_case(prompts=10, branches=5, width=16, temperature=1.0)
    case = replace(case, hidden=case.hidden * 250, weight=case.weight * 250).to(*dtypes)
    actual, expected = run(case), define(case)
    assert expected[0].min() < -1e5
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-6, atol=0.1)
    assert (actual[0] <= 0).all()
    assert all(x.isfinite().all() for x in actual)


def test_a_certain_choice_keeps_its_small_gradient(cpp: None) -> None:
    """1 - p = e^-40: taking p from 1 would leave 0."""
    tree = PrefixTree.from_identifiers([[0], [1]])
    hidden = torch.ones(1, 1, 1, 1, requires_grad=True)
    weight = torch.tensor([[40.0], [0.0]], requires_grad=True)
    log_pf = trajectory_logprobs(hidden, weight, torch.zeros(1, 1, 1, dtype=torch.long), tree=tree)
    log_pf.sum().backward()
    small = math.exp(-40)
    assert log_pf.item() == pytest.approx(-small, rel=1e-6)
    assert weight.grad.flatten().tolist() == pytest.approx([small, -small], rel=1e-6)


def test_a_state_that_is_not_a_number_gives_none(backend: str) -> None:
    case = make_case(padding=False).to(*[torch.float32] * 3)
    case.hidden[1, 1, 0] = math.nan
    log_pf = run(case)[0]
    assert log_pf[1, 1, 0].isnan()
    assert log_pf[0].isfinite().all()
