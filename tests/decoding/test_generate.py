"""Beam search against ``generate`` of transformers with its own constraint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.dict_trie import DictTrie
from support.small_models import FAST, SLOW, padded_prompts, small_model
from torch import Tensor

from gflowgr.decoding import constrained_beam_search
from gflowgr.tree import PrefixTree

LENGTH = 3


def random_codes(seed: int) -> list[tuple[int, ...]]:
    """About 110 identifiers of three tokens."""
    rng = np.random.default_rng(seed)
    codes = np.unique(rng.integers(0, [8, 9, 10], size=(130, LENGTH)), axis=0)
    return [tuple(row) for row in (codes + np.array([3, 15, 30])).tolist()]


def generate(
    model: Any, ids: Tensor, mask: Tensor, codes: list[tuple[int, ...]], beams: int
) -> tuple[Tensor, Tensor]:
    """Identifiers [B, beams, L] and their log-probabilities, by transformers."""
    trie = DictTrie(codes, range(len(codes)))
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]

    def allowed(_: int, sequence: Tensor) -> list[int]:
        prefix = tuple(sequence.tolist()[start:])
        return [child[-1] for child in trie.children(prefix)]

    # No length penalty and no end token: a hypothesis' score is the sum of its log-probabilities.
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        length_penalty=0.0,
        early_stopping=False,
        do_sample=False,
        pad_token_id=0,
        prefix_allowed_tokens_fn=allowed,
        return_dict_in_generate=True,
        output_scores=True,
    )
    shape = (len(ids), beams)
    return found.sequences[:, start:].unflatten(0, shape), found.sequences_scores.view(shape)


@pytest.mark.parametrize("name", FAST + SLOW)
def test_items_order_and_scores_are_those_of_generate(name: str) -> None:
    model = small_model(name)
    for seed, beams in ((1, 2), (2, 6)):
        codes = random_codes(seed)
        # Left: what generate asks of decoder-only models.
        ids, mask = padded_prompts("left", seed=seed)
        tree = PrefixTree.from_identifiers(codes)
        found = constrained_beam_search(model, ids, mask, tree, num_beams=beams, normalize="vocab")
        tokens, scores = generate(model, ids, mask, codes, beams)
        assert found.tokens.tolist() == tokens.tolist()
        torch.testing.assert_close(found.scores, scores, rtol=1e-5, atol=1e-5)
        assert found.valid.all()


@pytest.mark.parametrize("name", ["t5", "gpt2", "qwen3"])
def test_one_prompt_alone_equals_one_among_others(name: str) -> None:
    model = small_model(name)
    tree = PrefixTree.from_identifiers(random_codes(3))
    ids, mask = padded_prompts("left")
    together = constrained_beam_search(model, ids, mask, tree, num_beams=8)
    for row in range(len(ids)):
        # The last prompt is one token long: without its padding too.
        real = mask[row].bool()
        alone = constrained_beam_search(
            model, ids[row : row + 1, real], mask[row : row + 1, real], tree, num_beams=8
        )
        assert torch.equal(alone.items[0], together.items[row])
        torch.testing.assert_close(alone.scores[0], together.scores[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama", "qwen3"])
def test_bfloat16_gives_valid_items_in_order_of_their_scores(name: str) -> None:
    model = small_model(name).to(torch.bfloat16)
    codes = random_codes(4)
    ids, mask = padded_prompts("left")
    found = constrained_beam_search(
        model, ids, mask, PrefixTree.from_identifiers(codes), num_beams=10
    )
    assert found.scores.dtype == torch.float32
    assert found.valid.all()
    assert (found.scores.diff(dim=1) <= 0).all()
    for items, tokens in zip(found.items.tolist(), found.tokens.tolist(), strict=True):
        assert len(set(items)) == 10
        assert [codes[item] for item in items] == [tuple(row) for row in tokens]
