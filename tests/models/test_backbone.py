"""One packed sequence must equal N separate forwards, in values and in gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gflowgr.data import pad_histories
from gflowgr.models import (
    IdentifierVocabulary,
    PromptState,
    TigerConfig,
    build_tiger,
    encode_prompt,
    output_head,
    prompt_tokens,
    trajectory_hidden_states,
)

VOCABULARY = IdentifierVocabulary((5, 6, 7))
SMALL = TigerConfig(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, dropout=0.0)


@pytest.fixture
def model() -> nn.Module:
    return build_tiger(VOCABULARY, SMALL, seed=0).eval()


@pytest.fixture
def prompt_ids() -> tuple[torch.Tensor, torch.Tensor]:
    item_tokens = torch.from_numpy(
        VOCABULARY.encode(np.array([[0, 1, 2], [4, 5, 6], [1, 0, 3], [2, 2, 2]]))
    )
    return prompt_tokens(torch.tensor([[0, 1, 2], [3, -1, -1]]), item_tokens)


def trajectories() -> torch.Tensor:
    codes = np.array([[0, 1, 2], [4, 5, 6], [1, 0, 3], [2, 2, 2], [3, 4, 0], [0, 0, 0]])
    return torch.from_numpy(VOCABULARY.encode(codes)).reshape(2, 3, 3)


def separate_logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    tokens = trajectories()
    rows = [
        model(input_ids=ids, attention_mask=mask, labels=tokens[:, n].contiguous()).logits
        for n in range(tokens.shape[1])
    ]
    return torch.stack(rows, dim=1)


def packed_logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    hidden = trajectory_hidden_states(model, encode_prompt(model, ids, mask), trajectories())
    weight, bias = output_head(model)
    assert bias is None
    return hidden @ weight.T


def test_packed_forward_equals_separate_forwards(
    model: nn.Module, prompt_ids: tuple[torch.Tensor, torch.Tensor]
) -> None:
    torch.testing.assert_close(
        packed_logits(model, *prompt_ids), separate_logits(model, *prompt_ids), rtol=1e-5, atol=1e-5
    )


def test_packed_gradients_equal_separate_gradients(
    model: nn.Module, prompt_ids: tuple[torch.Tensor, torch.Tensor]
) -> None:
    weights = torch.randn(2, 3, 3, VOCABULARY.size, generator=torch.Generator().manual_seed(1))
    gradients = []
    for forward in (packed_logits, separate_logits):
        model.zero_grad()
        (forward(model, *prompt_ids) * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        scale = gradients[1][name].abs().max().clamp_min(1.0)
        torch.testing.assert_close(
            gradient / scale, gradients[1][name] / scale, rtol=1e-4, atol=1e-5, msg=name
        )


def test_padding_trajectories_change_nothing(
    model: nn.Module, prompt_ids: tuple[torch.Tensor, torch.Tensor]
) -> None:
    prompt = encode_prompt(model, *prompt_ids)
    tokens = trajectories()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 2] = False
    poisoned = tokens.clone()
    poisoned[:, 2] = -12345
    hidden = trajectory_hidden_states(model, prompt, poisoned, mask)
    expected = trajectory_hidden_states(model, prompt, tokens)
    torch.testing.assert_close(hidden[:, :2], expected[:, :2])


def test_a_model_without_an_encoder_is_refused() -> None:
    with pytest.raises(TypeError, match="encoder-decoder"):
        encode_prompt(nn.Linear(2, 2), torch.zeros(1, 1), torch.ones(1, 1))


def test_prompt_is_the_history_oldest_first_then_eos() -> None:
    item_tokens = torch.tensor([[2, 5], [3, 6], [4, -1]])
    ids, mask = prompt_tokens(torch.tensor([[0, 2, 1], [1, -1, -1]]), item_tokens)
    assert ids.tolist() == [[2, 5, 4, 3, 6, 1], [3, 6, 1, 0, 0, 0]]
    assert mask.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]


def test_an_unknown_item_in_a_history_is_named() -> None:
    with pytest.raises(ValueError, match="item 7, but the catalogue has 3"):
        prompt_tokens(torch.tensor([[7]]), torch.tensor([[2], [3], [4]]))


def test_histories_keep_their_last_items() -> None:
    padded = pad_histories(
        [np.array([1, 2, 3]), np.array([], dtype=int), np.array([9])], max_length=2
    )
    assert padded.tolist() == [[2, 3], [-1, -1], [9, -1]]


def test_pooled_state_ignores_padding() -> None:
    hidden = torch.tensor([[[1.0], [3.0], [100.0]]])
    state = PromptState(hidden, torch.tensor([[1, 1, 0]]))
    assert state.pooled().tolist() == [[2.0]]


def test_vocabulary_places_levels_after_each_other() -> None:
    assert VOCABULARY.size == 20
    assert VOCABULARY.level_offsets == (2, 7, 13)
    assert VOCABULARY.encode(np.array([[4, 0, 6]])).tolist() == [[6, 7, 19]]


def test_ragged_identifiers_end_with_eos() -> None:
    codes = np.array([[1, 2], [0, -1]])
    vocabulary = IdentifierVocabulary.from_codes(codes)
    assert vocabulary.ragged
    assert vocabulary.length == 3
    assert vocabulary.encode(codes).tolist() == [[3, 6, 1], [2, 1, -1]]


def test_a_code_outside_the_codebook_is_named() -> None:
    with pytest.raises(ValueError, match=r"codes\[0, 1\] = 6 is outside the codebook of level 1"):
        VOCABULARY.encode(np.array([[0, 6, 0]]))
