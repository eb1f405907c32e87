"""The tree as constraints of ``generate``: against the same constraint from dictionaries."""

from __future__ import annotations

import pytest
import torch
from support.dict_trie import Identifier
from support.generation_models import (
    EOS,
    FIXED,
    PAD,
    RAGGED,
    VOCAB,
    from_dictionary,
    make_model,
    prompt_length,
    prompts,
)
from torch import Tensor
from transformers import T5ForConditionalGeneration

from gflowgr.decoding.adapters import PrefixTreeLogitsProcessor
from gflowgr.tree import PrefixTree


def generate(family: str, **options: object) -> tuple[Tensor, Tensor]:
    """Generated tokens [rows, length] and scores [rows]."""
    options = {"num_beams": 6, "num_return_sequences": 6, "max_new_tokens": 4, **options}
    out = make_model(family).generate(
        **prompts(family), return_dict_in_generate=True, output_scores=True, **options
    )
    return out.sequences[:, prompt_length(family) :], out.sequences_scores


def processor(identifiers: list[Identifier], **options: object) -> PrefixTreeLogitsProcessor:
    tree = PrefixTree.from_identifiers(identifiers)
    return PrefixTreeLogitsProcessor(tree, **{"end_token": EOS, "normalize": "vocab", **options})


def as_identifiers(tokens: Tensor) -> list[Identifier]:
    """Tokens before the end token or padding."""
    return [tuple(t for t in row if t not in (PAD, EOS)) for row in tokens.tolist()]


BRANCHES: list[Identifier] = [(2, 5), (2, 6), (3,), (3, 5), (4, 7)]

FAMILIES = pytest.mark.parametrize("family", ["t5", "gpt2", "qwen3"])
CATALOGUES = pytest.mark.parametrize("identifiers", [FIXED, RAGGED], ids=["fixed", "ragged"])


class TestAgainstDictionaries:
    @FAMILIES
    @CATALOGUES
    def test_processor_gives_the_same_beams(
        self, family: str, identifiers: list[Identifier]
    ) -> None:
        expected = generate(
            family,
            prefix_allowed_tokens_fn=from_dictionary(identifiers, prompt_length(family)),
        )
        found = generate(family, logits_processor=[processor(identifiers)])
        assert found[0].tolist() == expected[0].tolist()
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)

    @FAMILIES
    @CATALOGUES
    def test_allowed_tokens_fn_gives_the_same_beams(
        self, family: str, identifiers: list[Identifier]
    ) -> None:
        tree = PrefixTree.from_identifiers(identifiers)
        expected = generate(
            family,
            prefix_allowed_tokens_fn=from_dictionary(identifiers, prompt_length(family)),
        )
        found = generate(
            family, prefix_allowed_tokens_fn=tree.as_prefix_allowed_tokens_fn(end_token=EOS)
        )
        assert found[0].tolist() == expected[0].tolist()
        assert torch.equal(found[1], expected[1])

    @FAMILIES
    def test_greedy_and_sampled_rows_are_identifiers(self, family: str) -> None:
        torch.manual_seed(0)
        model, start = make_model(family), prompt_length(family)
        for options in ({}, {"do_sample": True, "num_return_sequences": 50}):
            constraint = processor(RAGGED)
            sequences = model.generate(
                **prompts(family), max_new_tokens=4, logits_processor=[constraint], **options
            )
            found = as_identifiers(sequences[:, start:])
            assert set(found) <= set(RAGGED)
            items = constraint.items(sequences).tolist()
            assert items == [RAGGED.index(identifier) for identifier in found]

    def test_one_processor_serves_generations_of_different_prompts(self) -> None:
        constraint, tree = processor(FIXED), PrefixTree.from_identifiers(FIXED)
        allowed = tree.as_prefix_allowed_tokens_fn(end_token=EOS)
        model = make_model("gpt2")
        for width in (4, 3, 7, 8, 1):
            ids = torch.randint(2, VOCAB, (2, width), generator=torch.Generator().manual_seed(1))
            for options in (
                {"logits_processor": [constraint]},
                {"prefix_allowed_tokens_fn": allowed},
            ):
                out = model.generate(ids, num_beams=3, max_new_tokens=4, **options)
                assert set(as_identifiers(out[:, width:])) <= set(FIXED)


class TestScores:
    """The processor called by hand: what it keeps, and over what it normalises."""

    def scores(self, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(rows, 9, generator=torch.Generator().manual_seed(0)).to(dtype)

    def test_only_children_and_the_end_keep_their_scores(self) -> None:
        constraint = processor(BRANCHES, prompt_length=0)
        scores = self.scores(4)
        rows = torch.tensor([[2], [3], [4], [2]])
        out = constraint(rows, scores)
        kept = [[5, 6], [EOS, 5], [7], [5, 6]]
        for row, tokens in enumerate(kept):
            assert (out[row] > -torch.inf).nonzero()[:, 0].tolist() == tokens
            assert torch.equal(out[row, tokens], scores[row, tokens])
        assert constraint.dead is not None
        assert not constraint.dead.any()

    def test_children_normalises_over_what_continues_the_row(self) -> None:
        out = processor(BRANCHES, prompt_length=0, normalize="children")(
            torch.tensor([[2], [3]]), scores := self.scores(2)
        )
        for row, tokens in enumerate([[5, 6], [EOS, 5]]):
            expected = scores[row, tokens].log_softmax(0)
            torch.testing.assert_close(out[row, tokens], expected)

    def test_level_normalises_over_the_codebook_of_the_position(self) -> None:
        out = processor(BRANCHES, prompt_length=0, normalize="level")(
            torch.tensor([[2], [3]]), scores := self.scores(2)
        )
        torch.testing.assert_close(out[0, 5:7], scores[0, 5:8].log_softmax(0)[:2])
        expected = scores[1, [5, 6, 7, EOS]].log_softmax(0)
        torch.testing.assert_close(out[1, [5, EOS]], expected[[0, 3]])

    @pytest.mark.parametrize("normalize", ["vocab", "level", "children"])
    def test_in_place_gives_the_same_scores_in_the_given_tensor(self, normalize: str) -> None:
        rows, scores = torch.tensor([[2], [3], [8], [4]]), self.scores(4)
        options = {"prompt_length": 0, "normalize": normalize}
        before = scores.clone()
        expected = processor(BRANCHES, **options)(rows, scores)
        assert torch.equal(scores, before)
        found = processor(BRANCHES, in_place=True, **options)(rows, scores)
        assert found is scores
        assert torch.equal(found, expected)

    def test_unavailable_children_count_in_the_normaliser_and_are_not_kept(self) -> None:
        available = torch.tensor([True, False, True, True, True])
        constraint = processor(BRANCHES, prompt_length=0, normalize="children", available=available)
        scores = self.scores(1)
        out = constraint(torch.tensor([[2]]), scores)
        torch.testing.assert_close(out[0, 5], scores[0, 5:7].log_softmax(0)[0])
        assert (out > -torch.inf).sum() == 1

    def test_unavailable_items_and_dead_ends_are_not_generated(self) -> None:
        available = torch.arange(len(FIXED)) % 9 == 0
        found, scores = generate("t5", logits_processor=[processor(FIXED, available=available)])
        real = scores > -1e6
        wanted = {FIXED[i] for i in available.nonzero()[:, 0].tolist()}
        assert set(as_identifiers(found[real])) == wanted


class TestTraps:
    @FAMILIES
    def test_special_tokens_are_unreachable(self, family: str) -> None:
        """However probable padding or the end are, they come only after an identifier."""
        scores = torch.zeros(3, VOCAB)
        scores[:, [PAD, EOS]] = 50.0
        out = processor(FIXED)(prompts(family)["input_ids"], scores)
        assert (out[:, [PAD, EOS]] == -torch.inf).all()
        tokens, _ = generate(family, logits_processor=[processor(FIXED)])
        assert ((tokens == PAD) | (tokens == EOS)).sum() == len(tokens)
        assert (tokens[:, 3] <= EOS).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("normalize", ["vocab", "level", "children"])
    def test_masks_hold_in_half_precision(self, dtype: torch.dtype, normalize: str) -> None:
        """Large scores are neither swallowed nor let through; every row keeps a finite one."""
        scores = torch.full((4, VOCAB), -6e4, dtype=dtype)
        scores[:, 12:] = 6e4
        constraint = processor(FIXED, prompt_length=1, normalize=normalize)
        rows = torch.tensor([[PAD, 2], [PAD, 3], [PAD, 23], [PAD, EOS]])
        out = constraint(rows, scores)
        assert out.dtype == dtype
        allowed = from_dictionary(FIXED, 1)
        for row in range(4):
            assert (out[row] > -torch.inf).nonzero()[:, 0].tolist() == allowed(0, rows[row])
        assert out.isfinite().any(1).all()
        assert not out.softmax(-1).isnan().any()

    def test_fp16_model_generates_only_identifiers(self) -> None:
        model = T5ForConditionalGeneration(make_model("t5").config).to(torch.bfloat16).eval()
        out = model.generate(
            **prompts("t5"), num_beams=4, max_new_tokens=4, logits_processor=[processor(FIXED)]
        )
        assert set(as_identifiers(out[:, 1:])) <= set(FIXED)

    @pytest.mark.parametrize("normalize", ["vocab", "level", "children"])
    def test_a_row_whose_allowed_scores_are_all_minus_infinity_keeps_a_finite_one(
        self, normalize: str
    ) -> None:
        scores = torch.zeros(2, VOCAB)
        scores[0, 2:8] = -torch.inf
        constraint = processor(FIXED, prompt_length=1, normalize=normalize)
        out = constraint(torch.zeros(2, 1, dtype=torch.long), scores)
        assert out.isfinite().any(1).all()
        assert constraint.dead.tolist() == [True, False]
        assert out[0].argmax() == EOS

    def test_duplicate_identifiers_are_one_sequence_and_the_lowest_available_item(self) -> None:
        identifiers = [(2, 5), (3, 6), (2, 5), (2, 5)]
        tree = PrefixTree.from_identifiers(identifiers)
        constraint = PrefixTreeLogitsProcessor(tree, end_token=EOS, normalize="vocab")
        found, scores = generate("t5", logits_processor=[constraint])
        real = as_identifiers(found[scores > -1e6])
        assert sorted(real) == sorted([(2, 5), (3, 6)] * 3)  # once for each of three prompts
        sequences = torch.tensor([[PAD, 2, 5, EOS], [PAD, 3, 6, EOS]])
        assert constraint.items(sequences).tolist() == [0, 1]
        few = PrefixTreeLogitsProcessor(
            tree, prompt_length=1, available=torch.tensor([False, True, False, True])
        )
        assert few.items(sequences).tolist() == [3, 1]

    @FAMILIES
    def test_more_beams_than_items_give_each_item_once_and_minus_one(self, family: str) -> None:
        identifiers = FIXED[:4]
        constraint = processor(identifiers)
        model = make_model(family)
        out = model.generate(
            **prompts(family), num_beams=9, num_return_sequences=9, max_new_tokens=4,
            logits_processor=[constraint], return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        items = constraint.items(out.sequences, out.sequences_scores).view(3, 9)
        for row in items.tolist():
            assert sorted(row) == [-1] * 5 + [0, 1, 2, 3]

    def test_beams_that_change_places_keep_their_own_constraint(self) -> None:
        """Rows in any order get, each, what its own tokens allow."""
        constraint = processor(FIXED, prompt_length=None)
        allowed = from_dictionary(FIXED, 1)
        rows = torch.zeros(len(FIXED), 1, dtype=torch.long)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.tensor(FIXED)
        for step in range(4):
            out = constraint(rows, torch.zeros(len(rows), VOCAB))
            for row in range(len(rows)):
                kept = (out[row] > -torch.inf).nonzero()[:, 0].tolist()
                assert kept == sorted(allowed(0, rows[row]))
            tokens = tokens[torch.randperm(len(rows), generator=generator)]
            rows = torch.cat([torch.zeros_like(rows[:, :1]), tokens[:, : step + 1]], dim=1)

    def test_nothing_available_unconstrains_nothing(self) -> None:
        """No empty list, no free row: only the end token is left, and the item is -1."""
        tree = PrefixTree.from_identifiers(FIXED)
        none = torch.zeros(len(FIXED), dtype=torch.bool)
        allowed = tree.as_prefix_allowed_tokens_fn(end_token=EOS, available=none)
        assert allowed(0, torch.tensor([PAD])) == [EOS]
        assert allowed(0, torch.tensor([PAD, 23])) == [EOS]
        constraint = processor(FIXED, available=none)
        for options in ({"num_beams": 4, "num_return_sequences": 4}, {"do_sample": True}):
            out = make_model("t5").generate(
                **prompts("t5"), max_new_tokens=4, logits_processor=[constraint], **options
            )
            assert set(as_identifiers(out)) == {()}
            assert (constraint.items(out) == -1).all()

    def test_an_end_token_carried_by_the_identifiers_needs_no_end_token(self) -> None:
        identifiers = [(*ids, EOS) for ids in RAGGED]
        expected = generate("t5", prefix_allowed_tokens_fn=from_dictionary(RAGGED, 1))
        found = generate("t5", logits_processor=[processor(identifiers, end_token=None)])
        assert found[0].tolist() == expected[0].tolist()
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)

    def test_identifiers_of_one_length_may_end_with_the_generation(self) -> None:
        expected = generate(
            "gpt2", prefix_allowed_tokens_fn=from_dictionary(FIXED, 4), max_new_tokens=3
        )
        found = generate(
            "gpt2", logits_processor=[processor(FIXED, end_token=None)], max_new_tokens=3
        )
        assert found[0].tolist() == expected[0].tolist()
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)

    def test_items_of_cut_rows_are_none(self) -> None:
        constraint = processor([(2, 5), (2,), (3, 4, 5)], prompt_length=1)
        sequences = torch.tensor(
            [[PAD, 2, 5, EOS], [PAD, 2, EOS, PAD], [PAD, 3, 4, EOS], [PAD, 7, 7, 7], [PAD] * 4]
        )
        assert constraint.items(sequences).tolist() == [0, 1, -1, -1, -1]
        assert constraint.items(sequences[:, :2]).tolist() == [-1, -1, -1, -1, -1]


class TestRefusals:
    def test_prefixes_need_an_end_token(self) -> None:
        with pytest.raises(ValueError, match=r"end_token is None.*beginning of another: \(2,\)"):
            processor([(2, 5), (2,)], end_token=None)

    def test_an_end_token_means_one_thing(self) -> None:
        with pytest.raises(ValueError, match=r"end_token = 5 both ends .* \(2,\)"):
            processor([(2, 5), (2,)], end_token=5)

    def test_values_out_of_range_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"normalize must be .* got 'all'"):
            processor(FIXED, normalize="all")
        with pytest.raises(ValueError, match=r"end_token must be .*; got -1"):
            processor(FIXED, end_token=-1)
        with pytest.raises(ValueError, match=r"prompt_length must be .*; got -2"):
            processor(FIXED, prompt_length=-2)
        with pytest.raises(ValueError, match="prompt_length = 3, but only 1"):
            processor(FIXED, prompt_length=3)(torch.zeros(1, 1).long(), torch.zeros(1, VOCAB))
        with pytest.raises(ValueError, match="tokens up to 21, the model has 20"):
            processor(FIXED)(torch.zeros(1, 1).long(), torch.zeros(1, 20))
        with pytest.raises(ValueError, match=r"end_token must be 0\.\.23; got 30"):
            processor(FIXED, end_token=30)(torch.zeros(1, 1).long(), torch.zeros(1, VOCAB))
        with pytest.raises(ValueError, match="prompt_length is not known"):
            processor(FIXED).items(torch.zeros(1, 4).long())
