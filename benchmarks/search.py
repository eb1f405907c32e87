"""A whole constrained beam search, against ``model.generate`` with a trie of dicts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.harness.case import Case, Variant
from benchmarks.harness.constraints import DictTrie, random_catalogue
from benchmarks.harness.floors import Floor
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.judging import SCORE_TOLERANCE, Ranking, judge_rankings, judge_scores
from benchmarks.harness.models import (
    END,
    PAD,
    VOCAB,
    build_model,
    make_prompts,
    token_flops,
    weight_bytes,
)
from benchmarks.harness.registry import Table, register
from benchmarks.harness.shapes import BEAUTY_ITEMS, LENGTH, Shape
from gflowgr.decoding import GraphedSearch, constrained_beam_search

LOW_TOLERANCE = 0.3
"""Of the sum of four log-probabilities of a model in 16 bits, in nats."""


@dataclass(frozen=True)
class SearchShape(Shape):
    """A model, prompts, tokens of a prompt, beams, items."""

    kind: ClassVar[str] = "search"
    models: ClassVar[tuple[str, ...]] = ("t5", "gpt2", "qwen3", "decoder")
    example: ClassVar[str] = "8x60x20x12101"
    few: ClassVar[dict[str, int]] = {"prompts": 1}
    model: str
    prompts: int
    source: int
    beams: int
    items: int


def _build(
    table: str,
    shape: SearchShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    model: Any = build_model(shape.model, device)
    model = model.to(dtype)
    items = random_catalogue(shape.items, VOCAB, device)
    case = Case(
        table,
        shape,
        device,
        dtype,
        partial(make_prompts, shape.prompts, shape.source, device),
        {"generate, float64": partial(_search_reference, model, items.trie, shape)},
        judge=lambda result, wanted: (
            judge_rankings(_search_ranking(result), wanted)
            if dtype == torch.float32
            else judge_scores(_search_ranking(result), wanted, LOW_TOLERANCE)
        ),
        tolerance=SCORE_TOLERANCE if dtype == torch.float32 else LOW_TOLERANCE,
    )
    per_prompt, per_token = token_flops(model, shape.source)
    # One start token, then every beam's first three.
    tokens = 1 + (LENGTH - 1) * shape.beams
    weights = weight_bytes(model)
    case.floors["model"] = Floor(shape.prompts * (per_prompt + per_token * tokens), weights)

    def ours(inputs: Inputs) -> tuple[Tensor, Tensor]:
        found = constrained_beam_search(
            model,
            inputs["input_ids"],
            inputs["mask"],
            items.tree,
            num_beams=shape.beams,
            normalize="vocab",  # what generate ranks by
        )
        return found.tokens, found.scores

    case.variants = [Variant("gflowgr", "", ours, "generate, float64", "model", trains=False)]
    if device.type == "cuda":
        graphed = GraphedSearch(model, items.tree, num_beams=shape.beams, normalize="vocab")

        def replayed(inputs: Inputs) -> tuple[Tensor, Tensor]:
            found = graphed(inputs["input_ids"], inputs["mask"])
            return found.tokens, found.scores

        name = "gflowgr, CUDA graph of the steps"
        case.variants.append(
            Variant(name, "", replayed, "generate, float64", "model", trains=False)
        )
    if "transformers" in peers:
        case.variants.append(
            Variant(
                *("generate, dict trie", "transformers"),
                partial(_generate, model, items.trie, shape),
                *("generate, float64", "model"),
                trains=False,
            )
        )
    return case


def _generate(
    model: Any, trie: DictTrie, shape: SearchShape, inputs: Inputs, *, scores: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, K, L], and where wanted scores [B, K]: to return them it keeps all logits."""
    encoder = model.config.is_encoder_decoder
    before = 1 if encoder else shape.source  # what its sequences begin with

    def allowed(prompt: int, sequence: Tensor) -> list[int]:
        # It also asks about beams that it has given up; something must be allowed there.
        return trie.allowed(sequence[before:].tolist()) or [END]

    found = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["mask"],
        num_beams=shape.beams,
        num_return_sequences=shape.beams,
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        length_penalty=0.0,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=scores,
    )
    rows = (shape.prompts, shape.beams)
    tokens = found.sequences[:, before : before + LENGTH].unflatten(0, rows)
    return tokens, found.sequences_scores.unflatten(0, rows) if scores else None


def _search_reference(model: Any, trie: DictTrie, shape: SearchShape, inputs: Inputs) -> Ranking:
    with torch.no_grad():
        wide = copy.deepcopy(model).double()
        return _search_ranking(_generate(wide, trie, shape, inputs, scores=True))


def _search_ranking(result: tuple[Tensor, Tensor | None]) -> Ranking:
    """Each prompt is a row; a candidate is its identifier."""
    tokens, scores = result
    keys = torch.zeros_like(tokens[..., 0])
    for level in range(LENGTH):
        keys = keys * VOCAB + tokens[..., level]
    return Ranking(keys, scores)


def _shapes(small: tuple[int, ...]) -> tuple[SearchShape, ...]:
    """``small``: prompts of the small models, of 20 items of three and of four tokens."""
    searches = [("t5", prompts, 60) for prompts in small]
    searches += [("decoder", prompts, 80) for prompts in small]
    searches += [(model, prompts, 512) for model in ("gpt2", "qwen3") for prompts in (1, 8)]
    return tuple(SearchShape(*search, 20, BEAUTY_ITEMS) for search in searches)


register(
    Table(
        "search",
        _build,
        SearchShape,
        on_cpu=_shapes((1, 8, 64)),
        on_gpu=_shapes((1, 8, 64, 512)),
        low_precision=("cuda",),
    )
)
