"""Backbones read without transformers answer as those of transformers, and do nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_models import padded_prompts, small_model
from support.tiny_decoder import make_decoder
from support.tiny_shop import make_model
from torch import Tensor

import gflowgr
from gflowgr.decoding import item_logprobs
from gflowgr.decoding.decoders import FusedT5Decoder, GPT2Decoder, T5Decoder, decoder_for
from gflowgr.errors import DataError
from gflowgr.folders import MANIFEST_NAME
from gflowgr.models import GFlowModel, build_tiger, trajectory_hidden_states
from gflowgr.models.bare import BareModel, position_buckets, read_bare
from gflowgr.models.tiger import TigerConfig

TIGER = TigerConfig(32, d_ff=64, d_kv=16, num_heads=2, num_layers=2)


def tiger() -> GFlowModel:
    model = make_model(objective="sft")
    backbone = build_tiger(model.vocabulary, TIGER, seed=3)
    return GFlowModel(backbone, model.tree, model.vocabulary, model.settings)


MODELS = {"tiger": tiger, "decoder": lambda: make_decoder(seed=3)}


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[GFlowModel, GFlowModel]:
    """A model, and what was saved of it, read to decode only."""
    model = MODELS[request.param]().eval()
    model.save_pretrained(tmp_path)
    bare = GFlowModel.from_pretrained(tmp_path, decode_only=True)
    assert isinstance(bare.backbone, BareModel)
    return model, bare


def prompts(model: GFlowModel, side: str = "left") -> tuple[Tensor, Tensor]:
    ids, mask = padded_prompts(side)
    return ids % model.vocabulary.size * mask, mask


@pytest.mark.parametrize("backend", ["torch", None])
def test_the_same_items_are_found(pair: tuple[GFlowModel, GFlowModel], backend: str | None) -> None:
    with gflowgr.backend(backend):
        found, expected = (
            gflowgr.constrained_beam_search(each.backbone, *prompts(each), each.tree, num_beams=9)
            for each in pair
        )
    assert found.tokens.tolist() == expected.tokens.tolist()
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_items_have_the_same_scores(pair: tuple[GFlowModel, GFlowModel], side: str) -> None:
    found, expected = (
        item_logprobs(each.backbone, *prompts(each, side), each.tree) for each in pair
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_they_run_on_the_fast_decoders(pair: tuple[GFlowModel, GFlowModel]) -> None:
    backbone = pair[1].backbone
    with gflowgr.backend("torch"):
        kinds = {type(decoder_for(backbone, *prompts(pair[1])))}
    kinds.add(type(decoder_for(backbone, *prompts(pair[1]))))
    assert kinds in ({GPT2Decoder}, {T5Decoder, FusedT5Decoder})


def test_training_and_saving_are_refused(
    pair: tuple[GFlowModel, GFlowModel], tmp_path: Path
) -> None:
    bare = pair[1]
    tokens = bare.item_tokens()[:4].unsqueeze(1)
    with pytest.raises(TypeError, match="decode_only=True"):
        trajectory_hidden_states(bare.backbone, *prompts(bare), tokens)
    with pytest.raises(TypeError, match="decode_only=True"):
        bare.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("bidirectional", [False, True])
def test_position_buckets_are_those_of_transformers(bidirectional: bool) -> None:
    theirs: Any = small_model("t5").get_encoder().block[0].layer[0].SelfAttention
    options = {"bidirectional": bidirectional, "num_buckets": 32, "max_distance": 128}
    places = torch.arange(-300, 300)
    expected = theirs._relative_position_bucket(places, **options)
    assert position_buckets(places, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["t5-gated-untied", "gpt2-by-layer", "qwen3"])
def test_other_forms_are_left_to_transformers(name: str, tmp_path: Path) -> None:
    small_model(name).save_pretrained(tmp_path)
    assert read_bare(tmp_path) is None


def test_a_model_with_a_tokenizer_is_left_to_transformers(tmp_path: Path) -> None:
    small_model("gpt2").save_pretrained(tmp_path)
    assert read_bare(tmp_path) is not None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert read_bare(tmp_path) is None


def test_weights_of_other_sizes_are_named(tmp_path: Path) -> None:
    make_decoder().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    (tmp_path / MANIFEST_NAME).unlink()
    with pytest.raises(DataError, match="incomplete or damaged"):
        GFlowModel.from_pretrained(tmp_path, decode_only=True)
