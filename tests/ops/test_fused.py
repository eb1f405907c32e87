"""The fused losses are the losses of the log-probabilities, plus the supervised term on request."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gflowgr import ops

from .cases import HeadCase, make_head_case

KINDS = ["tb", "db", "subtb", "vargrad"]
REDUCTIONS = ["none", "sum", "mean", "prompt"]
REWARD = {"beta": 0.8, "log_reward_floor": -2.0}


def losses(kind: str) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """The fused loss and the loss from log-probabilities."""
    return getattr(ops, f"fused_{kind}_loss"), getattr(ops, f"{kind}_loss")


def make(kind: str, seed: int) -> tuple[HeadCase, dict[str, Any], list[Tensor]]:
    """A case with padding, keywords for its log-probabilities, [log_reward, log_z or log_flow]."""
    case = make_head_case(4, 3, 4, seed=seed)
    options = {"bias": case.bias, "tree": case.tree, "mask": case.mask, "temperature": 0.7}
    g = torch.Generator().manual_seed(seed)
    shapes = [case.mask.shape[:2]]
    if kind != "vargrad":
        shapes.append(case.mask.shape[:1] if kind == "tb" else case.mask.shape)
    targets = [3 * torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    return case, options, targets


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", ["vocab", "children"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loss_of_the_log_probabilities(
    kind: str, normalize: str, reduction: str
) -> None:
    fused, loss = losses(kind)
    case, options, targets = make(kind, seed=1)
    options["normalize"] = normalize

    def two_calls(hidden: Tensor, weight: Tensor, *given: Tensor) -> Tensor:
        log_pf = ops.trajectory_logprobs(hidden, weight, case.tokens, **options)
        return loss(log_pf, *given, mask=case.mask, reduction=reduction, **REWARD)

    def one_call(hidden: Tensor, weight: Tensor, *given: Tensor) -> Tensor:
        return fused(hidden, weight, case.tokens, *given, reduction=reduction, **options, **REWARD)

    results = []
    for call in (one_call, two_calls):
        inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight, *targets)]
        value = call(*inputs)
        value.sum().backward()
        results.append([value.detach(), *(x.grad for x in inputs)])
    assert results[0][0].abs().sum() > 1
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_lambda_reaches_fused_subtb() -> None:
    case, options, targets = make("subtb", seed=2)
    log_pf = ops.trajectory_logprobs(case.hidden, case.weight, case.tokens, **options)
    for lam in (0.2, 1.5):
        fused = ops.fused_subtb_loss(
            case.hidden, case.weight, case.tokens, *targets, lam=lam, **options
        )
        expected = ops.subtb_loss(log_pf, *targets, lam=lam, mask=case.mask)
        torch.testing.assert_close(fused, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_supervised_term(kind: str, reduction: str) -> None:
    """NLL of trajectory 0: at [b, 0], summed over prompts, or its mean over prompts that count."""
    fused, _ = losses(kind)
    case, options, targets = make(kind, seed=3)
    # Prompt 0 is padding, prompt 1 has no positive but another trajectory, 2 and 3 have one.
    case.mask[0] = False
    case.mask[1, 0] = False
    assert case.mask[1, 1:].any()
    assert case.mask[2:, 0].any(-1).all()
    inputs = (case.hidden, case.weight, case.tokens, *targets)

    log_pf = ops.trajectory_logprobs(*inputs[:3], **options)
    nll = [-sum(log_pf[b, 0, i].item() for i in range(5)) for b in range(4)]
    assert nll[0] == nll[1] == 0.0 < min(nll[2:])
    table = torch.zeros(4, 3, dtype=torch.float64)
    table[:, 0] = torch.tensor(nll, dtype=torch.float64)
    term = {
        "none": table,
        "sum": table.sum(),
        "mean": table.sum() / 3,
        "prompt": table.sum() / 3,
    }[reduction]

    plain = fused(*inputs, reduction=reduction, **options)
    joint = fused(*inputs, reduction=reduction, nll_weight=2.5, **options)
    torch.testing.assert_close(joint, plain + 2.5 * term)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_joint_objective(kind: str, reduction: str) -> None:
    fused, _ = losses(kind)
    case, options, targets = make(kind, seed=4)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, *given: Tensor) -> Tensor:
        return fused(
            hidden,
            weight,
            case.tokens,
            *given,
            nll_weight=0.5,
            reduction=reduction,
            **{**options, "bias": bias},
        )

    inputs = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias, *targets)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("upstream", [0.5, -1.0, 3.0])
@pytest.mark.parametrize("normalize", ["vocab", "children"])
def test_gradients_are_scaled_by_that_of_the_loss(normalize: str, upstream: float) -> None:
    case, options, targets = make("tb", seed=6)
    inputs = [x.requires_grad_() for x in (case.hidden, case.weight, *targets)]
    loss = ops.fused_tb_loss(
        case.hidden, case.weight, case.tokens, *targets, normalize=normalize, **options
    )
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    scaled = torch.autograd.grad(upstream * loss, inputs)
    for found, expected in zip(scaled, plain, strict=True):
        assert expected.any()
        torch.testing.assert_close(found, upstream * expected)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_for_logs_are_detached(kind: str) -> None:
    fused, _ = losses(kind)
    case, options, targets = make(kind, seed=5)
    inputs = (case.hidden, case.weight.requires_grad_(), case.tokens)
    log_reward, balance = targets if kind != "vargrad" else (*targets, None)
    loss, log_pf = ops.fused_flow_loss(
        kind, *inputs, log_reward, balance, nll_weight=1.0, **options
    )
    assert loss.requires_grad
    assert not log_pf.requires_grad
    torch.testing.assert_close(log_pf, ops.trajectory_logprobs(*inputs, **options).detach())
    torch.testing.assert_close(loss, fused(*inputs, *targets, nll_weight=1.0, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_poisoned_padding_changes_nothing(kind: str) -> None:
    fused, _ = losses(kind)
    case, options, targets = make(kind, seed=6)
    case.mask[0] = False
    assert not case.mask[1:].any(-1).all()
    valid = case.mask.any(-1)
    padding = [~case.mask[..., None], ~valid]
    if kind != "vargrad":
        padding.append(~valid.any(-1) if kind == "tb" else ~case.mask)

    def run(tokens: Tensor, given: list[Tensor]) -> list[Tensor]:
        given = [x.clone().requires_grad_() for x in given]
        weight = case.weight.clone().requires_grad_()
        loss = fused(given[0], weight, tokens, *given[1:], nll_weight=1.0, **options)
        loss.backward()
        return [loss.detach(), weight.grad, *(x.grad for x in given)]

    clean = [case.hidden, *targets]
    expected = run(case.tokens, clean)
    actual = run(
        case.tokens.masked_fill(~case.mask, -99),
        [x.masked_fill(p, math.nan) for x, p in zip(clean, padding, strict=True)],
    )
    for a, e in zip(actual, expected, strict=True):
        assert e.isfinite().all()
        assert torch.equal(a, e)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 2), (2, 0)])
def test_empty_batches(kind: str, shape: tuple[int, int]) -> None:
    fused, _ = losses(kind)
    hidden = torch.zeros(*shape, 3, 4, requires_grad=True)
    given = [] if kind == "vargrad" else [torch.zeros(shape[:1] if kind == "tb" else (*shape, 3))]
    for reduction in REDUCTIONS:
        loss = fused(
            hidden,
            torch.zeros(5, 4),
            torch.zeros(*shape, 3, dtype=torch.long),
            torch.zeros(shape),
            *given,
            nll_weight=1.0,
            reduction=reduction,
        )
        assert loss.shape == (shape if reduction == "none" else ())
        assert (loss == 0).all()
        loss.sum().backward()
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind: str) -> None:
    fused, _ = losses(kind)
    case, options, targets = make(kind, seed=7)
    options = {**options, "tree": None, "reduction": "prompt", "nll_weight": 0.5}
    inputs = (case.hidden, case.weight, case.tokens, *targets)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs, **options), fused(*inputs, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_signatures_are_the_published_ones(kind: str) -> None:
    """People call these from their own trainers: names, order and defaults stay."""
    fused, loss = losses(kind)
    target = {"tb": ["log_z"], "vargrad": []}.get(kind, ["log_flow"])
    lam = {"lam": 0.9} if kind == "subtb" else {}
    reward = {"beta": 1.0, "log_reward_floor": None, "reduction": "prompt"}
    reward |= {} if kind == "subtb" else {"residual_clip": None}
    expected = {
        fused: (
            ["hidden", "weight", "tokens", "log_reward", *target],
            {"bias": None, "tree": None, "mask": None, "temperature": 1.0, "normalize": None}
            | lam
            | reward
            | {"nll_weight": 0.0, "sparse_grad": False},
        ),
        loss: (["log_pf", "log_reward", *target], {"mask": None} | lam | reward),
    }
    for function, (positional, keywords) in expected.items():
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.default is p.empty] == positional
        assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == keywords


def test_a_kind_must_be_known_and_fit_its_balance() -> None:
    case, options, targets = make("tb", seed=8)
    inputs = (case.hidden, case.weight, case.tokens)
    with pytest.raises(ValueError, match=r"kind must be one of 'tb', 'db', .*; got 'ctb'"):
        ops.fused_flow_loss("ctb", *inputs, *targets, **options)
    with pytest.raises(ValueError, match='balance must be None for "vargrad"; got Tensor'):
        ops.fused_flow_loss("vargrad", *inputs, *targets, **options)
    with pytest.raises(TypeError, match=r"log_z must be a torch.Tensor; got NoneType"):
        ops.fused_flow_loss("tb", *inputs, targets[0], None, **options)
    with pytest.raises(ValueError, match=r"log_flow must have shape \[B=4, N=3, L=5\]"):
        ops.fused_flow_loss("db", *inputs, *targets, **options)
    flow = torch.zeros(case.tokens.shape, dtype=torch.float64)
    with pytest.raises(ValueError, match='residual_clip must be None for "subtb"; got 3'):
        ops.fused_flow_loss("subtb", *inputs, targets[0], flow, residual_clip=3, **options)
