"""One table of the benchmark: an op at a shape, its variants, references and floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gflowgr.benchmarking import floors, ours, plain
from gflowgr.benchmarking.floors import Bare, Floor
from gflowgr.benchmarking.inputs import Inputs, MakeInputs, catalogue, head_inputs, loss_inputs
from gflowgr.benchmarking.peers import KEYS, PEERS, Peer, Unusable
from gflowgr.benchmarking.shapes import GROUPS, Shape
from gflowgr.tree import PrefixTree

Forward = Callable[[Inputs], Tensor]
FLOOR = "bare products"


@dataclass(frozen=True)
class Variant:
    """One implementation of a case.

    Attributes:
        name: unique in the case.
        family: what a peer competes in: "vocabulary" (the whole softmax), "restricted" (the same
            tree restriction) or "reduction"; "" for ours, which compete with every family.
        forward: the forward pass.
        reference: key of the case's references.
        floor: key of the case's floors; None: no floor is known for what it computes.
        backend: ours only: the backend that is forced.
        compiles: a run of full size must come before its memory is counted.
    """

    name: str
    family: str
    forward: Forward
    reference: str
    floor: str | None = None
    backend: str | None = None
    compiles: bool = False

    def run(self, inputs: Inputs) -> Tensor:
        """Forward and backward pass; the gradients are in ``inputs.leaves``."""
        with ours.forced(self.backend):
            result = self.forward(inputs)
            result.backward(inputs.upstream)
        return result.detach()


@dataclass
class Case:
    """An op at a shape, on a device, in a dtype."""

    op: str
    shape: Shape
    device: torch.device
    dtype: torch.dtype
    make_inputs: MakeInputs
    references: dict[str, Callable[[Inputs], plain.Reference]]
    variants: list[Variant] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)  # (variant, why it is left out)
    floors: dict[str, Floor] = field(default_factory=dict)
    bare: dict[str, Bare] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What the tables are headed with."""
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"B {self.shape.B}, N {self.shape.N}, L {self.shape.L}"
        if self.op not in GROUPS["reductions"]:
            sizes = f"T {self.shape.rows} = {sizes}; d {self.shape.d}, V {self.shape.V}"
        return f"{self.op}, {self.shape.name}, {dtype} ({sizes})"


def build_case(
    op: str,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...] = KEYS,
) -> Case:
    """The case with every variant that is installed; the others in ``missing``, with reasons."""
    if op in GROUPS["reductions"]:
        return _reduction_case(op, shape, device, dtype, peers)
    if op in GROUPS["tree"]:
        return _tree_case(op, shape, device, dtype, peers)
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
    _add_ours(case, "head", ours.joint_loss if joint else ours.logprobs, "vocabulary", "products")
    _add_peers(case, peers, joint=joint, floor="products")
    return case


def _tree_case(
    op: str, shape: Shape, device: torch.device, dtype: torch.dtype, peers: tuple[str, ...]
) -> Case:
    trained = op == "tree"
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
        case.floors["sparse" if sparse else "dense"] = _tree_floor(
            shape, dtype, children, trained=trained, sparse=sparse
        )
    if trained:
        case.bare["zero-fill of the gradient"] = floors.zero_fill
    _add_ours(case, "tree", partial(ours.joint_loss, tree=tree), "children", "dense")
    plain_forward = partial(_restricted, restricted)
    if trained:
        forward = partial(ours.joint_loss, tree=tree, sparse=True)
        _add_ours(case, "tree", forward, "children", "sparse", suffix=", sparse")
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
    _add_ours(case, "reductions", partial(ours.reduction, kind=op), "definition", "bytes")
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


def _add_ours(
    case: Case, group: str, forward: Forward, reference: str, floor: str, suffix: str = ""
) -> None:
    found, missing = ours.usable_backends(group, case.device, case.dtype)
    for backend in found:
        name = ours.variant_name(backend) + suffix
        case.variants.append(Variant(name, "", forward, reference, floor, backend))
    if not suffix:
        case.missing += missing


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


def _tree_floor(
    shape: Shape, dtype: torch.dtype, children: int, *, trained: bool, sparse: bool
) -> Floor:
    codebooks = (shape.V - shape.first_code) * shape.d
    numbers = 2 * shape.rows * shape.d + codebooks
    if trained:
        numbers += codebooks if sparse else shape.V * shape.d
    flops = 2.0 * children * shape.d * (3 if trained else 2)
    bare = "zero-fill of the gradient" if trained and not sparse else None
    return Floor(flops, float(numbers * dtype.itemsize), bare)
