"""The cases: every op's variants at a shape; those of the losses are put together here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.beam_step import step_case
from benchmarks.harness import floors, ours, plain
from benchmarks.harness.case import Case, Variant
from benchmarks.harness.floors import Floor
from benchmarks.harness.inputs import Inputs, catalogue, head_inputs, loss_inputs
from benchmarks.harness.peers import KEYS, PEERS, Peer, Unusable
from benchmarks.harness.shapes import (
    GROUPS,
    AnyShape,
    ScoreShape,
    SearchShape,
    Shape,
    StepShape,
    ThroughputShape,
    TrainShape,
    TreeShape,
)
from benchmarks.search import score_case, search_case
from benchmarks.train_step import train_step_case
from benchmarks.training import throughput_case
from benchmarks.tree import tree_case
from gflowgr.tree import PrefixTree

Forward = Callable[[Inputs], Tensor]
FLOOR = "bare products"


def build_case(
    op: str,
    shape: AnyShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...] = KEYS,
) -> Case:
    """The case with every variant that is installed; the others in ``missing``, with reasons."""
    if isinstance(shape, StepShape):
        return step_case(op, shape, device, peers)
    if isinstance(shape, SearchShape):
        return search_case(op, shape, device, peers)
    if isinstance(shape, ScoreShape):
        return score_case(op, shape, device, peers)
    if isinstance(shape, TreeShape):
        return tree_case(op, shape, peers)
    if isinstance(shape, TrainShape):
        return train_step_case(op, shape, device, peers)
    if isinstance(shape, ThroughputShape):
        return throughput_case(op, shape, device, peers)
    if op in GROUPS["reductions"]:
        return _reduction_case(op, shape, device, dtype, peers)
    if op in GROUPS["children"]:
        return _children_case(op, shape, device, dtype, peers)
    return _head_case(op, shape, device, dtype, peers)


def _head_case(
    op: str, shape: Shape, device: torch.device, dtype: torch.dtype, peers: tuple[str, ...]
) -> Case:
    trained, joint = not op.endswith("-frozen"), op.startswith("head")
    case = Case(
        op,
        shape,
        device,
        dtype,
        head_inputs(shape, device, dtype, trained=trained, upstream=not joint),
        {"vocabulary": plain.vocabulary_reference},
    )
    case.floors["products"] = _product_floor(shape, dtype, trained)
    case.bare = {
        FLOOR: floors.BareProducts(trained, fresh=False),
        f"{FLOOR}, allocating": floors.BareProducts(trained, fresh=True),
    }
    forward = ours.joint_loss if joint else ours.logprobs
    case.add_ours("head", forward, "vocabulary", floor="products")
    _add_peers(case, peers, joint=joint, floor="products")
    return case


def _children_case(
    op: str, shape: Shape, device: torch.device, dtype: torch.dtype, peers: tuple[str, ...]
) -> Case:
    trained = op == "children"
    items = catalogue(shape)
    tree = PrefixTree.from_identifiers(items.tokens).to(device)
    restricted = plain.PlainRestriction(items, shape, device)
    case = Case(
        op,
        shape,
        device,
        dtype,
        head_inputs(
            shape, device, dtype, trained=trained, upstream=False, tokens=items.draw(shape, device)
        ),
        {
            "vocabulary": plain.vocabulary_reference,
            "children": partial(plain.whole_reference, forward=partial(_restricted, restricted)),
        },
    )
    case.notes.append(f"tree: {items.source}; trajectories drawn uniformly")
    children = restricted.children(case.make_inputs(0)["tokens"])
    case.notes.append(f"{children:,} children to normalise over in one draw")
    for sparse in (False, True) if trained else (False,):
        case.floors["sparse" if sparse else "dense"] = _children_floor(
            shape, dtype, children, trained=trained, sparse=sparse
        )
    if trained:
        case.bare["zero-fill of the gradient"] = floors.zero_fill
    case.add_ours("children", partial(ours.joint_loss, tree=tree), "children", floor="dense")
    plain_forward = partial(_restricted, restricted)
    if trained:
        forward = partial(ours.joint_loss, tree=tree, sparse=True)
        case.add_ours("children", forward, "children", floor="sparse", suffix=", sparse")
    name = "the same restriction, plain torch"
    case.variants.append(Variant(name, "restricted", plain_forward, "children", "dense"))
    if trained:
        forward = partial(_restricted, restricted, sparse=True)
        case.variants.append(
            Variant(f"{name}, sparse", "restricted", forward, "children", "sparse")
        )
    _add_peers(case, peers, joint=True, floor=None)
    return case


def _reduction_case(
    op: str, shape: Shape, device: torch.device, dtype: torch.dtype, peers: tuple[str, ...]
) -> Case:
    definition = partial(plain.reduction_definition, kind=op)
    case = Case(
        op,
        shape,
        device,
        dtype,
        loss_inputs(shape, device, dtype, op),
        {"definition": partial(plain.whole_reference, forward=definition)},
    )
    tokens, size = shape.rows, dtype.itemsize
    trajectories = shape.B * shape.N
    # log_pf and log_flow are read, and their gradients written; rewards are read.
    numbers = 2 * tokens + trajectories
    numbers += {"tb": 2 * shape.B, "vargrad": 0}.get(op, 2 * tokens)
    case.floors["bytes"] = Floor(0.0, float(numbers * size))
    case.add_ours("reductions", partial(ours.reduction, kind=op), "definition", floor="bytes")
    if "torch" in peers:
        case.variants.append(
            Variant("plain torch definition", "reduction", definition, "definition", "bytes")
        )
    if "compile" in peers:
        compiled = torch.compile(definition, dynamic=False)
        case.variants.append(
            Variant(
                "torch.compile definition",
                "reduction",
                compiled,
                "definition",
                "bytes",
                compiles=True,
            )
        )
    return case


def _add_peers(case: Case, peers: tuple[str, ...], *, joint: bool, floor: str | None) -> None:
    """The full-vocabulary peers; the plain TB + SFT loss is put on top of each."""
    for peer in PEERS:
        if peer.key not in peers:
            continue
        try:
            forward = _peer_forward(peer, case, joint=joint)
        except Unusable as reason:
            case.missing.append((peer.name, str(reason)))
            continue
        case.variants.append(
            Variant(peer.name, "vocabulary", forward, "vocabulary", floor, compiles=peer.compiles)
        )


def _peer_forward(peer: Peer, case: Case, *, joint: bool) -> Forward:
    logprobs = peer.make(case.device, case.dtype)

    def whole(
        hidden: Tensor, weight: Tensor, tokens: Tensor, log_reward: Tensor, log_z: Tensor
    ) -> Tensor:
        flat = logprobs(hidden.flatten(0, -2), weight, tokens.flatten())
        log_pf = flat.view(tokens.shape)
        return plain.joint_loss(log_pf, log_reward, log_z) if joint else log_pf

    run = torch.compile(whole, dynamic=False) if peer.compile else whole
    names = ("hidden", "weight", "tokens", "log_reward", "log_z")
    return lambda inputs: run(*(inputs[name] for name in names))


def _restricted(
    restricted: plain.PlainRestriction, inputs: Inputs, *, sparse: bool = False
) -> Tensor:
    log_pf = restricted(inputs, sparse=sparse)
    return plain.joint_loss(log_pf, inputs["log_reward"], inputs["log_z"])


def _product_floor(shape: Shape, dtype: torch.dtype, trained: bool) -> Floor:
    product = 2.0 * shape.rows * shape.d * shape.V
    states, head = shape.rows * shape.d, shape.V * shape.d
    # States and head are read, their gradients written.
    numbers = 2 * states + head * (2 if trained else 1)
    return Floor(product * (3 if trained else 2), float(numbers * dtype.itemsize), FLOOR, True)


def _children_floor(
    shape: Shape, dtype: torch.dtype, children: int, *, trained: bool, sparse: bool
) -> Floor:
    codebooks = (shape.V - shape.first_code) * shape.d
    numbers = 2 * shape.rows * shape.d + codebooks
    if trained:
        numbers += codebooks if sparse else shape.V * shape.d
    flops = 2.0 * children * shape.d * (3 if trained else 2)
    bare = "zero-fill of the gradient" if trained and not sparse else None
    return Floor(flops, float(numbers * dtype.itemsize), bare)
