"""Stepwise decoders: every fast one does what running whole sequences does."""

from __future__ import annotations

import copy

import pytest
import torch
from support.small_models import FAST, SLOW, VOCAB, padded_prompts, small_model
from torch import Tensor

from gflowgr.decoding.decoders import (
    GenericDecoder,
    StepDecoder,
    causal,
    decoder_for,
    decoder_kind,
)


def walk(decoder: StepDecoder, *, seed: int = 0) -> list[Tensor]:
    """Logits of four steps with a changing number of beams and crossing parents."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        out = [decoder.logits(decoder.first())]
        previous = 1
        for beams in (5, 7, 2):
            tokens = torch.randint(3, VOCAB, (decoder.batch, beams), generator=generator)
            parents = torch.randint(0, previous, (decoder.batch, beams), generator=generator)
            out.append(decoder.logits(decoder.advance(tokens, parents)))
            previous = beams
    return out


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_few_and_many_beams_are_attended_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a mask, gathered, and by the one after the other within a search."""
    model, prompts = small_model(name), padded_prompts("left")
    few = walk(decoder_for(model, *prompts))
    length = prompts[0].shape[1]
    for limit in (0, 6, 13):  # of 5, 12 and 14 beams up to each step
        monkeypatch.setattr(causal, "_FEW", limit - length)
        for one, other in zip(few, walk(decoder_for(model, *prompts)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAST)
def test_fast_decoders_equal_whole_sequences(name: str, side: str) -> None:
    model = small_model(name)
    ids, mask = padded_prompts(side)
    fast, slow = decoder_for(model, ids, mask), GenericDecoder(model, ids, mask)
    assert type(fast) is not GenericDecoder
    for quick, whole in zip(walk(fast), walk(slow), strict=True):
        torch.testing.assert_close(quick, whole, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "norms"), [("qwen3", 9), ("olmo2", 9), ("gemma", 0)])
@torch.no_grad()
def test_norms_of_one_op_equal_the_models_own(name: str, norms: int) -> None:
    """9 of two layers: two and two of the heads (or behind the parts) in each, and the last."""
    base = small_model(name).base_model
    own = dict(base.named_modules())
    view = causal._view_of(base)
    found = {n: m for n, m in view.named_modules() if isinstance(m, causal._RMSNorm)}
    assert len(found) == norms
    assert not any(isinstance(module, causal._RMSNorm) for module in own.values())
    generator = torch.Generator().manual_seed(0)
    for place, norm in found.items():
        norm.weight.normal_(generator=generator)
        hidden = torch.randn(3, 2, *norm.weight.shape, generator=generator)
        torch.testing.assert_close(norm(hidden), own[place](hidden))
        mixed = hidden.bfloat16()  # with a weight in float32, as some keep their norms
        assert torch.equal(norm(mixed), own[place](mixed))
    base.bfloat16()
    for place, norm in found.items():
        hidden = torch.randn(3, 2, *norm.weight.shape, generator=generator).bfloat16()
        torch.testing.assert_close(norm(hidden), own[place](hidden), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("name", ["t5", "gpt2", "qwen3", "gemma2"])
def test_forks_go_on_from_one_prefix_without_each_other(name: str) -> None:
    model = small_model(name)
    start, last = torch.tensor([[7, 8, 9]] * 4), torch.tensor([[3, 4]] * 4)
    below = [
        (torch.tensor([[10, 11, 12, 13]] * 4), torch.tensor([[2, 0, 1, 1]] * 4)),
        (torch.tensor([[11, 30]] * 4), torch.tensor([[1, 1]] * 4)),
    ]

    def begun() -> StepDecoder:
        decoder = decoder_for(model, *padded_prompts("left"))
        decoder.first()
        decoder.advance(start, torch.zeros_like(start))
        return decoder

    with torch.no_grad():
        root, apart = begun(), [begun() for _ in below]
        forks = [root.fork() for _ in below]
        # In turns, so that what one fork does would be seen by the other.
        for steps in (below, [(last, torch.ones_like(last))] * 2):
            for fork, alone, step in zip(forks, apart, steps, strict=True):
                torch.testing.assert_close(fork.advance(*step), alone.advance(*step))
        torch.testing.assert_close(root.advance(*below[1]), begun().advance(*below[1]))


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_padding_does_not_matter(name: str) -> None:
    model = small_model(name)
    left = walk(decoder_for(model, *padded_prompts("left")))
    right = walk(decoder_for(model, *padded_prompts("right")))
    # Prompts differ between the sides in what is padded only where they are not full.
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=2e-5)
    ids, mask = padded_prompts("left")
    short = walk(decoder_for(model, ids[1:2, 3:], mask[1:2, 3:]))
    long = walk(decoder_for(model, ids[1:2], mask[1:2]))
    for one, other in zip(short, long, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_many_steps_and_a_prompt_of_one_token(name: str) -> None:
    model = small_model(name)
    ids, mask = torch.tensor([[9]]), torch.ones(1, 1, dtype=torch.long)
    fast, slow = decoder_for(model, ids, mask), GenericDecoder(model, ids, mask)
    with torch.no_grad():
        torch.testing.assert_close(fast.logits(fast.first()), slow.logits(slow.first()))
        for step in range(20):  # longer than the first table of T5's position biases
            tokens = torch.tensor([[5 + step, 3, 30 - step]])
            parents = torch.tensor([[0, 0, 0]]) if step == 0 else torch.tensor([[2, 0, 1]])
            quick = fast.logits(fast.advance(tokens, parents))
            whole = slow.logits(slow.advance(tokens, parents))
            torch.testing.assert_close(quick, whole, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("name", ["t5", "gpt2", "qwen3"])
def test_empty_beams_leave_the_others_alone(name: str) -> None:
    model = small_model(name)
    ids, mask = padded_prompts("left")
    clean, holed = decoder_for(model, ids, mask), decoder_for(model, ids, mask)
    with torch.no_grad():
        clean.first(), holed.first()
        for _ in range(2):
            tokens = torch.tensor([[7, 8]] * 4)
            parents = torch.zeros_like(tokens)
            gap = torch.full_like(tokens, -1)
            expected = clean.logits(clean.advance(tokens, parents))
            padded = holed.advance(torch.cat([tokens, gap], 1), torch.cat([parents, gap], 1))
            torch.testing.assert_close(holed.logits(padded)[:, :2], expected)


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_no_worse_than_whole_sequences(name: str, dtype: torch.dtype) -> None:
    model = small_model(name)
    ids, mask = padded_prompts("left")
    rounded = copy.deepcopy(model).to(dtype)
    exact = walk(GenericDecoder(model, ids, mask))
    fast = walk(decoder_for(rounded, ids, mask))
    whole = walk(GenericDecoder(rounded, ids, mask))
    for half, slow, single in zip(fast, whole, exact, strict=True):
        assert half.dtype == dtype
        error, bound = ((x.float() - single).square().mean().sqrt() for x in (half, slow))
        assert float(error) <= 1.5 * float(bound) + 1e-4


def test_a_changed_model_is_not_taken_for_the_one_before() -> None:
    model = small_model("qwen3")
    prompts = padded_prompts("left")
    before = walk(decoder_for(model, *prompts))
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)  # as an adapter would
    after = walk(decoder_for(model, *prompts))
    assert not torch.allclose(before[1], after[1])
    for fast, slow in zip(after, walk(GenericDecoder(model, *prompts)), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = small_model(name)
    ids, mask = padded_prompts("left")
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        chosen = model.config._attn_implementation
        first = walk(decoder_for(model, ids, mask))
        assert model.config._attn_implementation == chosen
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
        # Weights are shared, not copied: a changed one is seen.
        model.get_output_embeddings().weight.mul_(2)
        changed = walk(decoder_for(model, ids, mask))
    assert not torch.allclose(first[1], changed[1])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mistral-sliding", "its attention has a sliding window"),
        ("gemma2", "model_type = 'gemma2' is none of gemma, gpt2, gpt_neox, llama"),
        ("bart", "BartForConditionalGeneration is not of the T5 family"),
    ],
)
def test_other_models_take_the_generic_way_and_say_why(name: str, reason: str) -> None:
    kind, why = decoder_kind(small_model(name))
    assert kind is GenericDecoder
    assert why is not None
    assert reason in why
    assert name in SLOW


def test_a_changed_decoder_is_not_taken_for_t5() -> None:
    model = small_model("t5")

    class Other(type(model.decoder)):  # type: ignore[misc]
        """A decoder of someone's own."""

    model.decoder.__class__ = Other
    assert decoder_kind(model) == (
        GenericDecoder,
        "its decoder Other is not the one of transformers; "
        "model_type = 't5' is none of gemma, gpt2, gpt_neox, llama, mistral, olmo2, qwen2, qwen3, "
        "smollm3",
    )
