"""Every op x dtype x block shape, both kinds of search and replays, against float64, by device.

`benchmarks/gpu_smoke.py` runs them in one table, `tests/cuda/test_cases.py` one by one: on a GPU,
and a few of them on the CPU, so that the cases themselves are known to be right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from ops.beam_step.cases import NORMALIZERS, StepCase
from ops.flow_loss import cases as flow_cases
from ops.logprobs_children import cases as children_cases
from ops.logprobs_dense import cases as dense_cases
from torch import Tensor

import gflowgr
from gflowgr.decoding import GraphedSearch, constrained_beam_search
from gflowgr.decoding.graphed import capture
from gflowgr.ops import fused_flow_kl, fused_flow_loss
from gflowgr.ops.beam_step.op import beam_step, beam_step_hidden
from gflowgr.ops.logprobs import children
from gflowgr.tree import PrefixTree
from support.small_models import padded_prompts, small_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORM_TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2**-6, torch.float16: 2**-6}
"""Relative, in norm: the dense head keeps scores in 8 bits of precision for 16-bit inputs."""


@dataclass(frozen=True)
class GpuCase:
    """A case: its name, and what raises an AssertionError on a device where it is wrong."""

    group: str
    name: str
    run: Callable[[str], None]


# ---------------------------------------------------------------------- helpers


def kernels(op: str, device: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends with kernels that run an op there; an AssertionError where there are none."""
    reasons = gflowgr.available_backends(device, dtype)[op]
    found = [name for name in ("cuda", "triton", "cpp") if reasons[name] is None]
    assert found, f"{op} has no kernel on {device}: {reasons}"
    return found


def moved(value: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """On the device; floating tensors in the dtype, where there is one."""
    if isinstance(value, PrefixTree):
        return value.to(device)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def compare(
    function: Callable[..., Tensor],
    leaves: dict[str, Tensor],
    fixed: dict[str, Any],
    device: str,
    backend: str,
    dtype: torch.dtype,
) -> None:
    """A loss and its gradients on a backend, against the reference in float64 on the CPU."""
    results = []
    for where, kind, name in (("cpu", torch.float64, "torch"), (device, None, backend)):
        own = {k: moved(x, where, kind).detach().requires_grad_() for k, x in leaves.items()}
        with gflowgr.backend(name):
            loss = function(**own, **{k: moved(x, where) for k, x in fixed.items()})
            loss.backward()
        results.append([loss.detach(), *(x.grad for x in own.values())])
    for name, wanted, actual in zip(("loss", *leaves), *results, strict=True):
        assert actual is not None, f"no gradient of {name}"
        error = float((actual.cpu().double() - wanted).norm())
        limit = NORM_TOLERANCE[dtype] * max(0.1, float(wanted.norm()))
        assert error <= limit, f"{name} is off by {error:.2g}, over {limit:.2g}"


def captured(
    work: Callable[[], list[Tensor]], device: str
) -> tuple[Callable[[], None], list[Tensor]]:
    """What replays the work, and where its results appear; on a CPU it computes it again."""
    outputs = work()
    if device == "cpu":

        def again() -> None:
            for to, new in zip(outputs, work(), strict=True):
                to.copy_(new)

        return again, outputs
    return capture(work)


def check_replay(
    work: Callable[[list[Tensor]], list[Tensor]],
    inputs: list[Tensor],
    others: list[Tensor],
    device: str,
) -> None:
    """Replayed on other inputs it gives, bit by bit, what a call on them gives."""
    given = [x.to(device) for x in inputs]
    replay, outputs = captured(lambda: work(given), device)
    for to, new in zip(given, others, strict=True):
        to.copy_(new)
    replay()
    found = [output.clone() for output in outputs]
    wanted = work([x.to(device) for x in others])
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(one, other), f"output {place} of the replay differs"


# ---------------------------------------------------------------------- the dense head

BLOCKS = {"one block": (70, 33, 1001), "rows": (700, 33, 1001), "columns": (300, 33, 5001)}
"""Rows, width, vocabulary of each shape of blocks: odd widths and vocabularies."""


@contextmanager
def small_blocks(shape: str, device: str) -> Iterator[None]:
    """The Triton head with blocks of the fewest rows or columns that it allows."""
    if device == "cpu" or shape == "one block":
        yield
        return
    from gflowgr.kernels.logprobs_dense import launch

    with mock.patch.multiple(launch, block_bytes=lambda device: 1, STATISTICS_BYTES=1):
        yield


def dense_head(shape: str, dtype: torch.dtype, bias: str, device: str) -> None:
    case = dense_cases.make_case(*BLOCKS[shape], dtype=dtype, bias=bias != "no bias")
    if bias == "forbidden":
        assert case.bias is not None
        case.bias[::3] = -torch.inf
        allowed = case.bias.isfinite().nonzero()[:, 0]
        case.targets = torch.where(
            case.targets < 0, -1, allowed[case.targets.clamp(min=0) % len(allowed)]
        )
    with small_blocks(shape, device):
        for backend in kernels("dense_logprobs", device, dtype):
            dense_cases.check(case, backend, device=device)


def loss_inputs(dtype: torch.dtype, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Leaves and keywords of a fused loss: ragged trajectories, poisoned under the mask."""
    g = torch.Generator().manual_seed(0)
    shape, width, vocabulary = (40, 3, 4), 29, 301
    lengths = torch.randint(0, 5, shape[:2], generator=g)
    lengths[:, 0] = 4
    mask = torch.arange(4) < lengths[..., None]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g)

    leaves = {
        "hidden": normal(*shape, width).masked_fill(~mask[..., None], torch.nan).to(dtype),
        "weight": (normal(vocabulary, width) / 4).to(dtype),
        "bias": normal(vocabulary).to(dtype),
        "log_reward": 3 * normal(*shape[:2]),
    }
    if kind != "vargrad":
        leaves["balance"] = normal(*(shape[:1] if kind == "tb" else shape))
    tokens = torch.randint(0, vocabulary, shape, generator=g)
    return leaves, {"tokens": tokens, "mask": mask}


def fused(kind: str, dtype: torch.dtype, shape: str, device: str) -> None:
    def loss(**given: Any) -> Tensor:
        given = {"balance": None, **given}
        return fused_flow_loss(kind, **given, nll_weight=0.6).loss

    leaves, fixed = loss_inputs(dtype, kind)
    with small_blocks(shape, device):
        for backend in kernels("dense_flow_loss", device, dtype):
            compare(loss, leaves, fixed, device, backend, dtype)


# ---------------------------------------------------------------------- the tree's ops


def over_children(dtype: torch.dtype, gradient: str, slopes: str, device: str) -> None:
    case = children_cases.make_case(prompts=30, width=21, items=300, codes=40).to(*[dtype] * 3)
    kept = (
        mock.patch.object(children, "SAVED_LIMIT", 0) if slopes == "recomputed" else nullcontext()
    )
    for backend in kernels("children_logprobs", device, dtype):
        with kept, gflowgr.backend(backend):
            children_cases.check(case, device, sparse_grad=gradient == "sparse")


def over_flows(dtype: torch.dtype, device: str) -> None:
    case = children_cases.make_case(prompts=9, width=21, items=300, codes=40)
    rewards = torch.randn(9, 300, generator=torch.Generator().manual_seed(3))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, **given: Any) -> Tensor:
        flows = gflowgr.item_flows(given["tree"], given["rewards"].to(hidden.device))
        return fused_flow_kl(
            *(hidden, weight, given["tokens"], flows),
            tree=given["tree"],
            bias=bias,
            mask=given["mask"],
            temperature=0.7,
            nll_weight=0.3,
        ).loss

    leaves = {name: getattr(case, name).to(dtype) for name in ("hidden", "weight", "bias")}
    fixed = {"tree": case.tree, "tokens": case.tokens.clamp(min=0), "mask": case.mask}
    for backend in kernels("flow_kl", device, dtype):
        # Flows are made by the free choice: the ops that make them have kernels on the CPU only.
        compare(loss, leaves, fixed | {"rewards": rewards}, device, backend, dtype)


def flow_losses(kind: str, dtype: torch.dtype, device: str) -> None:
    for backend in kernels("flow_loss", device, dtype):
        with gflowgr.backend(backend):
            for reduction, masked in product(flow_cases.REDUCTIONS, (False, True)):
                case = flow_cases.FlowCase.make(
                    kind, (70, 3, 4), masked=masked, reduction=reduction, dtype=dtype
                )
                flow_cases.check_raw_op(torch.ops.gflowgr, case, device)


def walks(device: str) -> None:
    tree = PrefixTree.from_identifiers([[1, 5, 9], [1, 6], [2, 5, 9], [1, 5, 8, 3]])
    tokens = torch.randint(0, 11, (500, 4), generator=torch.Generator().manual_seed(0))
    tokens[:100] = torch.tensor([1, 5, 8, 3])
    with gflowgr.backend("torch"):
        wanted = tree.walk(tokens)
    for backend in kernels("tree_walk", device):
        with gflowgr.backend(backend):
            assert torch.equal(tree.to(device).walk(tokens.to(device)).cpu(), wanted)


def beams(normalize: str, device: str) -> None:
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        rows = torch.randint(0, 12, (60, 3), generator=g) + torch.tensor([0, 12, 24])
        identifiers = [tuple(row) for row in rows.tolist()]
        if seed % 2:
            identifiers += [row[: 1 + seed % 3] for row in identifiers[::3]]
        for backend in kernels("beam_step", device):
            with gflowgr.backend(backend):
                StepCase(identifiers, seed).check_both(normalize, device)


# ---------------------------------------------------------------------- searches and replays


def search_tree() -> PrefixTree:
    rows = torch.randint(0, 4, (40, 3), generator=torch.Generator().manual_seed(0))
    codes = sorted({tuple(row) for row in (rows + torch.tensor([3, 15, 30])).tolist()})
    return PrefixTree.from_identifiers(codes)


def search(family: str, dtype: torch.dtype, device: str) -> None:
    """Scores of all items; in float32 their order, too."""
    tree = search_tree()
    ids, mask = padded_prompts("left")
    results = []
    for where, kind in (("cpu", torch.float64), (device, dtype)):
        found = constrained_beam_search(
            *(small_model(family).to(where, kind), ids.to(where), mask.to(where)),
            tree.to(where),
            num_beams=tree.num_items,
            normalize="vocab",
        )
        order = found.items.argsort(1)
        results.append([x.cpu().gather(1, order.cpu()) for x in (found.items, found.scores)])
    (items, wanted), (found_items, scores) = results
    assert torch.equal(items, found_items), "not every item was found"
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(scores.double(), wanted.double(), rtol=0, atol=tolerance)


def replay_search(family: str, device: str) -> None:
    """A graph of the steps, captured for other prompts and excluded items; in float32."""
    tree, model = search_tree(), small_model(family)
    ids, mask = padded_prompts("left")
    seen = torch.tensor([[0, 5, -1]]).expand(len(ids), -1)
    wanted = constrained_beam_search(model, ids, mask, tree, num_beams=8, exclude=seen)
    found = GraphedSearch(model.to(device), tree.to(device), num_beams=8, multiple=4)
    found(ids.flip(0).to(device), mask.flip(0).to(device), exclude=(seen + 1).to(device))
    again = found(ids.to(device), mask.to(device), exclude=seen.to(device))
    assert torch.equal(again.items.cpu(), wanted.items), "the items of a replay differ"
    torch.testing.assert_close(again.scores.cpu(), wanted.scores, rtol=0, atol=1e-4)


def replay_dense(dtype: torch.dtype, device: str) -> None:
    leaves, fixed = loss_inputs(dtype, "tb")
    leaves = {k: x.nan_to_num() for k, x in leaves.items()}
    fixed = {k: x.to(device) for k, x in fixed.items()}

    def work(given: list[Tensor]) -> list[Tensor]:
        own = [x.detach().requires_grad_() for x in given]
        with gflowgr.backend(kernels("dense_flow_loss", device, dtype)[0]):
            loss = fused_flow_loss(
                "tb", **dict(zip(leaves, own, strict=True)), **fixed, nll_weight=0.6
            ).loss
            return [loss.detach(), *torch.autograd.grad(loss, own)]

    values = list(leaves.values())
    with gflowgr.ops.validation(False):
        check_replay(work, values, [x.flip(0) for x in values], device)


def replay_children(dtype: torch.dtype, device: str) -> None:
    case = children_cases.make_case(prompts=30, width=21, items=300, codes=40).to(*[dtype] * 3)
    other = children_cases.make_case(prompts=30, width=21, items=300, codes=40, seed=0)
    tree = case.on(device)

    def work(given: list[Tensor]) -> list[Tensor]:
        hidden, upstream = given
        return children_cases.run(replace(tree, hidden=hidden, upstream=upstream))

    check_replay(
        *(work, [case.hidden, case.upstream.float()]),
        *([case.hidden.flip(0), other.upstream.float().flip(1)], device),
    )


def replay_flow_loss(kind: str, device: str) -> None:
    one, other = (flow_cases.FlowCase.make(kind, (900, 3, 4), masked=True, seed=k) for k in (0, 1))
    names = [k for k, v in vars(one).items() if isinstance(v, Tensor)]

    def work(given: list[Tensor]) -> list[Tensor]:
        case = replace(one, **dict(zip(names, given, strict=True)))
        grad, needs = case.grad.float(), (True, True, case.target is not None)
        with gflowgr.backend(kernels("flow_loss", device)[0]):
            backward = torch.ops.gflowgr.flow_loss_backward(grad, *case.arguments(), *needs)
            return [torch.ops.gflowgr.flow_loss(*case.arguments()), *backward]

    check_replay(work, *([getattr(c, k) for k in names] for c in (one, other)), device)


def replay_beams(normalize: str, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 12, (300, 3), generator=g) + torch.tensor([0, 12, 24])
    tree = PrefixTree.from_identifiers(rows).to(device)
    weight = torch.randn(40, 16, generator=g).to(device)

    def draw() -> list[Tensor]:
        nodes = torch.randint(0, 12, (4, 5), generator=g)
        sizes = ((4, 5, 40), (4, 5, 16), (4, 5))
        return [*(torch.randn(size, generator=g) for size in sizes), nodes]

    def work(given: list[Tensor]) -> list[Tensor]:
        logits, hidden, scores, nodes = given
        options: dict[str, Any] = {"width": 8, "normalize": normalize}
        with gflowgr.backend(kernels("beam_step", device)[0]):
            one = beam_step(logits, scores, nodes, tree, **options)
            two = beam_step_hidden(hidden, weight, None, scores, nodes, tree, **options)
        return [*one, *two]

    check_replay(work, draw(), draw(), device)


def gpu_cases() -> list[GpuCase]:
    """All of them; what is cheap and basic first."""
    found: list[GpuCase] = []

    def add(group: str, function: Callable[..., None], *values: Any) -> None:
        text = [str(v).removeprefix("torch.") for v in values]
        name = ", ".join([function.__name__, *text]).replace("_", " ")
        found.append(GpuCase(group, name, partial(function, *values)))

    add("tree", walks)
    for kind, dtype in product(flow_cases.KINDS, (torch.float32, torch.float64)):
        if dtype == torch.float32 or kind == "tb":
            add("flow_loss", flow_losses, kind, dtype)
    for dtype, gradient, slopes in product(DTYPES, ("dense", "sparse"), ("kept", "recomputed")):
        add("children", over_children, dtype, gradient, slopes)
    for dtype in DTYPES:
        add("children", over_flows, dtype)
    for normalize in NORMALIZERS:
        add("beam", beams, normalize)
    for dtype in DTYPES:
        group = f"dense {str(dtype).removeprefix('torch.')}"
        for shape, bias in product(BLOCKS, ("bias", "no bias", "forbidden")):
            add(group, dense_head, shape, dtype, bias)
        for kind in flow_cases.KINDS if dtype == torch.float32 else ("tb",):
            add(group, fused, kind, dtype, "one block")
    for family, dtype in product(("t5", "gpt2", "qwen3"), (torch.float32, torch.bfloat16)):
        add("search", search, family, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        add("replay", replay_dense, dtype)
        add("replay", replay_children, dtype)
    for family in ("t5", "gpt2", "qwen3"):
        add("replay", replay_search, family)
    for kind in flow_cases.KINDS:
        add("replay", replay_flow_loss, kind)
    for normalize in NORMALIZERS:
        add("replay", replay_beams, normalize)
    return found
