"""Using a trained model: evaluation of a checkpoint, and recommendations."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import numpy.typing as npt

from ..data import Dataset, LeaveOneOut, load_dataset
from ..decoding import GenerativeRecommender
from ..errors import DataError
from ..models.gflow_model import GFlowModel
from .processes import device, quiet_transformers

__all__ = ["evaluate_checkpoint", "recommend_from_checkpoint"]

_BATCH = 64


def load_for(model_folder: str, data_folder: str) -> tuple[GFlowModel, Dataset]:
    """A saved model and the dataset it is to be used on.

    Raises:
        DataError: either is damaged, or they have different numbers of items.
    """
    quiet_transformers()
    folder = Path(model_folder)
    if not (folder / "gflowgr.json").is_file() and (folder / "gflowgr" / "model").is_dir():
        folder = folder / "gflowgr" / "model"  # the folder of a whole run
    dataset = load_dataset(data_folder)
    model = GFlowModel.from_pretrained(folder)
    if model.tree.num_items != dataset.num_items:
        raise DataError(
            f"{folder} was trained on {model.tree.num_items} items, but {data_folder} has "
            f"{dataset.num_items}"
        )
    return model.eval().to(device()), dataset


def evaluate_checkpoint(
    model_folder: str,
    data_folder: str,
    *,
    part: Literal["valid", "test"],
    num_beams: int,
    collision: Literal["item", "string"],
    mask_seen: bool,
    max_users: int | None,
    progress: bool,
) -> None:
    """Evaluate a saved model and print its metrics with the rules they follow."""
    from ..evaluation import evaluate, format_table
    from ..evaluation.report import TableRow

    _check_counts({"--beams": num_beams})
    model, dataset = load_for(model_folder, data_folder)
    recommender = GenerativeRecommender(model, num_beams=num_beams, name=Path(model_folder).name)
    result = evaluate(
        recommender,
        LeaveOneOut(dataset, max_history=model.settings.max_history),
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


@dataclass(frozen=True)
class _Query:
    label: str
    history: npt.NDArray[np.int64]


def recommend_from_checkpoint(
    model_folder: str,
    data_folder: str,
    *,
    users: Sequence[str],
    histories: Sequence[str],
    lines: TextIO | None,
    k: int,
    num_beams: int,
    exclude_seen: bool,
    as_json: bool,
) -> None:
    """Print the ``k`` best items of users, of histories, or of JSON lines, as they come."""
    _check_counts({"-k": k, "--beams": num_beams})
    model, dataset = load_for(model_folder, data_folder)
    recommender = GenerativeRecommender(model, num_beams=num_beams)
    queries: Iterator[_Query] = iter(
        [_user_query(dataset, user) for user in users]
        + [_history_query(dataset, text.split(","), f"--history {text}") for text in histories]
    )
    if lines is not None:
        queries = _read_lines(dataset, lines)
    while batch := list(islice(queries, _BATCH)):
        past = [query.history for query in batch]
        items, scores = recommender.recommend(past, k, past if exclude_seen else None)
        for query, row, row_scores in zip(batch, items, scores, strict=True):
            _write(dataset, query, row, row_scores, as_json)


def _check_counts(counts: dict[str, int]) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _write(
    dataset: Dataset,
    query: _Query,
    items: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    as_json: bool,
) -> None:
    found = [(int(i), float(s)) for i, s in zip(items, scores, strict=True) if i >= 0]
    if as_json:
        record = {
            "query": query.label,
            "items": [
                {"item": item, "log_prob": round(score, 4), "title": dataset.title(item)}
                for item, score in found
            ],
        }
        print(json.dumps(record, ensure_ascii=False), flush=True)
        return
    print(f"\n{query.label}")
    for item in query.history[-5:]:
        print(f"    had   {int(item):>6}  {dataset.title(int(item))}")
    for place, (item, score) in enumerate(found, start=1):
        print(f"    {place:>3}.  {item:>6}  {dataset.title(item)}  (log P {score:.2f})")


def _user_query(dataset: Dataset, user: str) -> _Query:
    try:
        row = dataset.user_ids.index(str(user))
    except ValueError:
        raise DataError(f"user {user!r} is not in {dataset.path}") from None
    return _Query(f"user {user}", dataset.sequences.row(row).astype(np.int64))


def _history_query(dataset: Dataset, entries: Iterable[Any], where: str) -> _Query:
    items = []
    for entry in entries:
        try:
            item = int(entry)
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"{where}: {entry!r} is not an item number") from None
        if isinstance(entry, float) and item != entry:
            raise DataError(f"{where}: {entry!r} is not an item number")
        if not 0 <= item < dataset.num_items:
            raise DataError(f"{where}: item {item} is not in 0..{dataset.num_items - 1}")
        items.append(item)
    return _Query(where.removeprefix("--"), np.array(items, dtype=np.int64))


def _read_lines(dataset: Dataset, lines: TextIO) -> Iterator[_Query]:
    """One query per JSON line; a bad line is reported and skipped, so that a long job goes on."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _parse_line(dataset, line, f"line {number}")
        except DataError as error:
            print(f"gflowgr: skipped: {error}", file=sys.stderr)


def _parse_line(dataset: Dataset, line: str, where: str) -> _Query:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if isinstance(record, dict) and isinstance(record.get("history"), list):
        return _history_query(dataset, record["history"], where)
    if isinstance(record, dict) and "user" in record:
        return _user_query(dataset, str(record["user"]))
    wanted = '{"user": ...} or {"history": [...]}'
    raise DataError(f"{where}: expected {wanted}, got {line.strip()!r}")
