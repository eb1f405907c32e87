"""The fused TB + NLL loss from hidden states, the softmax over the children in a prefix tree.

``fused`` has the head's gradient dense and row-sparse, ``fused_frozen`` a frozen head. Against the
same restriction in plain PyTorch, and against full vocabularies.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import floors, ours, plain
from benchmarks.harness.case import Case, Variant
from benchmarks.harness.floors import Floor
from benchmarks.harness.inputs import Catalogue, Inputs, catalogue, head_inputs
from benchmarks.harness.peers import add_vocabulary_peers
from benchmarks.harness.registry import Table, register
from benchmarks.harness.shapes import CODES, LossShape, named
from gflowgr.tree import PrefixTree

__all__ = ["PlainRestriction", "children_floor", "refuse_codebooks"]

_ZEROS = "zero-fill of the gradient"


def _build(
    table: str,
    shape: LossShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    trained = not table.endswith("_frozen")
    items = catalogue(shape)
    tree = PrefixTree.from_identifiers(items.tokens).to(device)
    restricted = PlainRestriction(items, shape, device)
    tokens = items.draw(shape, device)
    case = Case(
        table,
        shape,
        device,
        dtype,
        head_inputs(shape, device, dtype, trained=trained, upstream=False, tokens=tokens),
        {
            "vocabulary": plain.vocabulary_reference,
            "children": partial(plain.whole_reference, forward=restricted.loss),
        },
    )
    case.notes.append(f"tree: {items.source}; trajectories drawn uniformly")
    children = restricted.children(case.make_inputs(0)["tokens"])
    case.notes.append(f"{children:,} children to normalise over in one draw")
    if trained:
        case.bare[_ZEROS] = floors.zero_fill
    plain_variants = []
    for sparse in (False, True) if trained else (False,):
        floor, suffix = ("sparse", ", sparse") if sparse else ("dense", "")
        case.floors[floor] = children_floor(shape, dtype, children, trained=trained, sparse=sparse)
        forward = partial(ours.fused_loss, tree=tree, sparse=sparse)
        # How many rows a sparse gradient has is read from the GPU: no graph.
        ours_too = {"floor": floor, "suffix": suffix, "graph": not sparse}
        case.add_ours("children_", forward, "children", **ours_too)
        name = f"the same restriction, plain torch{suffix}"
        run = partial(restricted.loss, sparse=sparse)
        plain_variants.append(Variant(name, "restricted", run, "children", floor))
    case.variants += plain_variants
    add_vocabulary_peers(case, peers, loss=True, floor=None)
    return case


class PlainRestriction:
    """The tree restriction as careful plain PyTorch writes it.

    The tree is a table [nodes, 256] of child nodes, -1 = none, made once. Per level: one product of
    all rows with the codebook's slice of the head, the table's row as a mask, log-softmax. The
    codebooks are cut from the head once, so that the dense gradient is filled with zeros once.
    """

    def __init__(self, items: Catalogue, shape: LossShape, device: torch.device) -> None:
        codes = items.tokens - shape.first_code - CODES * np.arange(shape.L)
        nodes = [np.zeros(len(codes), np.int64)]
        total = 1
        for level in range(shape.L):
            _, inverse = np.unique(codes[:, : level + 1], axis=0, return_inverse=True)
            nodes.append(total + inverse.reshape(-1))
            total += int(inverse.max()) + 1
        table = np.full((total, CODES), -1, np.int32)
        for level in range(shape.L):
            table[nodes[level], codes[:, level]] = nodes[level + 1]
        self.table = torch.from_numpy(table).to(device)
        self.paths = torch.from_numpy(np.stack(nodes[1:], 1)).to(
            device
        )  # nodes of items [items, L]
        self.counts = (table >= 0).sum(1)
        self.first = shape.first_code
        self.codebooks = torch.arange(shape.first_code, shape.V, device=device)

    def __call__(self, inputs: Inputs, *, sparse: bool = False) -> Tensor:
        """log_pf [B, N, L]; `sparse`: the gradient of the head is row-sparse."""
        hidden, weight, tokens = inputs["hidden"], inputs["weight"], inputs["tokens"]
        if sparse:
            head = F.embedding(self.codebooks, weight, sparse=True)
        else:
            head = weight[self.first :]
        node = torch.zeros(tokens.shape[:2], dtype=torch.int32, device=tokens.device).flatten()
        values = []
        for level, slice_ in enumerate(head.split(CODES)):
            code = tokens[..., level].flatten() - self.first - CODES * level
            children = self.table[node]
            logits = hidden[:, :, level].flatten(0, 1) @ slice_.T
            if logits.dtype != torch.float64:
                logits = logits.float()
            logits = logits.masked_fill(children < 0, -torch.inf)
            values.append(logits.log_softmax(-1).gather(1, code[:, None]))
            node = children.gather(1, code[:, None]).squeeze(1)
        return torch.cat(values, 1).view(tokens.shape)

    def loss(self, inputs: Inputs, *, sparse: bool = False) -> Tensor:
        """The loss of its log-probabilities."""
        log_pf = self(inputs, sparse=sparse)
        return plain.tb_nll_loss(log_pf, inputs["log_reward"], inputs["log_z"])

    def children(self, tokens: Tensor) -> int:
        """Sum over all tokens of the children of their nodes, only children not counted."""
        codes = tokens.flatten(0, 1).cpu().numpy() - self.first
        node, total = np.zeros(len(codes), np.int64), 0
        table = self.table.cpu().numpy()
        for level in range(tokens.shape[-1]):
            count = self.counts[node]
            total += int(count[count > 1].sum())
            node = table[node, codes[:, level] - CODES * level]
        return total


def children_floor(
    shape: LossShape, dtype: torch.dtype, children: int, *, trained: bool, sparse: bool
) -> Floor:
    """The least work of a loss over the children: rows of states and of the codebooks."""
    codebooks = (shape.V - shape.first_code) * shape.d
    numbers = 2 * shape.rows * shape.d + codebooks
    if trained:
        numbers += codebooks if sparse else shape.V * shape.d
    flops = 2.0 * children * shape.d * (3 if trained else 2)
    return Floor(flops, float(numbers * dtype.itemsize), _ZEROS if trained and not sparse else None)


def refuse_codebooks(shape: LossShape) -> str | None:
    """Why no codebooks fit into the vocabulary, or None."""
    if shape.first_code < 0:
        return f"V must be at least L * {CODES} = {shape.L * CODES}; got {shape.V}"
    return None


for _part in ("fused", "fused_frozen"):
    register(
        Table(
            f"logprobs_children.{_part}",
            _build,
            LossShape,
            on_cpu=named("letter", "llm"),
            on_gpu=named("letter-gpu", "llm-gpu"),
            low_precision=("cpu", "cuda"),
            refuse=refuse_codebooks,
        )
    )
