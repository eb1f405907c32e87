"""Prompts, pooled states, vocabularies, and models temporarily in evaluation mode."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from gflowgr.data import pad_histories
from gflowgr.models import (
    IdentifierVocabulary,
    PromptLayout,
    PromptState,
    encode_prompt,
    prompt_tokens,
)
from gflowgr.models.backbone import evaluating

VOCABULARY = IdentifierVocabulary((5, 6, 7))


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


def test_prompts_of_a_text_model_leave_out_what_ends_an_identifier() -> None:
    """Identifiers of varying length end with a token (here 9); prompts have separators instead."""
    layout = PromptLayout(prefix=(7, 7), separator=(8,), suffix=(6,), pad_token=5, end_token=9)
    item_tokens = torch.tensor([[20, 9, -1], [20, 30, 9]])
    ids, mask = prompt_tokens(torch.tensor([[1, 0], [0, -1]]), item_tokens, layout)
    assert ids.tolist() == [[7, 7, 20, 30, 8, 20, 6], [7, 7, 20, 6, 5, 5, 5]]
    assert mask.sum(1).tolist() == [7, 4]


def test_layout_is_kept_by_its_description() -> None:
    layout = PromptLayout(prefix=(7,), separator=(8, 1), suffix=(6,), end_token=9, max_items=3)
    assert PromptLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    with pytest.raises(ValueError, match="max_items must be >= 1; got 0"):
        PromptLayout(max_items=0)


def test_a_vocabulary_within_another() -> None:
    vocabulary = IdentifierVocabulary((2, 3), ragged=True, offset=50, eos_token=2)
    assert vocabulary.encode(np.array([[1, 2], [0, -1]])).tolist() == [[51, 54, 2], [50, 2, -1]]
    assert vocabulary.token_names() == ["<a_0>", "<a_1>", "<b_0>", "<b_1>", "<b_2>"]
    assert (
        IdentifierVocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary
    )
    with pytest.raises(ValueError, match=r"eos_token no identifier token \(50 to 54\)"):
        IdentifierVocabulary((2, 3), offset=50, eos_token=51)


def _fail(model: nn.Module) -> None:
    assert not any(module.training for module in model.modules())
    raise ArithmeticError("on the way")


def test_every_module_gets_its_own_mode_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()  # kept out of training by its owner
    with pytest.raises(ArithmeticError), evaluating(model):
        _fail(model)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
