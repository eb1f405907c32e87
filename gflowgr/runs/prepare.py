"""Make the inputs of training from a configuration: data, split, identifiers, tree."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..data import (
    Dataset,
    Split,
    TrainingExamples,
    generate_builtin,
    load_dataset,
    make_split,
    save_dataset,
)
from ..errors import DataError
from ..extensions import is_outside
from ..identifiers import (
    METHODS,
    Identifiers,
    from_codes,
    learn_codes,
    outside_identifiers,
    read_index,
    residual_kmeans,
    resolve_collisions,
    text_embeddings,
    write_index,
)
from ..models.causal import add_identifier_tokens
from ..models.vocabulary import IdentifierVocabulary
from ..tree import PrefixTree
from .config import ConfigError
from .processes import is_first_process
from .sections import CollaborativeConfig, DataConfig, collaborative_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Catalogue",
    "load_data",
    "make_catalogue",
    "make_identifiers",
    "published_identifiers",
    "split_data",
    "split_of",
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

    @property
    def leaf_of(self) -> np.ndarray:
        """The identifier of each item, int64 [items]; items that share one have the same."""
        leaves: np.ndarray = self.tree.leaf_of(torch.arange(self.tree.num_items)).numpy()
        return leaves


def load_data(config: DataConfig, output_dir: Path, seed: int) -> Dataset:
    """The dataset of ``config.path``, or the built-in one (generated once, then read again)."""
    if config.path is not None:
        return load_dataset(config.path)
    folder = output_dir / "data"
    if not (folder / "inter.json.gz").is_file():
        dataset = generate_builtin(
            seed=seed,
            num_users=config.users,
            num_items=config.items,
            popularity_bias=config.popularity_bias,
        )
        save_dataset(dataset, folder)
    return replace(load_dataset(folder), name="built-in dataset")


def split_of(dataset: Dataset, config: DataConfig) -> Split:
    """The split of ``config``.

    Raises:
        ConfigError: the data do not have its ``target_behaviour``.
        DataError: the data have no times for it, or side behaviours that it cannot place in time.
    """
    try:
        return make_split(
            dataset,
            config.split,
            max_history=config.max_history,
            held_out_share=config.held_out_share,
            target_behaviour=config.target_behaviour,
        )
    except DataError:
        raise
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error


def split_data(dataset: Dataset, config: DataConfig, output_dir: Path) -> Split:
    """:func:`split_of`; its training examples are memory-mapped from ``output_dir``."""
    split = split_of(dataset, config)
    folder = output_dir / "examples"
    if is_first_process():
        split.train.save(folder)
    stored = TrainingExamples.load(folder)
    split.check_examples(stored)
    split.train = stored
    return split


def published_identifiers(dataset: Dataset, name: str | None) -> tuple[str, Identifiers] | None:
    """The identifiers that are there: those of a file, the named ones of the data, the only ones.

    Returns:
        Their name and they themselves, or None when they have to be made: the data have none and
        none are named, or the name is no set of the data but a method of making them.

    Raises:
        ConfigError: several sets, and none is named.
        DataError: the named ones are missing, or the file is damaged.
    """
    names = dataset.index_names()
    if name is not None and name.endswith((".json.gz", ".json")):
        return Path(name).name, read_index(name, num_items=dataset.num_items)
    if (name in METHODS or is_outside(name)) and name not in names:
        return None
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
    method: str | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> tuple[str, Identifiers]:
    """Identifiers for data that come without, of item vectors or texts.

    Args:
        dataset: the data, with its texts.
        item_vectors: [items, d] of the collaborative model, or None.
        seed: of the k-means or the training.
        collaborative: where ``item_vectors`` come from; the identifiers are named after it.
        method: None: residual k-means of the item vectors, else of the texts, three levels and one
            token that separates. ``"kmeans"``, ``"rqvae"`` or ``"letter"``: four levels of 256
            codes without collisions, of the texts, else of the item vectors. One of your own,
            ``"module:function"``, is called with the dataset, the item vectors (float32 [items, d]
            or None) and the seed, and gives integer codes [items, L], padded with -1.
        folder: where those of a method are kept, and found again by a run that goes on.
        progress: show a progress bar while a method's are learned.

    Returns:
        The name for reports, and the identifiers.

    Raises:
        ConfigError: there is nothing to make them from.
    """
    if method is not None and is_outside(method):
        return _outside_identifiers(method, dataset, item_vectors, seed, folder)
    texts = [" ".join(fields.values()) for fields in dataset.texts or []]
    has_texts = any(re.search(r"\w\w", text) for text in texts)  # what counts as a word there
    if item_vectors is None and not has_texts:
        raise ConfigError(
            f"{dataset.name} has no identifiers and nothing to make them from; give it an index "
            "file (index.NAME.json.gz) or item texts (item.json.gz), or set collaborative.kind to "
            "sasrec or embeddings"
        )
    vectors = None
    if item_vectors is not None:
        vectors = item_vectors.detach().cpu().numpy().astype(np.float32)
        source = f"{collaborative_names(collaborative.kind)[0]} items"
        if collaborative.embeddings is not None:
            source = Path(collaborative.embeddings).name
    if method is not None:
        return _learned_identifiers(
            method, texts if has_texts else None, vectors, dataset.num_items, seed, folder, progress
        )
    if vectors is None:
        vectors, source = text_embeddings(texts, seed=seed), "item texts"
    # About four items per full path keeps the last, separating token short.
    size = int(np.clip(round((len(vectors) / 4) ** (1 / 3)), 4, 256))
    codes = residual_kmeans(vectors, levels=3, codebook_size=size, seed=seed, progress=progress)
    return f"residual k-means of {source} (3 x {size} + 1)", from_codes(codes)


def _outside_identifiers(
    method: str, dataset: Dataset, vectors: torch.Tensor | None, seed: int, folder: Path | None
) -> tuple[str, Identifiers]:
    """Those of a method of the user's, read from ``folder`` where they are kept."""
    path = folder / f"index.{method.replace(':', '.')}.json.gz" if folder is not None else None
    if path is not None and path.is_file():
        return method, read_index(path, num_items=dataset.num_items)
    given = None if vectors is None else vectors.detach().cpu().numpy().astype(np.float32)
    try:
        identifiers = outside_identifiers(method, dataset, given, seed, setting="data.identifiers")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if path is not None:
        write_index(path, identifiers)
    return method, identifiers


def _learned_identifiers(
    method: str,
    texts: list[str] | None,
    vectors: np.ndarray | None,
    num_items: int,
    seed: int,
    folder: Path | None,
    progress: bool,
) -> tuple[str, Identifiers]:
    """Those of a method, read from ``folder`` where they are kept."""
    name = f"{method} of item {'vectors' if texts is None else 'texts'}"
    path = folder / f"index.{method}.json.gz" if folder is not None else None
    if path is not None and path.is_file():
        return name, read_index(path, num_items=num_items)
    if method == "letter" and vectors is None:
        raise ConfigError(
            "data.identifiers: letter needs collaborative item vectors; set collaborative.kind to "
            "sasrec or embeddings"
        )
    inputs = vectors if texts is None else text_embeddings(texts, dim=512, seed=seed)
    assert inputs is not None
    quantised = learn_codes(
        method, inputs, vectors if method == "letter" else None, seed=seed, progress=progress
    )
    identifiers = from_codes(resolve_collisions(quantised, "reassign"))
    if path is not None:
        write_index(path, identifiers)
    return name, identifiers


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
