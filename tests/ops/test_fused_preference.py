"""The fused preference losses are the losses of policy and reference log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gflowgr
from gflowgr import ops

from .cases import VOCABULARY, HeadCase, make_head_case

REDUCTIONS = ["none", "sum", "mean", "prompt"]
REWARD = torch.rand(4, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
Reference = dict[str, Tensor]


def make(seed: int) -> tuple[HeadCase, Reference, dict[str, Any]]:
    """A case with padding, a narrower reference, keywords for the log-probabilities."""
    case = make_head_case(4, 3, 4, seed=seed)
    g = torch.Generator().manual_seed(seed + 100)
    reference = {
        "ref_hidden": torch.randn(4, 3, 5, 2, generator=g, dtype=torch.float64),
        "ref_weight": torch.randn(VOCABULARY, 2, generator=g, dtype=torch.float64),
        "ref_bias": torch.randn(VOCABULARY, generator=g, dtype=torch.float64),
    }
    assert bool(case.mask[:, 0].any(-1).sum() >= 2)
    options = {"bias": case.bias, "tree": case.tree, "mask": case.mask, "temperature": 0.7}
    return case, reference, options


def fused(kind: str, case: HeadCase, *states: Tensor, reference: Reference, **options: Any) -> Any:
    given = (REWARD,) if kind == "grpo" else ()
    return getattr(gflowgr, f"fused_{kind}_loss")(
        *states,
        case.tokens,
        reference["ref_hidden"],
        reference["ref_weight"],
        *given,
        ref_bias=reference["ref_bias"],
        **options,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", ["vocab", "level", "children"])
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_equals_the_loss_of_the_log_probabilities(
    kind: str, normalize: str, reduction: str
) -> None:
    case, reference, options = make(seed=1)
    options["normalize"] = normalize
    log_options = {**options, "bias": reference["ref_bias"]}
    ref_log_pf = ops.trajectory_logprobs(
        reference["ref_hidden"], reference["ref_weight"], case.tokens, **log_options
    )

    def two_calls(hidden: Tensor, weight: Tensor) -> Tensor:
        log_pf = ops.trajectory_logprobs(hidden, weight, case.tokens, **options)
        chosen = {"mask": case.mask, "beta": 0.3, "reduction": reduction}
        nll = -log_pf[:, 0].sum(-1)
        counted = case.mask.any(-1).any(-1).sum()
        term = {"none": nll, "sum": nll.sum()}.get(reduction, nll.sum() / counted)
        if kind == "grpo":
            return ops.grpo_loss(log_pf, ref_log_pf, REWARD, **chosen) + 0.5 * term
        return ops.sdpo_loss(log_pf, ref_log_pf, **chosen) + 0.5 * term

    def one_call(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused(
            kind,
            case,
            hidden,
            weight,
            reference=reference,
            beta=0.3,
            reduction=reduction,
            nll_weight=0.5,
            **options,
        )

    results = []
    for call in (one_call, two_calls):
        inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight)]
        value = call(*inputs)
        value.sum().backward()
        results.append([value.detach(), *(x.grad for x in inputs)])
    assert results[0][0].abs().sum() > 0.1
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("normalize", ["vocab", "children"])
def test_gradcheck_of_the_joint_objective(normalize: str) -> None:
    case, reference, options = make(seed=2)
    options |= {"normalize": normalize, "nll_weight": 0.5}

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        chosen = {**options, "bias": bias}
        return fused("dpo", case, hidden, weight, reference=reference, **chosen)

    inputs = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_logs_are_detached_and_the_reference_is_frozen(kind: str) -> None:
    case, reference, options = make(seed=3)
    for tensor in reference.values():
        tensor.requires_grad_()
    weight = case.weight.requires_grad_()
    states = (case.hidden, weight)
    beta = {"dpo": 0.1, "grpo": 1e-3}[kind]
    reward = REWARD if kind == "grpo" else None
    loss, log_pf, ref_log_pf = ops.fused_preference_loss(
        kind, *states, case.tokens, reward=reward, beta=beta, **reference, **options
    )
    loss.backward()
    assert weight.grad is not None
    assert all(tensor.grad is None for tensor in reference.values())
    assert not log_pf.requires_grad
    assert not ref_log_pf.requires_grad
    torch.testing.assert_close(
        log_pf, ops.trajectory_logprobs(*states, case.tokens, **options).detach()
    )
    torch.testing.assert_close(loss, fused(kind, case, *states, reference=reference, **options))


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_poisoned_padding_changes_nothing(kind: str) -> None:
    case, reference, options = make(seed=4)
    case.mask[0] = False
    options["nll_weight"] = 1.0
    hole = ~case.mask[..., None]
    results = []
    for poison, token in ((0.0, 0), (math.nan, -99)):
        case.tokens = case.tokens.masked_fill(~case.mask, token)
        hidden = case.hidden.masked_fill(hole, poison).requires_grad_()
        weight = case.weight.clone().requires_grad_()
        states = reference["ref_hidden"].masked_fill(hole, poison)
        loss = fused(
            kind, case, hidden, weight, reference={**reference, "ref_hidden": states}, **options
        )
        loss.backward()
        results.append([loss.detach(), hidden.grad, weight.grad])
    for actual, expected in zip(*results, strict=True):
        assert expected.isfinite().all()
        assert torch.equal(actual, expected)


def test_sparse_gradient_of_the_head() -> None:
    case, reference, options = make(seed=5)
    weight = case.weight.requires_grad_()
    fused(
        "dpo", case, case.hidden, weight, reference=reference, sparse_grad=True, **options
    ).backward()
    assert weight.grad.is_sparse


def test_arguments_are_named_in_errors() -> None:
    case, reference, options = make(seed=6)

    def call(changes: dict[str, Tensor], **more: Any) -> Any:
        states = (case.hidden, case.weight)
        return fused("dpo", case, *states, reference=reference | changes, **{**options, **more})

    wide = torch.zeros(VOCABULARY, 3)
    forbidden = reference["ref_bias"].clone()
    forbidden[case.tokens[case.mask][0]] = -math.inf
    with pytest.raises(ValueError, match=r"ref_hidden must have shape \[B=4, N=3, L=5, d\]"):
        call({"ref_hidden": reference["ref_hidden"][:1]})
    with pytest.raises(ValueError, match=r"ref_weight must have shape \[V=17, d=2\]"):
        call({"ref_weight": wide})
    with pytest.raises(ValueError, match=r"is forbidden, ref_bias\[\d+\] = -inf"):
        call({"ref_bias": forbidden})
    with pytest.raises(ValueError, match="nll_weight must be at least 0"):
        call({}, nll_weight=-1.0)
    with pytest.raises(ValueError, match="needs a tree"):
        call({}, tree=None, normalize="children")
    case.tokens[case.mask] = 16  # a row of the head and no identifier
    with pytest.raises(ValueError, match="tokens"):
        call({}, normalize="vocab")


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_compiles_as_one_graph(kind: str) -> None:
    case, reference, options = make(seed=7)
    options |= {"tree": None, "nll_weight": 0.5}

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused(kind, case, hidden, weight, reference=reference, **options)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    inputs = (case.hidden, case.weight)
    torch.testing.assert_close(compiled(*inputs), run(*inputs))


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
@pytest.mark.parametrize("shape", [(0, 2), (2, 2)])
def test_batches_without_a_trajectory(kind: str, shape: tuple[int, int]) -> None:
    hidden = torch.zeros(*shape, 3, 4, requires_grad=True)
    tokens = torch.zeros(*shape, 3, dtype=torch.long)
    given = (torch.zeros(shape),) if kind == "grpo" else ()
    run = getattr(gflowgr, f"fused_{kind}_loss")
    for reduction in REDUCTIONS:
        loss = run(
            hidden,
            torch.zeros(5, 4),
            tokens,
            torch.zeros(*shape, 3, 2),
            torch.zeros(5, 2),
            *given,
            mask=torch.zeros_like(tokens, dtype=torch.bool),
            nll_weight=1.0,
            reduction=reduction,
        )
        assert loss.shape == (shape[:1] if reduction == "none" else ())
        assert (loss == 0).all()
        loss.sum().backward()
    assert (hidden.grad == 0).all()


def test_a_kind_must_be_known_and_fit_its_reward() -> None:
    case, reference, options = make(seed=9)
    inputs = (case.hidden, case.weight, case.tokens)
    options |= reference
    with pytest.raises(ValueError, match="kind must be one of 'dpo', 'grpo'; got 'sdpo'"):
        ops.fused_preference_loss("sdpo", *inputs, beta=1.0, **options)
    with pytest.raises(ValueError, match='reward must be None for "dpo"; got Tensor'):
        ops.fused_preference_loss("dpo", *inputs, reward=REWARD, beta=1.0, **options)
    with pytest.raises(TypeError, match=r"reward must be a torch.Tensor; got NoneType"):
        ops.fused_preference_loss("grpo", *inputs, beta=1.0, **options)
