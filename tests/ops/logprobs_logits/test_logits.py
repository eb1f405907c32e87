"""Log-probabilities from logits: every backend, extremes, padding, gradients in place."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gflowgr
from gflowgr import backends, logprobs_from_logits

RUNS = [("torch", "cpu"), ("cpp", "cpu"), ("torch", "cuda")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Of the gradient's largest entry: float32 sums of thousands of terms, or half a place of 16 bits.
GRADIENT_RTOL = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(params=RUNS, ids="-".join)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, with the device that it runs on; skipped with its own reason."""
    name, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    reason = backends.available_backends(device)["logits_logprobs"][name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    with gflowgr.backend(name):
        yield device


def oracle(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def assert_value_and_gradient(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, *, rtol: float = 1e-6
) -> None:
    """Against float64, under a random gradient of the result."""
    exact = logits.detach().cpu().double().requires_grad_()
    expected = oracle(exact, tokens.cpu(), temperature)
    upstream = torch.rand(expected.shape)
    expected.backward(upstream.double())
    leaf = logits.detach().requires_grad_()
    actual = logprobs_from_logits(leaf, tokens, temperature=temperature)
    actual.backward(upstream.to(actual.device))
    assert actual.dtype == torch.float32
    # An exponential or logarithm of float32 is off by about 1e-7, a logit's difference by as much.
    scale = expected.detach().abs().max().item()
    torch.testing.assert_close(
        actual.detach().cpu().double(), expected.detach(), rtol=rtol, atol=rtol * max(1.0, scale)
    )
    assert leaf.grad.dtype == logits.dtype
    # A row that is all but certain has a gradient of exponentials that are all but 0 or 1.
    tolerance = GRADIENT_RTOL[logits.dtype] * exact.grad.abs().max().item() + 1e-7
    torch.testing.assert_close(leaf.grad.cpu().double(), exact.grad, rtol=0, atol=tolerance)


# ------------------------------------------------------------------ values and gradients


def test_a_nearly_certain_token_keeps_its_gradient(device: str) -> None:
    """1 - p = 1e-9 is taken from the saved sum without cancellation."""
    logits, saved = torch.zeros(1, 1, device=device), torch.zeros(1, device=device)
    gradient = torch.ops.gflowgr.logits_backward(
        saved + 1, logits, saved.long(), saved, saved + 1e-9, 1.0
    )
    torch.testing.assert_close(gradient.item(), 1e-9, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 70)),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.3, 5.0]),
    seed=st.integers(0, 2**20),
)
def test_equals_log_softmax(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    scale: float,
    temperature: float,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(shape, generator=g)).to(device, dtype)
    tokens = torch.randint(0, shape[-1], shape[:-1], generator=g).to(device)
    assert_value_and_gradient(logits, tokens, temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [2047, 2048, 2049, 4097, 33024])
def test_vocabularies_around_and_above_a_block(
    device: str, vocab_size: int, dtype: torch.dtype
) -> None:
    """The largest logit in the first, a middle and the last block; the token at either end."""
    logits = torch.randn(1, 3, 2, vocab_size, generator=torch.Generator().manual_seed(1))
    for row, place in enumerate((0, vocab_size // 2, vocab_size - 1)):
        logits[0, row, :, place] = 20.0
    tokens = torch.tensor([[[0, vocab_size - 1]] * 3], device=device)
    assert_value_and_gradient(logits.to(device, dtype), tokens)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_maximum_that_rises_from_block_to_block(device: str, temperature: float) -> None:
    """What the earlier blocks summed counts, taken down by the tempered rise."""
    logits = torch.linspace(0, 3, 6200, device=device).expand(1, 1, 2, 6200).contiguous()
    tokens = torch.tensor([[[0, 6199]]], device=device)
    assert_value_and_gradient(logits, tokens, temperature)


def test_gradcheck() -> None:
    """float64 runs on the reference."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 2, 3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 5, (2, 2, 3), generator=g)
    mask = torch.tensor([True, True, False]).expand(2, 2, 3)
    assert torch.autograd.gradcheck(
        lambda x: logprobs_from_logits(x, tokens, mask=mask, temperature=0.7), logits
    )


@pytest.mark.parametrize("magnitude", [1e4, 1e30])
def test_huge_logits_in_float32(device: str, magnitude: float) -> None:
    """Differences of 1 between logits of 1e4 count in full: the maximum is taken off first."""
    g = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (2, 2, 2, 37), generator=g) * 2.0 - 1
    logits = magnitude * signs + torch.randn(2, 2, 2, 37, generator=g).round()
    tokens = torch.randint(0, 37, (2, 2, 2), generator=g)
    assert_value_and_gradient(logits.to(device), tokens.to(device))


def test_the_whole_range_of_float16(device: str) -> None:
    """65504 and -65504 in one row, the smallest subnormal number in another."""
    logits = torch.zeros(1, 1, 3, 20, dtype=torch.float16)
    logits[0, 0, 0, :2] = torch.tensor([65504.0, -65504.0])
    logits[0, 0, 1, :2] = torch.tensor([65504.0, 65472.0])
    logits[0, 0, 2, :2] = torch.tensor([2.0**-24, -(2.0**-24)])
    assert_value_and_gradient(logits.to(device), torch.ones(1, 1, 3, dtype=torch.long).to(device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_forbidden_tokens(device: str, dtype: torch.dtype) -> None:
    """-inf logits take no probability and no gradient; as the token itself the result is -inf."""
    logits = torch.randn(1, 1, 3, 40, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    logits[..., 10:30] = -math.inf
    logits[0, 0, 2] = -math.inf
    logits.requires_grad_()
    tokens = torch.tensor([[[3, 15, 3]]], device=device)
    log_pf = logprobs_from_logits(logits, tokens)
    kept = torch.cat([logits[..., :10], logits[..., 30:]], -1).detach().double()
    assert log_pf[0, 0, 0].item() == pytest.approx(oracle(kept, tokens)[0, 0, 0].item(), rel=1e-6)
    assert log_pf[0, 0, 1:].tolist() == [-math.inf, -math.inf]
    log_pf[0, 0, 0].backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[..., 10:30] == 0).all()
    assert (logits.grad[0, 0, 1:] == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("inplace", [False, True])
def test_masked_rows_may_hold_anything(device: str, inplace: bool, poison: float) -> None:
    g = torch.Generator().manual_seed(5)
    leaf = torch.randn(2, 3, 4, 21, generator=g).to(device)
    mask = (torch.arange(4) < torch.randint(0, 5, (2, 3, 1), generator=g)).to(device)
    tokens = torch.randint(0, 21, (2, 3, 4), generator=g).to(device).masked_fill(~mask, -7)
    found = []
    for fill in (0.0, poison):
        x = leaf.masked_fill(~mask[..., None], fill).requires_grad_()
        log_pf = logprobs_from_logits(x.clone(), tokens, mask=mask, inplace_backward=inplace)
        log_pf.sum().backward()
        assert (log_pf[~mask] == 0).all()
        assert (x.grad[~mask] == 0).all()
        found.append((log_pf.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_nan_in_a_valid_row_is_not_hidden(device: str) -> None:
    for place in (0, 5, 39):
        logits = torch.zeros(1, 1, 1, 40, device=device)
        logits[..., place] = math.nan
        assert logprobs_from_logits(
            logits, torch.ones(1, 1, 1, dtype=torch.long, device=device)
        ).isnan()


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 0, 3, 5), (2, 3, 0, 5), (1, 1, 1, 1)])
def test_empty_and_one_element_inputs(device: str, shape: tuple[int, int, int, int]) -> None:
    logits = torch.ones(shape, device=device, requires_grad=True)
    tokens = torch.zeros(shape[:3], dtype=torch.long, device=device)
    log_pf = logprobs_from_logits(logits, tokens)
    assert log_pf.shape == shape[:3]
    log_pf.sum().backward()
    assert log_pf.sum() == 0
    assert (logits.grad == 0).all()


def test_inputs_need_not_be_contiguous(device: str) -> None:
    """Such as the shifted logits of a causal model."""
    g = torch.Generator().manual_seed(6)
    logits = torch.randn(2, 3, 5, 9, generator=g).to(device)[:, :, :-1]
    tokens = torch.randint(0, 9, (2, 4, 3), generator=g).to(device).transpose(1, 2)
    assert not logits.is_contiguous()
    assert_value_and_gradient(logits, tokens)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_tokens_of_any_integer_type(device: str, dtype: torch.dtype) -> None:
    logits = torch.randn(1, 2, 3, 9, device=device)
    tokens = torch.randint(0, 9, (1, 2, 3), device=device)
    expected = logprobs_from_logits(logits, tokens)
    assert torch.equal(logprobs_from_logits(logits, tokens.to(dtype)), expected)


# ------------------------------------------------------------------ in place


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_takes_the_memory_of_the_logits(device: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(7)
    leaf = torch.randn(2, 3, 4, 100, generator=g).to(device, dtype).requires_grad_()
    tokens = torch.randint(0, 100, (2, 3, 4), generator=g).to(device)
    (expected,) = torch.autograd.grad(logprobs_from_logits(leaf, tokens).sum(), leaf)
    logits = leaf.clone()
    places: list[int] = []
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    logprobs_from_logits(logits, tokens, inplace_backward=True).sum().backward()
    assert torch.equal(leaf.grad, expected)
    assert places == [logits.data_ptr()]
    assert torch.equal(logits.detach(), expected)


def test_in_place_is_refused_where_it_would_be_wrong(device: str) -> None:
    tokens = torch.zeros(1, 2, 3, dtype=torch.long, device=device)
    leaf = torch.randn(1, 2, 3, 5, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="inplace_backward: logits are a leaf that requires"):
        logprobs_from_logits(leaf, tokens, inplace_backward=True)
    with pytest.raises(ValueError, match="inplace_backward: logits must be contiguous"):
        logprobs_from_logits(2 * leaf.transpose(1, 2), tokens.mT, inplace_backward=True)


def test_autograd_notices_logits_that_are_needed_again(device: str) -> None:
    """By the operation that made them, and by a second backward pass."""
    tokens = torch.zeros(1, 2, 3, dtype=torch.long, device=device)
    leaf = torch.randn(1, 2, 3, 5, device=device, requires_grad=True)
    loss = logprobs_from_logits(leaf.tanh(), tokens, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = logprobs_from_logits(2 * leaf, tokens, inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------ as an operator


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device: str, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 19, device=device).to(dtype)
    targets = torch.tensor([3, -1, 18, 0], device=device)
    ops = torch.ops.gflowgr
    torch.library.opcheck(
        ops.logits_logprobs.default, (logits.clone().requires_grad_(), targets, 0.7, False)
    )
    log_pf, row_max, log_sum = ops.logits_logprobs(logits, targets, 0.7, False)
    saved = (torch.rand_like(log_pf), logits, targets, row_max, log_sum, 0.7)
    torch.library.opcheck(ops.logits_backward.default, saved)
    torch.library.opcheck(ops.logits_backward_.default, saved)


def test_second_derivatives_are_refused(device: str) -> None:
    logits = torch.randn(1, 1, 2, 5, device=device, requires_grad=True)
    tokens = torch.zeros(1, 1, 2, dtype=torch.long, device=device)
    log_pf = logprobs_from_logits(logits, tokens)
    (gradient,) = torch.autograd.grad(log_pf.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="gflowgr::logits_logprobs has no second derivative"):
        gradient.square().sum().backward()


def test_compiles_as_one_graph(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(logprobs_from_logits, fullgraph=True, backend="aot_eager")
    leaf = torch.randn(2, 2, 3, 11, device=device, requires_grad=True)
    tokens = torch.randint(0, 11, (2, 2, 3), device=device)
    mask = torch.tensor([True, True, False], device=device).expand(2, 2, 3)
    found = []
    for run in (logprobs_from_logits, compiled):
        log_pf = run(leaf * 1.0, tokens, mask=mask, inplace_backward=True)
        found.append((log_pf.detach(), *torch.autograd.grad(log_pf.sum(), leaf)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_token_of_another_shard_leaves_the_log_sum_exp(device: str) -> None:
    """A target of V or more is in the denominator only: what a sharded vocabulary needs."""
    logits = torch.randn(1, 7, device=device, requires_grad=True)
    log_pf = torch.ops.gflowgr.logits_logprobs(
        logits, torch.tensor([7], device=device), 0.5, False
    )[0]
    torch.testing.assert_close(log_pf, -(logits / 0.5).logsumexp(-1))
    log_pf.sum().backward()
    torch.testing.assert_close(logits.grad, -(logits.detach() / 0.5).softmax(-1) / 0.5)


def test_errors_name_the_bad_argument() -> None:
    logits = torch.zeros(1, 2, 3, 5)
    tokens = torch.zeros(1, 2, 3, dtype=torch.long)
    outside = tokens.clone()
    outside[0, 1, 2] = 5
    cases = [
        ((logits[0], tokens), {}, ValueError, "logits must have shape [B, N, L, V]; got shape"),
        ((logits.long(), tokens), {}, TypeError, "logits must have dtype float32"),
        ((logits, tokens[0]), {}, ValueError, "tokens must have shape [B=1, N=2, L=3], as in"),
        ((logits, tokens.float()), {}, TypeError, "tokens must have dtype int64"),
        ((logits[..., :0], tokens), {}, ValueError, "logits must have at least one column"),
        ((logits, outside), {}, ValueError, "tokens[0, 1, 2] = 5 is outside the vocabulary"),
        ((logits, tokens), {"temperature": 0.0}, ValueError, "temperature must be greater than 0"),
        ((logits, tokens), {"inplace_backward": 1}, TypeError, "inplace_backward must be a bool"),
        (
            (logits, tokens),
            {"mask": torch.tensor([False, True, True]).expand(1, 2, 3)},
            ValueError,
            "mask[0, 0] must be a prefix of its row",
        ),
    ]
    for given_arguments, options, error, message in cases:
        with pytest.raises(error) as caught:
            logprobs_from_logits(*given_arguments, **options)
        assert str(caught.value).startswith(message)
