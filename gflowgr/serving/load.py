"""Load a trained model with its dataset, and evaluate it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ..collaborative import CollaborativeModel, load_collaborative
from ..data import Dataset, load_dataset, make_split
from ..errors import DataError, shown
from ..evaluation import evaluate
from ..evaluation.generative import GenerativeRecommender
from ..models.gflow_model import GFlowModel
from ..report.tables import TableRow, format_table

__all__ = ["check_counts", "evaluate_checkpoint", "load_collaborative_for", "load_for", "model_in"]


def load_for(model_folder: str, data_folder: str) -> tuple[GFlowModel, Dataset]:
    """A saved model and the dataset it is to be used on, which has the model's ids of items.

    Raises:
        DataError: either is damaged, or they have different numbers of items or other ids.
    """
    folder = model_in(Path(model_folder))
    dataset = load_dataset(data_folder)
    model = GFlowModel.from_pretrained(folder, decode_only=True)
    if model.tree.num_items != dataset.num_items:
        raise DataError(
            f"{folder} was trained on {model.tree.num_items} items, but {data_folder} has "
            f"{dataset.num_items}"
        )
    ids, known = model.item_ids, dataset.item_ids
    item = None if ids is None or known is None else ids.first_difference(known)
    if ids is not None and known is not None and item is not None:
        raise DataError(
            f"{data_folder} must have the items that {folder} was trained on; item {item} is "
            f"{shown(ids[item])} there and {shown(known[item])} here"
        )
    return model.eval().to(_device()), replace(dataset, item_ids=ids or known)


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
) -> None:
    """Evaluate a saved model and print its metrics with the rules they follow."""
    check_counts({"--beams": num_beams})
    model, dataset = load_for(model_folder, data_folder)
    recommender = GenerativeRecommender(model, num_beams=num_beams, name=Path(model_folder).name)
    result = evaluate(
        recommender,
        make_split(
            dataset,
            split,
            max_history=model.settings.max_history,
            held_out_share=held_out_share,
            target_behaviour=target_behaviour,
        ),
        part,
        collision=collision,
        leaf_of=recommender.leaf_of(),
        mask_seen=mask_seen,
        max_users=max_users,
        progress=progress,
        truth=dataset.truth if part == "test" else None,
    )
    print(format_table([TableRow(str(model_folder), result.metrics)]))
    for name, rule in result.rules.items():
        print(f"{name}: {rule}")


def check_counts(counts: dict[str, int]) -> None:
    """Raise ValueError for an option that must be at least 1 and is not."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}")
