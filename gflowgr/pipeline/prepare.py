"""From a configuration to what training needs: data, split, identifiers, tree."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..data import Dataset, LeaveOneOut, TrainingExamples, load_dataset, save_dataset
from ..identifiers import Identifiers, from_codes
from ..models.vocabulary import IdentifierVocabulary
from ..tree import PrefixTree
from .config import ConfigError, DataConfig
from .processes import is_first_process

__all__ = [
    "Catalogue",
    "choose_identifiers",
    "load_data",
    "make_catalogue",
    "split_data",
    "stars_as_behaviours",
]


@dataclass(frozen=True)
class Catalogue:
    """The items as the generator sees them.

    Attributes:
        identifiers_name: which identifiers.
        vocabulary: their tokens.
        tree: prefix tree over all items, in token ids.
    """

    identifiers_name: str
    vocabulary: IdentifierVocabulary
    tree: PrefixTree


def load_data(config: DataConfig, output_dir: Path, seed: int) -> Dataset:
    """The dataset of ``config.path``, or the built-in one (generated once, then read again)."""
    if config.path is not None:
        return stars_as_behaviours(load_dataset(config.path))
    folder = output_dir / "data"
    if not (folder / "inter.json.gz").is_file():
        from ..data import generate_builtin

        dataset = generate_builtin(seed=seed, num_users=config.users, num_items=config.items)
        save_dataset(dataset, folder)
    return replace(load_dataset(folder), name="built-in dataset")


def stars_as_behaviours(dataset: Dataset) -> Dataset:
    """Let each distinct rating be a behaviour named after its value, so that it decides r_a.

    A dataset with behaviours of its own, without ratings, or with more than 127 distinct ratings
    (then they are no stars) is returned as it is.
    """
    if dataset.behaviours is not None or dataset.ratings is None:
        return dataset
    values, codes = np.unique(dataset.ratings, return_inverse=True)
    if len(values) > 127:
        return dataset
    names = tuple(f"{value:g}" for value in values)
    return replace(dataset, behaviours=codes.astype(np.int8), behaviour_names=names)


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


def choose_identifiers(
    dataset: Dataset, name: str | None, item_vectors: torch.Tensor | None, seed: int
) -> tuple[str, Identifiers]:
    """The named identifiers, the only ones, or residual k-means over ``item_vectors``.

    Raises:
        ConfigError: several sets and none named, or none and no item vectors to make them from.
    """
    names = dataset.index_names()
    if name is not None:
        return name, dataset.identifiers(name)
    if len(names) == 1:
        return names[0], dataset.identifiers(names[0])
    if names:
        raise ConfigError(
            f"data.identifiers: {dataset.name} has several sets, name one of: {', '.join(names)}"
        )
    if item_vectors is None:
        raise ConfigError(
            f"{dataset.name} has no identifiers, and without a collaborative model none can be made"
        )
    from ..identifiers import residual_kmeans

    vectors = item_vectors.detach().cpu().numpy().astype(np.float32)
    # About four items per full path keeps the last, separating token short.
    size = int(np.clip(round((len(vectors) / 4) ** (1 / 3)), 4, 256))
    codes = residual_kmeans(vectors, levels=3, codebook_size=size, seed=seed)
    return f"residual k-means of SASRec items (3 x {size} + 1)", from_codes(codes)


def make_catalogue(name: str, identifiers: Identifiers) -> Catalogue:
    """Vocabulary and tree of a set of identifiers."""
    vocabulary = IdentifierVocabulary.from_codes(identifiers.codes)
    tokens = vocabulary.encode(identifiers.codes)
    if vocabulary.ragged:
        rows = [row[row >= 0].tolist() for row in tokens]
        return Catalogue(name, vocabulary, PrefixTree.from_identifiers(rows))
    return Catalogue(name, vocabulary, PrefixTree.from_identifiers(tokens))
