"""Whole beam searches (``search``) and a whole catalogue's scores (``score``) of random models.

All models have a vocabulary of 1027: three special tokens, then four codebooks of 256.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.case import Case, Variant
from benchmarks.harness.constraints import DictTrie, random_catalogue
from benchmarks.harness.floors import Floor
from benchmarks.harness.inputs import Inputs, catalogue
from benchmarks.harness.judging import SCORE_TOLERANCE, Ranking, judge_numbers, judge_rankings
from benchmarks.harness.shapes import CODES, LENGTH, ScoreShape, SearchShape, Shape
from gflowgr.decoding import constrained_beam_search, item_logprobs
from gflowgr.tree import PrefixTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PAD, _END = 0, 2
_FIRST_CODE = 3
VOCAB = _FIRST_CODE + LENGTH * CODES

# The plain ways of scoring are linear in the items: timed on some, in batches of rows.
_SAMPLE, _ROWS = 256, 128


def build_model(name: str, device: torch.device) -> PreTrainedModel:
    """A random model, the same every time, in ``eval`` mode: "t5", "gpt2" or "qwen3".

    T5: width 128, 4 + 4 layers, 6 heads of 64, feed-forward 1024. The others: 4 layers, width 256.
    """
    import transformers as hf

    model: Any
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "t5":
            sizes: dict[str, Any] = {"d_model": 128, "d_ff": 1024, "d_kv": 64, "num_heads": 6}
            sizes |= {"num_layers": 4, "num_decoder_layers": 4, "vocab_size": VOCAB}
            sizes |= {"decoder_start_token_id": _PAD, "pad_token_id": _PAD, "eos_token_id": _END}
            config = hf.T5Config(**sizes)
            model = hf.T5ForConditionalGeneration(config)
        elif name == "gpt2":
            model = hf.GPT2LMHeadModel(
                hf.GPT2Config(
                    vocab_size=VOCAB,
                    n_embd=256,
                    n_layer=4,
                    n_head=4,
                    bos_token_id=1,
                    eos_token_id=_END,
                )
            )
        elif name == "qwen3":
            model = hf.Qwen3ForCausalLM(
                hf.Qwen3Config(
                    vocab_size=VOCAB,
                    hidden_size=256,
                    intermediate_size=768,
                    num_hidden_layers=4,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=64,
                    pad_token_id=_PAD,
                    eos_token_id=_END,
                )
            )
        else:
            raise ValueError(f"model {name!r} is unknown; expected t5, gpt2 or qwen3")
    return model.eval().to(device)


# ---- search ----


def search_case(op: str, shape: SearchShape, device: torch.device, peers: tuple[str, ...]) -> Case:
    """Ours and ``model.generate`` with a dict trie for its constraint."""
    model = build_model(shape.model, device)
    items = random_catalogue(shape.items, VOCAB, device)
    case = Case(
        op,
        shape,
        device,
        torch.float32,
        partial(_make_prompts, shape.prompts, shape.source, device),
        {"generate, float64": partial(_search_reference, model, items.trie, shape)},
        judge=lambda result, wanted: judge_rankings(_search_ranking(result), wanted),
        tolerance=SCORE_TOLERANCE,
    )
    per_prompt, per_token = token_flops(model, shape.source)
    # One start token, then every beam's first three.
    tokens = 1 + (LENGTH - 1) * shape.beams
    weights = float(sum(p.numel() * p.element_size() for p in model.parameters()))
    case.floors["model"] = Floor(shape.prompts * (per_prompt + per_token * tokens), weights)

    def ours(inputs: Inputs) -> tuple[Tensor, Tensor]:
        found = constrained_beam_search(
            model, inputs["input_ids"], inputs["mask"], items.tree, num_beams=shape.beams
        )
        return found.tokens, found.scores

    case.variants = [Variant("gflowgr", "", ours, "generate, float64", "model", trains=False)]
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


def _make_prompts(prompts: int, source: int, device: torch.device, seed: int) -> Inputs:
    g = torch.Generator(device).manual_seed(seed)
    ids = torch.randint(_FIRST_CODE, VOCAB, (prompts, source), generator=g, device=device)
    return Inputs({"input_ids": ids, "mask": torch.ones_like(ids)})


def _generate(
    model: Any, trie: DictTrie, shape: SearchShape, inputs: Inputs, *, scores: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, K, L], and where wanted scores [B, K]: to return them it keeps all logits."""
    encoder = model.config.is_encoder_decoder
    before = 1 if encoder else shape.source  # what its sequences begin with

    def allowed(prompt: int, sequence: Tensor) -> list[int]:
        # It also asks about beams that it has given up; something must be allowed there.
        return trie.allowed(sequence[before:].tolist()) or [_END]

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
        pad_token_id=_PAD,
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


# ---- score ----


def score_case(op: str, shape: ScoreShape, device: torch.device, peers: tuple[str, ...]) -> Case:
    """The whole catalogue by the tree; the plain ways, a row per item, on a sample of it."""
    model = build_model("t5", device)
    # Only V and L say how the identifiers become tokens.
    found = catalogue(Shape("score", 1, 1, LENGTH, 1, VOCAB))
    tokens = torch.from_numpy(found.tokens[: shape.items])
    tree = PrefixTree.from_identifiers(tokens).to(device)
    g = torch.Generator().manual_seed(0)
    sample = torch.randperm(len(tokens), generator=g)[:_SAMPLE].to(device)
    tokens = tokens.to(device)
    case = Case(
        op,
        shape,
        device,
        torch.float32,
        partial(_make_prompts, shape.prompts, shape.source, device),
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
    weights = float(sum(p.numel() * p.element_size() for p in model.parameters()))
    flops = (per_prompt + inner * per_token, len(tokens) * (per_prompt + LENGTH * per_token))
    case.floors = {
        "prefixes": Floor(shape.prompts * flops[0], weights),
        "pairs": Floor(shape.prompts * flops[1], weights),
    }
    case.variants.append(
        Variant(
            *("gflowgr", ""),
            lambda inputs: item_logprobs(model, inputs["input_ids"], inputs["mask"], tree),
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
        shifted = torch.cat([torch.full_like(part[:, :1], _PAD), part[:, :-1]], dim=1)
        given: dict[str, Any] = {"input_ids": source.expand(len(part), -1)}
        if states is not None:
            given = {"encoder_outputs": (states.expand(len(part), -1, -1),)}
        logits = model(**given, decoder_input_ids=shifted).logits
        out.append(logits.log_softmax(-1).gather(-1, part.unsqueeze(-1)).sum((1, 2)))
    return torch.cat(out)


def _score_reference(model: Any, tokens: Tensor, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return _score_pairs(copy.deepcopy(model).double(), tokens, False, inputs)


# ---- arithmetic ----


def token_flops(model: Any, source: int) -> tuple[float, float]:
    """FLOPs of matrix products: (of a prompt of ``source`` tokens, of one more token behind it)."""
    counts: list[float] = []
    lengths: Sequence[int] = (4, 8)
    for length in lengths:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            _forward(model, source, length)
        counts.append(float(counter.get_total_flops()))
    per_token = (counts[1] - counts[0]) / (lengths[1] - lengths[0])
    return counts[0] - lengths[0] * per_token, per_token


def _forward(model: Any, source: int, length: int) -> None:
    """A prompt and ``length`` tokens behind it, of which only these have logits."""
    device = model.device
    ids = torch.full((1, source), _FIRST_CODE, device=device)
    after = torch.full((1, length), _FIRST_CODE, device=device)
    if model.config.is_encoder_decoder:
        model(input_ids=ids, decoder_input_ids=after)
    else:
        model(input_ids=torch.cat([ids, after], dim=1), logits_to_keep=length)
