"""Beam search by any decoder, against brute force over every identifier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.dict_trie import DictTrie
from support.small_models import padded_prompts, small_model
from support.tiny_shop import make_model
from torch import Tensor

from gflowgr.decoding import beam, constrained_beam_search
from gflowgr.decoding.decoders import GenericDecoder, StepDecoder
from gflowgr.decoding.node_rows import distinct
from gflowgr.evaluation.generative import GenerativeRecommender
from gflowgr.tree import PrefixTree

Codes = list[tuple[int, ...]]


def ragged_codes(seed: int = 0) -> Codes:
    """About 30 identifiers of one to three tokens, some the prefixes of others."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 4, size=(40, 3)) + np.array([3, 15, 30])
    codes = {tuple(row[: 1 + k % 3]) for k, row in enumerate(rows.tolist())}
    return sorted(codes)


def brute_force(
    model: Any, ids: Tensor, mask: Tensor, codes: Codes, normalize: str, temperature: float
) -> Tensor:
    """log P of every identifier [B, items]: prefix by prefix, from whole sequences."""
    trie = DictTrie(codes, range(len(codes)))
    books = [sorted({code[k] for code in codes if len(code) > k}) for k in range(3)]
    scores = torch.zeros(len(ids), len(codes))
    for item, code in enumerate(codes):
        decoder = GenericDecoder(model, ids, mask)
        logits = decoder.first()
        for depth, token in enumerate(code):
            row = logits[:, 0] / temperature
            over = {
                "vocab": torch.arange(row.shape[1]),
                "level": torch.arange(books[depth][0], books[depth][-1] + 1),
                "children": torch.tensor([p[-1] for p in trie.children(code[:depth])]),
            }[normalize]
            scores[:, item] += row[:, token] - row[:, over].logsumexp(1)
            taken = torch.full((len(ids), 1), token)
            logits = decoder.advance(taken, torch.zeros_like(taken))
    return scores


@pytest.mark.parametrize("name", ["t5", "gpt2", "qwen3", "gemma2"])
@pytest.mark.parametrize(
    ("normalize", "temperature"), [("vocab", 1.0), ("level", 0.7), ("children", 2.0)]
)
@torch.no_grad()
def test_as_many_beams_as_items_give_the_exact_ranking(
    name: str, normalize: str, temperature: float
) -> None:
    model, codes = small_model(name), ragged_codes()
    ids, mask = padded_prompts("left")
    exact = brute_force(model, ids, mask, codes, normalize, temperature)
    # Stable: of equal ones (an only child, under "children") the shorter comes first.
    best = exact.sort(dim=1, descending=True, stable=True)
    found = constrained_beam_search(
        model,
        ids,
        mask,
        PrefixTree.from_identifiers(codes),
        num_beams=len(codes) + 3,
        normalize=normalize,
        temperature=temperature,
    )
    assert found.items[:, : len(codes)].tolist() == best.indices.tolist()
    torch.testing.assert_close(found.scores[:, : len(codes)], best.values, rtol=1e-5, atol=2e-5)
    # More beams than items: places that say so.
    assert found.valid.sum(1).tolist() == [len(codes)] * len(ids)
    assert (found.items[:, len(codes) :] == -1).all()
    assert (found.scores[:, len(codes) :] == -torch.inf).all()
    assert (found.tokens[:, len(codes) :] == -1).all()


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_unavailable_and_excluded_items_never_appear(name: str) -> None:
    model, codes = small_model(name), ragged_codes(1)
    ids, mask = padded_prompts("right")
    tree, generator = PrefixTree.from_identifiers(codes), torch.Generator().manual_seed(0)
    everything = constrained_beam_search(model, ids, mask, tree, num_beams=len(codes)).items
    for _ in range(4):
        available = torch.rand(len(codes), generator=generator) < 0.6
        barred = torch.rand(len(ids), len(codes), generator=generator) < 0.5
        found = constrained_beam_search(
            model,
            ids,
            mask,
            tree,
            num_beams=len(codes),
            available=available,
            exclude=torch.where(barred, torch.arange(len(codes)), -1),
        )
        for row, items in enumerate(everything.tolist()):
            left = [item for item in items if available[item] and not barred[row, item]]
            assert found.items[row, : len(left)].tolist() == left
            assert not found.valid[row, len(left) :].any()


def test_distinct_nodes_of_a_row_and_the_place_of_each_entry() -> None:
    values = torch.tensor([[7, -1, 3, 7], [-1, -1, -1, -1], [5, 4, -1, 6]])
    nodes, place = distinct(values)
    assert nodes.tolist() == [[3, 7, -1], [-1, -1, -1], [4, 5, 6]]
    assert place.tolist() == [[1, -1, 0, 1], [-1, -1, -1, -1], [1, 0, -1, 2]]


class Fixed(StepDecoder):
    """Given logits for the first token; of the others token 2 for sure."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.batch, self.device, self.head = len(logits), logits.device, None

    def first(self) -> Tensor:
        return self.logits.unsqueeze(1)

    def advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, self.logits.shape[1])
        logits[..., 2] = 50.0
        return logits


def test_a_search_goes_on_until_every_prompt_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Fixed(torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]]))
    monkeypatch.setattr(beam, "decoder_for", lambda *_: decoder)
    tree, ids = PrefixTree.from_identifiers([(0,), (1, 2)]), torch.zeros(2, 1).long()
    found = constrained_beam_search(None, ids, ids + 1, tree, num_beams=2, num_return=1)  # type: ignore[arg-type]
    assert found.items.tolist() == [[0], [1]]


def test_no_beam_is_spent_on_a_prefix_whose_own_item_is_unavailable_and_its_other_excluded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = Fixed(torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 5.0]]))
    monkeypatch.setattr(beam, "decoder_for", lambda *_: decoder)
    tree, ids = PrefixTree.from_identifiers([(5, 2), (5, 2, 2), (1, 2)]), torch.zeros(1, 1).long()
    options: dict[str, Any] = {
        "available": torch.tensor([False, True, True]),
        "exclude": torch.tensor([[1]]),
    }
    found = constrained_beam_search(None, ids, ids + 1, tree, num_beams=1, **options)  # type: ignore[arg-type]
    assert found.items.tolist() == [[2]]


class Counted(StepDecoder):
    """A decoder that counts its steps."""

    steps = 0

    def __init__(self, inner: StepDecoder) -> None:
        self.inner = inner
        self.batch, self.device, self.head = inner.batch, inner.device, inner.head

    def first(self) -> Tensor:
        Counted.steps = 1
        return self.inner.first()

    def advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        Counted.steps += 1
        return self.inner.advance(tokens, parents)


def test_a_search_that_is_settled_stops_and_finds_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model("t5")
    ids, mask = padded_prompts("right")
    make = beam.decoder_for
    monkeypatch.setattr(beam, "decoder_for", lambda *given: Counted(make(*given)))
    steps: dict[int, list[int]] = {}
    for seed in range(5):
        # One long identifier besides short ones: seldom among the best few.
        codes = [*[(3 + k,) for k in range(9)], (12, 16, 31, 40, 41), (3, 15)]
        tree = PrefixTree.from_identifiers(codes)
        for beams, wanted in ((1, 1), (4, 2), (20, 20)):
            options: dict[str, Any] = {"num_beams": beams, "num_return": wanted}
            ids, mask = padded_prompts("right", seed=seed)
            quick = constrained_beam_search(model, ids, mask, tree, **options)
            steps.setdefault(beams, []).append(Counted.steps)
            with monkeypatch.context() as patch:
                patch.setattr(beam.Search, "_settled", lambda *_: False)
                whole = constrained_beam_search(model, ids, mask, tree, **options)
            assert Counted.steps == 5
            assert torch.equal(quick.items, whole.items)
            assert torch.equal(quick.scores, whole.scores)
    assert min(steps[4]) < 5  # it does stop
    assert steps[20] == [5] * 5  # and not while places are empty


def test_identifiers_of_one_length_are_searched_without_reading_the_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model("gpt2")
    ids, mask = padded_prompts("left")
    tree = PrefixTree.from_identifiers([(3 + k, 20, 31 + k) for k in range(9)])
    looks: list[torch.Size] = []
    look = Tensor.__bool__
    run = beam.Search.run

    def counting(self: Any, wanted: int) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(
                Tensor, "__bool__", lambda tensor: looks.append(tensor.shape) or look(tensor)
            )
            return run(self, wanted)

    monkeypatch.setattr(beam.Search, "run", counting)
    assert constrained_beam_search(model, ids, mask, tree, num_beams=4).valid.all()
    assert looks == []


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama"])
def test_nan_scores_name_the_prompt(name: str) -> None:
    model = small_model(name)
    ids, mask = padded_prompts("left")
    ids[:2] = ids[:2].clamp(min=3)
    ids[2, -1] = 59
    ids[[0, 1, 3]] = ids[[0, 1, 3]].clamp(max=58)
    with torch.no_grad():  # the embedding of one token, which is the third prompt's only
        model.get_input_embeddings().weight[59] = torch.nan
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        model.lm_head = torch.nn.Linear(32, 60, bias=False)
    tree = PrefixTree.from_identifiers([(3, 4), (5, 6), (3, 9)])
    with pytest.raises(FloatingPointError, match=r"scores are NaN \(first in prompt 2\)"):
        constrained_beam_search(model, ids, mask, tree, num_beams=2)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperatures_must_be_positive_and_finite(temperature: float) -> None:
    ids, mask = padded_prompts("left")
    tree = PrefixTree.from_identifiers([(3, 4)])
    with pytest.raises(ValueError, match="temperature must be above 0 and finite; got"):
        constrained_beam_search(small_model("gpt2"), ids, mask, tree, temperature=temperature)


def test_a_recommender_searches_with_as_many_beams_as_items_are_asked_for() -> None:
    model, histories = make_model(), [np.array([5, 6, 7]), np.array([100])]
    items, scores = GenerativeRecommender(model, num_beams=2).recommend(histories, 10)
    for row in items.tolist():
        assert min(row) >= 0
        assert len(set(row)) == 10
    assert np.isfinite(scores).all()
    replayed = GenerativeRecommender(model, num_beams=2, graphs=True).recommend(histories, 10)
    assert np.array_equal(replayed[0], items)
