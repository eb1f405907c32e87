"""From a configuration to what training needs: data, split, identifiers, tree."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..data import Dataset, LeaveOneOut, TrainingExamples, load_dataset, save_dataset
from ..identifiers import Identifiers, from_codes
from ..models.causal_lm_build import add_identifier_tokens
from ..models.vocabulary import IdentifierVocabulary
from ..tree import PrefixTree
from .config import CollaborativeConfig, ConfigError, DataConfig
from .processes import is_first_process

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Catalogue",
    "load_data",
    "make_catalogue",
    "make_identifiers",
    "published_identifiers",
    "split_data",
]


@dataclass(frozen=True)
class Catalogue:
    """The items as the generator sees them.

    Attributes:
        identifiers_name: which identifiers.
        vocabulary: their tokens.
        tree: prefix tree over all items, in token ids.
        tokens: identifiers [items, L], right-padded with -1.
        tokenizer: of a text model, with the identifier tokens; none for a generator without text.
    """

    identifiers_name: str
    vocabulary: IdentifierVocabulary
    tree: PrefixTree
    tokens: np.ndarray
    tokenizer: PreTrainedTokenizerBase | None = None


def load_data(config: DataConfig, output_dir: Path, seed: int) -> Dataset:
    """The dataset of ``config.path``, or the built-in one (generated once, then read again)."""
    if config.path is not None:
        return load_dataset(config.path)
    folder = output_dir / "data"
    if not (folder / "inter.json.gz").is_file():
        from ..data import generate_builtin

        dataset = generate_builtin(seed=seed, num_users=config.users, num_items=config.items)
        save_dataset(dataset, folder)
    return replace(load_dataset(folder), name="built-in dataset")


def split_data(dataset: Dataset, max_history: int, output_dir: Path) -> LeaveOneOut:
    """The leave-one-out split; its training examples are memory-mapped from ``output_dir``."""
    split = LeaveOneOut(dataset, max_history=max_history)
    folder = output_dir / "examples"
    if is_first_process():
        split.train.save(folder)
    stored = TrainingExamples.load(folder)
    split.check_examples(stored)
    split.train = stored
    return split


def published_identifiers(dataset: Dataset, name: str | None) -> tuple[str, Identifiers] | None:
    """The identifiers that come with the data: the named ones, or the only ones.

    Returns:
        Their name and they themselves, or None when the data have none and none are named.

    Raises:
        ConfigError: several sets, and none is named.
        DataError: the named ones are missing, or the file is damaged.
    """
    names = dataset.index_names()
    if name is None and len(names) > 1:
        raise ConfigError(
            f"data.identifiers: {dataset.name} has several sets, name one of: {', '.join(names)}"
        )
    if name is None and not names:
        return None
    name = name or names[0]
    return name, dataset.identifiers(name)


def make_identifiers(
    dataset: Dataset,
    item_vectors: torch.Tensor | None,
    seed: int,
    collaborative: CollaborativeConfig,
) -> tuple[str, Identifiers]:
    """Identifiers for data that come without: residual k-means of item vectors, else of texts.

    Args:
        dataset: the data, with its texts.
        item_vectors: [items, d] of the collaborative model, or None.
        seed: of the k-means.
        collaborative: where ``item_vectors`` come from; the identifiers are named after it.

    Returns:
        The name for reports, and the identifiers.

    Raises:
        ConfigError: there is nothing to make them from.
    """
    from ..identifiers import residual_kmeans, text_embeddings

    texts = [" ".join(fields.values()) for fields in dataset.texts or []]
    if item_vectors is not None:
        vectors = item_vectors.detach().cpu().numpy().astype(np.float32)
        source = "SASRec items"
        if collaborative.embeddings is not None:
            source = Path(collaborative.embeddings).name
    elif any(re.search(r"\w\w", text) for text in texts):  # what text_embeddings takes for a word
        vectors = text_embeddings(texts, seed=seed)
        source = "item texts"
    else:
        raise ConfigError(
            f"{dataset.name} has no identifiers and nothing to make them from; give it an index "
            "file (index.NAME.json.gz) or item texts (item.json.gz), or set collaborative.kind to "
            "sasrec or embeddings"
        )
    # About four items per full path keeps the last, separating token short.
    size = int(np.clip(round((len(vectors) / 4) ** (1 / 3)), 4, 256))
    codes = residual_kmeans(vectors, levels=3, codebook_size=size, seed=seed)
    return f"residual k-means of {source} (3 x {size} + 1)", from_codes(codes)


def make_catalogue(
    name: str, identifiers: Identifiers, tokenizer: PreTrainedTokenizerBase | None = None
) -> Catalogue:
    """Vocabulary and tree of a set of identifiers.

    Args:
        name: which identifiers.
        identifiers: they themselves.
        tokenizer: of a text model; the identifier tokens are added to it, in place.
    """
    vocabulary = IdentifierVocabulary.from_codes(identifiers.codes)
    if tokenizer is not None:
        vocabulary = add_identifier_tokens(tokenizer, vocabulary)
    tokens = vocabulary.encode(identifiers.codes)
    if vocabulary.ragged:
        rows = [row[row >= 0].tolist() for row in tokens]
        tree = PrefixTree.from_identifiers(rows)
    else:
        tree = PrefixTree.from_identifiers(tokens)
    return Catalogue(name, vocabulary, tree, tokens, tokenizer)
