"""A decoder of 16 dimensions over the tiny shop's identifiers, fixed or of varying length."""

from __future__ import annotations

from typing import Any

import torch

from gflowgr.models import (
    DecoderConfig,
    FlowSettings,
    GFlowModel,
    IdentifierVocabulary,
    build_decoder,
    decoder_prompt,
)
from gflowgr.tree import PrefixTree
from support.tiny_shop import MAX_HISTORY, shop_catalogue

SIZES = DecoderConfig(16, d_ff=32, num_heads=2, num_layers=1, dropout=0.0)


def make_decoder(
    *, seed: int = 0, max_history: int = MAX_HISTORY, dropout: float = 0.0, **settings: Any
) -> GFlowModel:
    """The generator of the shop's catalogue."""
    catalogue = shop_catalogue()
    sizes = DecoderConfig(16, d_ff=32, num_heads=2, num_layers=1, dropout=dropout)
    backbone = build_decoder(catalogue.vocabulary, sizes, max_history=max_history, seed=seed)
    flow = {"objective": "sft", "normalize": "children", "max_history": max_history, **settings}
    layout = decoder_prompt(catalogue.vocabulary)
    settings_ = FlowSettings(**flow)
    return GFlowModel(backbone, catalogue.tree, catalogue.vocabulary, settings_, layout)


def ragged_decoder(max_history: int = MAX_HISTORY) -> GFlowModel:
    """A generator of 30 items whose identifiers have two or three codes, then the end's token."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 5, (30, 3), generator=generator).numpy()
    codes[::3, 2] = -1
    vocabulary = IdentifierVocabulary.from_codes(codes)
    tree = PrefixTree.from_identifiers([row[row >= 0].tolist() for row in vocabulary.encode(codes)])
    backbone = build_decoder(vocabulary, SIZES, max_history=max_history, seed=1)
    settings = FlowSettings(normalize="children", max_history=max_history)
    return GFlowModel(backbone, tree, vocabulary, settings, decoder_prompt(vocabulary))
