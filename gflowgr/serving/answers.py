"""Writers of recommendations: a table, JSON lines or a Parquet file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import numpy.typing as npt

from ..data import Dataset
from ..files import atomic_path
from .queries import Query

__all__ = ["Answer", "AnswerFields", "AnswerWriter", "check_output", "open_answers"]

_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
_GROUP = 8192
"""Rows of a Parquet row group, all held in memory until it is written."""


@dataclass(frozen=True)
class Answer:
    """The items for a query, best first, and their scores: log P of identifiers, in nats; of a
    collaborative model its own scores."""

    query: Query
    items: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class AnswerFields:
    """What a record holds besides ``row``, ``user`` and ``items``."""

    scores: bool = False
    titles: bool = False

    def record(self, answer: Answer, dataset: Dataset) -> dict[str, Any]:
        """An answer as JSON has it."""
        record = {
            "row": answer.query.row,
            "user": answer.query.user,
            "items": [dataset.item_id(item) for item in answer.items.tolist()],
        }
        if self.scores:
            record["scores"] = [round(score, 6) for score in answer.scores.tolist()]
        if self.titles:
            record["titles"] = [dataset.title(int(item)) for item in answer.items]
        return record


class AnswerWriter(Protocol):
    """Takes the answers of a batch, in the order of the queries."""

    def __call__(self, answers: Sequence[Answer]) -> None:
        """Write ``answers``."""


def check_output(output: str) -> None:
    """Raise ValueError for a file whose name does not say its format."""
    if not output.endswith(_SUFFIXES):
        raise ValueError(
            f"--output {output}: the name must end in {', '.join(_SUFFIXES)}, or in / for a folder"
        )


@contextmanager
def open_answers(
    output: str | None,
    dataset: Dataset,
    fields: AnswerFields,
    *,
    table: bool,
    score: str = "log P",
) -> Iterator[AnswerWriter]:
    """A writer to ``output``, or to standard output.

    A file is there only when the block has ended without an exception; standard output gets whole
    lines, batch by batch.

    Args:
        output: a file, whose ending chooses the format; None for standard output.
        dataset: names the items.
        fields: what a record holds.
        table: on standard output, write a table for people instead of JSON lines.
        score: what the table calls the scores.
    """
    if output is None:
        lines = _Lines(sys.stdout, dataset, fields)
        yield _Table(sys.stdout, dataset, score) if table else lines
        return
    with atomic_path(Path(output)) as temporary:
        if output.endswith(".parquet"):
            with _Parquet(temporary, dataset, fields) as rows:
                yield rows
        else:
            with open(temporary, "w", encoding="utf-8") as handle:
                yield _Lines(handle, dataset, fields)


class _Lines:
    def __init__(self, handle: TextIO, dataset: Dataset, fields: AnswerFields) -> None:
        self.handle, self.dataset, self.fields = handle, dataset, fields
        # A terminal of another encoding gets escapes, which JSON has for every character.
        self.ascii = (handle.encoding or "").lower().replace("-", "") != "utf8"

    def __call__(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            record = self.fields.record(answer, self.dataset)
            self.handle.write(json.dumps(record, ensure_ascii=self.ascii) + "\n")
        self.handle.flush()


class _Table:
    def __init__(self, handle: TextIO, dataset: Dataset, score: str) -> None:
        self.handle, self.dataset, self.score = handle, dataset, score

    def __call__(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self.handle.write(self._text(answer))
        self.handle.flush()

    def _text(self, answer: Answer) -> str:
        query, title, id_of = answer.query, self.dataset.title, self.dataset.item_id
        history = ",".join(str(id_of(item)) for item in query.history.tolist())
        lines = ["", f"history {history}" if query.user is None else f"user {query.user}"]
        lines += [
            f"    had   {id_of(item):>6}  {title(item)}" for item in query.history[-5:].tolist()
        ]
        found = zip(answer.items.tolist(), answer.scores.tolist(), strict=True)
        lines += [
            f"    {place:>3}.  {id_of(item):>6}  {title(item)}  ({self.score} {value:.2f})"
            for place, (item, value) in enumerate(found, start=1)
        ]
        return "\n".join(lines) + "\n"


class _Parquet:
    def __init__(self, path: Path, dataset: Dataset, fields: AnswerFields) -> None:
        import pyarrow
        from pyarrow import parquet

        items = pyarrow.int64() if dataset.item_ids is None else pyarrow.string()
        columns = [
            ("row", pyarrow.int64()),
            ("user", pyarrow.string()),
            ("items", pyarrow.list_(items)),
        ]
        if fields.scores:
            columns.append(("scores", pyarrow.list_(pyarrow.float32())))
        if fields.titles:
            columns.append(("titles", pyarrow.list_(pyarrow.string())))
        self.schema, self.dataset, self.fields = pyarrow.schema(columns), dataset, fields
        self.writer: Any = parquet.ParquetWriter(path, self.schema)
        self.waiting: list[dict[str, Any]] = []

    def __enter__(self) -> _Parquet:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._write_group()
        self.writer.close()

    def __call__(self, answers: Sequence[Answer]) -> None:
        self.waiting += [self.fields.record(answer, self.dataset) for answer in answers]
        if len(self.waiting) >= _GROUP:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow

        if self.waiting:
            self.writer.write_table(pyarrow.Table.from_pylist(self.waiting, schema=self.schema))
        self.waiting = []
