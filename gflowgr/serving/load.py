"""Load a trained model with its dataset, and evaluate it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..collaborative import CollaborativeModel, load_collaborative
from ..data import Dataset, load_dataset, make_split
from ..data.index import read_index
from ..errors import DataError, shown
from ..evaluation import evaluate
from ..evaluation.analysis import BY_INTERACTIONS, cold_start_groups
from ..evaluation.generative import GenerativeRecommender
from ..models.gflow_model import GFlowModel
from ..report.tables import TableRow, format_table, render_table, results_table
from .catalogue import Catalogue

__all__ = ["check_counts", "evaluate_checkpoint", "load_collaborative_for", "load_for", "model_in"]


def load_for(
    model_folder: str, data_folder: str, *, new_items: bool = False
) -> tuple[GFlowModel, Dataset]:
    """A saved model and the dataset it is to be used on, which has the model's ids of items.

    Args:
        model_folder: the model.
        data_folder: the dataset.
        new_items: whether the dataset may have more items than the model, after the model's.

    Raises:
        DataError: either is damaged, or they have different numbers of items or other ids.
    """
    folder = model_in(Path(model_folder))
    dataset = load_dataset(data_folder)
    model = GFlowModel.from_pretrained(folder, decode_only=True)
    trained = model.tree.num_items
    if trained != dataset.num_items and not (new_items and trained < dataset.num_items):
        raise DataError(
            f"{folder} was trained on {trained} items, but {data_folder} has {dataset.num_items}"
        )
    ids, known = model.item_ids, dataset.item_ids
    item = None if ids is None or known is None else ids.first_difference(known)
    if item == trained:
        item = None  # the first of the new ones
    if ids is not None and known is not None and item is not None:
        raise DataError(
            f"{data_folder} must have the items that {folder} was trained on; item {item} is "
            f"{shown(ids[item])} there and {shown(known[item])} here"
        )
    return model.eval().to(_device()), replace(dataset, item_ids=known or ids)


def _device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def model_in(folder: Path) -> Path:
    """A saved model's own folder; of a run's, or that of quickstart, its method ``gflowgr``."""
    if not (folder / "gflowgr.json").is_file():
        for pattern in ("gflowgr/model", "*/seed_*/*/gflowgr/model"):
            found = list(folder.glob(pattern))
            if len(found) == 1:
                return found[0]
    return folder


def load_collaborative_for(folder: str, data_folder: str) -> tuple[CollaborativeModel, Dataset]:
    """A saved collaborative model, such as ``RUN/sasrec``, and the dataset it is to be used on.

    Raises:
        DataError: either is damaged, or they have different numbers of items.
    """
    model, dataset = load_collaborative(folder), load_dataset(data_folder)
    if model.num_items != dataset.num_items:
        raise DataError(
            f"{folder} was trained on {model.num_items} items, but {data_folder} has "
            f"{dataset.num_items}"
        )
    return model, dataset


def evaluate_checkpoint(
    model_folder: str,
    data_folder: str,
    *,
    part: Literal["valid", "test"],
    split: str,
    held_out_share: float,
    target_behaviour: str | None,
    num_beams: int,
    collision: Literal["item", "string"],
    mask_seen: bool,
    max_users: int | None,
    progress: bool,
    index: str | None = None,
) -> None:
    """Evaluate a saved model and print its metrics, whole and by the interactions of the target in
    training, with the rules they follow.

    With the ``index`` that ``identifiers extend`` wrote, the dataset may have items that came after
    the training: they are in the tree, and count no interaction.
    """
    check_counts({"--beams": num_beams})
    model, dataset = load_for(model_folder, data_folder, new_items=index is not None)
    recommender = GenerativeRecommender(model, num_beams=num_beams, name=Path(model_folder).name)
    if index is not None:
        recommender = _extended(model, dataset, index, num_beams).recommender()
    parted = make_split(
        dataset,
        split,
        max_history=model.settings.max_history,
        held_out_share=held_out_share,
        target_behaviour=target_behaviour,
    )
    result = evaluate(
        recommender,
        parted,
        part,
        collision=collision,
        leaf_of=recommender.leaf_of(),
        mask_seen=mask_seen,
        max_users=max_users,
        progress=progress,
        truth=dataset.truth if part == "test" else None,
    )
    print(format_table([TableRow(str(model_folder), result.metrics)]))
    print(f"\n{BY_INTERACTIONS}")
    groups = cold_start_groups(result, parted, model.tree.num_items)
    rows = [TableRow(f"{group.name} ({group.users:,} users)", group.metrics) for group in groups]
    print(render_table(results_table(rows), "text"), end="\n\n")
    for name, rule in result.rules.items():
        print(f"{name}: {rule}")


def _extended(model: GFlowModel, dataset: Dataset, index: str, num_beams: int) -> Catalogue:
    """The catalogue of a model with the items of an index that came after it.

    Raises:
        DataError: the index is not of the dataset, or not made from the model's identifiers.
    """
    catalogue, trained = Catalogue.of(model, dataset, num_beams), model.tree.num_items
    codes = read_index(index, num_items=dataset.num_items).codes
    if not np.array_equal(codes[:trained], catalogue.codes()[:trained]):
        raise DataError(f"{index} must have the identifiers of the model, then new ones")
    new = {
        item: tuple(code for code in codes[item].tolist() if code >= 0)
        for item in range(trained, dataset.num_items)
    }
    return replace(catalogue, identifiers=new)


def check_counts(counts: dict[str, int]) -> None:
    """Raise ValueError for an option that must be at least 1 and is not."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}")
