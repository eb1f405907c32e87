"""Forward-mode derivatives and torch.func: right, or refused by name, for every op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import gflowgr
from gflowgr import backends
from gflowgr.ops.beam_step.op import beam_step, beam_step_hidden
from gflowgr.ops.logprobs import vocab_parallel as parallel

from .public_ops import DIFFERENTIABLE, FLOWS, OPS, TREE, arguments, read_by

DIFFERENTIABLE_READS = [
    (name, key) for name in OPS for key in read_by(name) if key in DIFFERENTIABLE
]


def sum_of(name: str, key: str, given: dict[str, Tensor]) -> object:
    return lambda x: OPS[name]({**given, key: x}).sum()


def reverse(name: str, key: str, given: dict[str, Tensor]) -> Tensor:
    """The gradient of the sum by the op's own backward pass."""
    x = given[key].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(OPS[name]({**given, key: x}).sum(), x)
    return gradient


@pytest.mark.parametrize(("name", "key"), DIFFERENTIABLE_READS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_of_every_mode_are_those_of_the_backward_pass(
    name: str, key: str, dtype: torch.dtype
) -> None:
    given = arguments(dtype)
    function, x = sum_of(name, key, given), given[key]
    expected = reverse(name, key, given)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    # PyTorch makes the tangent of a number times a scalar tensor float64.
    tolerance = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    _, along = jvp(function, (x,), (direction,))
    torch.testing.assert_close(along, (expected * direction).sum(), **tolerance)
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along, **tolerance)
    for derivative in (grad, jacrev):
        torch.testing.assert_close(derivative(function)(x), expected, **tolerance)


@pytest.mark.parametrize(
    "name",
    ["fused tb", "fused tb children", "fused flow kl children", "logprobs from logits", "subtb"],
)
def test_second_derivatives_by_composition(name: str) -> None:
    key = next(key for key in read_by(name) if key in ("hidden", "logits", "log_pf"))
    given = arguments(torch.float64)
    function, x = sum_of(name, key, given), given[key]
    direction = torch.ones_like(x)
    _, forward_over_reverse = jvp(grad(function), (x,), (direction,))
    reverse_over_forward = grad(lambda y: jvp(function, (y,), (direction,))[1])(x)
    torch.testing.assert_close(forward_over_reverse, reverse_over_forward)
    assert forward_over_reverse.abs().max() > 0


@pytest.mark.parametrize("name", OPS)
def test_vmap_over_batches_is_a_loop(name: str) -> None:
    """Of all floating arguments; the trajectories too, unless they choose rows of the head."""
    first, second = arguments(), arguments()
    for key in DIFFERENTIABLE:
        second[key] = first[key] * 0.5
    if "level" not in name and "children" not in name:
        second["mask"] = torch.zeros_like(first["mask"])
        second["mask"][:, :, 0] = True
    keys = [k for k in read_by(name) if "children" not in name or k not in ("tokens", "mask")]
    stacked = [torch.stack([first[key], second[key]]) for key in keys]
    found = vmap(lambda *xs: OPS[name]({**first, **dict(zip(keys, xs, strict=True))}))(*stacked)
    expected = torch.stack([OPS[name](first), OPS[name](second)])
    torch.testing.assert_close(found, expected)


def test_jacobians_of_both_modes_agree() -> None:
    given = arguments(torch.float64)
    for name in ("logprobs level", "logprobs children"):
        function = lambda x, name=name: OPS[name]({**given, "bias": x})  # noqa: E731
        torch.testing.assert_close(jacfwd(function)(given["bias"]), jacrev(function)(given["bias"]))


def test_data_checks_run_under_grad_and_jvp() -> None:
    given = arguments()
    given["log_reward"][1, 1] = torch.nan
    for name in ("tb", "fused tb"):
        key = "log_pf" if name == "tb" else "hidden"
        function = sum_of(name, key, given)
        with pytest.raises(ValueError, match=r"log_reward\[1, 1\] must be finite; got nan"):
            grad(function)(given[key])
        with pytest.raises(ValueError, match=r"log_reward\[1, 1\] must be finite; got nan"):
            jvp(function, (given[key],), (given[key],))


def test_under_vmap_bad_values_are_not_named_but_not_finite() -> None:
    given = arguments()
    given["tokens"][1, 1, 0] = 10**6
    found = vmap(sum_of("fused tb", "hidden", given))(given["hidden"][None])
    assert not found.isfinite().any()


@pytest.mark.parametrize(
    "name",
    ["fused tb", "fused flow kl children", "logprobs children", "logprobs from logits", "tb"],
)
def test_a_forced_backend_refuses_by_name(name: str) -> None:
    if missing := backends.cpp_missing():
        pytest.skip(missing)
    key = next(key for key in read_by(name) if key in DIFFERENTIABLE)
    given = arguments()
    with (
        gflowgr.backend("cpp"),
        pytest.raises(gflowgr.backends.BackendError, match="cannot run on backend 'cpp': forward"),
    ):
        jvp(sum_of(name, key, given), (given[key],), (given[key],))


def test_batched_trajectories_of_the_children_are_refused_by_name() -> None:
    given = arguments()
    with pytest.raises(RuntimeError, match='normalize="children" must have the same tokens and'):
        vmap(sum_of("logprobs children", "tokens", given))(given["tokens"][None])


def test_steps_of_a_beam_search_are_refused_by_name() -> None:
    logits, scores = torch.randn(1, 1, TREE.vocab_size), torch.zeros(1, 1)
    nodes = torch.zeros(1, 1, dtype=torch.long)
    hidden, weight = torch.randn(1, 1, 3), torch.randn(TREE.vocab_size, 3)
    calls = {
        "beam_step": (lambda x: beam_step(x, scores, nodes, TREE, width=2).scores.sum(), logits),
        "beam_step_hidden": (
            lambda x: beam_step_hidden(
                x, weight, None, scores, nodes, TREE, width=2, normalize="children"
            ).scores.sum(),
            hidden,
        ),
    }
    for name, (function, x) in calls.items():
        for transformed in (grad(function), lambda y, f=function: jvp(f, (y,), (y,))):
            with pytest.raises(RuntimeError, match=f"gflowgr::{name} knows no transform"):
                transformed(x)
        with pytest.raises(RuntimeError, match=f"gflowgr::{name} knows no transform"):
            vmap(function)(x[None])
        with (
            forward_ad.dual_level(),
            pytest.raises(RuntimeError, match=f"gflowgr::{name} has no forward-mode derivative"),
        ):
            function(forward_ad.make_dual(x, x))


def test_a_head_spread_over_processes_is_refused_by_name() -> None:
    given = arguments()

    def function(hidden: Tensor) -> Tensor:
        return parallel.vocab_parallel_logprobs(
            hidden, given["weight"], given["tokens"], first_token=0
        )

    with pytest.raises(RuntimeError, match="gflowgr::vocab_parallel_logprobs knows no transform"):
        jvp(function, (given["hidden"],), (given["hidden"],))


def test_the_registered_ops_refuse_a_forward_mode_derivative() -> None:
    """Which PyTorch would take for zero."""
    given = arguments()
    hidden, tokens = given["hidden"].flatten(0, 2), given["tokens"].flatten()
    needs = (True, False, False, False, False)
    options = ("tb", 1.0, 1.0, None, "prompt", 0.0, None)
    flow = (given["log_reward"], given["log_z"], given["mask"], *options)
    op, rewards = torch.ops.gflowgr, FLOWS.rewards
    calls = {
        "dense_logprobs": (
            lambda x: op.dense_logprobs(x, given["weight"], None, tokens, 1.0, False)[0],
            hidden,
        ),
        "dense_flow_loss": (
            lambda x: op.dense_flow_loss(
                *(x, given["weight"], None, given["tokens"], 1.0),
                *(given["log_reward"], given["log_z"], *options, *needs),
            )[0],
            given["hidden"],
        ),
        "logits_logprobs": (
            lambda x: op.logits_logprobs(x, tokens, 1.0, False)[0],
            given["logits"].flatten(0, 2),
        ),
        "flow_loss": (lambda x: op.flow_loss(x, *flow), given["log_pf"]),
        "children_logprobs": (
            lambda x: op.children_logprobs(
                *(x, given["weight"], None, given["tokens"], given["mask"], TREE.buffer),
                *(1.0, 0, False),
            )[0],
            given["hidden"],
        ),
        "flow_kl": (
            lambda x: op.flow_kl(
                *(x, given["weight"], None, given["tokens"], given["mask"], TREE.buffer),
                *(1.0, 0, None, rewards.log_reward, None, rewards.floor, rewards.root),
            )[0],
            given["hidden"],
        ),
    }
    for name, (function, x) in calls.items():
        with pytest.raises(RuntimeError, match=f"gflowgr::{name} has no forward-mode derivative"):
            jvp(function, (x,), (x,))
        function(x)


def test_torch_compile_follows_a_transform() -> None:
    torch._dynamo.reset()
    given = arguments()
    x = given["hidden"]
    run = lambda y: jvp(sum_of("fused tb", "hidden", given), (y,), (y,))[1]  # noqa: E731
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), run(x))
