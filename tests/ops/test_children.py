"""Log-probabilities among the children of a node: every backend against the float64 definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gflowgr import backends
from gflowgr.ops import children, set_validation, trajectory_logprobs
from gflowgr.ops.definitions import HeadInputs, logprobs_definition
from gflowgr.tree import PrefixTree

from .cases import make_head_case, prefix_mask

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative to 1 + |value|: one rounding of the 16-bit types; some hundred of float32 in a sum."""


@pytest.fixture(params=["torch", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that runs here, forced."""
    name: str = request.param
    if name == "cpp" and (missing := backends.cpp_missing()):
        pytest.skip(missing)
    with backends.backend(name):
        yield name


@pytest.fixture
def cpp() -> Iterator[None]:
    if missing := backends.cpp_missing():
        pytest.skip(missing)
    with backends.backend("cpp"):
        yield


@dataclass
class Case:
    """Arguments of the log-probabilities and a gradient to send back."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    tokens: Tensor
    mask: Tensor | None
    tree: PrefixTree
    temperature: float
    upstream: Tensor

    def inputs(self, *parameters: Tensor) -> HeadInputs:
        hidden, weight, *bias = parameters or self.parameters()
        given_bias = bias[0] if bias else None
        return HeadInputs(
            hidden,
            weight,
            self.tokens,
            given_bias,
            self.mask,
            self.tree,
            self.temperature,
            "children",
        )

    def parameters(self) -> list[Tensor]:
        given_bias = [] if self.bias is None else [self.bias]
        return [self.hidden, self.weight, *given_bias]

    def to(self, *dtypes: torch.dtype) -> Case:
        """Hidden, weight and bias rounded to these dtypes."""
        hidden, weight, bias = dtypes
        return replace(
            self,
            hidden=self.hidden.to(hidden),
            weight=self.weight.to(weight),
            bias=None if self.bias is None else self.bias.to(bias),
        )


def random_identifiers(
    items: int, steps: int, codes: int, first: int, g: torch.Generator
) -> Tensor:
    """[items, steps] tokens from `first` on, some shorter (-1); a few may end inside others."""
    tokens = torch.randint(first, first + codes, (items, steps), generator=g)
    length = torch.randint(1, steps + 1, (items, 1), generator=g)
    length = torch.where(torch.rand(items, 1, generator=g) < 0.7, steps, length)
    return tokens.where(torch.arange(steps) < length, -1)


def make_case(
    *,
    prompts: int = 3,
    branches: int = 3,
    width: int = 8,
    items: int = 40,
    steps: int = 3,
    codes: int = 6,
    first: int = 2,
    bias: bool = True,
    padding: bool = True,
    temperature: float = 0.7,
    seed: int = 0,
) -> Case:
    """Trajectories that are identifiers of a random tree (or padding), in float64."""
    g = torch.Generator().manual_seed(seed)
    identifiers = random_identifiers(items, steps, codes, first, g)
    vocabulary = first + codes + 2
    pick = torch.randint(0, items, (prompts, branches), generator=g)
    tokens = identifiers[pick]
    mask = tokens >= 0
    if padding:
        mask &= (torch.rand(prompts, branches, 1, generator=g) < 0.8).expand_as(mask)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return Case(
        hidden=normal(prompts, branches, steps, width),
        weight=normal(vocabulary, width) / max(1.0, width**0.5),
        bias=normal(vocabulary) if bias else None,
        tokens=tokens,
        mask=mask,
        tree=PrefixTree.from_identifiers(identifiers),
        temperature=temperature,
        upstream=normal(prompts, branches, steps),
    )


def run(case: Case, *, sparse_grad: bool = False) -> list[Tensor]:
    """log_pf and the gradients of hidden, weight and bias."""
    parameters = [x.detach().clone().requires_grad_() for x in case.parameters()]
    inputs = case.inputs(*parameters)
    assert inputs.tree is not None
    log_pf, _ = children.children_logprobs(inputs, inputs.tree, sparse_grad=sparse_grad)
    log_pf.backward(case.upstream.to(log_pf.dtype))
    return [log_pf.detach(), *(x.grad for x in parameters)]


def define(case: Case) -> list[Tensor]:
    """The same from the definition, with autograd, on the same numbers in float64."""
    parameters = [x.detach().double().requires_grad_() for x in case.parameters()]
    log_pf = logprobs_definition(case.inputs(*parameters))
    log_pf.backward(case.upstream)
    return [log_pf.detach(), *(x.grad for x in parameters)]


def check(case: Case) -> None:
    dtypes = [torch.float32, *(x.dtype for x in case.parameters())]
    if torch.float64 in dtypes:
        dtypes[0] = torch.float64
    for actual, expected, dtype in zip(run(case), define(case), dtypes, strict=True):
        assert actual.dtype == dtype
        tolerance = TOLERANCE[dtype] * max([1.0, *expected.abs().flatten().tolist()])
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


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
def test_equals_the_definition(dtypes: Any, **shape: Any) -> None:
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
    """In float64, so of the gradient that the definition's backend writes out."""
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
    # In the definition without infinities: a logit of -1e30 has the probability 0 just as well.
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


# ------------------------------------------------------------------ what is computed, and how


class Calls(TorchDispatchMode):
    """Records the arguments and results of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.gflowgr.children_backward.default:
            self.seen.append((args, result))
        return result


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0)])
def test_nothing_is_computed_for_what_is_frozen(backend: str, wanted: tuple[int, ...]) -> None:
    case = make_case(prompts=4).to(*[torch.float32] * 3)
    full = run(case)
    parameters = [
        x.clone().requires_grad_(bool(want))
        for x, want in zip(case.parameters(), wanted, strict=True)
    ]
    log_pf, _ = children.children_logprobs(case.inputs(*parameters), case.tree)
    with Calls() as calls:
        log_pf.backward(case.upstream.float())
    ((args, (d_hidden, d_weight, d_bias, rows)),) = calls.seen
    assert args[11:] == (*map(bool, wanted), False)
    assert [d_hidden.numel() > 0, d_weight.numel() > 0, d_bias.numel() > 0] == [*map(bool, wanted)]
    assert rows.numel() == 0
    for parameter, expected, want in zip(parameters, full[1:], wanted, strict=True):
        if want:
            assert torch.equal(parameter.grad, expected)
        else:
            assert parameter.grad is None


def test_the_gradient_of_the_head_is_not_copied(cpp: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large head a copy would cost more than everything else."""
    made = []
    zeros_like = children._zeros_like

    def recorded(weight: Tensor) -> Tensor:
        zeros = zeros_like(weight)
        made.append(zeros.data_ptr())
        return zeros

    monkeypatch.setattr(children, "_zeros_like", recorded)
    case = make_case(width=300, first=5000).to(*[torch.float32] * 3)
    assert case.weight.nbytes > children._LAZY_ZEROS_BYTES
    weight = case.weight.requires_grad_()
    log_pf, _ = children.children_logprobs(case.inputs(), case.tree)
    log_pf.sum().backward()
    assert made == [weight.grad.data_ptr()]
    assert not weight.grad[:5000].any()
    assert weight.grad[5000:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_kept_is_computed_again(
    cpp: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(prompts=30, branches=5, items=300, codes=12).to(dtype, dtype, dtype)
    kept = run(case)
    monkeypatch.setattr(children, "SAVED_LIMIT", 0)
    for again, expected in zip(run(case), kept, strict=True):
        assert torch.equal(again, expected)


def test_more_than_is_held_at_once_is_computed_in_turns(
    cpp: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 million products, of which 2^24 are held."""
    identifiers = torch.arange(5000)[:, None]
    case = Case(
        hidden=torch.randn(1, 4000, 1, 1),
        weight=torch.randn(5000, 1),
        bias=None,
        tokens=torch.randint(0, 5000, (1, 4000, 1)),
        mask=None,
        tree=PrefixTree.from_identifiers(identifiers),
        temperature=1.0,
        upstream=torch.randn(1, 4000, 1, dtype=torch.float64),
    )
    kept = run(case)
    monkeypatch.setattr(children, "SAVED_LIMIT", 0)
    for again, expected in zip(run(case), kept, strict=True):
        assert torch.equal(again, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False])
def test_the_number_of_threads_changes_nothing(
    cpp: None, dtype: torch.dtype, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(children, "SAVED_LIMIT", 0)
    case = make_case(prompts=40, branches=5, width=200, items=400, codes=12).to(dtype, dtype, dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(case))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ------------------------------------------------------------------ row-sparse gradient of the head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_gradient_holds_the_rows_that_competed(backend: str, dtype: torch.dtype) -> None:
    case = make_case(prompts=6, first=5).to(dtype, dtype, dtype)
    weight = case.weight.clone().requires_grad_()
    log_pf, _ = children.children_logprobs(
        case.inputs(case.hidden, weight, case.bias), case.tree, sparse_grad=True
    )
    (sparse,) = torch.autograd.grad(log_pf, weight, case.upstream.float())
    dense = run(case)[2]
    assert sparse.is_sparse
    assert sparse.is_coalesced()
    rows = sparse.indices()[0]
    assert (rows.diff() > 0).all()
    assert set(dense.abs().sum(-1).nonzero().flatten().tolist()) <= set(rows.tolist())
    assert 0 < len(rows) < len(case.weight)
    assert torch.equal(sparse.to_dense(), dense)
    assert torch.equal(run(case, sparse_grad=True)[2].to_dense(), dense)


def test_a_sparse_gradient_of_no_rows(backend: str) -> None:
    case = make_case(prompts=0).to(*[torch.float32] * 3)
    gradient = run(case, sparse_grad=True)[2]
    assert gradient.is_sparse
    assert gradient.shape == case.weight.shape
    assert gradient._nnz() == 0


@pytest.mark.parametrize("name", ["SGD", "SparseAdam"])
def test_optimisers_take_the_sparse_gradient(backend: str, name: str) -> None:
    """One step of SGD or SparseAdam equals the dense step of SGD or Adam."""
    case = make_case(prompts=6).to(*[torch.float32] * 3)

    def step(optimiser: str, sparse: bool) -> Tensor:
        weight = case.weight.clone().requires_grad_()
        make = getattr(torch.optim, optimiser)([weight], lr=0.1)
        inputs = case.inputs(case.hidden, weight)
        children.children_logprobs(inputs, case.tree, sparse_grad=sparse)[0].sum().backward()
        make.step()
        return weight.detach()

    dense = step(name.removeprefix("Sparse"), False)
    assert not torch.equal(dense, case.weight)
    torch.testing.assert_close(step(name, True), dense)


# ------------------------------------------------------------------ what PyTorch asks of an op


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_opcheck(backend: str, plain: bool, kept: bool) -> None:
    """On a complete tree, where all that is returned for the backward pass is in use."""
    identifiers = torch.cartesian_prod(*[torch.arange(3)] * 3)
    hidden = torch.randn(2, 3, 3, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    bias = None if plain else torch.randn(5, requires_grad=True)
    tokens = torch.randint(0, 3, (2, 3, 3))
    mask = None if plain else torch.ones(2, 3, 3, dtype=torch.bool)
    tree = PrefixTree.from_identifiers(identifiers)
    head = (hidden, weight, bias, tokens, mask, tree.buffer, 0.7)
    given = (*head, 3 * tokens.numel() if kept else 0, False)
    torch.library.opcheck(torch.ops.gflowgr.children_logprobs.default, given)
    saved = [x.detach() for x in torch.ops.gflowgr.children_logprobs(*given)[:3]]
    detached = [x.detach() if isinstance(x, Tensor) else x for x in head]
    for sparse in (True, False):
        torch.library.opcheck(
            torch.ops.gflowgr.children_backward.default,
            (torch.randn(tokens.shape), *detached, *saved, True, True, not plain, sparse),
        )


@pytest.mark.parametrize("graph", ["eager", "aot_eager"])
@pytest.mark.parametrize("sparse", [True, False])
def test_compiles_as_one_graph(backend: str, graph: str, sparse: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(trajectory_logprobs, fullgraph=True, backend=graph)
    for prompts in (3, 4, 5):  # the second recompiles with dynamic sizes
        case = make_head_case(prompts, 3, 4, seed=12, dtype=torch.float32)
        options: Any = {"tree": case.tree, "mask": case.mask, "sparse_grad": sparse}
        results = []
        for function in (compiled, trajectory_logprobs):
            hidden, weight = case.hidden.clone(), case.weight.clone()
            log_pf = function(
                hidden.requires_grad_(), weight.requires_grad_(), case.tokens, **options
            )
            log_pf.sum().backward()
            results.append([log_pf.detach(), hidden.grad, weight.grad.to_dense()])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_second_derivatives_are_refused(backend: str) -> None:
    case = make_case().to(*[torch.float32] * 3)
    hidden = case.hidden.requires_grad_()
    log_pf, _ = children.children_logprobs(case.inputs(), case.tree)
    (gradient,) = torch.autograd.grad(log_pf.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="children_backward has no second derivative"):
        gradient.sum().backward()


def test_activation_checkpointing(backend: str) -> None:
    case = make_case().to(*[torch.float32] * 3)
    expected = run(case)
    hidden = case.hidden.clone().requires_grad_()

    def log_pf(states: Tensor) -> Tensor:
        return children.children_logprobs(case.inputs(states, case.weight, case.bias), case.tree)[0]

    checkpoint(log_pf, hidden, use_reentrant=False).backward(case.upstream.float())
    assert torch.equal(hidden.grad, expected[1])


def test_the_graph_can_be_used_twice(backend: str) -> None:
    case = make_case().to(*[torch.float32] * 3)
    hidden = case.hidden.requires_grad_()
    log_pf, _ = children.children_logprobs(case.inputs(), case.tree)
    first, second = (
        torch.autograd.grad(log_pf.sum(), hidden, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_autocast_does_not_round_the_products(backend: str) -> None:
    case = make_case().to(*[torch.float32] * 3)
    plain = run(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(case), plain, strict=True))


def test_float64_is_left_to_the_definition(cpp: None) -> None:
    with pytest.raises(backends.BackendError, match="float64 is left to the definition"):
        run(make_case())


def test_an_empty_prefix_is_padding(backend: str) -> None:
    """A mask that is false everywhere: zeros, and gradients of zeros for what trains."""
    case = make_case().to(*[torch.float32] * 3)
    case.mask = prefix_mask(torch.zeros(3, 3), 3)
    log_pf, *grads = run(case)
    assert not log_pf.any()
    assert not any(x.any() for x in grads)
