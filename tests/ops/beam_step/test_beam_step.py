"""beam_step and beam_step_hidden: the reference and the C++ kernel against plain Python loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gflowgr
from gflowgr.ops.beam_step.op import beam_step, beam_step_hidden
from gflowgr.tree import PrefixTree
from gflowgr.tree.layout import build_numpy

from .cases import NORMALIZERS, TOLERANCE, StepCase, catalogues


@pytest.fixture(params=["torch", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpp" and (reason := gflowgr.backends.cpp_missing()) is not None:
        pytest.skip(reason)
    with gflowgr.backend(request.param):
        yield request.param


@pytest.mark.parametrize("normalize", NORMALIZERS)
@settings(max_examples=60)
@given(identifiers=catalogues(), seed=st.integers(0, 2**31))
def test_step_equals_plain_loops(
    normalize: str, identifiers: list[tuple[int, ...]], seed: int
) -> None:
    case = StepCase(identifiers, seed)
    for name in _backends():
        with gflowgr.backend(name):
            case.check_both(normalize)


def _backends() -> tuple[str, ...]:
    return ("torch",) if gflowgr.backends.cpp_missing() else ("torch", "cpp")


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_and_never_rounded_again(
    backend: str, dtype: torch.dtype, normalize: str
) -> None:
    case = _large_case(dtype)
    found = beam_step(case.logits, *case.beams, width=10, normalize=normalize)
    want = beam_step(case.logits.float(), *case.beams, width=10, normalize=normalize)
    assert found.scores.dtype == torch.float32
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)
    if normalize != "vocab":  # there the product itself is in half precision
        hidden, weight = case.hidden.float(), case.weight.float()
        found = beam_step_hidden(
            case.hidden, case.weight, None, *case.beams, width=10, normalize=normalize
        )
        want = beam_step(hidden @ weight.T, *case.beams, width=10, normalize=normalize)
        torch.testing.assert_close(found.scores, want.scores, atol=TOLERANCE, rtol=0)
        assert torch.equal(found.nodes, want.nodes)


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("wide", ["hidden", "weight", "bias"])
def test_float64_in_any_input_is_left_to_the_reference(wide: str, normalize: str) -> None:
    case = _large_case(size=8)
    bias = torch.randn(len(case.weight), generator=torch.Generator().manual_seed(0))
    given = {"hidden": case.hidden, "weight": case.weight, "bias": bias}
    given[wide] = given[wide].double()
    options = {"width": 10, "normalize": normalize}
    found = beam_step_hidden(*given.values(), *case.beams, **options)
    logits = case.hidden.double() @ case.weight.double().T + bias.double()
    want = beam_step(logits, *case.beams, **options)
    assert found.scores.dtype == want.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores, want.scores, atol=1e-4, rtol=0)
    if gflowgr.backends.cpp_missing() is None:
        with (
            gflowgr.backend("cpp"),
            pytest.raises(gflowgr.backends.BackendError, match="float64 is left to the reference"),
        ):
            beam_step(logits, *case.beams, **options)


class _large_case:
    """Nodes with hundreds of children, and enough beams at each for dense products."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, size: int = 40, prompts: int = 5
    ) -> None:
        made = torch.Generator().manual_seed(3)
        rows = torch.stack(
            [torch.randint(0, n, (30_000,), generator=made) for n in (4, 700, 3)], dim=1
        )
        self.tree = PrefixTree.from_identifiers(rows + torch.tensor([2, 6, 706]))
        vocab = 2 * 1024 + 37
        nodes = torch.randint(0, 5, (prompts, 9), generator=made)
        scores = torch.randn(prompts, 9, generator=made)
        self.beams = (scores, nodes, self.tree)
        self.hidden = torch.randn(prompts, 9, size, generator=made).to(dtype)
        self.weight = (torch.randn(vocab, size, generator=made) / size**0.5).to(dtype)
        self.logits = torch.randn(prompts, 9, vocab, generator=made).to(dtype) * 4


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_many_children_and_dense_products(backend: str, normalize: str) -> None:
    for size in (1, 40, 1100):  # 1100 is longer than one small product
        case = _large_case(size=size)
        bias = torch.linspace(-1, 1, len(case.weight))
        logits = case.hidden.double() @ case.weight.double().T + bias
        found = beam_step_hidden(
            case.hidden, case.weight, bias, *case.beams, width=50, normalize=normalize
        )
        with gflowgr.backend("torch"):
            want = beam_step(logits.float(), *case.beams, width=50, normalize=normalize)
        torch.testing.assert_close(found.scores, want.scores, atol=TOLERANCE, rtol=0)
        assert (found.nodes == want.nodes).float().mean() > 0.98  # but for near ties


def test_normaliser_of_a_large_vocabulary_loses_no_digits(backend: str) -> None:
    tree = PrefixTree.from_identifiers([[7], [33123]])
    logits = torch.randn(3, 1, 33124, generator=torch.Generator().manual_seed(0)) * 8
    beams = torch.zeros(3, 1), torch.zeros(3, 1).long()
    found = beam_step(logits, *beams, tree, width=1, normalize="vocab")
    exact = logits.double().log_softmax(-1)[:, 0, [7, 33123]].max(-1).values
    torch.testing.assert_close(found.end_scores[:, 0].double(), exact, atol=4e-6, rtol=2e-7)


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_threads_change_nothing(form: str) -> None:
    if reason := gflowgr.backends.cpp_missing():
        pytest.skip(reason)
    case = _large_case()
    one_prompt = (case.beams[0][:1], case.beams[1][:1], case.tree)

    def run() -> list[Tensor]:
        found: list[Tensor] = []
        for normalize in NORMALIZERS:
            options: dict[str, Any] = {"width": 30, "normalize": normalize}
            if form == "logits":
                found += beam_step(case.logits, *case.beams, **options)
                wide = case.logits[:1].repeat(1, 1, 5)  # few prompts: threads share the beams
                found += beam_step(wide, *one_prompt, **options)
            else:
                found += beam_step_hidden(case.hidden, case.weight, None, *case.beams, **options)
        return found

    alone = run()
    try:
        torch.set_num_threads(3)
        together = run()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_wide_child_ranges_and_wide_tokens(backend: str) -> None:
    rows = torch.tensor([[0, 70_000, 2], [0, 5, 300], [9, 70_001, 3], [9, 70_001, 2]])
    narrow = PrefixTree.from_identifiers(rows)
    wide = PrefixTree(torch.from_numpy(build_numpy(rows.numpy(), None, index_bytes=8)))
    logits = torch.randn(1, 4, 70_010, generator=torch.Generator().manual_seed(1))
    beams = (torch.zeros(1, 4), torch.tensor([[0, 1, 2, 5]]))
    for normalize in NORMALIZERS:
        found = beam_step(logits, *beams, wide, width=5, normalize=normalize)
        want = beam_step(logits, *beams, narrow, width=5, normalize=normalize)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert found.nodes.ge(0).sum() == 5
    assert found.end_nodes[0].tolist()[-1] == -1


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_prompts_or_no_beams(backend: str, shape: tuple[int, int]) -> None:
    tree = PrefixTree.from_identifiers([[1, 2], [1, 3]])
    empty = (torch.zeros(shape), torch.zeros(shape, dtype=torch.long), tree)
    for normalize in NORMALIZERS:
        steps = (
            beam_step(torch.zeros(*shape, 4), *empty, width=2, normalize=normalize),
            beam_step_hidden(
                torch.zeros(*shape, 6),
                torch.zeros(4, 6),
                None,
                *empty,
                width=2,
                normalize=normalize,
            ),
        )
        for step in steps:
            assert all(part.shape == (shape[0], 2) for part in step)
            assert bool((step.scores == -math.inf).all() and (step.end_nodes == -1).all())


def test_strided_inputs(backend: str) -> None:
    case = _large_case()
    want = beam_step(case.logits, *case.beams, width=7)
    logits = case.logits.transpose(0, 2).contiguous().transpose(0, 2)
    scores, nodes = (part.T.contiguous().T for part in case.beams[:2])
    found = beam_step(logits, scores, nodes, case.tree, width=7)
    assert torch.equal(found.nodes, want.nodes)
    torch.testing.assert_close(found.scores, want.scores)


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_registered_ops_pass_opcheck_and_compile_whole(backend: str, normalize: str) -> None:
    case = _large_case(prompts=2)
    scores, nodes, tree = case.beams
    live = torch.ones(tree.num_nodes, dtype=torch.bool)
    rest = (scores, nodes, tree.buffer, normalize, 0.9, live, torch.tensor([3]), 4)
    torch.library.opcheck(torch.ops.gflowgr.beam_step.default, (case.logits, *rest))
    head = (case.hidden, case.weight, None)
    torch.library.opcheck(torch.ops.gflowgr.beam_step_hidden.default, (*head, *rest))

    def step(logits: Tensor) -> Tensor:
        return beam_step(logits * 2, *case.beams, width=4, normalize=normalize).nodes + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.logits), step(case.logits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width must be at least 1; got 0"),
        ({"width": 2.0}, "width must be an integer; got float"),
        ({"normalize": "all"}, "normalize must be one of .* got 'all'"),
        ({"temperature": 0.0}, "temperature must be greater than 0; got 0"),
        ({"logits": torch.zeros(1, 2, 3)}, "logits has V = 3, but the tree holds tokens up to 3"),
        ({"logits": torch.zeros(2, 4)}, "logits must have shape"),
        ({"logits": torch.zeros(1, 2, 4).int()}, "logits must have dtype"),
        ({"scores": torch.zeros(1, 3)}, r"scores must have shape \[B=1, K=2\]"),
        ({"nodes": torch.zeros(1, 2).int()}, "nodes must have dtype int64; got int32"),
        ({"live": torch.ones(3).bool()}, r"live must have shape \[N=4\], as in tree"),
        ({"live": torch.ones(4)}, "live must have dtype bool"),
        ({"barred": torch.zeros(2).int()}, "barred must have dtype int64"),
        ({"barred_leaves": torch.zeros(2).int()}, "barred_leaves must have dtype int64"),
        ({"live_leaves": torch.ones(9).bool()}, r"live_leaves must have shape \[N=2\]"),
        ({"tree": None}, "tree must be a gflowgr.PrefixTree; got NoneType"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(1, 2, 4),
        "scores": torch.zeros(1, 2),
        "nodes": torch.zeros(1, 2).long(),
        "tree": PrefixTree.from_identifiers([[1, 2], [1, 3]]),
        "width": 2,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        beam_step(**{**arguments, **change})
