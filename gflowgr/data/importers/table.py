"""Tables of (user, item, time[, behaviour, value]): CSV, TSV or Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gflowgr.data.dataset import Dataset
from gflowgr.data.importers.build import Events, ImportReport, build, check_options
from gflowgr.data.importers.lines import BadLines, as_paths
from gflowgr.errors import DataError

if TYPE_CHECKING:
    import polars

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


def import_table(
    table: str | Path,
    metadata: str | Path | None = None,
    *,
    user: str = "user",
    item: str = "item",
    time: str = "time",
    behaviour: str | None = None,
    value: str | None = None,
    side_behaviours: Sequence[str] = (),
    time_format: str | None = None,
    k_core: int = 5,
    duplicates: str = "all",
    max_bad_fraction: float = 0.01,
    name: str | None = None,
) -> tuple[Dataset, ImportReport]:
    """Read a table with one event per row.

    The format follows the name: ``.parquet``, ``.csv``, ``.tsv`` or ``.txt`` (tab), text files also
    with ``.gz`` and with a header line. A row is bad when its user, item or behaviour is empty, its
    time is no time, or its value no finite number; fields beyond the header's are ignored.

    Args:
        table: the file of events.
        metadata: a table of items with the same ``item`` column; all its other columns become
        texts. user, item, time: names of the columns. Times are numbers (any unit; fractions are
        cut) or
            dates/times, which become Unix seconds (read as UTC where no zone is given).
        behaviour: column of the behaviour's name, if any.
        value: column of a number such as a rating, if any; becomes ``ratings``.
        side_behaviours: behaviours that are no events of the sequence, e.g. ("cart", "impression").
        time_format: of times given as text, in chrono's notation ("%d.%m.%Y"); default: ISO forms.
        k_core: keep users and items with at least this many events, iterated; 1 keeps all.
        duplicates: "all", "first" or "last" event of a user with an item.
        max_bad_fraction: more bad rows than this share is an error.
        name: of the data set; default: the file's name.

    Raises:
        FileNotFoundError, ValueError: wrong arguments.
        DataError: unreadable file, missing column, too many bad rows, nothing left after the
            k-core.
    """
    import polars as pl

    check_options(k_core, duplicates, max_bad_fraction)
    if side_behaviours and behaviour is None:
        raise ValueError("side_behaviours need the behaviour column's name in behaviour")
    (path,) = as_paths(table)
    named = {"user": user, "item": item, "time": time, "behaviour": behaviour, "value": value}
    columns = {role: column for role, column in named.items() if column is not None}
    raw = _read(path, list(columns.values()))
    text = pl.String
    frame = raw.select(
        pl.col(user).cast(text).str.strip_chars().alias("user"),
        pl.col(item).cast(text).str.strip_chars().alias("item"),
        _seconds(raw.get_column(time), time_format).alias("time"),
        (pl.lit("") if behaviour is None else pl.col(behaviour).cast(text).str.strip_chars()).alias(
            "behaviour"
        ),
        (pl.lit(0.0) if value is None else pl.col(value).cast(pl.Float64, strict=False)).alias(
            "value"
        ),
    )
    bad = BadLines()
    bad.lines = len(frame)
    wrong = {
        f"no {role} in column {columns[role]!r}": frame.get_column(role).fill_null("") == ""
        for role in ("user", "item", "behaviour")
        if role in columns
    }
    wrong[f"no time in column {time!r}"] = frame.get_column("time").is_null()
    if value is not None:
        wrong[f"no finite number in column {value!r}"] = ~frame.get_column(
            "value"
        ).is_finite().fill_null(False)
    good = _count_bad(path, raw, wrong, bad)
    events = Events()
    events.extend(frame.filter(pl.Series(good)))

    notes: dict[str, int] = {}

    def describe(keys: list[str]) -> list[dict[str, str]]:
        found = {} if metadata is None else _read_texts(as_paths(metadata)[0], item)
        if metadata is not None:
            notes["items without metadata"] = sum(key not in found for key in keys)
        return [{**found.get(key, {}), "item_id": key} for key in keys]

    return build(
        events,
        bad,
        source=path.name,
        name=name or path.name.split(".")[0],
        core=k_core,
        duplicates=duplicates,
        max_bad_fraction=max_bad_fraction,
        describe=describe,
        side_behaviours=side_behaviours,
        has_behaviours=behaviour is not None,
        has_values=value is not None,
        notes=notes,
    )


def _read(path: Path, columns: list[str] | None = None) -> polars.DataFrame:
    """The table; text files with every column as text, so that bad fields can be counted."""
    import polars as pl

    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    try:
        if suffix in (".parquet", ".pq"):
            frame = pl.read_parquet(path)
        elif suffix in _SEPARATORS:
            frame = pl.read_csv(
                path,
                separator=_SEPARATORS[suffix],
                infer_schema=False,
                truncate_ragged_lines=True,
            )
        else:
            known = ", ".join([*_SEPARATORS, ".parquet"])
            raise ValueError(f"{path}: unknown kind of table {suffix!r}, expected {known}")
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: cannot be read as a {suffix[1:]} table: {error}") from error
    missing = [c for c in columns or [] if c not in frame.columns]
    if missing:
        raise DataError(
            f"{path}: there is no column {missing[0]!r}; columns are {', '.join(frame.columns)}"
        )
    return frame


def _seconds(column: polars.Series, time_format: str | None) -> polars.Series:
    """Int64 with null where the entry is no time."""
    import polars as pl

    if column.dtype == pl.String and time_format is None:
        numbers = column.str.strip_chars().cast(pl.Float64, strict=False)
        # Whole columns are numbers or dates; a few bad entries must not change which.
        if numbers.null_count() * 2 < max(len(column), 1):
            exact = column.str.strip_chars().cast(pl.Int64, strict=False)
            column = exact if exact.null_count() == numbers.null_count() else numbers
    if column.dtype == pl.String:
        try:
            column = column.str.strip_chars().str.to_datetime(time_format, strict=False)
        except pl.exceptions.ComputeError:  # no entry looks like a time at all
            return pl.Series([None] * len(column), dtype=pl.Int64)
    if column.dtype == pl.Date or isinstance(column.dtype, pl.Datetime):
        return column.cast(pl.Datetime("us")).dt.epoch("s")
    if column.dtype.is_float():
        finite = column.is_finite().fill_null(False)
        column = pl.Series(np.where(finite, column.fill_null(0.0), np.nan)).fill_nan(None).floor()
    return column.cast(pl.Int64, strict=False)


def _count_bad(
    path: Path, raw: polars.DataFrame, wrong: dict[str, polars.Series], bad: BadLines
) -> np.ndarray:
    """Record the rows where any of ``wrong`` is true; returns the good ones, bool [rows]."""
    good = np.ones(len(raw), dtype=bool)
    for mask in wrong.values():
        good &= ~mask.to_numpy()
    for row in np.flatnonzero(~good).tolist():
        reason = next(reason for reason, mask in wrong.items() if mask[row])
        shown = ",".join("" if field is None else str(field) for field in raw.row(row))
        bad.add(f"{path.name}: row {row + 1}", reason, shown)
    return good


def _read_texts(path: Path, item: str) -> dict[str, dict[str, str]]:
    frame = _read(path, [item])
    keys = [str(key) for key in frame.get_column(item).to_list()]
    others = frame.drop(item)
    rows = others.iter_rows(named=True)
    return {
        key: {name: "" if field is None else str(field) for name, field in row.items()}
        for key, row in zip(keys, rows, strict=True)
    }
