"""T5 in C++ on the CPU: equal to the model over whole sequences, and when PyTorch runs instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support.decoder_walks import assert_close, prompts, walk
from support.small_models import VOCAB, padded_prompts, small_model
from torch import Tensor, nn

import gflowgr
from gflowgr.backends import cpp_missing
from gflowgr.decoding import constrained_beam_search
from gflowgr.decoding.decoders import (
    FusedT5Decoder,
    GenericDecoder,
    StepDecoder,
    T5Decoder,
    decoder_for,
    decoder_kind,
)
from gflowgr.decoding.decoders.t5_fused import why_unsupported_t5_fused
from gflowgr.models.backbone import real_prompt
from gflowgr.ops.logprobs.dense import probe_cpp

_missing = probe_cpp(torch.device("cpu"), torch.float32) if cpp_missing() is None else cpp_missing()
pytestmark = pytest.mark.skipif(_missing is not None, reason=str(_missing))

_SIZES = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "relu": {"d_ff": 40, "d_kv": 16, "num_heads": 2},
    "relu, several tiles": {"d_ff": 1100, "d_kv": 32, "num_heads": 3},
    "gated": {"d_ff": 56, "d_kv": 48, "num_heads": 1, "feed_forward_proj": "gated-gelu"},
    "untied, gated": {
        "d_ff": 520,
        "d_kv": 16,
        "num_heads": 5,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "few buckets": {
        "d_ff": 16,
        "d_kv": 16,
        "num_heads": 2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
    },
}


def make_t5(name: str = "relu", **changes: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.T5Config(**{**_SIZES, **CONFIGS[name], **changes})
        return transformers.T5ForConditionalGeneration(config).eval()


@torch.no_grad()
def fused(model: Any, ids: Tensor, mask: Tensor) -> StepDecoder:
    made = decoder_for(model, ids, mask)
    assert isinstance(made, FusedT5Decoder), why_unsupported_t5_fused(model)
    return made


@torch.no_grad()
def generic(model: Any, ids: Tensor, mask: Tensor) -> GenericDecoder:
    # A prompt without a token attends to whatever stands under its mask: the same for both.
    return GenericDecoder(model, *real_prompt(model, ids, mask))


class TestEqualsWholeSequences:
    @pytest.mark.parametrize("name", CONFIGS)
    @pytest.mark.parametrize("scaled", [False, True])
    def test_any_configuration(self, name: str, scaled: bool) -> None:
        model = make_t5(name)
        model.config.scale_decoder_outputs = scaled
        ids, mask = prompts(batch=3, size=18)
        assert_close(walk(fused(model, ids, mask)), walk(generic(model, ids, mask)))

    @pytest.mark.parametrize("size", [1, 16, 65, 150])
    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_any_number_of_prompts_and_threads(self, batch: int, size: int) -> None:
        model, (ids, mask) = make_t5(), prompts(batch, size)
        expected = walk(generic(model, ids, mask), (3, 4))
        threads = torch.get_num_threads()
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                assert_close(walk(fused(model, ids, mask), (3, 4)), expected)
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_on_either_side(self, side: str) -> None:
        model, (ids, mask) = make_t5("gated"), padded_prompts(side)
        assert_close(walk(fused(model, ids, mask)), walk(generic(model, ids, mask)))

    def test_mt5(self) -> None:
        config = transformers.MT5Config(**{**_SIZES, **CONFIGS["gated"]})
        model = transformers.MT5ForConditionalGeneration(config).eval()
        ids, mask = prompts(batch=2, size=9)
        assert_close(walk(fused(model, ids, mask)), walk(generic(model, ids, mask)))

    def test_more_steps_than_lanes(self) -> None:
        model, (ids, mask) = make_t5(), prompts(batch=1, size=4)
        widths = (3,) * 20
        expected = walk(generic(model, ids, mask), widths)
        assert_close(walk(fused(model, ids, mask), widths), expected)

    @torch.no_grad()
    def test_a_fork_goes_on_by_itself(self) -> None:
        model, (ids, mask) = make_t5(), prompts(batch=2, size=5)
        tokens, parents = torch.tensor([[4, 5], [6, 7]]), torch.zeros(2, 2, dtype=torch.long)
        trunk = fused(model, ids, mask)
        trunk.first()
        trunk.advance(tokens, parents)
        expected = trunk.fork().advance(tokens + 9, parents + 1)
        branch = trunk.fork()
        branch.advance(tokens + 20, parents)
        assert torch.equal(trunk.advance(tokens + 9, parents + 1), expected)
        whole = generic(model, ids, mask)
        whole.first()
        whole.advance(tokens, parents)
        assert_close([trunk.logits(expected)], [whole.advance(tokens + 9, parents + 1)])

    def test_weights_changed_in_place_are_seen(self) -> None:
        model, (ids, mask) = make_t5(), prompts(batch=2, size=6)
        before = walk(fused(model, ids, mask))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        after = walk(fused(model, ids, mask))
        assert not torch.allclose(before[1], after[1], rtol=1e-3)
        assert_close(after, walk(generic(model, ids, mask)))

    @pytest.mark.parametrize("part", ["encoder", "decoder"])
    def test_not_a_number_comes_out(self, part: str) -> None:
        model, (ids, mask) = make_t5(), prompts(batch=1, size=6)
        with torch.no_grad():
            getattr(model, part).block[0].layer[-1].DenseReluDense.wi.weight[3, 5] = torch.nan
        tree = gflowgr.PrefixTree.from_identifiers([(5, 9), (5, 8), (6, 7)])
        with pytest.raises(FloatingPointError, match="NaN"):
            constrained_beam_search(model, ids, mask, tree, num_beams=2)


class TestWhenItIsUsed:
    @torch.no_grad()
    def test_by_default_without_gradients(self) -> None:
        assert decoder_kind(make_t5()) == (FusedT5Decoder, None)

    def test_gradients_need_the_definition(self) -> None:
        model, (ids, mask) = make_t5(), prompts(batch=1, size=3)
        assert decoder_kind(model) == (T5Decoder, None)
        decoder_for(model, ids, mask).first().sum().backward()
        assert model.encoder.block[0].layer[0].SelfAttention.q.weight.grad is not None

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["torch", "triton", "cuda"])
    def test_another_backend(self, name: str) -> None:
        with gflowgr.backend(name):
            assert why_unsupported_t5_fused(make_t5()) == f"backend '{name}' is asked for"
            assert decoder_kind(make_t5()) == (T5Decoder, None)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda model: model.train(), "the model is in training mode"),
            (lambda model: model.bfloat16(), "the model in torch.bfloat16"),
            (lambda model: _first_feed(model).wi.bfloat16(), "a Linear of it is not plain"),
            (lambda model: setattr(_first_feed(model), "act", nn.SiLU()), "its activation SiLU"),
            (lambda model: setattr(_first_feed(model), "wi", _Low()), "a _Low of it is not plain"),
            (
                lambda model: setattr(_first_feed(model), "wi", nn.Sequential(nn.Linear(24, 40))),
                "a Sequential of it is not plain",
            ),
            (
                lambda model: _first_feed(model).wi.register_forward_hook(lambda *_: None),
                "a Linear of it is not plain",
            ),
        ],
    )
    def test_unsupported_models_run_on_the_reference(
        self, change: Callable[[Any], object], reason: str
    ) -> None:
        model = make_t5()
        change(model)
        assert reason in (why_unsupported_t5_fused(model) or "")
        assert decoder_kind(model) == (T5Decoder, None)

    @torch.no_grad()
    def test_heads_that_are_no_whole_vectors(self) -> None:
        assert why_unsupported_t5_fused(make_t5(d_kv=24)) == "d_kv = 24 is no multiple of 16"

    @torch.no_grad()
    def test_umt5_has_a_bias_in_every_layer(self) -> None:
        kind, why = decoder_kind(small_model("umt5"))
        assert kind is GenericDecoder
        assert "UMT5ForConditionalGeneration is not of the T5 family" in str(why)


class _Low(nn.Linear):
    """A linear layer with something added."""

    def __init__(self) -> None:
        super().__init__(24, 40, bias=False)


def _first_feed(model: Any) -> Any:
    return model.encoder.block[0].layer[-1].DenseReluDense


class TestEncodedPrompts:
    """States that the encoder has given already are not computed again."""

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["t5", "t5-whole-vectors", "bart"])
    def test_same_as_without(self, name: str) -> None:
        model, (ids, mask) = small_model(name), padded_prompts("right")
        states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = walk(decoder_for(model, ids, mask))
        model.get_encoder().forward = None  # a call would fail
        assert_close(walk(decoder_for(model, ids, mask, states)), expected)

    @pytest.mark.parametrize(
        ("name", "shape", "message"),
        [
            (
                "t5",
                (4, 6, 32),
                r"encoded must be \[B, S, d\] with B, S = \(4, 7\); got \(4, 6, 32\)",
            ),
            ("gpt2", (4, 7, 32), "encoded: GPT2LMHeadModel has no encoder"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, name: str, shape: tuple[int, ...], message: str
    ) -> None:
        ids, mask = padded_prompts("left")
        with pytest.raises(ValueError, match=message):
            decoder_for(small_model(name), ids, mask, torch.zeros(shape))
