"""Trajectory log-probabilities: values, gradients, padding, extremes, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gflowgr.ops import set_validation, trajectory_logprobs
from gflowgr.ops.logprobs import reference
from gflowgr.tree import PrefixTree

from . import oracles
from .cases import IDENTIFIERS, VOCABULARY, HeadCase, head_cases, make_head_case, prefix_mask

NORMALISERS = ["vocab", "level", "children"]


def keywords(case: HeadCase, normalize: str, *, bias: bool = True, temperature: float = 0.7) -> Any:
    return {
        "bias": case.bias if bias else None,
        "tree": None if normalize == "vocab" else case.tree,
        "mask": case.mask,
        "temperature": temperature,
        "normalize": normalize,
    }


def oracle(
    case: HeadCase, normalize: str, *, bias: bool = True, temperature: float = 0.7
) -> Tensor:
    return oracles.logprobs(
        case.hidden,
        case.weight,
        case.tokens,
        bias=case.bias if bias else None,
        identifiers=IDENTIFIERS,
        normalize=normalize,
        mask=case.mask,
        temperature=temperature,
    )


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("normalize", NORMALISERS)
@settings(max_examples=30)
@given(case=head_cases, bias=st.booleans(), temperature=st.sampled_from([1.0, 0.3, 2.0]))
def test_equals_the_loops(normalize: str, case: HeadCase, bias: bool, temperature: float) -> None:
    actual = trajectory_logprobs(
        case.hidden,
        case.weight,
        case.tokens,
        **keywords(case, normalize, bias=bias, temperature=temperature),
    )
    expected = oracle(case, normalize, bias=bias, temperature=temperature)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert (actual <= 0).all()
    assert (actual[~case.mask] == 0).all()


def test_a_tree_restricts_the_softmax_unless_told_otherwise() -> None:
    case = make_head_case(2, 3, 4, seed=1)
    inputs = (case.hidden, case.weight, case.tokens)
    tree = {"tree": case.tree, "mask": case.mask}
    children = trajectory_logprobs(*inputs, **tree)
    vocab = trajectory_logprobs(*inputs, mask=case.mask)
    assert torch.equal(children, trajectory_logprobs(*inputs, **tree, normalize="children"))
    assert torch.equal(vocab, trajectory_logprobs(*inputs, **tree, normalize="vocab"))
    assert (children[case.mask] > vocab[case.mask]).all()  # fewer candidates share the mass


def test_probabilities_of_all_identifiers_sum_to_one() -> None:
    """The children-normalised policy is a distribution over the leaves of the tree."""
    tokens = torch.tensor([row + [0] * (4 - len(row)) for row in IDENTIFIERS])[None]
    mask = prefix_mask(torch.tensor([[len(row) for row in IDENTIFIERS]]), 4)
    table = torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64)
    before = torch.cat([torch.zeros_like(tokens[..., :1]), tokens[..., :-1]], -1)
    hidden = table[before]  # the state depends on the last token only, alike in all branches
    log_pf = trajectory_logprobs(
        hidden,
        torch.eye(VOCABULARY, dtype=torch.float64),
        tokens,
        tree=PrefixTree.from_identifiers(IDENTIFIERS),
        mask=mask,
    )
    assert log_pf.sum(-1).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_an_only_child_is_certain() -> None:
    tree = PrefixTree.from_identifiers([[1, 2], [3, 4]])
    hidden = torch.randn(1, 2, 2, 8)
    log_pf = trajectory_logprobs(
        hidden, torch.randn(5, 8), torch.tensor([[[1, 2], [3, 4]]]), tree=tree
    )
    assert (log_pf[..., 1] == 0).all()
    assert (log_pf[..., 0] < 0).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_any_integer_dtype_holds_tokens(dtype: torch.dtype) -> None:
    case = make_head_case(2, 3, 4, seed=2)
    for normalize in NORMALISERS:
        options = keywords(case, normalize)
        wide = trajectory_logprobs(case.hidden, case.weight, case.tokens, **options)
        narrow = trajectory_logprobs(case.hidden, case.weight, case.tokens.to(dtype), **options)
        assert torch.equal(wide, narrow)


def test_strides_do_not_matter() -> None:
    case = make_head_case(2, 3, 4, seed=3)
    hidden = case.hidden.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    weight = case.weight.T.contiguous().T
    tokens = case.tokens.transpose(0, 1).contiguous().transpose(0, 1)
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    for normalize in NORMALISERS:
        torch.testing.assert_close(
            trajectory_logprobs(hidden, weight, tokens, **keywords(case, normalize)),
            oracle(case, normalize),
        )


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize(
    ("normalize", "bias", "temperature"),
    [("vocab", True, 0.4), ("level", False, 0.4), ("level", True, 1.0), ("children", True, 0.4)],
)
def test_gradcheck(normalize: str, bias: bool, temperature: float) -> None:
    case = make_head_case(2, 2, 2, seed=4)
    assert case.mask.any()
    assert not case.mask.any(-1).all()
    options = keywords(case, normalize, temperature=temperature)

    def run(hidden: Tensor, weight: Tensor, *given: Tensor) -> Tensor:
        options["bias"] = given[0] if given else None
        return trajectory_logprobs(hidden, weight, case.tokens, **options)

    inputs = [case.hidden, case.weight, *([case.bias] if bias else [])]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("normalize", NORMALISERS)
def test_blocks_of_rows_change_neither_values_nor_gradients(
    normalize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_head_case(4, 4, 3, seed=5)
    upstream = torch.randn(case.mask.shape, dtype=torch.float64)

    def run() -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
        options = {**keywords(case, normalize), "bias": inputs[2]}
        log_pf = trajectory_logprobs(*inputs[:2], case.tokens, **options)
        with torch.no_grad():
            assert torch.equal(log_pf, trajectory_logprobs(*inputs[:2], case.tokens, **options))
        (log_pf * upstream).sum().backward()
        return [log_pf.detach(), *(x.grad for x in inputs)]

    whole = run()
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(reference, "MIN_BLOCK_ROWS", 3)
    for actual, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(actual, expected)


def test_no_gradient_is_made_for_what_is_frozen() -> None:
    case = make_head_case(2, 2, 3, seed=6)
    for normalize in NORMALISERS:
        hidden = case.hidden.clone().requires_grad_()
        trajectory_logprobs(
            hidden, case.weight, case.tokens, **keywords(case, normalize)
        ).sum().backward()
        assert hidden.grad is not None
        assert case.weight.grad is None
        assert case.bias.grad is None


def test_only_rows_of_the_head_on_the_way_get_a_gradient_from_a_tree() -> None:
    """Walking (2, 8): the root's children 2..5 and those of (2,), 6..8, compete; no other does."""
    weight = torch.randn(VOCABULARY, 4, requires_grad=True)
    trajectory_logprobs(
        torch.randn(1, 1, 2, 4),
        weight,
        torch.tensor([[[2, 8]]]),
        tree=PrefixTree.from_identifiers(IDENTIFIERS),
    ).sum().backward()
    touched = weight.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert touched == [2, 3, 4, 5, 6, 7, 8]


# ------------------------------------------------------------------ padding and forbidden tokens


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("normalize", NORMALISERS)
@settings(max_examples=15)
@given(case=head_cases, token=st.sampled_from([-7, 0, VOCABULARY, 10**12]))
def test_poisoned_padding_changes_nothing(
    normalize: str, poison: float, case: HeadCase, token: int
) -> None:
    upstream = torch.randn(case.mask.shape, dtype=torch.float64)

    def run(hidden: Tensor, tokens: Tensor) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in (hidden, case.weight, case.bias)]
        options = {**keywords(case, normalize), "bias": inputs[2]}
        log_pf = trajectory_logprobs(*inputs[:2], tokens, **options)
        (log_pf * upstream).sum().backward()
        return [log_pf.detach(), *(x.grad for x in inputs)]

    expected = run(case.hidden, case.tokens)
    actual = run(
        case.hidden.masked_fill(~case.mask[..., None], poison),
        case.tokens.masked_fill(~case.mask, token),
    )
    for a, e in zip(actual, expected, strict=True):
        assert e.isfinite().all()
        assert torch.equal(a, e)
    assert (actual[1][~case.mask] == 0).all()


@pytest.mark.parametrize("normalize", NORMALISERS)
@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (2, 2)])
def test_nothing_valid_gives_zeros_and_zero_gradients(
    normalize: str, shape: tuple[int, int]
) -> None:
    """Parameters get a gradient of zeros and not None, as data-parallel training needs."""
    case = make_head_case(*shape, 3, seed=7)
    case.mask = torch.zeros_like(case.mask)
    hidden = torch.full_like(case.hidden, math.nan).requires_grad_()
    parameters = [case.weight.requires_grad_(), case.bias.requires_grad_()]
    log_pf = trajectory_logprobs(hidden, case.weight, case.tokens, **keywords(case, normalize))
    assert log_pf.shape == case.mask.shape
    assert (log_pf == 0).all()
    log_pf.sum().backward()
    assert all((x.grad == 0).all() for x in [hidden, *parameters])


@pytest.mark.parametrize("normalize", NORMALISERS)
def test_a_bias_of_minus_infinity_takes_a_token_out_of_the_softmax(normalize: str) -> None:
    """As if the token were not there; the head row and the bias of the token get no gradient."""
    tree = PrefixTree.from_identifiers([[0], [1], [2]])
    smaller = PrefixTree.from_identifiers([[0], [1]])
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(1, 2, 1, 4, dtype=torch.float64)
    tokens = torch.tensor([[[0], [1]]])
    bias = torch.tensor([0.5, -0.5, -math.inf], dtype=torch.float64, requires_grad=True)
    log_pf = trajectory_logprobs(hidden, weight, tokens, bias=bias, tree=tree, normalize=normalize)
    without = trajectory_logprobs(
        hidden, weight[:2], tokens, bias=bias[:2], tree=smaller, normalize=normalize
    )
    torch.testing.assert_close(log_pf, without)
    log_pf[0, 0].sum().backward()
    assert weight.grad[:2].abs().min() > 0
    assert (weight.grad[2] == 0).all()
    assert bias.grad[2] == 0
    assert bias.grad.isfinite().all()


@pytest.mark.parametrize("normalize", NORMALISERS)
def test_a_forbidden_token_has_probability_zero(normalize: str) -> None:
    tree = PrefixTree.from_identifiers([[0], [1]])
    inputs = (torch.randn(1, 2, 1, 4), torch.randn(2, 4), torch.tensor([[[0], [1]]]))
    options: Any = {"tree": tree, "normalize": normalize}
    one = trajectory_logprobs(*inputs, bias=torch.tensor([0.0, -math.inf]), **options)
    assert one.flatten().tolist() == [0.0, -math.inf]
    both = trajectory_logprobs(*inputs, bias=torch.full((2,), -math.inf), **options)
    assert both.flatten().tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize(
    ("normalize", "impossible"),
    [
        ("children", [[False, True], [False, False], [True, True]]),
        # Tokens 0 and 1, then 2 and 3, in any combination.
        ("level", [[False, False], [False, False], [True, False]]),
    ],
)
def test_unchecked_trajectories_outside_the_tree_have_probability_zero(
    normalize: str, impossible: list[list[bool]]
) -> None:
    tree = PrefixTree.from_identifiers([[0, 2], [1, 3]])
    inputs = (
        torch.randn(1, 3, 2, 4), torch.randn(5, 4), torch.tensor([[[0, 3], [1, 3], [4, 2]]])
    )  # fmt: skip
    previous = set_validation(False)
    try:
        log_pf = trajectory_logprobs(*inputs, tree=tree, normalize=normalize)
    finally:
        set_validation(previous)
    assert log_pf.isneginf().tolist() == [impossible]


# ------------------------------------------------------------------ extremes and dtypes


@pytest.mark.parametrize("normalize", NORMALISERS)
def test_logits_of_ten_thousand_in_float32(normalize: str) -> None:
    """Against the loops on the same float32 numbers; 2e-7 of the largest logit is one rounding."""
    case = make_head_case(3, 3, 4, seed=8, dtype=torch.float32)
    scale = 1e4 / (case.hidden @ case.weight.T).abs().max()
    case.hidden = (case.hidden * scale).requires_grad_()
    case.bias[1] = -1e4
    actual = trajectory_logprobs(
        case.hidden, case.weight, case.tokens, **keywords(case, normalize, temperature=1.0)
    )
    expected = oracle(case, normalize, temperature=1.0)
    assert expected.min() < -1e3
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e4 * 2e-7)
    assert (actual <= 0).all()
    actual.sum().backward()
    assert case.hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", NORMALISERS)
def test_16_bit_inputs_accumulate_in_float32(normalize: str, dtype: torch.dtype) -> None:
    """As exact as float32 on the same numbers; logits past fp16's 65504 stay finite."""
    case = make_head_case(3, 3, 4, seed=9, dtype=dtype)
    case.hidden = case.hidden * 300
    case.weight = (case.weight * 300).requires_grad_()
    assert (case.hidden.float() @ case.weight.float().T).abs().max() > 65504
    actual = trajectory_logprobs(case.hidden, case.weight, case.tokens, **keywords(case, normalize))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), oracle(case, normalize), rtol=1e-5, atol=0.1)
    actual.sum().backward()
    assert case.weight.grad.dtype == dtype


@pytest.mark.parametrize("normalize", NORMALISERS)
def test_gradient_of_the_head_is_summed_in_float32(normalize: str) -> None:
    """Half a bf16 unit, 600 times over, would vanish in a bf16 sum."""
    rows = 600
    tree = PrefixTree.from_identifiers([[0], [1]])
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    trajectory_logprobs(
        torch.ones(rows, 1, 1, 1, dtype=torch.bfloat16),
        weight,
        torch.zeros(rows, 1, 1, dtype=torch.long),
        tree=tree,
        normalize=normalize,
    ).sum().backward()
    assert weight.grad.flatten().tolist() == [rows / 2, -rows / 2]


@pytest.mark.parametrize("normalize", NORMALISERS)
def test_autocast_rounds_the_inputs_and_nothing_else(normalize: str) -> None:
    """As for any output head; the products of the rounded numbers are exact, and so are sums."""
    case = make_head_case(2, 3, 16, seed=10, dtype=torch.float32)
    options = keywords(case, normalize)
    rounded = [x.bfloat16() for x in (case.hidden, case.weight, case.bias)]
    expected = trajectory_logprobs(*rounded[:2], case.tokens, **options | {"bias": rounded[2]})
    weight = case.weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_pf = trajectory_logprobs(case.hidden, weight, case.tokens, **options)
        # The usual mixture under autocast: 16-bit states, float32 head.
        mixed = trajectory_logprobs(case.hidden.bfloat16(), weight, case.tokens, **options)
    assert log_pf.dtype == torch.float32
    torch.testing.assert_close(log_pf, expected)
    torch.testing.assert_close(mixed, expected)
    log_pf.sum().backward()
    assert weight.grad.dtype == torch.float32


# ------------------------------------------------------------------ torch.compile


def test_compiles_as_one_graph_over_the_vocabulary() -> None:
    case = make_head_case(3, 3, 4, seed=11)
    torch._dynamo.reset()
    compiled = torch.compile(trajectory_logprobs, fullgraph=True, backend="eager")
    hidden = case.hidden.masked_fill(~case.mask[..., None], math.nan).requires_grad_()
    log_pf = compiled(
        hidden, case.weight, case.tokens, bias=case.bias, mask=case.mask, temperature=0.7
    )
    torch.testing.assert_close(log_pf, oracle(case, "vocab"))
    log_pf.sum().backward()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[~case.mask] == 0).all()


def test_compiles_as_one_graph_with_a_tree() -> None:
    case = make_head_case(3, 3, 4, seed=12)
    torch._dynamo.reset()
    compiled = torch.compile(trajectory_logprobs, fullgraph=True, backend="eager")
    log_pf = compiled(case.hidden, case.weight, case.tokens, **keywords(case, "children"))
    torch.testing.assert_close(log_pf, oracle(case, "children"))
