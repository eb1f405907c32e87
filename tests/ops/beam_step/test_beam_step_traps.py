"""Known mistakes of constrained decoders in one step, a test for each."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from support import emulation
from torch import Tensor

import gflowgr
from gflowgr import backends
from gflowgr.ops.beam_step.op import BeamStep, beam_step, beam_step_hidden
from gflowgr.tree import PrefixTree

ROOT = torch.zeros(1, 1, dtype=torch.long)
SURE = torch.zeros(1, 1)
NORMALIZERS = ("vocab", "level", "children")


@pytest.fixture(params=emulation.cpu_backends(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpp" and (reason := gflowgr.backends.cpp_missing()) is not None:
        pytest.skip(reason)
    with gflowgr.backend(request.param):
        yield request.param


@pytest.fixture(params=NORMALIZERS)
def normalize(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def row(*logits: float) -> Tensor:
    return torch.tensor(logits).view(1, 1, -1)


def real(values: Tensor) -> list[int]:
    """Entries of the first prompt up to the empty slots, which must all be at the end."""
    found: list[int] = values[0].tolist()
    count = sum(value >= 0 for value in found)
    assert found[count:] == [-1] * (len(found) - count)
    return found[:count]


def same(a: BeamStep, b: BeamStep) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_more_beams_than_candidates_leave_flagged_empty_slots(normalize: str) -> None:
    tree = PrefixTree.from_identifiers([[1], [2]])
    step = beam_step(row(9.0, 1.0, 2.0, 9.0), SURE, ROOT, tree, width=6, normalize=normalize)
    assert real(step.end_nodes) == [2, 1]
    assert step.end_scores[0, 2:].tolist() == [-math.inf] * 4
    assert step.end_parents.tolist() == [[0, 0, -1, -1, -1, -1]]
    assert step.tokens.tolist() == step.nodes.tolist() == [[-1] * 6]  # nothing goes on


def test_unsorted_and_duplicate_identifiers_lose_nothing(normalize: str) -> None:
    rows = [[3, 1], [1, 2], [3, 0], [1, 2], [2, 2], [3, 1]]
    logits = torch.randn(1, 1, 5)
    steps = [
        beam_step(
            logits, SURE, ROOT, PrefixTree.from_identifiers(ids), width=4, normalize=normalize
        )
        for ids in (rows, sorted(set(map(tuple, rows))))
    ]
    assert same(*steps)
    assert sorted(real(steps[0].tokens)) == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_logits_of_valid_tokens_beat_high_ones_of_invalid_tokens(
    dtype: torch.dtype, normalize: str
) -> None:
    # An additive mask of -1e6 is -inf in float16, one of -1e9 swallows the logit in float32.
    tree = PrefixTree.from_identifiers([[1], [2], [3]])
    logits = row(60000.0, -32768.0, -32512.0, -math.inf, 50000.0).to(dtype)
    step = beam_step(logits, SURE, ROOT, tree, width=3, normalize=normalize)
    assert real(step.end_nodes) == [2, 1]  # and what the model forbids is not there at all
    assert float(step.end_scores[0, 0] - step.end_scores[0, 1]) == float(
        logits[0, 0, 2] - logits[0, 0, 1]
    )


def test_row_of_minus_infinity_gives_nothing_and_no_nan(normalize: str) -> None:
    tree = PrefixTree.from_identifiers([[1, 1], [2, 1]])
    logits = torch.full((1, 2, 4), -math.inf)
    logits[0, 1] = 0.0
    beams = (torch.zeros(1, 2), torch.zeros(1, 2).long())
    step = beam_step(logits, *beams, tree, width=4, normalize=normalize)
    assert real(step.parents) == [1, 1]  # the other beam is not harmed
    hidden = torch.tensor([[[1.0], [0.0]]])
    bias = torch.full((4,), -math.inf)
    step = beam_step_hidden(
        hidden, torch.zeros(4, 1), bias, *beams, tree, width=4, normalize=normalize
    )
    assert real(step.nodes) == []


def test_children_at_minus_infinity_give_nothing_beside_other_logits(normalize: str) -> None:
    tree = PrefixTree.from_identifiers([[1], [3]])
    logits = row(5.0, -math.inf, 4.0, -math.inf)
    step = beam_step(logits, SURE, ROOT, tree, width=2, normalize=normalize)
    assert real(step.end_nodes) == []
    assert not bool(step.end_scores.isnan().any())


@pytest.mark.parametrize("levels", [1, 2])
def test_a_forbidden_token_stays_forbidden_beside_a_nan_score(normalize: str, levels: int) -> None:
    # The beam's NaN makes NaN of every child's score, and NaN sorts before every number.
    tree = PrefixTree.from_identifiers([[token] * levels for token in (1, 2, 3)])
    logits, nan = row(0.0, 1.0, -math.inf, 2.0), torch.full((1, 1), math.nan)
    bias = logits.flatten()
    for step in (
        beam_step(logits, nan, ROOT, tree, width=3, normalize=normalize),
        beam_step_hidden(
            torch.zeros(1, 1, 2),
            torch.ones(4, 2),
            bias,
            nan,
            ROOT,
            tree,
            width=3,
            normalize=normalize,
        ),
    ):
        kept, scores = (
            (step.end_nodes, step.end_scores) if levels == 1 else (step.nodes, step.scores)
        )
        assert real(kept) == [1, 3]
        assert scores[0, :2].isnan().all()
        assert scores[0, 2] == -math.inf


def test_nan_logits_sort_first_and_are_not_hidden(normalize: str) -> None:
    tree = PrefixTree.from_identifiers([[1, 1], [2, 1]])
    logits = torch.zeros(1, 2, 40)
    logits[0, 1, 2] = math.nan
    beams = (torch.tensor([[0.0, -50.0]]), torch.zeros(1, 2).long())
    step = beam_step(logits, *beams, tree, width=2, normalize=normalize)
    assert bool(step.scores.isnan().all())
    assert real(step.parents) == [1, 1]
    assert real(step.tokens) == [1, 2]
    # A beam that is none cannot spoil the others.
    step = beam_step(logits, *(torch.tensor([[0.0, -math.inf]]), beams[1]), tree, width=2)
    assert real(step.parents) == [0, 0]
    assert not bool(step.scores.isnan().any())


def test_nan_of_a_token_outside_the_normaliser_does_no_harm() -> None:
    tree = PrefixTree.from_identifiers([[1], [2]])
    logits = row(math.nan, 0.0, 1.0, math.nan)
    whole = beam_step(logits, SURE, ROOT, tree, width=1, normalize="vocab")
    assert bool(whole.end_scores.isnan().all())
    for normalize in ("level", "children"):
        step = beam_step(logits, SURE, ROOT, tree, width=1, normalize=normalize)
        assert float(step.end_scores) == pytest.approx(-math.log1p(math.exp(-1)))


def test_infinite_logit_is_as_in_log_softmax() -> None:
    tree = PrefixTree.from_identifiers([[1], [2]])
    step = beam_step(row(math.inf, 0.0, 1.0), SURE, ROOT, tree, width=2, normalize="vocab")
    assert real(step.end_nodes) == []  # probability 0
    step = beam_step(row(0.0, math.inf, 1.0), SURE, ROOT, tree, width=2, normalize="vocab")
    assert bool(step.end_scores[0, 0].isnan())
    assert real(step.end_nodes) == [1]


def test_special_tokens_cannot_be_reached(normalize: str) -> None:
    # Tokens 0, 1 and 2 stand for padding, end and mask: the model wants nothing else.
    tree = PrefixTree.from_identifiers([[3, 5], [4, 6]])
    logits = row(100.0, 100.0, 100.0, 0.0, 1.0, 100.0, 100.0, 100.0)
    step = beam_step(logits, SURE, ROOT, tree, width=5, normalize=normalize)
    assert real(step.tokens) == [4, 3]


def test_normalisers_rank_beams_differently() -> None:
    # Two beams of equal score with one child each: what is left of the probability differs.
    tree = PrefixTree.from_identifiers([[1, 3], [2, 4], [2, 5]])
    beams = (torch.tensor([[0.0, -0.1]]), torch.tensor([[1, 2]]))
    logits = torch.tensor([[[8.0, 0, 0, 1.0, 0, 0], [0.0, 0, 0, 0, 3.0, 0]]])
    by_kind = {
        kind: real(beam_step(logits, *beams, tree, width=3, normalize=kind).end_nodes)
        for kind in NORMALIZERS
    }
    assert by_kind == {"vocab": [4, 5, 3], "level": [4, 3, 5], "children": [3, 4, 5]}


def test_identifier_that_is_a_prefix_counts_among_both(normalize: str) -> None:
    tree = PrefixTree.from_identifiers([[1], [1, 2], [3], [2, 1]])
    step = beam_step(row(0.0, 3.0, 2.0, 1.0), SURE, ROOT, tree, width=3, normalize=normalize)
    assert real(step.tokens) == [1, 2]
    assert real(step.end_nodes) == [1, 3]
    assert step.scores[0, 0] == step.end_scores[0, 0]


def test_ended_prefix_whose_continuations_are_all_gone_takes_no_beam(normalize: str) -> None:
    tree = PrefixTree.from_identifiers([[1], [1, 2], [1, 3], [2, 1]])
    logits = row(0.0, 9.0, 0.0, 0.0)
    options = {"width": 1, "normalize": normalize}
    # Items 1 and 2 are out of stock; item 0, their prefix, is not.
    live = tree.available_nodes(torch.tensor([True, False, False, True]))
    step = beam_step(logits, SURE, ROOT, tree, live=live, **options)
    assert (real(step.tokens), real(step.end_nodes)) == ([2], [1])
    # One is out of stock, one was seen by this prompt.
    live = tree.available_nodes(torch.tensor([True, False, True, True]))
    seen = torch.tensor([int(tree.walk(torch.tensor([1, 3]))[-1])])
    step = beam_step(logits, SURE, ROOT, tree, live=live, barred=seen, **options)
    assert (real(step.tokens), real(step.end_nodes)) == ([2], [1])


def test_node_that_lives_by_its_children_does_not_end(normalize: str) -> None:
    tree = PrefixTree.from_identifiers([[1], [1, 2], [3]])
    gone = torch.tensor([False, True, True])
    leaf = tree.leaf_of(torch.tensor(0))
    options = {"live": tree.available_nodes(gone), "width": 1, "normalize": normalize}
    logits = row(0.0, 9.0, 0.0, 0.0)
    leaves = torch.ones(tree.num_leaves, dtype=torch.bool)
    leaves[leaf] = False
    for given in ({"live_leaves": leaves}, {"barred_leaves": leaf.view(1)}):
        step = beam_step(logits, SURE, ROOT, tree, **given, **options)
        assert (real(step.tokens), real(step.end_nodes)) == ([1], [2])


def test_dead_ends_are_not_entered(normalize: str) -> None:
    tree = PrefixTree.from_identifiers([[1, 1], [1, 2], [2, 1]])
    live = tree.available_nodes(torch.tensor([False, False, True]))
    logits = row(0.0, 9.0, 0.0)
    step = beam_step(logits, SURE, ROOT, tree, width=2, live=live, normalize=normalize)
    assert real(step.tokens) == [2]


def test_bars_hold_for_one_prompt_only_and_leave_the_normaliser(normalize: str) -> None:
    tree = PrefixTree.from_identifiers([[1], [2], [3]])
    logits = row(0.0, 3.0, 2.0, 1.0).expand(3, 1, 4)
    beams = (SURE.expand(3, 1), ROOT.expand(3, 1))
    free = beam_step(logits, *beams, tree, width=3, normalize=normalize)
    barred = torch.tensor([1 * tree.num_nodes + 1, 2 * tree.num_nodes + 3])
    step = beam_step(logits, *beams, tree, width=3, barred=barred, normalize=normalize)
    assert step.end_nodes.tolist() == [[1, 2, 3], [2, 3, -1], [1, 2, -1]]
    assert torch.equal(step.end_scores[1, :2], free.end_scores[1, 1:])
    nothing = torch.empty(0, dtype=torch.long)
    assert same(free, beam_step(logits, *beams, tree, width=3, barred=nothing, normalize=normalize))


@pytest.mark.parametrize("width", [1, 3, 70])
def test_ties_keep_the_order_of_beams_then_tokens(width: int, normalize: str) -> None:
    rows = [[a, b] for a in range(3) for b in range(50)]
    tree = PrefixTree.from_identifiers(rows)
    beams = (torch.zeros(1, 3), torch.tensor([[2, 1, 3]]))
    step = beam_step(torch.zeros(1, 3, 51), *beams, tree, width=width, normalize=normalize)
    expected = [
        (parent, node)
        for parent, first in ((0, 54), (1, 4), (2, 104))
        for node in range(first, first + 50)
    ]
    kept = list(zip(step.end_parents[0].tolist(), step.end_nodes[0].tolist(), strict=True))
    assert kept == expected[:width]
    # Zero has two signs, one value.
    zeros = torch.tensor([[-0.0, 0.0, -0.0]])
    again = beam_step(
        torch.zeros(1, 3, 51), zeros, beams[1], tree, width=width, normalize=normalize
    )
    assert torch.equal(again.end_nodes, step.end_nodes)


def test_beams_may_sit_at_different_depths(normalize: str) -> None:
    tree = PrefixTree.from_identifiers([[1, 2, 3], [4]])
    beams = (torch.zeros(1, 4), torch.tensor([[3, 0, -1, 1]]))  # [1, 2], root, none, [1]
    step = beam_step(torch.zeros(1, 4, 5), *beams, tree, width=4, normalize=normalize)
    kept = zip(real(step.parents), real(step.tokens), strict=True)
    assert sorted(kept) == [(1, 1), (3, 2)]
    assert sorted(real(step.end_parents)) == [0, 1]


def test_leaf_and_unknown_nodes_have_no_children(normalize: str) -> None:
    tree = PrefixTree.from_identifiers([[1], [2]])
    beams = (torch.zeros(1, 3), torch.tensor([[1, 2, -1]]))
    step = beam_step(torch.zeros(1, 3, 4), *beams, tree, width=2, normalize=normalize)
    assert real(step.nodes) == real(step.end_nodes) == []


@pytest.mark.parametrize("score", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_forbidden_token_is_not_taken_from_a_beam_whose_score_makes_nan_of_it(
    name: str, score: float
) -> None:
    if name == "cpp" and (missing := backends.cpp_missing()):
        pytest.skip(missing)
    tree = PrefixTree.from_identifiers([[1], [2], [3]])
    logits = torch.tensor([[[0.0, -math.inf, 0.0, 0.0]]])
    with backends.backend(name):
        step = beam_step(logits, torch.tensor([[score]]), torch.zeros(1, 1).long(), tree, width=3)
    assert sorted(step.end_nodes[0].tolist()) == [-1, 2, 3]
