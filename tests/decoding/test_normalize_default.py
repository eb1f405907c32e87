"""With a tree, the default normaliser is its children everywhere, unless the model has another."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from support.identifier_shop import IdentifierShop
from support.tiny_shop import make_model
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from gflowgr import (
    GFlowModel,
    PrefixTreeLogitsProcessor,
    constrained_beam_search,
    constrained_generate,
    fused_vargrad_loss,
    item_logprobs,
    sample_items,
    trajectory_logprobs,
)
from gflowgr.models import output_head, trajectory_hidden_states

CODES = [(2, 5, 8), (2, 5, 9), (2, 6, 8), (3, 5, 10), (4, 7, 8)]


def test_losses_searches_samples_scores_and_adapters_have_one_default() -> None:
    """What an engineer does: trains with ``tree=`` and decodes, and says nothing about either."""
    shop = IdentifierShop(CODES)
    model, prompt = shop.model, (shop.ids, shop.mask)
    count = len(CODES)
    tokens = torch.tensor(CODES).expand(len(shop.ids), -1, -1)
    with torch.no_grad():
        hidden = trajectory_hidden_states(model, *prompt, tokens).hidden
        weight, bias = output_head(model)
        trained = trajectory_logprobs(hidden, weight, tokens, bias=bias, tree=shop.tree).sum(-1)
        balanced = fused_vargrad_loss(hidden, weight, tokens, trained, bias=bias, tree=shop.tree)
    assert balanced < 1e-8
    torch.testing.assert_close(trained.logsumexp(1), torch.zeros(len(tokens)), atol=1e-5, rtol=0)

    def same(scores: Tensor, items: Tensor) -> None:
        torch.testing.assert_close(scores, trained.gather(1, items), rtol=1e-5, atol=1e-5)

    torch.testing.assert_close(item_logprobs(model, *prompt, shop.tree), trained)
    found = constrained_beam_search(model, *prompt, shop.tree, num_beams=count)
    same(found.scores, found.items)
    drawn = sample_items(model, *prompt, shop.tree, count, seed=0)
    same(drawn.model_log_probs, drawn.items)
    call = {
        "input_ids": shop.ids,
        "attention_mask": shop.mask,
        "num_beams": count,
        "num_return_sequences": count,
        "max_new_tokens": 3,
        "length_penalty": 0.0,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    for way in (
        {"custom_generate": constrained_generate, "tree": shop.tree},
        {"logits_processor": [PrefixTreeLogitsProcessor(shop.tree)]},
    ):
        out = model.generate(**call, **way)
        assert torch.equal(out.sequences[:, -3:].unflatten(0, (-1, count)), found.tokens)
        torch.testing.assert_close(out.sequences_scores, found.scores.flatten())


@pytest.mark.parametrize("trained", ["vocab", "children"])
def test_a_saved_backbone_is_used_as_it_was_trained_and_warns_where_it_is_not(
    trained: str, tmp_path: Path
) -> None:
    model = make_model(objective="sft").with_settings(normalize=trained)
    model.save_pretrained(tmp_path)
    loaded = GFlowModel.from_pretrained(tmp_path)
    prompt = (torch.tensor([[3, 4, 5]]), torch.ones(1, 3).long(), loaded.tree)
    for backbone in (
        model.backbone,
        loaded.backbone,
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path),
    ):
        backbone.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scores = item_logprobs(backbone, *prompt)
            assert torch.equal(scores, item_logprobs(backbone, *prompt, normalize=trained))
            constrained_beam_search(backbone, *prompt, num_beams=3)
        other = "children" if trained == "vocab" else "vocab"
        message = f"trained with normalize='{trained}', and is used with '{other}'"
        with pytest.warns(UserWarning, match=message):
            assert not torch.equal(item_logprobs(backbone, *prompt, normalize=other), scores)
        with pytest.warns(UserWarning, match=message):
            constrained_beam_search(backbone, *prompt, num_beams=3, normalize=other)
        with pytest.warns(UserWarning, match=message):
            sample_items(backbone, *prompt, 3, seed=0, normalize=other)
