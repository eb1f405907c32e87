"""GPT-2 in C++ on the CPU: equal to the model, and when PyTorch runs instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support.decoder_walks import assert_close, prompts, walk
from support.small_models import VOCAB, padded_prompts
from torch import Tensor, nn

import gflowgr
from gflowgr.backends import cpp_missing
from gflowgr.decoding import constrained_beam_search
from gflowgr.decoding.decoders import (
    CausalDecoder,
    FusedGPT2Decoder,
    GenericDecoder,
    GPT2Decoder,
    StepDecoder,
    decoder_for,
    decoder_kind,
)
from gflowgr.decoding.decoders.gpt2_fused import why_unsupported_gpt2_fused
from gflowgr.models import DecoderConfig, build_decoder
from gflowgr.models.backbone import real_prompt
from gflowgr.models.bare import BareGPT2
from gflowgr.models.vocabulary import IdentifierVocabulary
from gflowgr.ops.logprobs.dense import probe_cpp

_missing = probe_cpp(torch.device("cpu"), torch.float32) if cpp_missing() is None else cpp_missing()
pytestmark = pytest.mark.skipif(_missing is not None, reason=str(_missing))

_SIZES = {
    "vocab_size": VOCAB,
    "n_positions": 180,
    "n_layer": 3,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "relu": {"n_embd": 32, "n_head": 2, "n_inner": 48, "activation_function": "relu"},
    "gelu, several tiles": {"n_embd": 96, "n_head": 2, "n_inner": 1104},
    "one layer, one head": {"n_embd": 16, "n_head": 1, "n_layer": 1},
    "unscaled": {"n_embd": 48, "n_head": 3, "scale_attn_weights": False},
    "untied": {"n_embd": 32, "n_head": 1, "tie_word_embeddings": False},
}


def make_gpt2(name: str = "relu", **changes: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(**{**_SIZES, **CONFIGS[name], **changes})
        model = transformers.GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():  # biases and norms too: theirs are 0 and 1
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model


@torch.no_grad()
def fused(model: Any, ids: Tensor, mask: Tensor) -> StepDecoder:
    made = decoder_for(model, ids, mask)
    assert isinstance(made, FusedGPT2Decoder), why_unsupported_gpt2_fused(model)
    return made


@torch.no_grad()
def reference(model: Any, ids: Tensor, mask: Tensor) -> GPT2Decoder:
    # A prompt without a token attends to whatever stands under its mask: the same for both.
    return GPT2Decoder(model, *real_prompt(model, ids, mask))


class TestEqualsTheModel:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_any_configuration(self, name: str) -> None:
        model, (ids, mask) = make_gpt2(name), prompts(batch=3, size=18)
        assert_close(walk(fused(model, ids, mask)), walk(reference(model, ids, mask)))

    @pytest.mark.parametrize("side", ["left", "right"])
    @torch.no_grad()
    def test_whole_sequences(self, side: str) -> None:
        model, (ids, mask) = make_gpt2(), padded_prompts(side)
        assert_close(walk(fused(model, ids, mask)), walk(GenericDecoder(model, ids, mask)))

    @pytest.mark.parametrize("size", [1, 16, 65, 150])
    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_any_number_of_prompts_and_threads(self, batch: int, size: int) -> None:
        model, (ids, mask) = make_gpt2(), prompts(batch, size)
        expected = walk(reference(model, ids, mask), (3, 40, 4))
        threads = torch.get_num_threads()
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                assert_close(walk(fused(model, ids, mask), (3, 40, 4)), expected)
        finally:
            torch.set_num_threads(threads)

    def test_more_steps_than_lanes(self) -> None:
        model, (ids, mask) = make_gpt2(), prompts(batch=1, size=4)
        widths = (3,) * 20
        expected = walk(reference(model, ids, mask), widths)
        assert_close(walk(fused(model, ids, mask), widths), expected)

    @torch.no_grad()
    def test_the_model_without_transformers(self) -> None:
        codes = IdentifierVocabulary((16, 16))
        sizes = DecoderConfig(d_model=32, d_ff=64, num_heads=2, num_layers=2)
        model = build_decoder(codes, sizes, max_history=10, seed=0).eval()
        bare = BareGPT2(model.config.to_dict())
        bare.load_state_dict(model.state_dict())
        ids, mask = prompts(batch=2, size=9)
        ids = ids % codes.size
        made = decoder_for(bare.eval(), ids, mask)
        assert isinstance(made, FusedGPT2Decoder)
        tokens, parents = torch.tensor([[4, 5, 6]] * 2), torch.zeros(2, 3, dtype=torch.long)
        other = reference(model, ids, mask)
        assert_close([made.first()], [other.first()])
        assert_close([made.advance(tokens, parents)], [other.advance(tokens, parents)])

    @torch.no_grad()
    def test_a_fork_goes_on_by_itself(self) -> None:
        model, (ids, mask) = make_gpt2(), prompts(batch=2, size=5)
        tokens, parents = torch.tensor([[4, 5], [6, 7]]), torch.zeros(2, 2, dtype=torch.long)
        trunk = fused(model, ids, mask)
        trunk.first()
        trunk.advance(tokens, parents)
        expected = trunk.fork().advance(tokens + 9, parents + 1)
        branch = trunk.fork()
        branch.advance(tokens + 20, parents)
        assert torch.equal(trunk.advance(tokens + 9, parents + 1), expected)

    def test_weights_changed_in_place_are_seen(self) -> None:
        model, (ids, mask) = make_gpt2(), prompts(batch=2, size=6)
        before = walk(fused(model, ids, mask))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        after = walk(fused(model, ids, mask))
        assert not torch.allclose(before[1], after[1], rtol=1e-3)
        assert_close(after, walk(reference(model, ids, mask)))

    @pytest.mark.parametrize("part", ["attn.c_attn", "mlp.c_fc"])
    def test_not_a_number_comes_out(self, part: str) -> None:
        model, (ids, mask) = make_gpt2(), prompts(batch=1, size=6)
        with torch.no_grad():
            model.transformer.h[0].get_submodule(part).weight[3, 5] = torch.nan
        tree = gflowgr.PrefixTree.from_identifiers([(5, 9), (5, 8), (6, 7)])
        with pytest.raises(FloatingPointError, match="NaN"):
            constrained_beam_search(model, ids, mask, tree, num_beams=2)

    def test_what_stands_in_padding_does_not_matter(self) -> None:
        """The last real token of a prompt is followed by padding, whose states nobody may read."""
        model = make_gpt2()
        ids, mask = padded_prompts("right")
        other = torch.where(mask == 0, 7, ids)
        assert_close(walk(fused(model, ids, mask)), walk(fused(model, other, mask)))


class TestWhenItIsUsed:
    @torch.no_grad()
    def test_by_default_without_gradients(self) -> None:
        assert decoder_kind(make_gpt2()) == (FusedGPT2Decoder, None)

    def test_gradients_need_the_reference(self) -> None:
        model, (ids, mask) = make_gpt2(), prompts(batch=1, size=3)
        assert decoder_kind(model) == (GPT2Decoder, None)
        decoder_for(model, ids, mask).first().sum().backward()
        assert model.transformer.h[0].attn.c_attn.weight.grad is not None

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["torch", "triton", "cuda"])
    def test_another_backend(self, name: str) -> None:
        with gflowgr.backend(name):
            assert why_unsupported_gpt2_fused(make_gpt2()) == f"backend '{name}' is asked for"
            assert decoder_kind(make_gpt2()) == (GPT2Decoder, None)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda model: model.bfloat16(), "the model in torch.bfloat16"),
            (lambda model: _first_feed(model).c_fc.bfloat16(), "a Conv1D of it is not plain"),
            (lambda model: setattr(_first_feed(model), "act", nn.SiLU()), "its activation SiLU"),
            (
                lambda model: setattr(_first_feed(model), "c_fc", _Low(model)),
                "a _Low of it is not plain",
            ),
            (
                lambda model: _first_feed(model).c_fc.register_forward_hook(lambda *_: None),
                "a Conv1D of it is not plain",
            ),
            (
                lambda model: setattr(model.transformer.h[1].attn, "scaling", 0.5),
                "its layers scale scores differently",
            ),
        ],
    )
    def test_unsupported_models_run_on_the_reference(
        self, change: Callable[[Any], object], reason: str
    ) -> None:
        model = make_gpt2()
        change(model)
        assert reason in (why_unsupported_gpt2_fused(model) or "")
        assert decoder_kind(model) == (GPT2Decoder, None)

    @torch.no_grad()
    def test_heads_that_are_no_whole_vectors(self) -> None:
        model = make_gpt2(n_head=4)
        assert "no multiples of 16 wide" in (why_unsupported_gpt2_fused(model) or "")

    def test_a_gpt2_with_something_in_it_runs_by_its_own_forward(self) -> None:
        plain = make_gpt2()
        hooked, training, patched = (copy.deepcopy(plain) for _ in range(3))
        hooked.transformer.h[1].register_forward_hook(lambda *_: None)
        training.train()
        patched.transformer.h[0].mlp.forward = patched.transformer.h[0].mlp.forward
        for model in (hooked, training, patched):
            assert decoder_kind(model) == (CausalDecoder, None)

        class Own(type(plain.transformer.h[0].attn)):  # type: ignore[misc]
            pass

        plain.transformer.h[0].attn.__class__ = Own
        assert decoder_kind(plain) == (CausalDecoder, None)


class _Low(transformers.pytorch_utils.Conv1D):
    """A linear layer with something added."""

    def __init__(self, model: Any) -> None:
        super().__init__(48, 32)


def _first_feed(model: Any) -> Any:
    return model.transformer.h[0].mlp
