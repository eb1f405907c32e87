"""Readers of queries: users and histories from arguments, JSON lines or Parquet."""

from __future__ import annotations

import csv
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..data import Dataset
from ..errors import DataError, shown
from ..files import parse_json, regular_file

__all__ = ["Query", "QueryReader", "parquet_rows", "read_available"]

_MAX_LINE = 1 << 24
_WANTED = '{"user": "17"} or {"history": [3, 14, 15]}'


@dataclass(frozen=True)
class Query:
    """One request.

    Attributes:
        row: its number from 1: the line of a file of JSON lines, the row of a Parquet file.
        user: the user's id, or the name that the request gives; None without one.
        history: numbers of items, oldest first.
    """

    row: int
    user: str | None
    history: npt.NDArray[np.int64]


class QueryReader:
    """Turns requests into queries, against the users and items of a dataset.

    Every method raises DataError for what is no request: it names the place and the value.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._rows: dict[str, int] | None = None

    def from_arguments(self, users: Sequence[str], histories: Sequence[str]) -> list[Query]:
        """Users of the dataset, then histories such as ``3,14,15``, as a line of CSV has them."""
        found = [Query(row, user, self._of_user(user)) for row, user in enumerate(users, 1)]
        for row, text in enumerate(histories, len(found) + 1):
            where = f"--history {text[:80]}"
            try:
                (entries,) = csv.reader([text], skipinitialspace=True, strict=True)
            except (csv.Error, ValueError) as error:
                raise DataError(f"{where}: must be ids with commas between them: {error}") from None
            found.append(Query(row, None, self._items(entries, where)))
        return found

    def from_file(self, source: str) -> Iterator[Query]:
        """The requests of a file, a line or a batch of rows at a time.

        Args:
            source: JSON lines, a file ``*.parquet`` with columns ``user`` or ``history`` or both,
                or ``-`` for JSON lines from standard input.
        """
        if source == "-":
            yield from self._lines(sys.stdin.buffer, "standard input")
        elif source.endswith(".parquet"):
            yield from self.from_rows(source, 0, parquet_rows(source))
        else:
            with regular_file(source).open("rb") as handle:
                yield from self._lines(handle, source)

    def _lines(self, lines: BinaryIO, name: str) -> Iterator[Query]:
        for row in itertools.count(1):
            where = f"{name}: line {row}"
            line = _next_line(lines, where)
            if not line:
                return
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            if not isinstance(record, dict):
                raise DataError(f"{where}: the query must be {_WANTED}; got {shown(record)}")
            yield self._query(record, row, where)

    def from_rows(self, source: str, first: int, rows: int) -> Iterator[Query]:
        """The requests of some rows of a Parquet file; only row groups with such rows are read.

        Args:
            source: the file.
            first: the first row, from 0.
            rows: how many.
        """
        with _parquet_file(source) as file:
            columns = [name for name in ("user", "history") if name in file.schema_arrow.names]
            if not columns:
                names = ", ".join(file.schema_arrow.names) or "none"
                raise DataError(f"{source}: no column user or history; its columns: {names}")
            sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
            ends = list(itertools.accumulate(sizes))
            groups = [
                n for n, end in enumerate(ends) if end > first and end - sizes[n] < first + rows
            ]
            begin = ends[groups[0]] - sizes[groups[0]] if groups else 0
            for batch in file.iter_batches(1024, row_groups=groups, columns=columns):
                skipped = max(0, first - begin)
                wanted = batch.slice(skipped, max(0, first + rows - begin - skipped))
                for row, record in enumerate(wanted.to_pylist(), begin + skipped + 1):
                    yield self._query(record, row, f"{source}: row {row}")
                begin += len(batch)

    def _query(self, record: dict[str, Any], row: int, where: str) -> Query:
        user, history = record.get("user"), record.get("history")
        if user is not None and (isinstance(user, bool) or not isinstance(user, str | int)):
            raise DataError(f"{where}: user must be text or a whole number; got {shown(user)}")
        user = None if user is None else str(user)
        if isinstance(history, list):
            return Query(row, user, self._items(history, where))
        if history is not None:
            raise DataError(f"{where}: history must be a list of items; got {shown(history)}")
        if user is None:
            raise DataError(f"{where}: the query must be {_WANTED}; got {shown(record)}")
        return Query(row, user, self._of_user(user, f"{where}: "))

    def _of_user(self, user: str, where: str = "") -> npt.NDArray[np.int64]:
        if self._rows is None:
            self._rows = {name: row for row, name in enumerate(self.dataset.user_ids)}
        row = self._rows.get(user)
        if row is None:
            raise DataError(f"{where}user {shown(user)} is not in {self.dataset.path}")
        return self.dataset.sequences.row(row).astype(np.int64)

    def _items(self, entries: Iterable[Any], where: str) -> npt.NDArray[np.int64]:
        items = [_item(entry, self.dataset, where) for entry in entries]
        return np.array(items, dtype=np.int64)


def read_available(path: str, dataset: Dataset) -> npt.NDArray[np.bool_]:
    """Items that may be recommended [items], from a text file with the id of an item a line.

    Raises:
        DataError: a line is no item of the catalogue, or there is none at all.
    """
    available = np.zeros(dataset.num_items, dtype=np.bool_)
    with regular_file(path).open("rb") as handle:
        for number in itertools.count(1):
            where = f"{path}: line {number}"
            line = _next_line(handle, where)
            if not line:
                break
            if line.strip():
                text = line.decode("utf-8", errors="replace").strip()
                available[_item(text, dataset, where)] = True
    if not available.any():
        raise DataError(f"{path}: no item in it")
    return available


def _next_line(lines: BinaryIO, where: str) -> bytes:
    """The next line, which must have an end; empty after the last one."""
    line = lines.readline(_MAX_LINE + 1)
    if len(line) > _MAX_LINE:
        raise DataError(f"{where}: a line must have at most {_MAX_LINE:,} bytes; got more")
    return line


def parquet_rows(source: str) -> int:
    """Number of rows of a Parquet file, from its footer."""
    with _parquet_file(source) as file:
        return int(file.metadata.num_rows)


@contextmanager
def _parquet_file(source: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    regular_file(source)
    try:
        with parquet.ParquetFile(source) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: not a readable Parquet file: {error}") from None


def _item(entry: Any, dataset: Dataset, where: str) -> int:
    """The number of the item that a request names by its id."""
    ids = dataset.item_ids
    if ids is None:
        return _item_number(entry, dataset.num_items, where)
    # Ids that are whole numbers come as such from JSON and from tables.
    if isinstance(entry, float) and entry.is_integer():
        entry = int(entry)
    name = str(entry).strip() if isinstance(entry, str | int) else ""
    item = ids.item(name) if entry is not True and entry is not False else None
    if item is None:
        raise DataError(
            f"{where}: {shown(entry)} is no item of the data; ids are such as {ids[0]!r}"
        )
    return item


def _item_number(entry: Any, num_items: int, where: str) -> int:
    # int() would also accept 1_0, digits of other scripts, and a Decimal with a fraction.
    if isinstance(entry, str):
        text = entry.strip()
        item = int(text) if re.fullmatch(r"-?[0-9]{1,19}", text) else None
    elif isinstance(entry, float):
        item = int(entry) if entry.is_integer() else None
    else:
        item = entry if isinstance(entry, int) and not isinstance(entry, bool) else None
    if item is None:
        raise DataError(f"{where}: {shown(entry)} is not an item number")
    if not 0 <= item < num_items:
        raise DataError(f"{where}: item {shown(item)} is not in 0..{num_items - 1}")
    return item
