"""The CUDA kernels of a beam search's step in the emulator (see test_emulated.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import emulation
from torch import Tensor

import gflowgr
from gflowgr.ops.beam_step.op import BeamStep, beam_step, beam_step_hidden
from gflowgr.tree import PrefixTree

from .cases import NORMALIZERS, TOLERANCE, StepCase, catalogues


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    with gflowgr.backend("cuda"):
        yield


def defined(*args: Any, **options: Any) -> BeamStep:
    """``beam_step`` as its reference has it."""
    with gflowgr.backend("torch"):
        return beam_step(*args, **options)


def same(a: BeamStep, b: BeamStep) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(found: BeamStep, want: BeamStep) -> None:
    """Logits are far enough apart that rounding does not change the order."""
    for name, one, other in zip(BeamStep._fields, found, want, strict=True):
        if one.dtype == torch.float32:
            torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0, equal_nan=True)
        else:
            assert torch.equal(one, other), name


def apart(*shape: int, seed: int = 0) -> Tensor:
    """Logits in a random order, each row's at least 1/64 apart and exact in half precision."""
    made = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=made).argsort(-1) / 64 - shape[-1] / 128


ONE = (torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long))


@settings(max_examples=8)
@given(normalize=st.sampled_from(NORMALIZERS), identifiers=catalogues(), seed=st.integers(0, 2**31))
def test_step_equals_plain_loops(
    normalize: str, identifiers: list[tuple[int, ...]], seed: int
) -> None:
    StepCase(identifiers, seed).check_both(normalize)


@pytest.mark.parametrize(
    ("dtype", "normalize"),
    [
        (torch.float32, "vocab"),
        (torch.bfloat16, "vocab"),
        (torch.float16, "vocab"),
        (torch.bfloat16, "level"),
        (torch.float16, "children"),
    ],
)
def test_dtypes_and_rows_at_any_address(dtype: torch.dtype, normalize: str) -> None:
    tree = PrefixTree.from_identifiers([[a, b] for a in range(0, 40, 3) for b in (41, 77, 99)])
    scores, nodes = torch.zeros(2, 3), torch.tensor([[0, 1, 2], [0, 3, -1]])
    for vocab in (104, 101):
        logits = (apart(2, 3, vocab) * 4).to(dtype)
        moved = torch.empty(logits.numel() + 1, dtype=dtype)[1:].view(logits.shape).copy_(logits)
        found = beam_step(moved, scores, nodes, tree, width=9, normalize=normalize)
        want = defined(logits.float(), scores, nodes, tree, width=9, normalize=normalize)
        check(found, want)


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_long_rows_are_cut_into_shares(normalize: str) -> None:
    """20 001 logits of two beams: 4 shares each, the last ones shorter or empty."""
    logits = apart(1, 2, 20_001) / 16
    scores, nodes = torch.tensor([[-3.0, 0.0]]), torch.tensor([[0, 1]])
    rows = [[1, b] for b in range(3, 5000)] + [[b] for b in range(2, 20_001, 2)]
    tree = PrefixTree.from_identifiers(rows)
    for width in (1, 30) if normalize == "vocab" else (30,):
        options: dict[str, Any] = {"width": width, "normalize": normalize}
        check(
            beam_step(logits, scores, nodes, tree, **options),
            defined(logits, scores, nodes, tree, **options),
        )


@pytest.mark.parametrize(("at", "value"), [(17_003, math.nan), (9_002, math.inf), (7, -math.inf)])
def test_a_value_that_is_not_finite_in_one_share(at: int, value: float) -> None:
    tree = PrefixTree.from_identifiers(torch.arange(0, 20_000, 7).unsqueeze(1))
    logits = apart(1, 1, 20_000)
    logits[0, 0, ::3] = -math.inf
    logits[0, 0, at] = value
    for normalize in NORMALIZERS:
        options: dict[str, Any] = {"width": 12, "normalize": normalize}
        check(beam_step(logits, *ONE, tree, **options), defined(logits, *ONE, tree, **options))


@pytest.mark.parametrize("width", [5, 700, 2500, 5000])
def test_many_children_in_any_order(width: int) -> None:
    """Ascending scores are the worst case: every round beats all before it. 5000 do not fit into
    shared memory."""
    tree = PrefixTree.from_identifiers(torch.arange(4100).unsqueeze(1))
    ascending = torch.arange(4100).view(1, 1, -1) / 64
    for logits in (ascending, ascending.flip(-1), apart(1, 1, 4100)):
        options: dict[str, Any] = {"width": width, "normalize": "children"}
        check(beam_step(logits, *ONE, tree, **options), defined(logits, *ONE, tree, **options))


@pytest.mark.parametrize("shares", [1, 2])
def test_ties_keep_the_order_of_beams_then_tokens(shares: int) -> None:
    """Also where they meet from several beams, shares and rounds."""
    children = 1300 if shares == 1 else 9000
    tree = PrefixTree.from_identifiers(torch.arange(children).unsqueeze(1))
    logits = torch.zeros(1, 3, children)
    logits[0, 1:, 50::100] = 1.0
    beams = (torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.long))
    step = beam_step(logits, *beams, tree, width=400)
    best = [(beam, token) for beam in (1, 2) for token in range(50, children, 100)]
    others = [(0, token) for token in range(children)]
    kept = list(zip(step.end_parents[0].tolist(), (step.end_nodes[0] - 1).tolist(), strict=True))
    assert kept == (best + others)[:400]


@pytest.mark.parametrize("kind", ["live", "barred"])
def test_masks_of_nodes_with_many_children(kind: str) -> None:
    rows = [[1]] + [[1, b] for b in range(2, 3000)] + [[5], [6, 2]]
    tree = PrefixTree.from_identifiers(rows)
    made = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"width": 20}
    if kind == "live":
        options["live"] = torch.rand(tree.num_nodes, generator=made) < 0.3
        options["live_leaves"] = torch.rand(tree.num_leaves, generator=made) < 0.3
    else:
        some = torch.rand(2 * tree.num_nodes, generator=made) < 0.5
        options["barred"] = some.nonzero()[:, 0]
        leaves = torch.rand(2 * tree.num_leaves, generator=made) < 0.5
        options["barred_leaves"] = leaves.nonzero()[:, 0]
    beams = (torch.zeros(2, 2), torch.tensor([[0, 1], [1, 0]]), tree)
    logits = apart(2, 2, 3001)
    check(beam_step(logits, *beams, **options), defined(logits, *beams, **options))


@pytest.mark.parametrize(
    ("place", "shape", "normalize"),
    [
        ("root", (66, 1, 13), "level"),
        ("root", (66, 1, 5), "children"),
        ("anywhere", (7, 11, 24), "children"),
        ("few", (40, 2, 13), "level"),
    ],
)
def test_hidden_states_of_shared_and_of_different_nodes(
    place: str, shape: tuple[int, int, int], normalize: str
) -> None:
    """Tiles of 64 beams at one node, at several, with few live; 66 prompts make two groups."""
    made = torch.Generator().manual_seed(1)
    rows = torch.stack([torch.randint(0, n, (900,), generator=made) for n in (90, 30, 3)], 1)
    tree = PrefixTree.from_identifiers(rows + torch.tensor([0, 90, 120]))
    hidden = torch.randn(shape, generator=made)
    weight = torch.randn(130, shape[2], generator=made)
    bias = torch.randn(130, generator=made)
    nodes = {
        "root": torch.zeros(shape[:2], dtype=torch.long),
        "anywhere": torch.randint(-1, tree.num_nodes, shape[:2], generator=made),
        "few": torch.where(torch.rand(shape[:2], generator=made) < 0.1, 0, -1),
    }[place]
    beams = (torch.randn(shape[:2], generator=made), nodes, tree)
    barred = torch.arange(0, shape[0] * tree.num_nodes, 3)  # other nodes in each prompt
    options: dict[str, Any] = {"width": 6, "normalize": normalize, "temperature": 0.8}
    logits = torch.nn.functional.linear(hidden, weight, bias)
    check(
        beam_step_hidden(hidden, weight, bias, *beams, **options, barred=barred),
        defined(logits, *beams, **options, barred=barred),
    )


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [torch.bfloat16, torch.float16])
def test_hidden_states_in_half_precision(hidden: torch.dtype, weight: torch.dtype) -> None:
    case = StepCase([(a, b) for a in range(9) for b in range(9 + a)], seed=5)
    case.hidden, case.weight = case.hidden.to(hidden), case.weight.to(weight)
    beams = (case.scores, case.nodes, case.tree)
    found = beam_step_hidden(
        case.hidden, case.weight, case.bias, *beams, normalize="children", **case.options
    )
    logits = torch.nn.functional.linear(case.hidden.float(), case.weight.float(), case.bias)
    case.check(found, logits, "children")


def test_the_order_of_threads_and_blocks_does_not_matter() -> None:
    made = torch.Generator().manual_seed(2)
    tree = PrefixTree.from_identifiers(
        [[a, b] for a in range(200) for b in range(2)] + [[700]]  # ragged: both kinds of result
    )
    scores, nodes = torch.randn(2, 2, generator=made), torch.tensor([[0, 1], [0, 0]])
    logits = torch.randn(1, 2, 9000, generator=made).bfloat16()  # two shares
    hidden, weight = torch.randn(2, 2, 8, generator=made), torch.randn(9000, 8, generator=made)
    results = []
    for order in emulation.SCHEDULES:
        with emulation.schedule(order):
            one = (scores[:1], nodes[:1], tree)
            steps = [beam_step(logits, *one, width=50, normalize="vocab")]
            for normalize in ("level", "children"):
                steps.append(
                    beam_step_hidden(
                        *(hidden, weight, None, scores, nodes, tree),
                        width=50,
                        normalize=normalize,
                    )
                )
            results.append(steps)
    for other in results[1:]:
        assert all(map(same, results[0], other))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_prompts_or_no_beams(shape: tuple[int, int]) -> None:
    tree = PrefixTree.from_identifiers([[1, 2], [1, 3]])
    empty = (torch.zeros(shape), torch.zeros(shape, dtype=torch.long), tree)
    for normalize in NORMALIZERS:
        head = (torch.zeros(*shape, 6), torch.zeros(4, 6), None)
        for step in (
            beam_step(torch.zeros(*shape, 4), *empty, width=2, normalize=normalize),
            beam_step_hidden(*head, *empty, width=2, normalize=normalize),
        ):
            assert all(part.shape == (shape[0], 2) for part in step)
            assert bool((step.scores == -math.inf).all() and (step.end_nodes == -1).all())


def test_wrong_arguments_are_named() -> None:
    tree = PrefixTree.from_identifiers([[1, 2], [1, 3]]).buffer
    step = torch.ops.gflowgr_cuda.beam_step
    rest = (tree, None, "vocab", 1.0, None, None, None, None, 2)
    with pytest.raises(RuntimeError, match="logits must be float32, bfloat16 or float16"):
        step(torch.zeros(1, 1, 4).double(), *ONE, *rest)
    with pytest.raises(RuntimeError, match=r"logits must be \[B, K, V\] with B and K of scores"):
        step(torch.zeros(1, 2, 4), *ONE, *rest)
    with pytest.raises(RuntimeError, match="temperature must be a number above 0; got -1"):
        step(torch.zeros(1, 1, 4), *ONE, *rest[:3], -1.0, *rest[4:])
    many = torch.zeros(1, 70_000)
    with pytest.raises(RuntimeError, match="too many candidates: 1 prompts x 70000 beams"):
        step(torch.zeros(1, 70_000, 4), many, many.long(), *rest[:-1], 70_000)
