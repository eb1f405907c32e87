"""The four losses on log-probabilities: values, gradients, padding, extremes, reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gflowgr.ops import db_loss, subtb_loss, tb_loss, vargrad_log_z, vargrad_loss

from .. import oracles
from ..cases import prefix_mask
from .cases import LossCase, loss_cases, make_loss_case

LOSSES: dict[str, Callable[..., Tensor]] = {
    "tb": tb_loss,
    "db": db_loss,
    "subtb": subtb_loss,
    "vargrad": vargrad_loss,
}
KINDS = list(LOSSES)
REDUCTIONS = ["none", "sum", "mean", "prompt"]


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=rtol)


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(
    case=loss_cases,
    reduction=st.sampled_from(REDUCTIONS),
    beta=st.sampled_from([1.0, 0.3, 2.5]),
    floor=st.sampled_from([None, -1.0, 2.0]),
    clip=st.sampled_from([None, 0.5, 3.0]),
)
def test_equals_the_loops(
    kind: str,
    case: LossCase,
    reduction: str,
    beta: float,
    floor: float | None,
    clip: float | None,
) -> None:
    clip = None if kind == "subtb" else clip
    clipped = {} if kind == "subtb" else {"residual_clip": clip}
    actual = LOSSES[kind](
        case.log_pf,
        case.log_reward,
        *case.target(kind),
        mask=case.mask,
        beta=beta,
        log_reward_floor=floor,
        reduction=reduction,
        **clipped,
    )
    target = next(iter(case.target(kind)), None)
    options = {"beta": beta, "floor": floor, "clip": clip}
    rows = oracles.losses(kind, case.log_pf, case.log_reward, target, case.mask, **options)
    expected = oracles.reduce(rows, reduction).reshape(actual.shape)
    assert_close(actual, expected)


@settings(max_examples=30)
@given(case=loss_cases, lam=st.sampled_from([1e-3, 0.5, 1.0, 1.7, 40.0]))
def test_subtb_weighs_sub_trajectories_by_lambda(case: LossCase, lam: float) -> None:
    actual = subtb_loss(
        case.log_pf, case.log_reward, case.log_flow, lam=lam, mask=case.mask, reduction="sum"
    )
    rows = oracles.losses("subtb", case.log_pf, case.log_reward, case.log_flow, case.mask, lam=lam)
    assert_close(actual, oracles.reduce(rows, "sum"))


@pytest.mark.parametrize("lam", [1e-4, 0.9, 1e4])
def test_subtb_weights_neither_underflow_nor_overflow_on_long_trajectories(lam: float) -> None:
    """lambda^40 does not fit float32, its share of the weights does."""
    steps = 40
    log_pf = torch.zeros(1, 1, steps)
    log_flow = torch.arange(steps, 0, -1).float().reshape(1, 1, steps)  # g_i - g_j = j - i
    loss = subtb_loss(log_pf, torch.zeros(1, 1), log_flow, lam=lam)
    expected = {1e-4: 1.0, 1e4: steps**2}.get(lam)
    assert loss.isfinite()
    if expected is not None:
        assert loss.item() == pytest.approx(expected, rel=1e-2)


def test_limits_of_subtb_are_db_and_tb() -> None:
    """A tiny lambda leaves single steps (DB over the length), a huge one whole trajectories."""
    case = make_loss_case(3, 2, 4, seed=1, padding=False)
    inputs = case.log_pf, case.log_reward
    nearly_db = subtb_loss(*inputs, case.log_flow, lam=1e-9, reduction="none")
    assert_close(nearly_db, db_loss(*inputs, case.log_flow, reduction="none") / 4, rtol=1e-6)
    nearly_tb = subtb_loss(*inputs, case.log_flow, lam=1e9, reduction="none")
    log_z = case.log_flow[:, :, 0]
    tb = (log_z + case.log_pf.sum(-1) - case.log_reward) ** 2
    assert_close(nearly_tb, tb, rtol=1e-6)


def test_perfect_flows_have_zero_loss() -> None:
    """Two leaves with rewards 3 and 1 under one root: Z = 4, P = 3/4 and 1/4."""
    log_pf = torch.tensor([[[0.75], [0.25]]]).log()
    log_reward = torch.tensor([[3.0, 1.0]]).log()
    log_z = torch.tensor([4.0]).log()
    log_flow = log_z.expand(1, 2).unsqueeze(-1)
    for loss in (
        tb_loss(log_pf, log_reward, log_z),
        db_loss(log_pf, log_reward, log_flow),
        subtb_loss(log_pf, log_reward, log_flow),
        vargrad_loss(log_pf, log_reward),
    ):
        assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert vargrad_log_z(log_pf, log_reward).item() == pytest.approx(math.log(4.0))


def test_a_clipped_residual_pulls_as_the_clip_does() -> None:
    """Of 3 and of 300 nats: slope 2 * 3, and VarGrad's estimate is of the unclipped numbers."""
    for size in (3.0, 300.0):
        log_pf = torch.zeros(1, 1, 1, requires_grad=True)
        loss = tb_loss(log_pf, torch.tensor([[-size]]), torch.zeros(1), residual_clip=3.0)
        loss.backward()
        assert loss.item() == 3 * (2 * size - 3)
        assert log_pf.grad.item() == 6
    log_pf = torch.zeros(1, 3, 1, requires_grad=True)
    loss = vargrad_loss(log_pf, torch.tensor([[9.0, 0.0, 0.0]]), residual_clip=4.0)
    loss.backward()
    assert loss.item() == 4 * (2 * 6 - 4) + 3**2 + 3**2  # residuals -6, 3, 3
    # Slopes -8, 6, 6 less their mean, since each token moves the estimate too.
    torch.testing.assert_close(log_pf.grad.flatten(), torch.tensor([-8.0, 6, 6]) - 4 / 3)


def test_the_residual_has_no_factor_one_half() -> None:
    log_pf, log_reward = torch.full((1, 1, 2), -1.0), torch.tensor([[2.0]])
    assert tb_loss(log_pf, log_reward, torch.tensor([7.0])).item() == (7 - 2 - 2) ** 2


def test_a_scalar_log_z_serves_all_prompts() -> None:
    case = make_loss_case(3, 2, 4, seed=2)
    shared = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    loss = tb_loss(case.log_pf, case.log_reward, shared, mask=case.mask)
    assert_close(loss, tb_loss(case.log_pf, case.log_reward, shared.expand(3), mask=case.mask))
    loss.backward()
    assert shared.grad is not None
    assert shared.grad.abs() > 0


def test_vargrad_estimates_log_z_per_prompt_and_not_per_batch() -> None:
    """Adding a constant to one prompt's rewards changes its log Z and no loss."""
    case = make_loss_case(2, 3, 4, seed=3, padding=False)
    shift = torch.tensor([[0.0], [50.0]], dtype=torch.float64)
    before = vargrad_loss(case.log_pf, case.log_reward, reduction="none")
    after = vargrad_loss(case.log_pf, case.log_reward + shift, reduction="none")
    assert before.sum() > 1
    assert_close(before, after)
    log_z = partial(vargrad_log_z, case.log_pf)
    assert_close(log_z(case.log_reward + shift), log_z(case.log_reward) + shift[:, 0])


def test_vargrad_is_tb_at_the_group_estimate() -> None:
    case = make_loss_case(4, 4, 4, seed=4)
    case.mask[:, 0, 0] = True  # every prompt has a trajectory
    log_z = vargrad_log_z(case.log_pf, case.log_reward, mask=case.mask, beta=0.5)
    tb = tb_loss(case.log_pf, case.log_reward, log_z, mask=case.mask, beta=0.5)
    assert_close(vargrad_loss(case.log_pf, case.log_reward, mask=case.mask, beta=0.5), tb)


def test_vargrad_log_z_of_a_prompt_without_trajectories_is_nan() -> None:
    mask = prefix_mask(torch.tensor([[2, 0], [0, 0]]), 2)
    log_pf = torch.full((2, 2, 2), -1.0, requires_grad=True)
    log_z = vargrad_log_z(log_pf, torch.zeros(2, 2), mask=mask)
    assert log_z[0].item() == 2.0
    assert log_z[1].isnan()
    log_z.nansum().backward()
    assert torch.equal(log_pf.grad, torch.where(mask, -1.0, 0.0))


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, reduction: str) -> None:
    """Gradients to log_pf, log_reward and log_z or log_flow; for "none", of every element apart."""
    case = make_loss_case(3, 3, 4, seed=5)
    assert case.mask.any()
    assert not case.mask.all()
    inputs = [case.log_pf, case.log_reward, *case.target(kind)]
    loss = partial(LOSSES[kind], mask=case.mask, beta=0.7, log_reward_floor=-2.0)
    assert (0.7 * case.log_reward[case.mask.any(-1)] < -2.0).any()
    assert torch.autograd.gradcheck(
        lambda *x: loss(*x, reduction=reduction), [x.requires_grad_() for x in inputs]
    )


def test_gradcheck_of_the_group_estimate() -> None:
    case = make_loss_case(3, 3, 4, seed=6)
    case.mask[:, 0, 0] = True
    assert torch.autograd.gradcheck(
        lambda pf, reward: vargrad_log_z(pf, reward, mask=case.mask, beta=0.7),
        [case.log_pf.requires_grad_(), case.log_reward.requires_grad_()],
    )


def test_gradient_of_tb_is_twice_the_residual() -> None:
    case = make_loss_case(3, 2, 4, seed=7, padding=False)
    log_pf = case.log_pf.requires_grad_()
    residual = case.log_z[:, None] + log_pf.detach().sum(-1) - case.log_reward
    tb_loss(log_pf, case.log_reward, case.log_z, reduction="sum").backward()
    assert_close(log_pf.grad, 2 * residual[..., None].expand_as(log_pf))


@pytest.mark.parametrize("reduction", ["sum", "mean", "prompt"])
def test_detaching_vargrads_estimate_gives_the_same_gradient(reduction: str) -> None:
    case = make_loss_case(4, 4, 3, seed=8)
    case.mask[:, 0, 0] = True
    log_pf = case.log_pf.requires_grad_()
    options = {"mask": case.mask, "reduction": reduction}
    (whole,) = torch.autograd.grad(vargrad_loss(log_pf, case.log_reward, **options), log_pf)
    log_z = vargrad_log_z(log_pf, case.log_reward, mask=case.mask).detach()
    (fixed,) = torch.autograd.grad(tb_loss(log_pf, case.log_reward, log_z, **options), log_pf)
    assert whole.abs().sum() > 1
    assert_close(whole, fixed)


# ------------------------------------------------------------------ padding


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(case=loss_cases, reduction=st.sampled_from(REDUCTIONS))
def test_poisoned_padding_changes_nothing(
    kind: str, poison: float, case: LossCase, reduction: str
) -> None:
    valid = case.mask.any(-1)
    clean = [case.log_pf, case.log_reward, *case.target(kind)]
    padding = [~case.mask, ~valid]
    if kind != "vargrad":
        padding.append(~valid.any(-1) if kind == "tb" else ~case.mask)

    def run(inputs: list[Tensor]) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in inputs]
        loss = LOSSES[kind](*inputs, mask=case.mask, reduction=reduction)
        weights = torch.linspace(1, 2, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()]
        (loss.flatten() * weights).sum().backward()
        return [loss.detach(), *(x.grad for x in inputs)]

    expected = run(clean)
    actual = run([x.masked_fill(p, poison) for x, p in zip(clean, padding, strict=True)])
    for a, e in zip(actual, expected, strict=True):
        assert e.isfinite().all()
        assert torch.equal(a, e)
    for gradient, p in zip(actual[1:], padding, strict=True):
        assert (gradient[p] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_padding_costs_nothing(kind: str, reduction: str) -> None:
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    case = make_loss_case(2, 3, 4, seed=9)
    inputs = [
        torch.full_like(x, math.nan).requires_grad_()
        for x in (case.log_pf, case.log_reward, *case.target(kind))
    ]
    loss = LOSSES[kind](*inputs, mask=mask, reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all()
    assert all((x.grad == 0).all() for x in inputs)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_single_inputs(kind: str, shape: tuple[int, int, int]) -> None:
    case = make_loss_case(*shape, seed=10, padding=False)
    inputs = [x.requires_grad_() for x in (case.log_pf, case.log_reward, *case.target(kind))]
    for reduction in REDUCTIONS:
        loss = LOSSES[kind](*inputs, reduction=reduction)
        assert loss.shape == (shape[:2] if reduction == "none" else ())
        assert loss.isfinite().all()
        loss.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_no_mask_means_all_true() -> None:
    case = make_loss_case(2, 3, 4, seed=11, padding=False)
    for kind, loss in LOSSES.items():
        inputs = (case.log_pf, case.log_reward, *case.target(kind))
        assert torch.equal(loss(*inputs), loss(*inputs, mask=torch.ones(2, 3, 4).bool()))


def test_prompt_reduction_counts_prompts_that_have_a_trajectory() -> None:
    """Losses 4 and 9 for prompt 0, 16 for prompt 2, nothing for prompt 1."""
    log_pf = torch.tensor([[[-2.0], [-3.0]], [[0.0], [0.0]], [[-4.0], [0.0]]])
    mask = torch.tensor([[[1], [1]], [[0], [0]], [[1], [0]]]).bool()
    loss = partial(tb_loss, log_pf, torch.zeros(3, 2), torch.zeros(3), mask=mask)
    assert loss(reduction="none").tolist() == [[4, 9], [0, 0], [16, 0]]
    assert loss(reduction="sum").item() == 29
    assert loss(reduction="mean").item() == pytest.approx(29 / 3)
    assert loss(reduction="prompt").item() == loss().item() == 29 / 2


# ------------------------------------------------------------------ rewards and extremes


def test_the_floor_takes_rewards_that_have_no_logarithm() -> None:
    """Rewards 0 (-inf) and below (NaN) become the floor, without gradient; others keep theirs."""
    log_reward = torch.tensor([[-math.inf, math.nan, -9.0, 1.0]], requires_grad=True)
    log_pf = torch.zeros(1, 4, 1)
    loss = partial(tb_loss, log_pf, log_reward, torch.zeros(1), log_reward_floor=-5.0)
    assert loss(reduction="none").tolist() == [[25, 25, 25, 1]]
    loss().backward()
    assert log_reward.grad.tolist() == [[0, 0, 0, 2]]


def test_beta_comes_before_the_floor() -> None:
    log_pf, log_reward = torch.zeros(1, 1, 1), torch.tensor([[-4.0]])
    loss = tb_loss(log_pf, log_reward, torch.zeros(1), beta=0.5, log_reward_floor=-3.0)
    assert loss.item() == 2.0**2


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_log_probabilities_and_rewards_in_float32(kind: str) -> None:
    """Rewards from e^-30 to e^30, log-probabilities down to -2e4 nats: float32 suffices."""
    case = make_loss_case(4, 3, 4, seed=12)
    case.log_pf = -torch.logspace(-6, 4.3, 48, dtype=torch.float64).reshape(4, 3, 4)
    case.log_reward = torch.linspace(-30, 30, 12, dtype=torch.float64).reshape(4, 3)
    inputs = [x.float() for x in (case.log_pf, case.log_reward, *case.target(kind))]
    inputs = [x.requires_grad_() for x in inputs]
    actual = LOSSES[kind](*inputs, mask=case.mask, reduction="none")
    target = next(iter(case.target(kind)), None)
    rows = oracles.losses(kind, case.log_pf, case.log_reward, target, case.mask)
    assert actual.dtype == torch.float32
    assert_close(actual, oracles.reduce(rows, "none"), rtol=1e-4)
    actual.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_inputs_are_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    """Bit-equal to the same numbers given in float32; squares past fp16's 65504 do not overflow."""
    case = make_loss_case(3, 3, 4, seed=13)
    case.mask[:, :2, 0] = True
    scaled = [100 * x for x in (case.log_pf, case.log_reward, *case.target(kind))]
    narrow = [x.to(dtype).requires_grad_() for x in scaled]
    loss = LOSSES[kind](*narrow, mask=case.mask)
    wide = [x.detach().float() for x in narrow]
    assert loss.dtype == torch.float32
    assert loss > 65504
    assert torch.equal(loss, LOSSES[kind](*wide, mask=case.mask))
    (loss / 1000).backward()
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in narrow)


@pytest.mark.parametrize("kind", KINDS)
def test_one_float64_input_makes_the_loss_float64(kind: str) -> None:
    """Whichever it is; the others are widened, and nothing is rounded afterwards."""
    case = make_loss_case(2, 2, 3, seed=14)
    inputs = [value.float() for value in (case.log_pf, case.log_reward, *case.target(kind))]
    expected = LOSSES[kind](*(value.double() for value in inputs), mask=case.mask)
    for wide in range(len(inputs)):
        mixed = [value.double() if n == wide else value for n, value in enumerate(inputs)]
        loss = LOSSES[kind](*mixed, mask=case.mask)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind: str, reduction: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[kind], fullgraph=True, backend="eager")
    case = make_loss_case(3, 2, 4, seed=15)
    options = {"mask": case.mask, "beta": 0.5, "log_reward_floor": -3.0, "reduction": reduction}

    def run(loss: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in (case.log_pf, case.log_reward)]
        value = loss(*inputs, *case.target(kind), **options)
        value.sum().backward()
        return [value.detach(), *(x.grad for x in inputs)]

    for actual, expected in zip(run(compiled), run(LOSSES[kind]), strict=True):
        assert_close(actual, expected)
