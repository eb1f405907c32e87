"""The dense head: every backend against the float64 reference, through op and public function.

Tolerances: float32 results carry the rounding of a dot product of d terms, about sqrt(d) 2^-24 of
the largest logit, which exp() turns into a relative error of the gradients; 16-bit inputs are
multiplied exactly, but their gradients pass through probabilities and states rounded to 8 bits
(bfloat16) and are rounded once more at the end.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gflowgr
from gflowgr import backends
from gflowgr.ops import fused_flow_loss
from gflowgr.ops.logprobs import dense as dense_ops

from .cases import (
    GRADIENT_TOLERANCE,
    Case,
    assert_close,
    check,
    exact,
    joint_inputs,
    make_case,
)

KINDS = ["tb", "db", "subtb", "vargrad"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def usable_backends() -> list[str]:
    """Backends that run the dense head on the CPU here; the GPU's are tested under `-m gpu`."""
    cpu = torch.device("cpu")
    return [n for n in ("torch", "cpp") if dense_ops.PROBES[n](cpu, torch.float32) is None]


BACKENDS = usable_backends()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    width=st.integers(1, 40),
    vocabulary=st.integers(1, 150),
    seed=st.integers(0, 2**20),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference(
    backend: str,
    rows: int,
    width: int,
    vocabulary: int,
    seed: int,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    check(make_case(rows, width, vocabulary, seed, dtype=dtype, bias=bias), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [
        (1300, 16, 65),  # several blocks of rows, one row in the last tile
        (300, 2050, 130),  # more than two depths of a product
        (40, 8192, 70),
        (700, 8, 2000),
        (513, 6, 64),
        (48, 64, 500),  # fewer rows than the width: the scores lie in the gradient's memory
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_tiles_and_widths(
    backend: str, rows: int, width: int, vocabulary: int, dtype: torch.dtype
) -> None:
    check(make_case(rows, width, vocabulary, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_mixed_dtypes(backend: str, types: tuple[str, str]) -> None:
    case = make_case(90, 24, 100)
    case.hidden = case.hidden.to(getattr(torch, types[0]))
    case.weight = case.weight.to(getattr(torch, types[1]))
    check(case, backend, tolerance=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_logits_of_ten_thousand(backend: str, scale: float) -> None:
    """A logit of 1e4 is known to 1e-3 in float32; maxima move by far more than 2^60 on the way."""
    case = make_case(200, 16, 400, scale=scale)
    grad = torch.ones(200)
    expected, _, gradients = exact(case, grad)
    with gflowgr.backend(backend):
        log_pf, _, slopes = torch.ops.gflowgr.dense_logprobs(*case.arguments, True)
    assert float(expected.abs().max()) > scale
    assert_close(log_pf, expected, 1e-6)
    assert_close(slopes, gradients[0], 2e-6 * scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_logits_beyond_its_range(backend: str) -> None:
    case = make_case(30, 64, 50, dtype=torch.float16, scale=1e4)
    case.weight *= 20
    assert (case.hidden.double() @ case.weight.double().T)[case.targets >= 0].abs().max() > 7e4
    expected, _, _ = exact(case, torch.ones(30))
    with gflowgr.backend(backend):
        log_pf = torch.ops.gflowgr.dense_logprobs(*case.arguments, False)[0]
    assert_close(log_pf, expected, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_tokens(backend: str) -> None:
    """A bias of -inf: also over whole tiles, first of all, and over the whole vocabulary."""
    case = make_case(60, 8, 300, masked=False)
    assert case.bias is not None
    case.bias[:200] = -math.inf
    case.targets = case.targets % 100 + 200
    check(case, backend)
    case.targets[0] = 3
    with gflowgr.backend(backend):
        log_pf = torch.ops.gflowgr.dense_logprobs(*case.arguments, False)[0]
        case.bias[:] = -math.inf
        nothing = torch.ops.gflowgr.dense_logprobs(*case.arguments, False)[0]
    assert log_pf[0] == -math.inf
    assert log_pf[1:].isfinite().all()
    assert (nothing == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_confident_row_keeps_its_gradient(backend: str) -> None:
    """1 - p is about 1e-2 here: were p rounded to bfloat16 first, nothing would be left of it."""
    case = make_case(40, 16, 30, dtype=torch.bfloat16, bias=False, masked=False)
    own = case.weight[case.targets].float()
    case.hidden = (8 * own / own.square().sum(-1, keepdim=True)).bfloat16()
    grad = torch.ones(40)
    expected, _, gradients = exact(case, grad)
    assert 1e-4 < expected.abs().median() < 0.02
    with gflowgr.backend(backend):
        _, _, slopes = torch.ops.gflowgr.dense_logprobs(*case.arguments, True)
    error = (slopes.double() - gradients[0]).norm(dim=-1) / gradients[0].norm(dim=-1)
    assert error.max() < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nearly_certain_row_of_a_shard_keeps_its_gradient(backend: str) -> None:
    """Of log_pf, which other shards have made exact, 1 - p is taken without cancellation."""
    hidden, weight = torch.tensor([[0.5, 0.25]]), torch.tensor([[1.0, -2.0]])
    log_pf = torch.tensor([-1e-9])
    with gflowgr.backend(backend):
        d_hidden, d_weight, _ = torch.ops.gflowgr.dense_backward(
            torch.ones(1), hidden, weight, None, torch.zeros(1).long(), log_pf, torch.zeros(1), 1.0,
            True, True, False,
        )  # fmt: skip
    torch.testing.assert_close(d_hidden, 1e-9 * weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(d_weight, 1e-9 * hidden, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["state", "a row of the head", "a bias"])
def test_a_nan_at_a_valid_position_reaches_the_result(backend: str, what: str) -> None:
    """Also where it is not the target's: otherwise a model that broke would look fine."""
    case = make_case(20, 8, 90, masked=False)
    assert case.bias is not None
    case.targets = case.targets % 64
    if what == "state":
        case.hidden[3] = math.nan
    else:
        (case.weight if what == "a row of the head" else case.bias)[80] = math.nan
    with gflowgr.backend(backend):
        log_pf, lse, _ = torch.ops.gflowgr.dense_logprobs(*case.arguments, False)
    broken = torch.arange(20) == 3 if what == "state" else torch.ones(20, dtype=torch.bool)
    assert torch.equal(log_pf.isnan(), broken)
    assert torch.equal(lse.isnan(), broken)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_elsewhere(backend: str) -> None:
    """The target V: the row counts, its token is in another shard."""
    case = make_case(50, 12, 40, masked=False)
    case.targets[::2] = 40
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", [41, 2**62])
def test_no_token_at_all(backend: str, target: int) -> None:
    """A target beyond V: all of its row is NaN, and what it adds to; the other rows are not."""
    case = make_case(5, 12, 40, masked=False)
    case.targets[2] = target
    with gflowgr.backend(backend):
        log_pf, lse, slopes = torch.ops.gflowgr.dense_logprobs(*case.arguments, True)
        d_hidden, d_weight, d_bias = torch.ops.gflowgr.dense_backward(
            torch.ones(5), *case.arguments[:4], log_pf, lse, case.temperature, True, True, True
        )
    assert log_pf.isnan().nonzero().tolist() == [[2]]
    for gradient in (slopes, d_hidden):
        assert gradient.isnan().all(1).nonzero().tolist() == [[2]]
        assert gradient.isnan().any(1).sum() == 1
    assert d_weight.isnan().all()
    assert d_bias.isnan().all()


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend: str, needs: tuple[bool, bool, bool]) -> None:
    case = make_case(80, 10, 90)
    grad = torch.randn(80)
    _, _, gradients = exact(case, grad)
    with gflowgr.backend(backend):
        log_pf, lse, slopes = torch.ops.gflowgr.dense_logprobs(*case.arguments, False)
        found = torch.ops.gflowgr.dense_backward(
            grad, *case.arguments[:4], log_pf, lse, case.temperature, *needs
        )
    assert slopes.numel() == 0
    for actual, wanted, need in zip(found, gradients, needs, strict=True):
        assert (actual.numel() > 0) == need
        if need:
            assert_close(actual, wanted, 2e-5)


# ------------------------------------------------------------------ the joint losses


@pytest.mark.parametrize("reduction", ["prompt", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_joint_losses(backend: str, kind: str, dtype: torch.dtype, reduction: str) -> None:
    """Loss, log-probabilities and all gradients, for an upstream gradient that is not 1."""
    inputs, keywords = joint_inputs(kind, dtype, seed=3)
    options = {"reduction": reduction, "nll_weight": 0.7, "beta": 0.5, "temperature": 1.3}
    options |= {"log_reward_floor": -10.0, "residual_clip": None if kind == "subtb" else 1.0}
    results = []
    for exactly in (True, False):
        leaves = {
            k: (x.double() if exactly else x.clone()).requires_grad_() for k, x in inputs.items()
        }
        with gflowgr.backend("torch" if exactly else backend):
            given = {k: x for k, x in leaves.items() if k not in ("log_z", "log_flow")}
            balance = leaves.get("log_z", leaves.get("log_flow"))
            loss, log_pf = fused_flow_loss(kind, **given, balance=balance, **keywords, **options)
            (-2.5 * loss).backward()
        results.append([loss.detach(), log_pf, *(x.grad for x in leaves.values())])
    bound = GRADIENT_TOLERANCE[dtype]
    for wanted, actual in zip(*results, strict=True):
        assert_close(actual, wanted, bound if actual.dim() else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_joint_loss_over_many_blocks_of_ragged_prompts(backend: str) -> None:
    inputs, keywords = joint_inputs("vargrad", torch.float32, seed=5, prompts=400)
    keywords["mask"][40:200] = False  # whole blocks without a valid row
    results = []
    for exactly in (True, False):
        leaves = {
            k: (x.double() if exactly else x.clone()).requires_grad_() for k, x in inputs.items()
        }
        with gflowgr.backend("torch" if exactly else backend):
            gflowgr.fused_vargrad_loss(**leaves, **keywords).backward()
        results.append([x.grad for x in leaves.values()])
    for wanted, actual in zip(*results, strict=True):
        assert_close(actual, wanted, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_pass_adds_the_same(backend: str) -> None:
    inputs, keywords = joint_inputs("tb", torch.float32, seed=6)
    leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}
    with gflowgr.backend(backend):
        loss = gflowgr.fused_tb_loss(**leaves, **keywords)
        loss.backward(retain_graph=True)
        once = {k: x.grad.clone() for k, x in leaves.items() if x.grad is not None}
        loss.backward()
    assert len(once) == len(leaves)
    for key, gradient in once.items():
        torch.testing.assert_close(leaves[key].grad, 2 * gradient)


def test_results_do_not_depend_on_the_number_of_threads_beyond_rounding() -> None:
    if "cpp" not in BACKENDS:
        pytest.skip(f"cpp: {dense_ops.probe_cpp(torch.device('cpu'), torch.float32)}")
    case = make_case(700, 16, 500)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with gflowgr.backend("cpp"):
                twice = [torch.ops.gflowgr.dense_logprobs(*case.arguments, True) for _ in range(2)]
            assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
            results.append(twice[0])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


# ------------------------------------------------------------------ registration


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    case = make_case(12, 6, 9)
    grad = torch.randn(12)
    leaves = [x.nan_to_num().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    case.targets.clamp_(min=0)
    inputs, keywords = joint_inputs("tb", torch.float32, seed=8, prompts=2)
    joint = {k: x.nan_to_num().requires_grad_() for k, x in inputs.items()}
    targets = keywords["tokens"].masked_fill(~keywords["mask"], -1)
    with gflowgr.backend(backend):
        for jacobian in (False, True):
            torch.library.opcheck(
                torch.ops.gflowgr.dense_logprobs, (*leaves, case.targets, 0.7, jacobian)
            )
        log_pf, lse, _ = torch.ops.gflowgr.dense_logprobs(*leaves, case.targets, 0.7, False)
        torch.library.opcheck(
            torch.ops.gflowgr.dense_backward,
            (grad, *leaves, case.targets, log_pf, lse, 0.7, True, True, True),
            test_utils=("test_schema", "test_faketensor"),
        )
        torch.library.opcheck(
            torch.ops.gflowgr.dense_flow_loss,
            (
                *(joint["hidden"], joint["weight"], joint["bias"], targets, 0.7),
                *(joint["log_reward"], joint["log_z"], "tb", 1.0, 1.0, None, "prompt", 0.5, 3.0),
                *[True] * 5,
            ),
        )


@pytest.mark.parametrize("kind", ["logprobs", "loss"])
def test_second_derivatives_are_refused(kind: str) -> None:
    inputs, keywords = joint_inputs("tb", torch.float32, seed=9)
    leaves = {k: x.nan_to_num().requires_grad_() for k, x in inputs.items()}
    if kind == "loss":
        value = gflowgr.fused_tb_loss(**leaves, **keywords)
    else:
        arguments = (leaves["hidden"], leaves["weight"])
        value = gflowgr.trajectory_logprobs(*arguments, **keywords).square().sum()
    (slope,) = torch.autograd.grad(value, leaves["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        slope.square().sum().backward()


def test_non_contiguous_inputs() -> None:
    hidden = torch.randn(4, 3, 2, 10).permute(0, 2, 1, 3).requires_grad_()
    weight = torch.randn(10, 20).T.requires_grad_()
    tokens = torch.randint(0, 20, (4, 3, 2)).transpose(1, 2)
    assert not any(x.is_contiguous() for x in (hidden, weight, tokens))
    expected = gflowgr.trajectory_logprobs(hidden.double(), weight.double(), tokens)
    actual = gflowgr.trajectory_logprobs(hidden, weight, tokens)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)
    (wanted,) = torch.autograd.grad(expected.square().sum(), hidden)
    (found,) = torch.autograd.grad(actual.square().sum(), hidden)
    assert_close(found, wanted.double(), 2e-5)


def test_why_a_backend_cannot_run_is_said() -> None:
    with gflowgr.backend("cpp"), pytest.raises(backends.BackendError, match="float64"):
        gflowgr.trajectory_logprobs(
            torch.randn(1, 1, 1, 2, dtype=torch.float64),
            torch.randn(3, 2, dtype=torch.float64),
            torch.zeros(1, 1, 1, dtype=torch.long),
        )


def test_under_activation_checkpointing() -> None:
    inputs, keywords = joint_inputs("tb", torch.float32, seed=10)
    results = []
    for wrapped in (False, True):
        leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}

        def run(given: dict[str, Tensor] = leaves) -> Tensor:
            return gflowgr.fused_tb_loss(**given, **keywords, nll_weight=1.0)

        loss = checkpoint(run, use_reentrant=False) if wrapped else run()
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves.values())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_more_than_two_to_the_31_logits() -> None:
    """The last rows and the last tokens come out as if they were alone."""
    if "cpp" not in BACKENDS:
        pytest.skip(f"cpp: {dense_ops.probe_cpp(torch.device('cpu'), torch.float32)}")
    rows, size = 66_000, 33_000
    assert rows * size > 2**31
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 2, generator=g)
    weight = torch.randn(size, 2, generator=g)
    targets = torch.randint(0, size, (rows,), generator=g)
    last = slice(rows - 64, rows)
    targets[last] = torch.arange(size - 64, size)
    grad = (torch.arange(rows) >= last.start).float()
    with gflowgr.backend("cpp"):
        log_pf, lse, _ = torch.ops.gflowgr.dense_logprobs(hidden, weight, None, targets, 1.0, False)
        d_hidden, d_weight, _ = torch.ops.gflowgr.dense_backward(
            grad, hidden, weight, None, targets, log_pf, lse, 1.0, True, True, False
        )
    alone = Case(hidden[last], weight, None, targets[last], 1.0)
    expected, _, gradients = exact(alone, torch.ones(64))
    assert_close(log_pf[last], expected, 1e-5)
    assert_close(d_hidden[last], gradients[0], 2e-5)
    assert_close(d_weight, gradients[1], 2e-5)
    assert not d_hidden[: last.start].any()
