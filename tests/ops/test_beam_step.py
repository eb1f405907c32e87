"""beam_step and beam_step_hidden: the definition and the C++ kernel against plain Python loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dict_trie import DictTrie
from hypothesis import given, settings
from hypothesis import strategies as st
from step_oracle import Allowed, Candidate, step_oracle
from torch import Tensor

import gflowgr
from gflowgr._tree_layout import build_numpy
from gflowgr.ops.beam_step import BeamStep, beam_step, beam_step_hidden
from gflowgr.tree import PrefixTree

NORMALIZERS = ("vocab", "level", "children")
TOLERANCE = 3e-5


@pytest.fixture(params=["torch", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpp" and (reason := gflowgr.backends.cpp_missing()) is not None:
        pytest.skip(reason)
    with gflowgr.backend(request.param):
        yield request.param


class Case:
    """A catalogue, beams at any of its nodes, a model's output, and masks; from one seed."""

    def __init__(self, identifiers: list[tuple[int, ...]], seed: int) -> None:
        made = torch.Generator().manual_seed(seed)

        def pick(count: int) -> int:
            return int(torch.randint(count, (), generator=made))

        self.trie = DictTrie(identifiers, range(len(identifiers)))
        self.tree = PrefixTree.from_identifiers([list(row) for row in identifiers])
        prompts, beams = (1, 2, 3)[pick(3)], (1, 2, 12)[pick(3)]
        vocab, width = self.tree.vocab_size + pick(4), (3, 16, 21)[pick(3)]
        self.nodes = torch.randint(-1, self.tree.num_nodes, (prompts, beams), generator=made)
        if pick(3) == 0:
            self.nodes.clamp_(max=0)  # all at the root, which then is shared
        self.scores = torch.randn(prompts, beams, generator=made)
        self.scores[torch.rand(prompts, beams, generator=made) < 0.2] = -math.inf
        self.hidden = torch.randn(prompts, beams, width, generator=made)
        self.weight = torch.randn(vocab, width, generator=made)
        self.bias = torch.randn(vocab, generator=made) if pick(2) else None
        self.temperature = (1.0, 0.6)[pick(2)]
        self.width = (1, 2, 5, 40)[pick(4)]

        def mask(count: int) -> Tensor | None:
            return torch.rand(count, generator=made) < 0.7 if pick(2) else None

        def keys(count: int) -> Tensor | None:
            chosen = torch.rand(prompts * count, generator=made) < 0.3
            return chosen.nonzero()[:, 0] if pick(2) else None

        self.live, self.live_leaves = mask(self.tree.num_nodes), mask(self.tree.num_leaves)
        self.barred, self.barred_leaves = keys(self.tree.num_nodes), keys(self.tree.num_leaves)

    @property
    def options(self) -> dict[str, Any]:
        masks = ("live", "barred", "live_leaves", "barred_leaves")
        return {name: getattr(self, name) for name in ("width", "temperature", *masks)}

    def allowed(self, prompt: int) -> Allowed:
        def own(keys: Tensor | None, count: int) -> frozenset[int]:
            found = [] if keys is None else keys.tolist()
            return frozenset(key % count for key in found if key // count == prompt)

        return Allowed(
            None if self.live is None else self.live.tolist(),
            own(self.barred, self.tree.num_nodes),
            None if self.live_leaves is None else self.live_leaves.tolist(),
            own(self.barred_leaves, self.tree.num_leaves),
        )

    def check(self, found: BeamStep, logits: Tensor, normalize: str) -> None:
        for prompt in range(len(self.nodes)):
            open_ends, ends = step_oracle(
                self.trie,
                logits[prompt].tolist(),
                self.scores[prompt].tolist(),
                self.nodes[prompt].tolist(),
                normalize=normalize,
                temperature=self.temperature,
                allowed=self.allowed(prompt),
            )
            kept = [part[prompt].tolist() for part in found]
            _compare(list(zip(*kept[:4], strict=True)), open_ends)
            tokens = [self.trie.prefixes[node][-1] if node >= 0 else -1 for node in kept[5]]
            _compare(list(zip(kept[4], kept[6], tokens, kept[5], strict=True)), ends)


def _compare(slots: list[tuple[float, int, int, int]], expected: list[Candidate]) -> None:
    """Slots hold the best of the expected candidates, in order, up to rounding of the scores."""
    count = min(len(slots), len(expected))
    assert slots[count:] == [(-math.inf, -1, -1, -1)] * (len(slots) - count)
    kept = [Candidate(*slot) for slot in slots[:count]]
    assert kept == sorted(kept, key=lambda c: c.rank)
    scores = {(c.parent, c.token, c.node): c.score for c in expected}
    assert len({(c.parent, c.token, c.node) for c in kept}) == count
    for one, best in zip(kept, expected, strict=False):
        assert one.score == pytest.approx(best.score, abs=TOLERANCE)
        assert one.score == pytest.approx(
            scores[one.parent, one.token, one.node], abs=TOLERANCE, nan_ok=True
        )


@st.composite
def catalogues(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Identifiers of one or of several lengths, over narrow and wide codebooks, some full."""
    length, codes = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 5, 40, 400]))
    offset = draw(st.sampled_from([0, 3]))
    shortest = draw(st.sampled_from([1, length]))
    step = draw(st.sampled_from([0, codes]))  # codebooks that follow each other, or are shared
    token = st.integers(offset, offset + codes - 1)
    row = st.lists(token, min_size=shortest, max_size=length)
    row = row.map(lambda ids: tuple(code + step * k for k, code in enumerate(ids)))
    return draw(st.lists(row, min_size=1, max_size=60))


@pytest.mark.parametrize("normalize", NORMALIZERS)
@settings(max_examples=60)
@given(identifiers=catalogues(), seed=st.integers(0, 2**31))
def test_step_equals_plain_loops(
    normalize: str, identifiers: list[tuple[int, ...]], seed: int
) -> None:
    case = Case(identifiers, seed)
    logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias)
    for name in _backends():
        with gflowgr.backend(name):
            found = beam_step(
                logits, case.scores, case.nodes, case.tree, normalize=normalize, **case.options
            )
            case.check(found, logits, normalize)
            found = beam_step_hidden(
                *(case.hidden, case.weight, case.bias, case.scores, case.nodes, case.tree),
                normalize=normalize,
                **case.options,
            )
            case.check(found, logits, normalize)


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
    found = beam_step(logits, torch.zeros(3, 1), torch.zeros(3, 1).long(), tree, width=1)
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
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"width": 2.0}, "width must be an integer, got float"),
        ({"normalize": "all"}, "normalize must be one of .* got 'all'"),
        ({"temperature": 0.0}, "temperature must be greater than 0, got 0"),
        ({"logits": torch.zeros(1, 2, 3)}, "logits has V = 3, but the tree holds tokens up to 3"),
        ({"logits": torch.zeros(2, 4)}, "logits must have shape"),
        ({"logits": torch.zeros(1, 2, 4).double()}, "logits must have dtype"),
        ({"scores": torch.zeros(1, 3)}, r"scores must have shape \[B=1, K=2\]"),
        ({"nodes": torch.zeros(1, 2).int()}, "nodes must have dtype int64; got int32"),
        ({"live": torch.ones(3).bool()}, r"live must have shape \[N=4\], as in tree"),
        ({"live": torch.ones(4)}, "live must have dtype bool"),
        ({"barred": torch.zeros(2).int()}, "barred must have dtype int64"),
        ({"live_leaves": torch.ones(9).bool()}, r"live_leaves must have shape \[N=2\]"),
        ({"tree": None}, "tree must be a gflowgr.PrefixTree, got NoneType"),
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
