"""Every backend of ``gflowgr::flow_loss``: values and gradients, as an operator, extremes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gflowgr
from gflowgr import backends
from gflowgr.ops import subtb_loss, tb_loss
from gflowgr.ops.flow_loss.op import flow_loss
from gflowgr.ops.flow_loss.reference import FlowOptions, loss_reference

from .cases import LossCase, loss_cases, make_loss_case

KINDS = ["tb", "db", "subtb", "vargrad"]
REDUCTIONS = ["none", "sum", "mean", "prompt"]
RUNS = [("torch", "cpu"), ("cpp", "cpu"), ("torch", "cuda"), ("cuda", "cuda")]

OPTIONS: dict[str, Any] = {
    "lam": 0.9,
    "beta": 1.0,
    "floor": None,
    "reduction": "prompt",
    "nll_weight": 0.0,
    "clip": None,
}


@pytest.fixture(params=RUNS, ids="-".join)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, with the device that it runs on; skipped with its own reason."""
    name, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    reason = backends.available_backends(device)["flow_loss"][name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    with gflowgr.backend(name):
        yield device


def arguments(
    kind: str, case: LossCase, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    """log_pf, log_reward, target (leaves that require a gradient) and mask."""
    target = next(iter(case.target(kind)), None)
    floating = [
        None if x is None else x.to(device, dtype, copy=True).requires_grad_()
        for x in (case.log_pf, case.log_reward, target)
    ]
    return [*floating, case.mask.to(device)]


def op(flow: FlowOptions, *inputs: Tensor | None) -> Tensor:
    """The op itself, which the front door leaves out on the backend ``torch``."""
    loss: Tensor = torch.ops.gflowgr.flow_loss.default(*inputs, *flow)
    return loss


def value_and_gradients(
    inputs: list[Tensor | None], loss: Tensor, upstream: Tensor
) -> list[Tensor]:
    wanted = [x for x in inputs[:3] if x is not None]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream.to(loss))]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    """Within rtol of each element or of the largest: sums lose what is small beside the rest."""
    for a, e in zip(actual, expected, strict=True):
        scale = e.abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(a.cpu().double(), e, rtol=rtol, atol=rtol * scale)


# ------------------------------------------------------------------ against the reference


# float32: 24 bits, sums of up to 30 terms of a few nats and a square of their residual.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_the_reference(
    device: str, kind: str, dtype: torch.dtype, rtol: float, data: st.DataObject
) -> None:
    """Values and gradients under a random gradient of the result, whatever the options."""
    case = data.draw(st.one_of(loss_cases, st.builds(make_loss_case, *[st.integers(1, 30)] * 4)))
    options = {
        "lam": data.draw(st.sampled_from([1e-3, 0.5, 0.9, 1.0, 1.3, 40.0])),
        "beta": data.draw(st.sampled_from([1.0, 0.3])),
        "floor": data.draw(st.sampled_from([None, -1.0, 2.0])),
        "reduction": data.draw(st.sampled_from(REDUCTIONS)),
        "nll_weight": data.draw(st.sampled_from([0.0, 0.7])),
        "clip": None if kind == "subtb" else data.draw(st.sampled_from([None, 0.5, 3.0])),
    }
    rounded = [None if x is None else x.double() for x in arguments(kind, case, dtype=dtype)[:3]]
    oracle = [None if x is None else x.detach().requires_grad_() for x in rounded]
    expected = loss_reference(*oracle, case.mask, FlowOptions(kind, **options))
    upstream = torch.randn_like(expected)
    inputs = arguments(kind, case, device, dtype)
    actual = op(FlowOptions(kind, **options), *inputs)
    assert_all_close(
        value_and_gradients(inputs, actual, upstream),
        value_and_gradients(oracle, expected, upstream),
        rtol,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(device: str, kind: str, reduction: str) -> None:
    case = make_loss_case(3, 3, 4, seed=1)
    *inputs, mask = arguments(kind, case, device)
    floating = [x for x in inputs if x is not None]
    options = {"lam": 1.7, "beta": 0.7, "floor": -2.0, "nll_weight": 0.3, "reduction": reduction}
    options["clip"] = None if kind == "subtb" else 1.5

    def loss(*x: Tensor) -> Tensor:
        return op(FlowOptions(kind, **options), *x, *[None] * (3 - len(x)), mask)

    assert torch.autograd.gradcheck(loss, floating)


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_and_gradients_that_are_not_needed(device: str, kind: str) -> None:
    case = make_loss_case(3, 2, 4, seed=2, padding=False)
    inputs = arguments(kind, case, device)
    everything = value_and_gradients(inputs, op(FlowOptions(kind), *inputs), torch.ones(()))
    for asked in range(len(everything) - 1):
        only = arguments(kind, case, device)
        for i, x in enumerate(only[:3]):
            if x is not None and i != asked:
                x.requires_grad_(False)
        loss = op(FlowOptions(kind), *only[:3], None)
        loss.backward()
        assert torch.equal(loss, everything[0])
        assert torch.equal(only[asked].grad, everything[1 + asked])
        assert all(x is None or x.grad is None for i, x in enumerate(only[:3]) if i != asked)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_one_element_inputs(device: str, kind: str, shape: tuple[int, int, int]) -> None:
    case = make_loss_case(*shape, seed=3, padding=False)
    for reduction in REDUCTIONS:
        inputs = arguments(kind, case, device)
        loss = op(FlowOptions(kind, reduction=reduction, nll_weight=0.5), *inputs)
        assert loss.shape == (shape[:2] if reduction == "none" else ())
        gradients = value_and_gradients(inputs, loss, torch.ones(loss.shape))[1:]
        wanted = [x for x in inputs[:3] if x is not None]
        assert [g.shape for g in gradients] == [x.shape for x in wanted]
        if math.prod(shape) == 0:
            assert (loss == 0).all()
            assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_need_not_be_contiguous(device: str, kind: str) -> None:
    case = make_loss_case(3, 4, 5, seed=4)
    inputs = arguments(kind, case, device)

    def scattered(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(x.requires_grad)

    apart = [scattered(x) for x in inputs]
    assert not apart[0].is_contiguous()
    upstream = torch.randn(4, 3, dtype=torch.float64).T
    actual, expected = (
        value_and_gradients(x, op(FlowOptions(kind, reduction="none"), *x), upstream)
        for x in (apart, inputs)
    )
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


# ------------------------------------------------------------------ padding and extremes


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_never_read(device: str, kind: str) -> None:
    """NaN under the mask changes no bit, and its gradient is zero."""
    case = make_loss_case(5, 4, 6, seed=5)
    case.mask[1] = False
    valid = case.mask.any(-1)
    assert not valid.all()
    assert not valid.any(-1).all()
    padding = [~case.mask, ~valid, ~valid.any(-1) if kind == "tb" else ~case.mask]
    clean, poisoned = arguments(kind, case, device), arguments(kind, case, device)
    for x, where in zip(poisoned[:3], padding, strict=True):
        if x is not None:
            x.data[where.to(device)] = math.nan
    for reduction in REDUCTIONS:
        upstream = torch.rand(5, 4) if reduction == "none" else torch.tensor(0.7)
        options = {"lam": 2.0, "nll_weight": 0.5, "reduction": reduction}
        expected, actual = (
            value_and_gradients(x, op(FlowOptions(kind, **options), *x), upstream)
            for x in (clean, poisoned)
        )
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)
        for gradient, where in zip(actual[1:], padding, strict=False):
            assert (gradient.cpu()[where] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_and_log_probabilities_at_the_extremes(device: str, kind: str) -> None:
    """Rewards from e^-30 to e^30, log-probabilities down to -2e4 nats, in float32."""
    case = make_loss_case(4, 3, 4, seed=6)
    case.log_pf = -torch.logspace(-6, 4.3, 48).double().reshape(4, 3, 4)
    case.log_reward = torch.linspace(-30, 30, 12).double().reshape(4, 3)
    options = {"reduction": "none", "lam": 0.9}
    oracle = arguments(kind, case)
    expected = loss_reference(*oracle, FlowOptions(kind, **OPTIONS | options))
    upstream = torch.rand(4, 3)
    inputs = arguments(kind, case, device, torch.float32)
    actual = flow_loss(FlowOptions(kind, **options), *inputs)
    assert_all_close(
        value_and_gradients(inputs, actual, upstream),
        value_and_gradients(oracle, expected, upstream),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("dtype", "lam"),
    [
        *((torch.float32, lam) for lam in (1e-300, 1e-30, 1e-4, 0.999999, 1.000001, 1e4, 1e300)),
        *((torch.float64, lam) for lam in (1e-300, 0.999999, 1e300)),
    ],
)
def test_lambda_at_the_extremes(device: str, dtype: torch.dtype, lam: float) -> None:
    """No weight under- or overflows where it matters, up to 40 tokens."""
    case = make_loss_case(3, 2, 40, seed=7)
    case.mask[0, 0] = True
    oracle = arguments("subtb", case)
    expected = loss_reference(*oracle, FlowOptions("subtb", lam=lam))
    inputs = arguments("subtb", case, device, dtype)
    actual = flow_loss(FlowOptions("subtb", lam=lam), *inputs)
    # The float32 weights differ from lambda's by up to 40 roundings of it.
    assert_all_close(
        value_and_gradients(inputs, actual, torch.ones(())),
        value_and_gradients(oracle, expected, torch.ones(())),
        rtol=2e-5 if dtype == torch.float32 else 1e-10,
    )


def test_a_long_trajectory_whose_flows_nearly_balance(device: str) -> None:
    """Potentials of 1e5 nats with residuals of 1: nothing is lost to differences of large sums."""
    steps = 1000
    g = torch.Generator().manual_seed(8)
    log_pf = -100 * torch.rand(1, 1, steps, generator=g).round(decimals=2)
    flow = torch.cat([torch.zeros(1), log_pf[0, 0].cumsum(0)[:-1]]).reshape(1, 1, steps)
    noise = torch.randn(1, 1, steps, generator=g).round(decimals=2)
    inputs = [log_pf, torch.zeros(1, 1), flow + noise]
    expected = subtb_loss(*[x.double() for x in inputs], lam=0.5)
    actual = subtb_loss(*[x.to(device) for x in inputs], lam=0.5)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5 if device == "cpu" else 1e-3)


def test_the_floor_takes_rewards_without_a_logarithm(device: str) -> None:
    log_reward = torch.tensor([[-math.inf, math.nan, -9.0, 1.0]], device=device).requires_grad_()
    log_pf, log_z = torch.zeros(1, 4, 1, device=device), torch.zeros(1, device=device)
    loss = flow_loss(
        FlowOptions("tb", floor=-5.0, reduction="none"), log_pf, log_reward, log_z, None
    )
    assert loss.tolist() == [[25, 25, 25, 1]]
    loss.sum().backward()
    assert log_reward.grad.tolist() == [[0, 0, 0, 2]]


def test_a_single_trajectory_has_no_variance(device: str) -> None:
    """Exactly zero, value and gradient, whatever its numbers round to."""
    case = make_loss_case(50, 1, 4, seed=9, padding=False)
    inputs = arguments("vargrad", case, device, torch.float32)
    loss = flow_loss(FlowOptions("vargrad", reduction="none"), *inputs)
    for result in value_and_gradients(inputs, loss, torch.rand(50, 1)):
        assert (result == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(kind: str) -> None:
    """About 50 blocks of prompts."""
    case = make_loss_case(2500, 8, 20, seed=10)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            inputs = arguments(kind, case, dtype=torch.float32)
            loss = flow_loss(FlowOptions(kind), *inputs)
            found.append(value_and_gradients(inputs, loss, torch.ones(())))
        finally:
            torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, e) for a, e in zip(other, found[0], strict=True))


# ------------------------------------------------------------------ as an operator


@pytest.mark.parametrize(
    ("kind", "reduction", "need"),
    [
        ("tb", "none", (True, True, True)),
        ("db", "prompt", (True, True, True)),
        ("subtb", "none", (True, False, False)),
        ("vargrad", "prompt", (False, True, False)),
    ],
)
def test_opcheck(device: str, kind: str, reduction: str, need: tuple[bool, ...]) -> None:
    inputs = arguments(kind, make_loss_case(2, 3, 4, seed=11), device)
    options = [0.9, 0.5, -1.0, reduction, 0.3, None if kind == "subtb" else 1.5]
    torch.library.opcheck(torch.ops.gflowgr.flow_loss.default, (*inputs, kind, *options))
    inputs = [None if x is None else x.detach() for x in inputs]
    grad = torch.rand((2, 3) if reduction == "none" else (), dtype=torch.float64, device=device)
    torch.library.opcheck(
        torch.ops.gflowgr.flow_loss_backward.default, (grad, *inputs, kind, *options, *need)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_the_op_are_refused(device: str, kind: str) -> None:
    inputs = arguments(kind, make_loss_case(2, 3, 4, seed=12), device)
    loss = op(FlowOptions(kind), *inputs)
    (gradient,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="gflowgr::flow_loss has no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_backend_is_the_reference_under_autograd(kind: str) -> None:
    """So it has second derivatives, and costs what the formula costs in plain PyTorch."""
    inputs = arguments(kind, make_loss_case(2, 3, 4, seed=12), "cpu")
    with backends.backend("torch"):
        loss = flow_loss(FlowOptions(kind), *inputs)
    assert loss.grad_fn is not None
    assert loss.grad_fn.name() == "DivBackward0"
    (gradient,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), inputs[0])
    assert bool(second.isfinite().all())
    assert bool(second.any())


def test_compiles_with_aot_autograd_as_one_graph(device: str) -> None:
    """Forward and backward pass through the fake kernels."""
    torch._dynamo.reset()
    case = make_loss_case(3, 2, 4, seed=13)
    options = {"beta": 0.5, "log_reward_floor": -3.0}
    results = []
    for loss in (tb_loss, torch.compile(tb_loss, fullgraph=True, backend="aot_eager")):
        *inputs, mask = arguments("tb", case, device)
        value = loss(*inputs, mask=mask, **options)
        results.append(value_and_gradients(inputs, value, torch.ones(())))
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


def test_mixed_precision_does_not_reach_the_op(device: str) -> None:
    case = make_loss_case(3, 2, 4, seed=14)
    *inputs, mask = arguments("tb", case, device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = tb_loss(*inputs, mask=mask)
    assert torch.equal(inside, tb_loss(*inputs, mask=mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fast_check_of_values_misses_none(dtype: torch.dtype) -> None:
    """One bad value at every place of the inputs, the rest sound."""
    case = make_loss_case(3, 3, 4, seed=15)
    case.mask[:, :, 0] = True
    sound = [case.log_pf.to(dtype), case.log_reward.to(dtype), case.log_z.to(dtype)]
    for i in range(9):
        for bad, floor in ((math.nan, None), (-math.inf, None), (math.inf, None), (math.inf, -1.0)):
            reward = sound[1].clone()
            reward.view(-1)[i] = bad
            with pytest.raises(
                ValueError, match=rf"log_reward\[{i // 3}, {i % 3}\] must be finite; got "
            ):
                tb_loss(sound[0], reward, sound[2], mask=case.mask, log_reward_floor=floor)
        for place in (1, 2, 3):
            mask = torch.ones(9, 4, dtype=torch.bool)
            mask[i, place - 1] = False
            with pytest.raises(ValueError, match=rf"mask\[{i // 3}, {i % 3}\] must be a prefix"):
                tb_loss(*sound, mask=mask.view(3, 3, 4))
