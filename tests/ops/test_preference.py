"""DPO, S-DPO and GRPO on log-probabilities: values, gradients, padding, extremes, reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gflowgr.ops import dpo_loss, grpo_loss, sdpo_loss
from gflowgr.ops.preference.reference import k3_divergence

from .cases import prefix_mask

REDUCTIONS = ["none", "sum", "mean", "prompt"]
BETA = 0.3


def make_case(
    prompts: int, branches: int, steps: int, seed: int, *, padding: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_pf, ref_log_pf, reward and mask in float64; with `padding`, lengths from 0 to L."""
    g = torch.Generator().manual_seed(seed)
    shape = (prompts, branches, steps)
    low = 0 if padding else steps
    lengths = torch.randint(low, steps + 1, shape[:2], generator=g)
    log_pf, reference = (
        -2 * torch.randn(shape, generator=g, dtype=torch.float64).abs() for _ in range(2)
    )
    reward = 5 * torch.rand(shape[:2], generator=g, dtype=torch.float64)
    return log_pf, reference, reward, prefix_mask(lengths, steps)


def rows(log_pf: Tensor, reference: Tensor, mask: Tensor, b: int) -> dict[int, list[float]]:
    """Log-ratios of the real tokens of prompt b's valid trajectories."""
    found = {}
    for n in range(mask.shape[1]):
        steps = int(mask[b, n].sum())
        if steps:
            pairs = zip(
                log_pf[b, n, :steps].tolist(), reference[b, n, :steps].tolist(), strict=True
            )
            found[n] = [p - q for p, q in pairs]
    return found


def sdpo_loops(log_pf: Tensor, reference: Tensor, mask: Tensor) -> list[float | None]:
    """S-DPO of each prompt by its text; None where there is nothing to compare."""
    table: list[float | None] = []
    for b in range(len(mask)):
        delta = {n: sum(ratios) for n, ratios in rows(log_pf, reference, mask, b).items()}
        if 0 not in delta or len(delta) < 2:
            table.append(None)
            continue
        total = sum(math.exp(BETA * (delta[n] - delta[0])) for n in delta if n)
        table.append(-math.log(1 / (1 + total)))
    return table


def grpo_loops(
    log_pf: Tensor, reference: Tensor, reward: Tensor, mask: Tensor
) -> tuple[list[float | None], Tensor]:
    """GRPO of each prompt and its gradient to log_pf for the reduction "sum"."""
    table: list[float | None] = []
    slope = torch.zeros_like(log_pf)
    for b in range(len(mask)):
        group = rows(log_pf, reference, mask, b)
        if not group:
            table.append(None)
            continue
        values = [reward[b, n].item() for n in group]
        mean = sum(values) / len(values)
        spread = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
        loss = 0.0
        for n, ratios in group.items():
            advantage = (reward[b, n].item() - mean) / (math.sqrt(spread) + 1e-4)
            for i, ratio in enumerate(ratios):
                share = 1 / len(ratios) / len(group)
                k3 = math.exp(-ratio) - (-ratio) - 1
                loss += -(1 * advantage - BETA * k3) * share
                slope[b, n, i] = (-advantage + BETA * (1 - math.exp(-ratio))) * share
        table.append(loss)
    return table, slope


def reduced(table: list[float | None], reduction: str) -> Tensor:
    kept = [x for x in table if x is not None]
    if reduction == "none":
        return torch.tensor([x or 0.0 for x in table], dtype=torch.float64)
    count = 1 if reduction == "sum" else max(1, len(kept))
    return torch.tensor(sum(kept) / count, dtype=torch.float64)


cases = st.builds(
    make_case, st.integers(0, 4), st.integers(2, 4), st.integers(1, 4), st.integers(0, 2**20)
)
Case = tuple[Tensor, Tensor, Tensor, Tensor]


@settings(max_examples=40)
@given(case=cases, reduction=st.sampled_from(REDUCTIONS))
def test_equal_the_loops(case: Case, reduction: str) -> None:
    log_pf, reference, reward, mask = case
    options = {"mask": mask, "beta": BETA, "reduction": reduction}
    loss = sdpo_loss(log_pf, reference, **options)
    expected = reduced(sdpo_loops(log_pf, reference, mask), reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    if mask.shape[1] == 2:
        assert torch.equal(dpo_loss(log_pf, reference, **options), loss)

    log_pf.requires_grad_()
    loss = grpo_loss(log_pf, reference, reward, **options)
    table, slope = grpo_loops(log_pf.detach(), reference, reward, mask)
    torch.testing.assert_close(loss, reduced(table, reduction), rtol=1e-9, atol=1e-9)
    if reduction == "sum":
        loss.backward()
        torch.testing.assert_close(log_pf.grad, slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_of_sdpo(reduction: str) -> None:
    log_pf, reference, _, mask = make_case(4, 3, 3, seed=1)
    assert not mask.any(-1).all()
    run = partial(
        sdpo_loss, ref_log_pf=reference, mask=mask, beta=BETA, reduction=reduction
    )  # GRPO's stopped gradient has no finite difference
    assert torch.autograd.gradcheck(run, log_pf.requires_grad_())


def test_an_unchanged_policy_knows_no_difference() -> None:
    """log(1 + rejected) for S-DPO; for GRPO no divergence and the plain policy gradient."""
    log_pf, _, reward, _ = make_case(2, 4, 3, seed=2, padding=False)
    assert sdpo_loss(log_pf, log_pf).item() == pytest.approx(math.log(4))
    assert dpo_loss(log_pf[:, :2], log_pf[:, :2]).item() == pytest.approx(math.log(2))
    log_pf.requires_grad_()
    loss = grpo_loss(log_pf, log_pf, reward, beta=10.0)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)  # advantages sum to zero
    loss.backward()
    best = reward.argmax(1)
    assert (log_pf.grad[torch.arange(2), best] < 0).all()  # descent makes it more probable


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_extreme_gaps_overflow_nowhere(gap: float, dtype: torch.dtype) -> None:
    """The chosen trajectory 1e4 nats above or below three rejected ones, of which two are level."""
    reference = torch.zeros(1, 4, 1, dtype=dtype)
    log_pf = torch.tensor([0.0, -gap, -gap, -gap - 50], dtype=dtype).reshape(1, 4, 1)
    log_pf = log_pf.requires_grad_()
    loss = sdpo_loss(log_pf, reference, beta=1.0)
    loss.backward()
    if gap > 0:
        assert loss.item() == 0.0
        assert (log_pf.grad == 0).all()
    else:
        # A rejected one as far above as this has all the gradient, here 50 nats below 1e4.
        assert loss.item() == pytest.approx(-gap + math.log(2), rel=1e-3)
        slope = log_pf.grad.flatten()
        expected = torch.tensor([-1.0, 0.5, 0.5, 0.0], dtype=dtype)
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_extreme_gaps_of_grpo(gap: float) -> None:
    """The penalty of an improbable token grows on, and pulls it back; no infinity, no NaN."""
    log_pf = torch.tensor([[[gap], [0.0]]], requires_grad=True)
    loss = grpo_loss(log_pf, torch.zeros(1, 2, 1), torch.tensor([[1.0, 1.0]]), beta=0.1)
    loss.backward()
    assert loss.isfinite()
    slope = log_pf.grad[0, 0, 0].item()
    assert slope == pytest.approx(0.05 if gap > 0 else 0.05 * (1 - math.exp(20)), rel=1e-6)
    assert log_pf.grad[0, 1, 0] == 0


def test_divergence_is_exact_up_to_its_tangent_and_smooth_there() -> None:
    near = torch.tensor([1e-6, -1e-6], dtype=torch.float64)
    torch.testing.assert_close(k3_divergence(near), near**2 / 2, rtol=1e-5, atol=0)
    ratio = torch.tensor([-19.999, -20.001], dtype=torch.float64, requires_grad=True)
    value = k3_divergence(ratio)
    value.sum().backward()
    torch.testing.assert_close(value[0], value[1], rtol=3e-3, atol=0)
    torch.testing.assert_close(ratio.grad[0], ratio.grad[1], rtol=2e-3, atol=0)


def test_equal_rewards_teach_nothing() -> None:
    log_pf, reference, _, mask = make_case(3, 4, 3, seed=3)
    log_pf.requires_grad_()
    reward = torch.full((3, 4), 0.1)  # no binary fraction
    grpo_loss(log_pf, reference, reward, mask=mask, beta=0.0).backward()
    assert log_pf.grad.abs().max() < 1e-9


LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": lambda p, q, r, **options: dpo_loss(p[:, :2], q[:, :2], **options),
    "sdpo": lambda p, q, r, **options: sdpo_loss(p, q, **options),
    "grpo": grpo_loss,
}


@pytest.mark.parametrize("kind", LOSSES)
def test_poisoned_padding_changes_nothing(kind: str) -> None:
    """Prompts: complete; without the chosen one; without rejected ones; without anything."""
    log_pf, reference, reward, _ = make_case(4, 3, 3, seed=4, padding=False)
    lengths = torch.tensor([[3, 2, 0], [0, 2, 3], [2, 0, 0], [0, 0, 0]])
    mask = prefix_mask(lengths, 3)
    part = mask[:, :2] if kind == "dpo" else mask

    def run(fill: float) -> tuple[Tensor, Tensor]:
        p = log_pf.masked_fill(~mask, fill).requires_grad_()
        q, r = reference.masked_fill(~mask, fill), reward.masked_fill(~mask.any(-1), fill)
        loss = LOSSES[kind](p, q, r, mask=part, reduction="none")
        loss.sum().backward()
        return loss.detach(), p.grad

    loss, grad = run(0.0)
    counted = [True, True, True, False] if kind == "grpo" else [True, False, False, False]
    assert loss.ne(0).tolist() == counted
    assert torch.equal(grad.ne(0).any(-1).any(-1), loss.ne(0))
    for poison in (math.nan, -math.inf):
        for actual, expected in zip(run(poison), (loss, grad), strict=True):
            assert torch.equal(actual, expected)


def test_the_reference_is_frozen() -> None:
    log_pf, reference, reward, _ = make_case(2, 2, 3, seed=5, padding=False)
    for loss in LOSSES.values():
        inputs = [x.clone().requires_grad_() for x in (log_pf, reference, reward)]
        loss(*inputs).backward()
        assert [x.grad is None for x in inputs] == [False, True, True]


def test_arguments_are_named_in_errors() -> None:
    log_pf, reference, reward, mask = make_case(2, 3, 3, seed=6, padding=False)
    for call, message in (
        (lambda: dpo_loss(log_pf, reference), r"N = 2 trajectories, .* got N = 3"),
        (lambda: sdpo_loss(log_pf[:, :1], reference[:, :1]), r"N >= 2 .*\[2, 1, 3\]"),
        (lambda: sdpo_loss(log_pf, reference[:1]), r"ref_log_pf must have shape \[B=2, N=3, L=3\]"),
        (lambda: sdpo_loss(log_pf, reference, beta=0.0), "beta must be greater than 0; got 0"),
        (lambda: grpo_loss(log_pf, reference, reward, beta=-1.0), "beta must be at least 0"),
        (lambda: grpo_loss(log_pf, reference, reward[:, :2]), r"reward must have shape \[B=2, N=3"),
        (
            lambda: grpo_loss(log_pf, reference, reward / 0),
            r"reward\[0, 0\] must be finite; got inf",
        ),
        (lambda: sdpo_loss(log_pf, reference, reduction="batch"), "reduction must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    holes = mask.clone()
    holes[1, 2, 0] = False
    with pytest.raises(ValueError, match=r"mask\[1, 2\] must be a prefix"):
        grpo_loss(log_pf, reference, reward, mask=holes)
