"""Log P of every item of a catalogue, against a row of the model per item."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.harness.case import Case, Variant
from benchmarks.harness.floors import Floor
from benchmarks.harness.inputs import Inputs, catalogue
from benchmarks.harness.judging import SCORE_TOLERANCE, judge_numbers
from benchmarks.harness.models import (
    PAD,
    VOCAB,
    build_model,
    make_prompts,
    token_flops,
    weight_bytes,
)
from benchmarks.harness.registry import Table, register
from benchmarks.harness.shapes import BEAUTY_ITEMS, LENGTH, LossShape, Shape
from gflowgr.decoding import item_logprobs
from gflowgr.tree import PrefixTree

# The plain ways of scoring are linear in the items: timed on some, in batches of rows.
_SAMPLE, _ROWS = 256, 128


@dataclass(frozen=True)
class ScoreShape(Shape):
    """Prompts, tokens of a prompt, items."""

    kind: ClassVar[str] = "catalogue_scores"
    example: ClassVar[str] = "4x60x12101"
    few: ClassVar[dict[str, int]] = {"prompts": 1, "items": 50}
    prompts: int
    source: int
    items: int


def _build(
    table: str,
    shape: ScoreShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    model = build_model("t5", device)
    # Only V and L say how the identifiers become tokens.
    found = catalogue(LossShape("", 1, 1, LENGTH, 1, VOCAB))
    tokens = torch.from_numpy(found.tokens[: shape.items])
    tree = PrefixTree.from_identifiers(tokens).to(device)
    g = torch.Generator().manual_seed(0)
    sample = torch.randperm(len(tokens), generator=g)[:_SAMPLE].to(device)
    tokens = tokens.to(device)
    case = Case(
        table,
        shape,
        device,
        dtype,
        partial(make_prompts, shape.prompts, shape.source, device),
        {"pairs, float64": partial(_score_reference, model, tokens[sample])},
        judge=lambda result, wanted: judge_numbers(
            result[0, sample] if result.dim() == 2 else result, wanted, SCORE_TOLERANCE
        ),
        tolerance=SCORE_TOLERANCE,
    )
    case.notes.append(
        f"identifiers: {found.source}, the first {len(tokens):,}; the plain ways score "
        f"{len(sample)} of them for one prompt, their times are scaled up to all"
    )
    per_prompt, per_token = token_flops(model, shape.source)
    inner = 1 + sum(tree.level_sizes[:-1])
    weights = weight_bytes(model)
    flops = (per_prompt + inner * per_token, len(tokens) * (per_prompt + LENGTH * per_token))
    case.floors = {
        "prefixes": Floor(shape.prompts * flops[0], weights),
        "pairs": Floor(shape.prompts * flops[1], weights),
    }
    case.variants.append(
        Variant(
            *("gflowgr", ""),
            lambda inputs: item_logprobs(
                model, inputs["input_ids"], inputs["mask"], tree, normalize="vocab"
            ),
            *("pairs, float64", "prefixes"),
            trains=False,
        )
    )
    scale = shape.prompts * len(tokens) / len(sample)
    for name, family, once in (
        ("a row per item", "pairs", False),
        ("a row per item, encoded once", "decoder_pairs", True),
    ):
        if "torch" in peers:
            forward = partial(_score_pairs, model, tokens[sample], once)
            floor = None if once else "pairs"
            case.variants.append(
                Variant(
                    *(name, family, forward, "pairs, float64", floor), trains=False, scale=scale
                )
            )
    return case


def _score_pairs(model: Any, tokens: Tensor, encoded_once: bool, inputs: Inputs) -> Tensor:
    """Log P [M] of identifiers [M, L] for the first prompt, each item a row of its own."""
    source = inputs["input_ids"][:1]
    states = model.get_encoder()(input_ids=source).last_hidden_state if encoded_once else None
    out = []
    for part in tokens.split(_ROWS):
        shifted = torch.cat([torch.full_like(part[:, :1], PAD), part[:, :-1]], dim=1)
        given: dict[str, Any] = {"input_ids": source.expand(len(part), -1)}
        if states is not None:
            given = {"encoder_outputs": (states.expand(len(part), -1, -1),)}
        logits = model(**given, decoder_input_ids=shifted).logits
        out.append(logits.log_softmax(-1).gather(-1, part.unsqueeze(-1)).sum((1, 2)))
    return torch.cat(out)


def _score_reference(model: Any, tokens: Tensor, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return _score_pairs(copy.deepcopy(model).double(), tokens, False, inputs)


_SHAPES = (ScoreShape(4, 60, BEAUTY_ITEMS),)
register(Table("catalogue_scores", _build, ScoreShape, on_cpu=_SHAPES, on_gpu=_SHAPES))
