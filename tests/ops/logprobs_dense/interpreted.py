"""The Triton kernels of the dense head under Triton's interpreter (see test_interpreted.py).

Against the reference in float64 on the same inputs. Tolerances: float32 sums of a few hundred
products of order 1 are good to 1e-5. 16-bit inputs have the same logits, being exact in float32;
but scores and scaled states are cut to 8 bits (a GPU rounds, the interpreter truncates: 2^-7 at
most, 2^-8 on average) and results rounded: 2^-6 in norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from gflowgr.kernels.logprobs_dense import calls as head
from gflowgr.kernels.logprobs_dense import launch as dense_launch

from . import cases
from .cases import Case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
make_case = partial(cases.make_case, scale=2.0)
# Rows, width, vocabulary and dtype: every shape in float32, larger and smaller ones in 16 bits.
CASES = [
    ((1, 1, 1), torch.float32),
    ((1, 8, 5), torch.float32),
    ((40, 33, 100), torch.float32),
    ((17, 300, 31), torch.float32),
    ((33, 16, 65), torch.float32),
    ((1, 8, 5), torch.float16),
    ((40, 33, 100), torch.bfloat16),
    ((33, 16, 65), torch.float16),
]


@dataclass
class Expected:
    """The reference in float64, with hidden, weight and bias to differentiate by."""

    log_pf: Tensor
    lse: Tensor
    leaves: tuple[Tensor, ...]

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((self.log_pf * grad.double()).sum(), self.leaves)


def define(case: Case) -> Expected:
    live = case.targets >= 0
    hidden = case.hidden.double().masked_fill(~live[:, None], 0.0).requires_grad_()
    weight = case.weight.double().requires_grad_()
    vocabulary = weight.shape[0]
    bias = torch.zeros(vocabulary) if case.bias is None else case.bias
    bias = bias.double().requires_grad_()
    logits = (hidden @ weight.T + bias) / case.temperature
    lse = logits.logsumexp(-1)
    here = live & (case.targets < vocabulary)
    picked = logits.gather(1, case.targets.clamp(0, vocabulary - 1)[:, None])[:, 0]
    log_pf = torch.where(here, picked, 0.0) - lse
    return Expected(log_pf * live, (lse * live).detach(), (hidden, weight, bias))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    error = (actual.double() - expected).norm()
    limit = 2e-5 if dtype == torch.float32 else 2**-6
    assert error <= limit * max(0.1, float(expected.norm())), (error, expected.norm())


def random_grad(case: Case, seed: int = 1) -> Tensor:
    """Of log_pf; anything at all under the mask."""
    grad = torch.randn(len(case.targets), generator=torch.Generator().manual_seed(seed))
    return grad.masked_fill(case.targets < 0, torch.nan)


def clean(grad: Tensor) -> Tensor:
    return grad.nan_to_num(0.0)


def backward(case: Case, grad: Tensor, *need: bool) -> tuple[Tensor, Tensor, Tensor]:
    log_pf, lse, _ = head.dense_logprobs(*case.arguments, False)
    return head.dense_backward(grad, *case.arguments[:4], log_pf, lse, case.temperature, *need)


def joint(case: Case, grad: Tensor, *need: bool) -> tuple[Tensor, ...]:
    return head.dense_fused(
        *case.arguments, 1, lambda first, log_pf: grad[first : first + len(log_pf)], *need
    )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows or columns to a block."""
    monkeypatch.setattr(dense_launch, "block_bytes", lambda device: 1)
    monkeypatch.setattr(dense_launch, "STATISTICS_BYTES", 1)
    monkeypatch.setattr(dense_launch, "MIN_ROWS", 8)
    monkeypatch.setattr(dense_launch, "MIN_COLUMNS", 16)


@pytest.fixture
def redone(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every block that was scored: whether its first reference would not do."""
    seen: list[bool] = []
    launch = dense_launch._launch_tiles

    def spy(*args: object, **kwargs: object) -> None:
        if isinstance(kwargs.get("redo"), Tensor):
            seen.append(bool(kwargs["redo"]))
        launch(*args, **kwargs)

    monkeypatch.setattr(dense_launch, "_launch_tiles", spy)
    return seen


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_logprobs(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = make_case(*shape, dtype=dtype)
    expected = define(case)
    for jacobian in (False, True):
        log_pf, lse, derivative = head.dense_logprobs(*case.arguments, jacobian)
        assert log_pf.dtype == lse.dtype == derivative.dtype == torch.float32
        assert_close(log_pf, expected.log_pf.detach())
        assert_close(lse, expected.lse)
        assert (log_pf <= 0).all()
        assert (log_pf[case.targets < 0] == 0).all()
        assert (lse[case.targets < 0] == 0).all()
    assert_close(derivative, expected.gradients(torch.ones(shape[0]))[0], dtype)
    assert (derivative[case.targets < 0] == 0).all()


@pytest.mark.parametrize("run", [backward, joint])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_gradients(shape: tuple[int, int, int], dtype: torch.dtype, run) -> None:
    case = make_case(*shape, dtype=dtype)
    grad = random_grad(case)
    expected = define(case)
    *log_pf, d_hidden, d_weight, d_bias = run(case, grad, True, True, True)
    for actual, wanted in zip(
        (d_hidden, d_weight, d_bias), expected.gradients(clean(grad)), strict=True
    ):
        assert actual.dtype == dtype
        assert_close(actual, wanted, dtype)
    assert (d_hidden[case.targets < 0] == 0).all()
    if log_pf:
        assert_close(log_pf[0], expected.log_pf.detach())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "by_columns"), [((20, 3, 40), False), ((20, 4, 260), True)], ids=["rows", "columns"]
)
def test_several_blocks(
    shape: tuple[int, int, int], by_columns: bool, dtype: torch.dtype, monkeypatch
) -> None:
    sizes: list[tuple[int, ...]] = []
    gradient = dense_launch.gradient

    def spy(block: dense_launch.DenseCall, out: Tensor, *rest: Tensor) -> None:
        sizes.append(tuple(out.shape))
        gradient(block, out, *rest)

    monkeypatch.setattr(dense_launch, "gradient", spy)
    case = make_case(*shape, dtype=dtype)
    grad = random_grad(case)
    expected = define(case).gradients(clean(grad))
    for run in (backward, joint):
        results = run(case, grad, True, True, True)[-3:]
        for actual, wanted in zip(results, expected, strict=True):
            assert_close(actual, wanted, dtype)
    assert len(sizes) > 2
    assert all((rows == shape[0]) == by_columns for rows, _ in sizes)
    _, lse, derivative = head.dense_logprobs(*case.arguments, True)
    assert_close(lse, define(case).lse)
    assert_close(derivative, define(case).gradients(torch.ones(shape[0]))[0], dtype)


@pytest.mark.parametrize("run", [backward, joint])
@pytest.mark.parametrize("need", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_no_work_for_a_gradient_that_is_not_needed(need, run, monkeypatch) -> None:
    products: list[torch.Size] = []
    product = dense_launch.product

    def spy(a: Tensor, b: Tensor, out: Tensor, **options: bool) -> None:
        products.append(out.shape)
        product(a, b, out, **options)

    monkeypatch.setattr(dense_launch, "product", spy)
    case = make_case(12, 9, 40)
    grad = random_grad(case)
    results = run(case, grad, *map(bool, need))[-3:]
    assert len(products) == sum(need)
    for actual, wanted, needed in zip(
        results, define(case).gradients(clean(grad)), need, strict=True
    ):
        if needed:
            assert_close(actual, wanted)
        else:
            assert actual.shape == (0,)


def test_vocabulary_shards() -> None:
    """Two halves of the vocabulary: log-sum-exps and target logits combine, and so do gradients."""
    case = make_case(20, 7, 90)
    grad = random_grad(case)
    expected = define(case)
    gradients = expected.gradients(clean(grad))
    cut, shards = 50, []
    for first, last in ((0, cut), (cut, 90)):
        local = case.targets - first
        size = last - first
        local = torch.where((local < 0) | (local >= size), size, local)  # elsewhere
        local = torch.where(case.targets < 0, -1, local)
        shards.append(
            replace(case, weight=case.weight[first:last], bias=case.bias[first:last], targets=local)
        )
    parts = [head.dense_logprobs(*shard.arguments, False)[:2] for shard in shards]
    for shard, (log_pf, lse) in zip(shards, parts, strict=True):
        away = (shard.targets >= shard.weight.shape[0]) & (case.targets >= 0)
        assert away.any()
        assert torch.equal(log_pf[away], -lse[away])
    lse = torch.logaddexp(parts[0][1], parts[1][1]) * (case.targets >= 0)
    assert_close(lse, expected.lse)
    picked = sum(
        (log_pf + lse) * (s.targets < s.weight.shape[0])
        for s, (log_pf, lse) in zip(shards, parts, strict=True)
    )
    log_pf = (picked - lse) * (case.targets >= 0)
    assert_close(log_pf, expected.log_pf.detach())
    d_hidden = torch.zeros_like(case.hidden)
    for shard, (first, last) in zip(shards, ((0, cut), (cut, 90)), strict=True):
        here, d_weight, d_bias = head.dense_backward(
            grad, *shard.arguments[:4], log_pf, lse, case.temperature, True, True, True
        )
        d_hidden += here
        assert_close(d_weight, gradients[1][first:last])
        assert_close(d_bias, gradients[2][first:last])
    assert_close(d_hidden, gradients[0])


@pytest.mark.parametrize("run", [backward, joint])
def test_forbidden_tokens(run) -> None:
    """A bias of -inf: probability 0, no gradient. All tokens of a tile, and of the sample, too."""
    case = make_case(21, 6, 96)
    case.bias[::3] = -math.inf  # what `_reference` samples, of 96
    case.bias[32:64] = -math.inf
    allowed = case.bias.isfinite().nonzero()[:, 0]
    case.targets = torch.where(case.targets < 0, -1, allowed[case.targets % len(allowed)])
    grad = random_grad(case)
    results = run(case, grad, True, True, True)[-3:]
    for actual, wanted in zip(results, define(case).gradients(clean(grad)), strict=True):
        assert_close(actual, wanted)
    assert (results[1][~case.bias.isfinite()] == 0).all()
    log_pf = head.dense_logprobs(*case.arguments, False)[0]
    assert_close(log_pf, define(case).log_pf.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("peak", [0, 1], ids=["sampled", "missed"])
def test_extreme_logits(peak: int, dtype: torch.dtype, redone: list[bool]) -> None:
    """+-1e4, exact in 16 bits: log_pf is a difference of them and keeps its digits."""
    weight = torch.full((96, 1), -100.0)
    weight[peak :: 3 * 8] = 100.0  # 3 columns apart are sampled: 0, 3, 6, ...
    targets = torch.tensor([peak, 5, peak, -1, peak + 24])
    hidden = torch.tensor([[100.0], [100.0], [-100.0], [math.nan], [0.25]])
    case = Case(hidden.to(dtype), weight.to(dtype), None, targets, 1.0)
    expected = define(case)
    grad = torch.tensor([1.0, -2.0, 0.5, math.nan, 3.0])
    log_pf, d_hidden, d_weight, _ = joint(case, grad, True, True, False)
    torch.testing.assert_close(log_pf.double(), expected.log_pf.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        head.dense_logprobs(*case.arguments, False)[0], log_pf, rtol=1e-6, atol=1e-6
    )
    wanted = expected.gradients(clean(grad))
    assert_close(d_hidden, wanted[0], dtype)
    assert_close(d_weight, wanted[1], dtype)
    # With a peak that was not sampled the scores overflow at first, and are done again.
    assert redone == [peak == 1]
    # dense_backward is given the log-sum-exp as a float32: a unit of 2^-10 at 1e4.
    limit = 2**-10 if dtype == torch.float32 else 2**-6
    for actual, value in zip(backward(case, grad, True, True, False)[:2], wanted[:2], strict=True):
        assert (actual - value).norm() <= limit * value.norm()


def test_usual_logits_are_scored_once(redone: list[bool]) -> None:
    joint(make_case(40, 33, 100), random_grad(make_case(40, 33, 100)), True, True, True)
    assert redone == [False]


@pytest.mark.parametrize("run", [backward, joint])
def test_confident_rows_keep_their_gradient(run) -> None:
    """At p = 1 - 2e-4, 1 - p rounded from a 16-bit p would be 0 or 2^-8."""
    weight = torch.zeros(40, 1)
    weight[7] = 12.0
    case = Case(torch.ones(1, 1).bfloat16(), weight.bfloat16(), None, torch.tensor([7]), 1.0)
    expected = define(case)
    assert -3e-4 < expected.log_pf < -1e-4
    wanted = expected.gradients(torch.ones(1))
    d_hidden, d_weight, _ = run(case, torch.ones(1), True, True, False)[-3:]
    torch.testing.assert_close(d_hidden.double(), wanted[0], rtol=2**-6, atol=0.0)
    torch.testing.assert_close(d_weight.double(), wanted[1], rtol=2**-6, atol=0.0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joint_loss_over_whole_prompts(dtype: torch.dtype) -> None:
    """The variance over each prompt's trajectories, whose gradient needs all of its rows."""
    prompts, branches, steps = 7, 3, 4
    case = make_case(prompts * branches * steps, 4, 70, dtype=dtype)
    reward = torch.randn(prompts, branches, generator=torch.Generator().manual_seed(5))
    blocks: list[tuple[int, int]] = []

    def upstream(first: int, log_pf: Tensor) -> Tensor:
        blocks.append((first, len(log_pf)))
        begin = first // (branches * steps)
        totals = log_pf.view(-1, branches, steps).sum(-1)
        residual = totals - reward[begin : begin + len(totals)]
        centred = 2 * (residual - residual.mean(1, keepdim=True))
        return centred[..., None].expand(-1, -1, steps).reshape(-1)

    results = head.dense_fused(*case.arguments, branches * steps, upstream, True, True, True)
    expected = define(case)
    residual = expected.log_pf.view(prompts, branches, steps).sum(-1) - reward
    loss = (residual - residual.mean(1, keepdim=True)).square().sum()
    wanted = torch.autograd.grad(loss, expected.leaves)
    assert_close(results[0], expected.log_pf.detach())
    for actual, value in zip(results[1:], wanted, strict=True):
        assert_close(actual, value, dtype)
    assert len(blocks) > 1
    assert sum(size for _, size in blocks) == len(case.targets)
    assert all(first % 12 == size % 12 == 0 for first, size in blocks)


def test_mixed_dtypes_and_strides() -> None:
    case = make_case(14, 12, 40)
    strided = replace(
        case,
        hidden=torch.stack([case.hidden, case.hidden], 1).flatten(1)[:, :12],
        weight=case.weight.bfloat16().T.contiguous().T,
        bias=torch.stack([case.bias, case.bias], 1)[:, 0],
        targets=torch.stack([case.targets, case.targets], 1)[:, 0],
    )
    assert not any(t.is_contiguous() for t in (strided.hidden, strided.weight, strided.bias))
    grad = random_grad(strided)
    wanted = define(strided).gradients(clean(grad))
    for run in (backward, joint):
        d_hidden, d_weight, d_bias = run(strided, grad, True, True, True)[-3:]
        assert (d_hidden.dtype, d_weight.dtype) == (torch.float32, torch.bfloat16)
        assert_close(d_hidden, wanted[0])
        assert_close(d_weight, wanted[1], torch.bfloat16)
        assert_close(d_bias, wanted[2])


def test_repeats_its_bits_and_ignores_autocast() -> None:
    case = make_case(40, 33, 100)
    grad = random_grad(case)
    first = joint(case, grad, True, True, True)
    with torch.autocast("cpu", torch.bfloat16):
        second = joint(case, grad, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows() -> None:
    case = make_case(0, 5, 11)
    assert [t.shape for t in head.dense_logprobs(*case.arguments, True)] == [(0,), (0,), (0, 5)]
    for run in (backward, joint):
        d_hidden, d_weight, d_bias = run(case, torch.empty(0), True, True, True)[-3:]
        assert d_hidden.shape == (0, 5)
        assert (d_weight == 0).all()
        assert d_weight.shape == (11, 5)
        assert (d_bias == 0).all()


def test_refusals() -> None:
    case = make_case(3, 2, 4, bias=False)
    with pytest.raises(ValueError, match="need_bias = True, but bias = None"):
        joint(case, torch.ones(3), True, True, True)
    wide = replace(case, hidden=case.hidden.double(), weight=case.weight.double())
    with pytest.raises(TypeError, match="float64"):
        head.dense_logprobs(*wide.arguments, False)


def test_a_target_beyond_the_vocabulary_is_no_token() -> None:
    """V is another shard's; whatever is larger makes all of its row NaN, and no other row."""
    case = make_case(7, 8, 5)
    case.targets[:2] = torch.tensor([5, 6])
    needs = (True, True, True)
    log_pf, lse, _ = head.dense_logprobs(*case.arguments, False)
    torch.testing.assert_close(log_pf[0], -lse[0])
    assert log_pf.isnan().nonzero().tolist() == [[1]]
    gradients = head.dense_backward(torch.ones(7), *case.arguments[:4], log_pf, lse, 0.7, *needs)
    _, _, jacobian = head.dense_logprobs(*case.arguments, True)
    for d_hidden in (gradients[0], jacobian):
        assert d_hidden.isnan().any(1).nonzero().tolist() == [[1]]
    assert gradients[1].isnan().all()
    assert gradients[2].isnan().all()
