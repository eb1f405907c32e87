"""The generator that a configuration describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..data import Dataset
from ..models import FlowSettings, GFlowModel
from ..models.causal import (
    CausalConfig,
    check_causal_lm,
    initialise_identifier_rows,
    load_causal_lm,
    load_tokenizer,
    prompt_layout,
)
from ..models.decoder import DecoderConfig, build_decoder, decoder_prompt
from ..models.lora import add_lora, check_peft
from ..models.tiger import TigerConfig, build_tiger
from .prepare import Catalogue
from .sections import OutsideGenerator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GeneratorConfig = TigerConfig | DecoderConfig | CausalConfig | OutsideGenerator

__all__ = ["GeneratorConfig", "add_adapters", "check_generator", "make_generator"]


def check_generator(config: GeneratorConfig) -> PreTrainedTokenizerBase | None:
    """Check before any training that the generator can be made; return its tokenizer.

    Raises:
        DataError: the folder of a text model lacks something, or is damaged.
        TypeError: its model cannot be trained.
        ImportError: LoRA is asked for without ``peft``.
    """
    if not isinstance(config, CausalConfig):
        return None
    if config.lora is not None:
        check_peft()
    tokenizer = load_tokenizer(config)
    check_causal_lm(config)
    return tokenizer


def make_generator(
    config: GeneratorConfig,
    catalogue: Catalogue,
    dataset: Dataset,
    settings: FlowSettings,
    *,
    seed: int,
) -> GFlowModel:
    """The untrained generator.

    Args:
        config: which.
        catalogue: the items' identifiers.
        dataset: its items' ids go with the model, its texts give a text model's new tokens their
            first embeddings.
        settings: objective.
        seed: of everything random in it.
    """
    vocabulary, tokenizer = catalogue.vocabulary, catalogue.tokenizer
    ids = dataset.item_ids
    if isinstance(config, TigerConfig):
        backbone: Any = build_tiger(vocabulary, config, seed=seed)
        return GFlowModel(backbone, catalogue.tree, vocabulary, settings, item_ids=ids)
    if isinstance(config, DecoderConfig):
        backbone = build_decoder(vocabulary, config, max_history=settings.max_history, seed=seed)
        layout = decoder_prompt(vocabulary)
        return GFlowModel(backbone, catalogue.tree, vocabulary, settings, layout, item_ids=ids)
    if not isinstance(config, CausalConfig):
        backbone = config.build(vocabulary, max_history=settings.max_history, seed=seed)
        layout = config.prompt(vocabulary)
        return GFlowModel(backbone, catalogue.tree, vocabulary, settings, layout, item_ids=ids)
    assert tokenizer is not None
    backbone = load_causal_lm(config, tokenizer, seed=seed)
    positions = getattr(backbone.config, "max_position_embeddings", None)
    layout = prompt_layout(config, tokenizer, vocabulary, positions)
    texts = None
    if config.rows == "text" and dataset.texts is not None:
        texts = [fields.get("title") or " ".join(fields.values()) for fields in dataset.texts]
    tokens = torch.from_numpy(catalogue.tokens)
    initialise_identifier_rows(backbone, tokenizer, vocabulary, tokens, texts, seed=seed)
    return GFlowModel(backbone, catalogue.tree, vocabulary, settings, layout, tokenizer, ids)


def add_adapters(config: GeneratorConfig, model: GFlowModel) -> GFlowModel:
    """``model``, with fresh LoRA adapters if ``config`` asks for them."""
    if isinstance(config, CausalConfig) and config.lora is not None:
        add_lora(model.backbone, config.lora, model.vocabulary)
    return model
