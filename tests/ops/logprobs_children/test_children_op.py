"""Log-probabilities among children as an op: what it computes, its gradients' forms, PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gflowgr import backends
from gflowgr.ops import trajectory_logprobs
from gflowgr.ops.logprobs import children
from gflowgr.tree import PrefixTree

from ..cases import make_head_case, prefix_mask
from .cases import Case, make_case, run

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


@pytest.mark.parametrize(
    ("plain", "kept", "sparse"), [(True, True, False), (False, True, True), (False, False, False)]
)
def test_opcheck(backend: str, plain: bool, kept: bool, sparse: bool) -> None:
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
    torch.library.opcheck(
        torch.ops.gflowgr.children_backward.default,
        (torch.randn(tokens.shape), *detached, *saved, True, True, not plain, sparse),
    )


@pytest.mark.parametrize(("graph", "sparse"), [("eager", True), ("aot_eager", False)])
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


def test_float64_is_left_to_the_reference(cpp: None) -> None:
    with pytest.raises(backends.BackendError, match="float64 is left to the reference"):
        run(make_case())


def test_an_empty_prefix_is_padding(backend: str) -> None:
    """A mask that is false everywhere: zeros, and gradients of zeros for what trains."""
    case = make_case().to(*[torch.float32] * 3)
    case.mask = prefix_mask(torch.zeros(3, 3), 3)
    log_pf, *grads = run(case)
    assert not log_pf.any()
    assert not any(x.any() for x in grads)
