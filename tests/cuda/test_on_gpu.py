"""The CUDA kernels on a GPU: cases like the emulator's, large inputs, graphs, no waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ops.beam_step.cases import NORMALIZERS, TOLERANCE, StepCase
from ops.flow_loss.cases import KINDS, REDUCTIONS, FlowCase
from ops.flow_loss.cases import check_raw_op as check_flow
from ops.logprobs_children.cases import ChildrenCase, shop
from ops.logprobs_children.cases import check_raw_op as check_children
from torch import Tensor

import gflowgr
from gflowgr import backends
from gflowgr.ops.beam_step.op import BeamStep, beam_step, beam_step_hidden
from gflowgr.tree import PrefixTree

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda() -> Any:
    """The namespace of the raw ops; skips with the reason where they cannot run."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if backends.cuda_missing() is not None:
        pytest.skip(f"cuda: {backends.cuda_missing()}")
    return torch.ops.gflowgr_cuda


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within, whatever waits for the GPU raises; that it does is tried first."""
    ready = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            ready.item()
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flow_loss(kind: str, reduction: str, masked: bool, dtype: torch.dtype, cuda: Any) -> None:
    for shape in ((70, 3, 4), (1, 1, 1), (3, 40, 50), (20_000, 2, 3)):
        case = FlowCase.make(kind, shape, masked=masked, reduction=reduction, dtype=dtype)
        check_flow(cuda, case, "cuda")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_children(dtype: torch.dtype, sparse: bool, recompute: bool, cuda: Any) -> None:
    items = shop(300, (90, 20, 4, 3))
    items[::7, 3] = -1
    for width in (40, 13):
        case = ChildrenCase.make(
            items, (30, 3), width, bias=True, padded=True, dtypes=(dtype, dtype)
        )
        check_children(cuda, case, "cuda", sparse=sparse, recompute=recompute)


def large_case(dtype: torch.dtype) -> ChildrenCase:
    """Thousands of trajectories over Beauty-sized levels."""
    identifiers = shop(12_000, (256, 256, 256, 256))
    return ChildrenCase.make(identifiers, (1024, 4), 256, dtypes=(dtype, dtype))


def test_children_of_many_trajectories(cuda: Any) -> None:
    """Against the same kernels on a part of the trajectories, which float64 has checked above."""
    case = large_case(torch.float32)
    whole = case.run(cuda, "cuda")
    again = case.run(cuda, "cuda")
    assert all(torch.equal(whole[name], again[name]) for name in whole), "not deterministic"
    totals = {"weight": torch.zeros_like(whole["weight"], dtype=torch.float64)}
    for begin in range(0, 1024, 128):
        part = slice(begin, begin + 128)
        piece = ChildrenCase(
            *(case.hidden[part], case.weight, None, case.tokens[part], None, case.tree),
            case.grad[part],
        ).run(cuda, "cuda")
        torch.testing.assert_close(piece["log_pf"], whole["log_pf"][part])
        torch.testing.assert_close(piece["hidden"], whole["hidden"][part])
        totals["weight"] += piece["weight"].double()
    torch.testing.assert_close(whole["weight"].double(), totals["weight"], rtol=1e-4, atol=1e-4)


def captured(work: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of the work, and where its results appear."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    return graph, outputs


@pytest.mark.parametrize("kind", KINDS)
def test_flow_loss_in_a_graph(kind: str, cuda: Any) -> None:
    """Replayed on other data it computes what a call on them does: nothing was read by the host."""
    case = FlowCase.make(kind, (9000, 3, 4), masked=True).on("cuda")
    other = FlowCase.make(kind, (9000, 3, 4), masked=True, seed=1).on("cuda")
    needs = (True, True, case.target is not None)
    grad = case.grad.float()

    def work(arguments: tuple[Any, ...]) -> list[Tensor]:
        return [
            cuda.flow_loss(*arguments),
            *cuda.flow_loss_backward(grad, *arguments, *needs),
        ]

    graph, outputs = captured(lambda: work(case.arguments()))
    expected = work(other.arguments())
    for to, new in zip(case.arguments(), other.arguments(), strict=True):
        if isinstance(to, Tensor):
            to.copy_(new)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_children_in_a_graph(cuda: Any) -> None:
    identifiers = shop(300, (90, 20, 4))
    case = ChildrenCase.make(identifiers, (200, 3), 32, bias=True)
    other = ChildrenCase.make(identifiers, (200, 3), 32, bias=True, seed=1)
    changing = [tensor.cuda() for tensor in (case.hidden, case.tokens, case.grad)]
    weight, bias, tree = case.weight.cuda(), case.bias.cuda(), case.tree.buffer.cuda()  # type: ignore[union-attr]

    def work() -> list[Tensor]:
        hidden, tokens, grad = changing
        inputs = (hidden, weight, bias, tokens, None, tree, 1.0)
        log_pf, slopes, plan, _ = cuda.children_logprobs(*inputs, case.saved())
        dense = torch.zeros_like(weight)
        d_hidden, _, _, d_bias = cuda.children_backward(
            grad, *inputs, log_pf, slopes, plan, True, dense, True, False
        )
        return [log_pf, d_hidden, dense, d_bias]

    graph, outputs = captured(work)
    for to, new in zip(changing, (other.hidden, other.tokens, other.grad), strict=True):
        to.copy_(new)
    graph.replay()
    replayed = [output.clone() for output in outputs]
    assert all(torch.equal(a, b) for a, b in zip(replayed, work(), strict=True))


def test_nothing_waits_for_the_gpu(cuda: Any) -> None:
    case = ChildrenCase.make(shop(300, (90, 20, 4)), (50, 3), 32)
    inputs = tuple(
        value.cuda() if isinstance(value, Tensor) else value
        for value in (case.hidden, case.weight, None, case.tokens, None, case.tree.buffer, 1.0)
    )
    grad = case.grad.cuda()

    def work() -> list[Tensor]:
        dense = torch.zeros_like(case.weight, device="cuda")
        log_pf, slopes, plan, _ = cuda.children_logprobs(*inputs, case.saved())
        d_hidden, *_ = cuda.children_backward(
            grad, *inputs, log_pf, slopes, plan, True, dense, False, False
        )
        return [log_pf, d_hidden, dense]

    expected = work()
    with no_waiting():
        found = work()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(bool(tensor.any()) for tensor in found)


# ---------------------------------------------------------------------- a beam search's step


class Step:
    """Random beams in a random catalogue, on the GPU."""

    def __init__(self, prompts: int, beams: int, vocab: int, dtype: torch.dtype, seed: int) -> None:
        made = torch.Generator().manual_seed(seed)
        codes = (vocab - 512, 256, 256)
        self.tree = PrefixTree.from_identifiers(shop(200_000, codes)).to("cuda")
        self.nodes = torch.randint(0, 2 * codes[0], (prompts, beams), generator=made).cuda()
        self.nodes[:, 0] = 0
        self.scores = torch.randn(prompts, beams, generator=made).cuda()
        self.logits = torch.randn(prompts, beams, vocab, generator=made).to("cuda", dtype)
        self.hidden = torch.randn(prompts, beams, 64, generator=made).to("cuda", dtype)
        self.weight = torch.randn(vocab, 64, generator=made).to("cuda", dtype) / 8
        self.live = (torch.rand(self.tree.num_nodes, generator=made) < 0.9).cuda()

    @property
    def changing(self) -> list[Tensor]:
        return [self.logits, self.hidden, self.scores, self.nodes]

    def run(self, normalize: str, *, hidden: bool = False) -> BeamStep:
        options: dict[str, Any] = {"width": 20, "normalize": normalize, "live": self.live}
        beams = (self.scores, self.nodes, self.tree)
        if hidden:
            return beam_step_hidden(self.hidden, self.weight, None, *beams, **options)
        return beam_step(self.logits, *beams, **options)


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_beam_step_equals_plain_loops(normalize: str, cuda: Any) -> None:
    for seed in range(20):
        identifiers = [tuple(row) for row in shop(60, (12, 30, 4), seed).tolist()]
        if seed % 2:
            identifiers += [row[: 1 + seed % 3] for row in identifiers[::3]]  # prefixes too
        case = StepCase(identifiers, seed)
        with gflowgr.backend("cuda"):
            case.check_both(normalize, "cuda")


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 20, 33_124), (1, 1, 33_124), (3, 7, 1027)])
def test_beam_step_of_long_rows(
    shape: tuple[int, int, int], dtype: torch.dtype, normalize: str, cuda: Any
) -> None:
    step = Step(*shape, dtype, 0)
    for hidden in (False, True):
        with gflowgr.backend("cuda"):
            found, again = (step.run(normalize, hidden=hidden) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        with gflowgr.backend("torch"):
            want = step.run(normalize, hidden=hidden)
        tolerance = 0.05 if hidden and normalize == "vocab" else TOLERANCE
        for name in ("scores", "end_scores"):
            torch.testing.assert_close(
                getattr(found, name), getattr(want, name), atol=tolerance, rtol=0
            )
        if tolerance == TOLERANCE and dtype == torch.float32:
            assert (found.nodes == want.nodes).float().mean() > 0.98  # but for near ties


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("shape", [(8, 4, 2000), (2, 1, 33_124)])
def test_beam_step_in_a_graph(shape: tuple[int, int, int], normalize: str, cuda: Any) -> None:
    """Replayed on other beams it computes what a call on them does."""
    step, other = Step(*shape, torch.float32, 0), Step(*shape, torch.float32, 1)

    def work(of: Step) -> list[Tensor]:
        return [*of.run(normalize), *of.run(normalize, hidden=True)]

    with gflowgr.backend("cuda"):
        graph, outputs = captured(lambda: work(step))
        for to, new in zip(step.changing, other.changing, strict=True):
            to.copy_(new)
        graph.replay()
        replayed = [output.clone() for output in outputs]
        assert all(torch.equal(a, b) for a, b in zip(replayed, work(step), strict=True))


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_beam_step_waits_for_nothing(normalize: str, cuda: Any) -> None:
    step = Step(8, 4, 2000, torch.bfloat16, 0)
    with gflowgr.backend("cuda"):
        # The sizes of the codebooks are read once per tree: here.
        expected = [step.run(normalize, hidden=hidden) for hidden in (False, True)]
        with no_waiting():
            found = [step.run(normalize, hidden=hidden) for hidden in (False, True)]
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert (one.scores > -torch.inf).any()
