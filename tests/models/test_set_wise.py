"""One packed sequence must equal N separate forwards, in values and in gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.small_models import FAST, VOCAB, padded_prompts, small_model
from torch import Tensor, nn

from gflowgr.models import TrajectoryStates, output_head, trajectory_hidden_states

SIDES = ["left", "right"]


def identifiers(length: int = 4) -> tuple[Tensor, Tensor]:
    """Five trajectories of each of the four prompts: one shorter, one of padding alone."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, VOCAB, (4, 5, length), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 1, 2:] = False
    mask[1:3, 4] = False
    return tokens, mask


def logits_of(model: Any, states: TrajectoryStates) -> Tensor:
    weight, bias = output_head(model)
    return nn.functional.linear(states.hidden, weight, bias)


def packed(model: Any, ids: Tensor, mask: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    return logits_of(model, trajectory_hidden_states(model, ids, mask, tokens, real))


def separate(model: Any, ids: Tensor, mask: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """The model's own logits, prompt by prompt and trajectory by trajectory, nothing padded."""
    rows = []
    for b in range(len(ids)):
        prompt = ids[b : b + 1, mask[b].bool()]
        for n in range(tokens.shape[1]):
            own = tokens[b : b + 1, n, : max(1, int(real[b, n].sum()))]
            if model.config.is_encoder_decoder:
                logits = model(input_ids=prompt, labels=own.contiguous()).logits[0]
            else:
                logits = model(input_ids=torch.cat([prompt, own[:, :-1]], 1)).logits
                logits = logits[0, prompt.shape[1] - 1 :]
            missing = tokens.shape[2] - len(logits)
            rows.append(nn.functional.pad(logits, (0, 0, 0, missing)))
    return torch.stack(rows).unflatten(0, tokens.shape[:2])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FAST)
def test_values_and_gradients_equal_those_of_separate_forwards(name: str, side: str) -> None:
    model = small_model(name)
    ids, mask = padded_prompts(side)
    tokens, real = identifiers()
    weights = torch.randn(*tokens.shape, VOCAB, generator=torch.Generator().manual_seed(1))
    results, gradients = [], []
    for forward in (packed, separate):
        model.zero_grad()
        logits = forward(model, ids, mask, tokens, real).masked_fill(~real.unsqueeze(-1), 0.0)
        (logits * weights).sum().backward()
        results.append(logits.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert len(gradients[0]) > 15
    for key, gradient in gradients[0].items():
        scale = gradients[1][key].abs().max().clamp_min(1.0)
        torch.testing.assert_close(
            gradient / scale, gradients[1][key] / scale, rtol=1e-5, atol=1e-5, msg=key
        )


@pytest.mark.parametrize("shape", [(1, 4), (3, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("name", ["t5", "gpt2", "qwen3"])
def test_any_number_of_trajectories_of_any_length(name: str, shape: tuple[int, int]) -> None:
    model = small_model(name)
    ids, mask = padded_prompts("right")
    tokens = identifiers()[0][:, : shape[0], : shape[1]]
    real = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        found, expected = (f(model, ids, mask, tokens, real) for f in (packed, separate))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mt5", "gpt2", "llama"])
def test_what_padding_holds_changes_nothing(name: str) -> None:
    """Neither states nor gradients, even where it is no token at all."""
    model = small_model(name)
    ids, mask = padded_prompts("left")
    tokens, real = identifiers()
    outcomes = []
    for poison in (5, -12345):
        model.zero_grad()
        states = trajectory_hidden_states(
            model, ids.masked_fill(mask == 0, poison), mask, tokens.masked_fill(~real, poison), real
        )
        hidden = states.hidden.masked_fill(~real.unsqueeze(-1), 0.0)
        (hidden.square().sum() + states.pooled.square().sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        outcomes.append((hidden.detach(), states.pooled.detach(), gradient))
    for one, other in zip(*outcomes, strict=True):
        assert bool(one.isfinite().all())
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "qwen3"])
@pytest.mark.parametrize("side", SIDES)
def test_pooled_state_is_the_mean_of_the_prompts_own_states(name: str, side: str) -> None:
    model = small_model(name)
    ids, mask = padded_prompts(side)
    with torch.no_grad():
        pooled = trajectory_hidden_states(model, ids, mask, identifiers()[0]).pooled
        for row, kept in enumerate(mask.bool()):
            reader = model.get_encoder() if name == "t5" else model.base_model
            alone = reader(input_ids=ids[row : row + 1, kept]).last_hidden_state
            torch.testing.assert_close(pooled[row], alone[0].mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*without torch.compile")
@pytest.mark.parametrize(
    ("name", "attention"),
    [("gpt2", "eager"), ("qwen2", "eager"), ("qwen2", "flex_attention")],
)
def test_other_attentions_are_the_same(name: str, attention: str) -> None:
    model = small_model(name)
    ids, mask = padded_prompts("left")
    tokens, real = identifiers()
    with torch.no_grad():
        expected = packed(model, ids, mask, tokens, real)
        model.set_attn_implementation(attention)
        with torch.compiler.set_stance("force_eager"):  # else FlexAttention is compiled for minutes
            found = packed(model, ids, mask, tokens, real)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "gpt2", "qwen3"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    """With dropout: layers are checkpointed in training only."""
    model = small_model(name).train()
    ids, mask = padded_prompts("right")
    tokens, real = identifiers()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        packed(model, ids, mask, tokens, real).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["t5", "gpt2", "llama"])
def test_bf16_autocast(name: str, attention: str) -> None:
    model = small_model(name)
    model.set_attn_implementation(attention)
    ids, mask = padded_prompts("left")
    tokens, real = identifiers()
    exact = trajectory_hidden_states(model, ids, mask, tokens, real).hidden
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = trajectory_hidden_states(model, ids, mask, tokens, real)
    states.hidden.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    error = (states.hidden.float() - exact)[real].norm() / exact[real].norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mistral-sliding", "MistralForCausalLM is not: its attention has a sliding window"),
        ("gemma2", "model_type = 'gemma2' is none of gemma, gpt2"),
        ("bart", "encoder-decoder with relative positions .T5 family.; got Bart"),
    ],
)
def test_a_model_that_cannot_run_set_wise_is_refused(name: str, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        trajectory_hidden_states(small_model(name), *padded_prompts("left"), identifiers()[0])


def test_an_attention_without_masks_is_refused() -> None:
    model = small_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TypeError, match="'flash_attention_2', which takes no mask"):
        trajectory_hidden_states(model, *padded_prompts("left"), identifiers()[0])
