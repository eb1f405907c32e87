"""One step of a constrained beam search, from logits or from hidden states.

A run makes the step at depths 1, 2 and 3 of the tree, each on beams at random nodes of that depth
and the same logits or states; a time is that of one of the three on average. The first step of a
search is left out: it has a single row per prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.case import Case, Variant
from benchmarks.harness.constraints import RandomCatalogue, random_catalogue
from benchmarks.harness.floors import Floor, one_launch
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.judging import SCORE_TOLERANCE, Ranking, judge_rankings
from benchmarks.harness.registry import Table, register
from benchmarks.harness.shapes import BEAUTY_ITEMS, CODES, LENGTH, Shape
from gflowgr.ops.beam_step.op import BeamStep, beam_step, beam_step_hidden

DEPTHS = range(1, LENGTH)
HIDDEN = 512
"""Width of the states."""

LOW_TOLERANCE = 0.05
"""Of a score from states in 16 bits, in nats: two roundings of a logit of up to 4."""

_LARGEST_TRIE = 10_000_000  # 300 bytes an item


@dataclass(frozen=True)
class StepShape(Shape):
    """A step: prompts, beams, vocabulary, items of a random catalogue."""

    kind: ClassVar[str] = "beam_step"
    example: ClassVar[str] = "64x20x33124x10m"
    few: ClassVar[dict[str, int]] = {"prompts": 2, "items": 1000}
    prompts: int
    beams: int
    vocab: int
    items: int

    def problem(self) -> str | None:
        """The codebooks must fit into the vocabulary."""
        least = LENGTH * CODES
        return f"VOCAB must be at least {least}; got {self.vocab}" if self.vocab < least else None


class Kept(NamedTuple):
    """What a step keeps, [B, K] each; without tokens the nodes say what they are."""

    scores: Tensor
    parents: Tensor
    tokens: Tensor | None
    nodes: Tensor | None


Step = Callable[[Inputs, int], Kept]


def _build(
    table: str,
    shape: StepShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    catalogue = random_catalogue(shape.items, shape.vocab, device)
    hidden = table == "beam_step.hidden"
    reference = _hidden_children_step if hidden else _logits_step
    # Peers round logits to 16 bits.
    tolerance = LOW_TOLERANCE if hidden and dtype != torch.float32 else SCORE_TOLERANCE
    case = Case(
        table,
        shape,
        device,
        dtype,
        partial(_make_inputs, shape, catalogue, hidden, dtype),
        {"float64": partial(_reference, catalogue, partial(reference, catalogue))},
        judge=lambda result, wanted: judge_rankings(_ranking(result, catalogue), wanted, tolerance),
        tolerance=tolerance,
        uncounted="a step holds little but its result; the structures' bytes are in tree.build",
    )
    case.notes.append("one step: the mean of those at depths 1, 2 and 3")
    if hidden:
        case.notes.append(f"states of width {HIDDEN}")
    case.bare = {"a launch": one_launch} if device.type == "cuda" else {}
    _add_variants(case, catalogue, shape, peers, hidden)
    return case


def _add_variants(
    case: Case,
    catalogue: RandomCatalogue,
    shape: StepShape,
    peers: tuple[str, ...],
    hidden: bool,
) -> None:
    bare = next(iter(case.bare), None)
    ours: Step
    if hidden:
        ours = partial(_our_hidden_step, catalogue)
        case.floors = {
            "children": _children_floor(case.make_inputs(0), catalogue, bare, case.dtype),
            "logits": _logits_floor(shape, bare, case.dtype),
        }
    else:
        ours = partial(_our_step, catalogue)
        # Every logit is read once.
        nbytes = float(case.dtype.itemsize) * shape.prompts * shape.beams * shape.vocab
        case.floors = {"logits": Floor(0.0, nbytes, bare)}
    floor = "children" if hidden else "logits"
    timing = {"trains": False, "scale": 1 / len(DEPTHS)}
    name = "beam_step_hidden" if hidden else "beam_step"
    case.add_ours(name, partial(_steps, ours), "float64", floor=floor, **timing)

    def add(name: str, family: str, step: Step) -> None:
        forward = partial(_steps, step)
        case.variants.append(
            Variant(name, family, forward, "float64", "logits", trains=False, scale=timing["scale"])
        )

    if hidden and "torch" in peers:
        add("logits first, then beam_step", "logits", partial(_logits_first_step, catalogue))
        add("logits first, plain torch", "logits", partial(_hidden_children_step, catalogue))
    if not hidden and "csr" in peers:
        add("CSR, top-k of the candidates", "csr", partial(_logits_step, catalogue))
        add("CSR, top-k of the vocabulary", "csr", partial(_masked_step, catalogue))
    if not hidden and "transformers" in peers:
        name = "transformers, dict trie"
        if shape.items > _LARGEST_TRIE:
            case.missing.append((name, f"over {_LARGEST_TRIE:,} items: 300 bytes each"))
        else:
            add(name, "transformers", _transformers_step(catalogue, shape.beams))


# ---- inputs, reference, floors ----


def _make_inputs(
    shape: StepShape, catalogue: RandomCatalogue, hidden: bool, dtype: torch.dtype, seed: int
) -> Inputs:
    """Beams at nodes above random items, with random scores; logits of unit variance."""
    device = catalogue.device
    g = torch.Generator(device).manual_seed(seed)
    beams = (shape.prompts, shape.beams)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    items = torch.randint(shape.items, beams, generator=torch.Generator().manual_seed(seed))
    prefix = catalogue.tokens[items].long().to(device)
    nodes = catalogue.tree.walk(prefix)
    tensors = {"prefix": prefix, "scores": normal(*beams) - 8.0}
    tensors |= {f"nodes {depth}": nodes[..., depth - 1].contiguous() for depth in DEPTHS}
    if hidden:
        tensors["hidden"] = normal(*beams, HIDDEN).to(dtype)
        tensors["weight"] = (normal(shape.vocab, HIDDEN) * HIDDEN**-0.5).to(dtype)
    else:
        tensors["logits"] = normal(*beams, shape.vocab).to(dtype)
    return Inputs(tensors)


def _steps(step: Step, inputs: Inputs) -> list[Kept]:
    return [step(inputs, depth) for depth in DEPTHS]


def _ranking(result: list[Kept], catalogue: RandomCatalogue) -> Ranking:
    """Each prompt's step at each depth is a row; a candidate is a beam and a token."""
    keys = []
    for kept in result:
        tokens = kept.tokens
        if tokens is None:
            assert kept.nodes is not None
            tokens = catalogue.tree.node_tokens(kept.nodes)
        keys.append(kept.parents.long() * catalogue.vocab + tokens)
    return Ranking(torch.cat(keys), torch.cat([kept.scores for kept in result]))


def _reference(catalogue: RandomCatalogue, step: Step, inputs: Inputs) -> Ranking:
    with torch.no_grad():
        return _ranking(_steps(step, inputs.double()), catalogue)


def _children_floor(
    inputs: Inputs, catalogue: RandomCatalogue, bare: str | None, dtype: torch.dtype
) -> Floor:
    """Reads states and the children's rows of the head; a product per child, for one draw."""
    pairs = rows = 0
    for depth in DEPTHS:
        tokens, _, valid = catalogue.csr.children(inputs[f"nodes {depth}"], depth)
        pairs += int(valid.sum())
        rows += len(tokens[valid].unique())
    numbers = rows * HIDDEN + len(DEPTHS) * inputs["hidden"].numel()
    nbytes = dtype.itemsize * numbers / len(DEPTHS)
    return Floor(2.0 * pairs * HIDDEN / len(DEPTHS), nbytes, bare)


def _logits_floor(shape: StepShape, bare: str | None, dtype: torch.dtype) -> Floor:
    """All logits: a matrix product that reads states and head."""
    rows = shape.prompts * shape.beams
    nbytes = float(dtype.itemsize) * (rows + shape.vocab) * HIDDEN
    return Floor(2.0 * rows * shape.vocab * HIDDEN, nbytes, bare)


# ---- ours ----


def _our_step(catalogue: RandomCatalogue, inputs: Inputs, depth: int) -> Kept:
    beams = (inputs["scores"], inputs[f"nodes {depth}"], catalogue.tree)
    step = beam_step(inputs["logits"], *beams, width=beams[0].shape[1], normalize="vocab")
    return _kept(step, depth)


def _our_hidden_step(catalogue: RandomCatalogue, inputs: Inputs, depth: int) -> Kept:
    beams = (inputs["scores"], inputs[f"nodes {depth}"], catalogue.tree)
    head = (inputs["hidden"], inputs["weight"], None)
    width = beams[0].shape[1]
    return _kept(beam_step_hidden(*head, *beams, width=width, normalize="children"), depth)


def _kept(found: BeamStep, depth: int) -> Kept:
    if depth == LENGTH - 1:  # what the last token completes
        return Kept(found.end_scores, found.end_parents, None, found.end_nodes)
    return Kept(found.scores, found.parents, found.tokens, found.nodes)


# ---- the others ----


def _log_softmax(logits: Tensor) -> Tensor:
    """At least float32, as careful code computes it."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _logits_step(catalogue: RandomCatalogue, inputs: Inputs, depth: int) -> Kept:
    """CSR: log-softmax over all, then the best of the gathered candidates."""
    nodes = inputs[f"nodes {depth}"]
    logp = _log_softmax(inputs["logits"])
    tokens, after, valid = catalogue.csr.children(nodes, depth)
    return _best(logp.gather(-1, tokens), tokens, after, valid, inputs["scores"])


def _best(logp: Tensor, tokens: Tensor, after: Tensor, valid: Tensor, scores: Tensor) -> Kept:
    total = torch.where(valid, logp + scores.unsqueeze(-1), -torch.inf).flatten(1)
    best, place = total.topk(scores.shape[1], dim=1)
    kept = (tokens.flatten(1).gather(1, place), after.flatten(1).gather(1, place))
    return Kept(best, place // tokens.shape[-1], *kept)


def _masked_step(catalogue: RandomCatalogue, inputs: Inputs, depth: int) -> Kept:
    """CSR: a mask over the vocabulary scattered from the candidates, then the best of all."""
    nodes, scores = inputs[f"nodes {depth}"], inputs["scores"]
    logp = _log_softmax(inputs["logits"])
    vocab = logp.shape[-1]
    tokens, after, valid = catalogue.csr.children(nodes, depth)
    # Entries that are no candidates may share a candidate's token: they get a column of their own.
    mask = torch.zeros(*nodes.shape, vocab + 1, dtype=torch.bool, device=nodes.device)
    mask.scatter_(-1, torch.where(valid, tokens, vocab), True)
    total = torch.where(mask[..., :vocab], logp, -torch.inf) + scores.unsqueeze(-1)
    best, place = total.flatten(1).topk(scores.shape[1], dim=1)
    parents, chosen = place // vocab, place % vocab
    rows = parents.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    edge = (tokens.gather(1, rows) == chosen.unsqueeze(-1)) & valid.gather(1, rows)
    return Kept(best, parents, chosen, torch.where(edge, after.gather(1, rows), 0).sum(-1))


def _transformers_step(catalogue: RandomCatalogue, beams: int) -> Step:
    from transformers import PrefixConstrainedLogitsProcessor

    trie = catalogue.trie
    processor = PrefixConstrainedLogitsProcessor(
        lambda prompt, prefix: trie.allowed(prefix.tolist()), num_beams=beams
    )

    def step(inputs: Inputs, depth: int) -> Kept:
        logp = _log_softmax(inputs["logits"].flatten(0, 1))
        prefix = inputs["prefix"][..., :depth].flatten(0, 1)
        total = processor(prefix, logp).view_as(inputs["logits"]) + inputs["scores"].unsqueeze(-1)
        best, place = total.flatten(1).topk(beams, dim=1)
        vocab = logp.shape[-1]
        return Kept(best, place // vocab, place % vocab, None)

    return step


def _hidden_children_step(catalogue: RandomCatalogue, inputs: Inputs, depth: int) -> Kept:
    """All logits, then softmax over the gathered children."""
    logits = inputs["hidden"] @ inputs["weight"].T
    tokens, after, valid = catalogue.csr.children(inputs[f"nodes {depth}"], depth)
    chosen = torch.where(valid, logits.gather(-1, tokens), -torch.inf)
    return _best(_log_softmax(chosen), tokens, after, valid, inputs["scores"])


def _logits_first_step(catalogue: RandomCatalogue, inputs: Inputs, depth: int) -> Kept:
    """All logits, then our step on them."""
    beams = (inputs["scores"], inputs[f"nodes {depth}"], catalogue.tree)
    logits = inputs["hidden"] @ inputs["weight"].T
    found = beam_step(logits, *beams, width=beams[0].shape[1], normalize="children")
    return _kept(found, depth)


def _shapes(
    rows: tuple[tuple[int, int], ...], vocabularies: tuple[int, ...]
) -> tuple[StepShape, ...]:
    # Catalogues outermost: one is built, and serves all that follow.
    return tuple(
        StepShape(prompts, beams, vocab, items)
        for vocab in vocabularies
        for items in (BEAUTY_ITEMS, 1_000_000, 10_000_000, 100_000_000)
        for prompts, beams in rows
    )


_CPU_ROWS = ((1, 10), (8, 20), (64, 20))
_GPU_ROWS = ((1, 20), (8, 20), (64, 20), (512, 20))
for _part in ("logits", "hidden"):
    register(
        Table(
            f"beam_step.{_part}",
            _build,
            StepShape,
            on_cpu=_shapes(_CPU_ROWS, (1027, 33124)),
            on_gpu=_shapes(_GPU_ROWS, (1027, 33124)),
            low_precision=("cuda",),
        )
    )
