"""The package's beam search behind ``generate``: the same call, the same answer."""

from __future__ import annotations

import functools

import pytest
import torch
from support.generation_models import EOS, FIXED, PAD, RAGGED, from_dictionary, make_model, prompts
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation import GenerateBeamEncoderDecoderOutput

from gflowgr.decoding.adapters import PrefixTreeLogitsProcessor, constrained_generate
from gflowgr.tree import PrefixTree

CALL = {
    "num_beams": 6,
    "num_return_sequences": 5,
    "max_new_tokens": 3,
    "return_dict_in_generate": True,
    "output_scores": True,
}
TREE = PrefixTree.from_identifiers(FIXED)
ENDED = [(*identifier, EOS) for identifier in RAGGED]
SHARED = [*FIXED[:6], FIXED[0], FIXED[3], FIXED[0]]


def generate(family: str = "t5", **options: object) -> GenerateBeamEncoderDecoderOutput:
    return make_model(family).generate(**prompts(family), **{**CALL, **options})


def ours(
    tree: PrefixTree = TREE, *, family: str = "t5", **options: object
) -> GenerateBeamEncoderDecoderOutput:
    way = {"custom_generate": constrained_generate, "tree": tree, "normalize": "vocab"}
    return generate(family, **{**way, **options})


def assert_same(
    found: GenerateBeamEncoderDecoderOutput, expected: GenerateBeamEncoderDecoderOutput
) -> None:
    assert found.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(
        found.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-5
    )


class TestUnchangedCalls:
    @pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
    @pytest.mark.parametrize("beams", [(6, 5), (12, 12), (1, 1)])
    def test_identifiers_of_one_length(self, beams: tuple[int, int], penalty: float) -> None:
        options = {
            "num_beams": beams[0],
            "num_return_sequences": beams[1],
            "length_penalty": penalty,
        }
        expected = generate(prefix_allowed_tokens_fn=from_dictionary(FIXED, 1), **options)
        found = ours(**options)
        assert found.sequences.tolist() == expected.sequences.tolist()
        if beams[0] > 1:  # greedy search of generate has no sequence scores
            assert_same(found, expected)

    def test_the_encoder_runs_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder = make_model("t5").get_encoder()
        runs: list[object] = []
        hook = encoder.register_forward_hook(lambda *_: runs.append(1))
        monkeypatch.setenv("GFLOWGR_BACKEND", "torch")  # in which every run is a call
        try:
            ours()
        finally:
            hook.remove()
        assert len(runs) == 1

    def test_identifiers_with_an_end_token_of_their_own(self) -> None:
        options = {"max_new_tokens": 4, "length_penalty": 0.0, "early_stopping": "never"}
        options |= {"num_beams": 20}  # generate drops ends ranked below the beams, ours does not
        expected = generate(prefix_allowed_tokens_fn=from_dictionary(RAGGED, 1), **options)
        found = ours(PrefixTree.from_identifiers(ENDED), **options)
        # generate pads with the end token where padding is token 0, and one column too many.
        ended = (expected.sequences == EOS).cumsum(1)
        width = found.sequences.shape[1]
        assert (ended[:, width:] > 0).all()
        expected.sequences = expected.sequences.masked_fill(ended > 1, PAD)[:, :width]
        assert_same(found, expected)

    def test_shared_identifiers_are_one_sequence_each(self) -> None:
        options = {"num_return_sequences": 6}
        found = ours(PrefixTree.from_identifiers(SHARED), **options)
        expected = generate(prefix_allowed_tokens_fn=from_dictionary(SHARED, 1), **options)
        assert_same(found, expected)

    def test_a_call_without_dictionary_returns_the_sequences(self) -> None:
        sequences = ours(return_dict_in_generate=False)
        assert isinstance(sequences, Tensor)
        assert torch.equal(sequences, ours().sequences)
        assert ours(output_scores=False).sequences_scores is None

    def test_tree_may_be_bound_beforehand(self) -> None:
        bound = functools.partial(constrained_generate, tree=TREE, normalize="vocab")
        assert_same(generate(custom_generate=bound), ours())

    def test_prompts_without_attention_mask(self) -> None:
        ids = prompts("t5")["input_ids"][:1]
        model, options = make_model("t5"), dict(CALL)
        found = model.generate(
            ids, custom_generate=constrained_generate, tree=TREE, normalize="vocab", **options
        )
        expected = model.generate(
            ids, prefix_allowed_tokens_fn=from_dictionary(FIXED, 1), **options
        )
        assert_same(found, expected)

    def test_availability_and_exclusion_reach_the_search(self) -> None:
        available = torch.arange(len(FIXED)) % 2 == 0
        constraint = PrefixTreeLogitsProcessor(
            TREE, end_token=EOS, available=available, normalize="vocab"
        )
        assert_same(ours(available=available), generate(logits_processor=[constraint]))
        everything = torch.arange(len(FIXED)).expand(3, -1)
        assert (ours(exclude=everything[:, :-1]).sequences_scores[1:5] == -torch.inf).all()


class TestDecoderOnly:
    """Prompts padded on the left stand in front of the identifiers."""

    @pytest.mark.parametrize("family", ["gpt2", "qwen3"])
    @pytest.mark.parametrize("beams", [6, 12])
    def test_identifiers_of_one_length(self, family: str, beams: int) -> None:
        options = {"num_beams": beams, "num_return_sequences": 6}
        expected = generate(family, prefix_allowed_tokens_fn=from_dictionary(FIXED, 4), **options)
        found = ours(family=family, **options)
        assert_same(found, expected)
        prompt = prompts(family)["input_ids"].repeat_interleave(6, dim=0)
        assert torch.equal(found.sequences[:, :4], prompt)

    @pytest.mark.parametrize("family", ["gpt2", "qwen3"])
    def test_prompts_without_padding(self, family: str) -> None:
        ids = prompts(family)["input_ids"][:1]
        model, options = make_model(family), dict(CALL)
        found = model.generate(
            ids, custom_generate=constrained_generate, tree=TREE, normalize="vocab", **options
        )
        expected = model.generate(
            ids, prefix_allowed_tokens_fn=from_dictionary(FIXED, 4), **options
        )
        assert_same(found, expected)

    @pytest.mark.parametrize("family", ["gpt2", "qwen3"])
    def test_padding_may_be_a_token_of_identifiers(self, family: str) -> None:
        """In all three ways, whose prompts end where identifiers begin."""
        inputs, pad = prompts(family), FIXED[0][0]
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad)
        wanted = ours(family=family)
        ways = (
            {"custom_generate": constrained_generate, "tree": TREE, "normalize": "vocab"},
            {
                "logits_processor": [
                    PrefixTreeLogitsProcessor(TREE, end_token=EOS, normalize="vocab")
                ]
            },
            {"prefix_allowed_tokens_fn": TREE.as_prefix_allowed_tokens_fn(end_token=EOS)},
        )
        for way in ways:
            found = make_model(family).generate(**inputs, **{**CALL, "pad_token_id": pad, **way})
            assert found.sequences[:, 4:].tolist() == wanted.sequences[:, 4:].tolist()
            torch.testing.assert_close(
                found.sequences_scores, wanted.sequences_scores, rtol=1e-5, atol=1e-5
            )

    def test_unsupported_inputs_are_named(self) -> None:
        model = make_model("gpt2")
        embeds = model.get_input_embeddings()(prompts("gpt2")["input_ids"])
        with pytest.raises(ValueError, match="inputs_embeds is not supported"):
            model.generate(
                inputs_embeds=embeds, custom_generate=constrained_generate, tree=TREE, **CALL
            )


class TestLayout:
    def test_end_token_and_padding_follow_where_there_is_room(self) -> None:
        out = ours(max_new_tokens=5).sequences
        assert out.shape == (15, 5)
        assert (out[:, 0] == PAD).all()
        assert (out[:, 4] == EOS).all()
        assert torch.equal(out[:, :4], ours().sequences)

    def test_more_beams_than_items_are_padding_at_minus_infinity(self) -> None:
        few = PrefixTree.from_identifiers(FIXED[:3])
        out = ours(few)
        scores = out.sequences_scores.view(3, 5)
        assert (scores[:, :3] > -torch.inf).all()
        assert (scores[:, 3:] == -torch.inf).all()
        rows = out.sequences.view(3, 5, -1)
        assert (rows[:, 3:] == PAD).all()
        for row in rows[:, :3, 1:].tolist():
            assert sorted(map(tuple, row)) == sorted(FIXED[:3])

    def test_nothing_available_is_all_padding(self) -> None:
        out = ours(available=torch.zeros(len(FIXED), dtype=torch.bool))
        assert (out.sequences == PAD).all()
        assert (out.sequences_scores == -torch.inf).all()


class Always(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return torch.ones(len(input_ids), dtype=torch.bool)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("do_sample", True),
            ("repetition_penalty", 1.2),
            ("no_repeat_ngram_size", 2),
            ("bad_words_ids", [[5]]),
            ("suppress_tokens", [5]),
            ("forced_eos_token_id", EOS),
            ("min_new_tokens", 2),
            ("renormalize_logits", True),
            ("output_attentions", True),
            ("output_logits", True),
            ("max_time", 5.0),
        ],
    )
    def test_unsupported_options_are_named(self, name: str, value: object) -> None:
        with pytest.raises(ValueError, match=rf"{name} = .* not supported"):
            ours(**{name: value})

    def test_other_constraints_and_criteria_are_named(self) -> None:
        constraint = PrefixTreeLogitsProcessor(TREE, end_token=EOS)
        with pytest.raises(ValueError, match="logits_processor: PrefixTreeLogitsProcessor"):
            ours(logits_processor=[constraint])
        with pytest.raises(ValueError, match="PrefixConstrainedLogitsProcessor"):
            ours(prefix_allowed_tokens_fn=from_dictionary(FIXED, 1))
        with pytest.raises(ValueError, match="stopping_criteria: Always"):
            ours(stopping_criteria=[Always()])

    def test_identifiers_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"max_new_tokens = 2, .* identifiers of 3 tokens"):
            ours(max_new_tokens=2)

    def test_ranking_by_length_is_refused(self) -> None:
        ragged = PrefixTree.from_identifiers(ENDED)
        with pytest.raises(ValueError, match=r"length_penalty = 1.0 .* pass length_penalty=0.0"):
            ours(ragged, max_new_tokens=4)
        with pytest.raises(ValueError, match="early_stopping = True"):
            ours(ragged, max_new_tokens=4, length_penalty=0.0, early_stopping=True)

    def test_forced_decoder_tokens_are_refused(self) -> None:
        with pytest.raises(ValueError, match="decoder_input_ids of 2 tokens"):
            ours(decoder_input_ids=torch.tensor([[PAD, 2]] * 3))

    def test_encoder_outputs_alone_are_refused(self) -> None:
        encoded = make_model("t5").get_encoder()(**prompts("t5"))
        with pytest.raises(ValueError, match="encoder_outputs without input_ids"):
            make_model("t5").generate(
                encoder_outputs=encoded, custom_generate=constrained_generate, tree=TREE, **CALL
            )

    def test_a_call_without_tree_says_so(self) -> None:
        with pytest.raises(TypeError, match="'tree'"):
            generate(custom_generate=constrained_generate)
