"""Loads a saved collaborative model of any kind, such as a run leaves in its folder ``sasrec``."""

from __future__ import annotations

from pathlib import Path

from gflowgr import files
from gflowgr.collaborative.base import CONFIG_NAME, WEIGHTS_NAME, CollaborativeModel
from gflowgr.collaborative.embedding import EmbeddingScorer
from gflowgr.collaborative.ensemble import AverageModel, CrossFitted
from gflowgr.collaborative.popularity import Popularity
from gflowgr.collaborative.sasrec import SASRec
from gflowgr.errors import DataError, shown

__all__ = ["is_collaborative", "load_collaborative"]

_LOADERS = {
    kind.KIND: kind.load
    for kind in (SASRec, AverageModel, CrossFitted, EmbeddingScorer, Popularity)
}


def is_collaborative(folder: str | Path) -> bool:
    """Whether ``folder`` has the files of a collaborative model, and not those of a generator."""
    place = Path(folder)
    names = (CONFIG_NAME, WEIGHTS_NAME)
    return all((place / n).is_file() for n in names) and not (place / "gflowgr.json").is_file()


def load_collaborative(folder: str | Path) -> CollaborativeModel:
    """The collaborative model in ``folder``, by the kind that its configuration names.

    Raises:
        DataError: another kind, or a damaged folder.
    """
    path = Path(folder) / CONFIG_NAME
    kind = files.read_json(path, expect=dict).get("kind")
    if kind not in _LOADERS:
        raise DataError(f"{path}: kind must be one of {', '.join(_LOADERS)}; got {shown(kind)}")
    model: CollaborativeModel = _LOADERS[kind](folder)
    return model
