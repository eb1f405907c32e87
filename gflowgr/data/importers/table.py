"""Tables of (user, item, time[, behaviour, value]): text, Parquet, folders of parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gflowgr.data.dataset import Dataset
from gflowgr.data.importers.build import Events, ImportReport, build, check_found, check_options
from gflowgr.data.importers.columns import keys_of, times_of, values_of
from gflowgr.data.importers.frames import Part, TextForm, read_parts, table_files
from gflowgr.data.importers.lines import BadLines
from gflowgr.data.importers.text import read_key, text_of

if TYPE_CHECKING:
    import polars

Sources = str | Path | Sequence[str | Path]


def import_table(
    table: Sources,
    metadata: Sources | None = None,
    *,
    user: str = "user",
    item: str = "item",
    time: str = "time",
    behaviour: str | None = None,
    value: str | None = None,
    side_behaviours: Sequence[str] = (),
    time_format: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    columns: Sequence[str] = (),
    decimal: str | None = None,
    k_core: int = 5,
    duplicates: str = "all",
    max_bad_fraction: float = 0.01,
    name: str | None = None,
) -> tuple[Dataset, ImportReport]:
    """Read a table with one event per row.

    The format follows the name: ``.parquet``, or text as ``.csv``, ``.tsv``, ``.txt``, ``.dat``,
    ``.data``, ``.inter``, ``.item``, also packed (``.gz``, ``.bz2``, ``.xz``, a ``.zip`` of one
    file). A folder holds the parts of one table, as Spark writes them; ``column=value`` in the
    names of its folders is a column. A row is bad when its user, item or behaviour is empty or no
    key, its time is no time, or its value no number that float32 holds; fields beyond the header's
    are ignored.

    Keys of users, items and behaviours are compared as texts without surrounding white space; whole
    numbers that pandas wrote as floats (10.0) are "10", leading zeros of texts stay.

    Args:
        table: the events: a file, a folder of parts, or several of them.
        metadata: a table of items with the same ``item`` column; all its other columns become
            texts, without entities, tags and scripts.
        user, item, time: names of the columns. Times are numbers (any one unit; fractions are cut)
            or dates/times, which become Unix seconds (read as UTC where no zone is given).
        behaviour: column of the behaviour's name, if any.
        value: column of a number such as a rating, if any; becomes ``ratings``.
        side_behaviours: behaviours that are no events of the sequence, e.g. ("cart", "impression").
        time_format: of times given as text, in chrono's notation ("%d.%m.%Y"); default: ISO forms.
        separator: between the fields of text, tried first; default: by the name and the header.
        encoding: of text, e.g. "cp1251"; default: UTF-8, by its byte order mark UTF-16, and Latin-1
            for lines that are not UTF-8 (the report counts them).
        columns: names for the columns of a table of events that has no header line.
        decimal: "." or "," before the fraction of values given as text; the other may then group
            thousands. Default: values with a comma are bad.
        k_core: keep users and items with at least this many events, iterated; 1 keeps all.
        duplicates: "all", "first" or "last" event of a user with an item.
        max_bad_fraction: more bad rows than this share is an error.
        name: of the data set; default: the file's name.

    Raises:
        FileNotFoundError, ValueError: wrong arguments.
        DataError: unreadable file, missing or repeated column, a column of a type that cannot hold
            what it should, too many bad rows, nothing left after the k-core, metadata of none of
            the items.
    """
    check_options(k_core, duplicates, max_bad_fraction)
    for argument, given in (("side_behaviours", side_behaviours), ("columns", columns)):
        if isinstance(given, str):
            raise ValueError(f"{argument} must be a list of names; got the text {given!r}")
    if side_behaviours and behaviour is None:
        raise ValueError("side_behaviours need the behaviour column's name in behaviour")
    if decimal not in (None, ".", ","):
        raise ValueError(f"decimal must be '.' or ','; got {decimal!r}")
    form = TextForm(separator, encoding, tuple(columns))
    roles = {"user": user, "item": item, "time": time, "behaviour": behaviour, "value": value}
    named = {role: column for role, column in roles.items() if column is not None}
    if time_format is not None and not isinstance(time_format, str):
        raise ValueError(f"time_format must be a text such as '%d.%m.%Y'; got {time_format!r}")
    for role, column in named.items():
        if not isinstance(column, str):
            raise ValueError(f"{role} must be the name of a column; got {column!r}")
        twin = next(other for other, same in named.items() if same == column)
        if twin != role:
            raise ValueError(f"{twin} and {role} must be different columns; got {column!r} twice")
    files = table_files(table)
    meta_files = None if metadata is None else table_files(metadata)

    bad, events = BadLines(), Events()
    for part in read_parts(files, list(named.values()), form):
        bad.latin += part.latin
        frame, good = _read_events(part, named, time_format, decimal, bad)
        events.extend(frame.filter(good))

    notes: dict[str, int] = {}

    def describe(keys: list[str]) -> list[dict[str, str]]:
        assert meta_files is not None
        texts_form = TextForm(separator, encoding)
        parts = read_parts(meta_files, [item], texts_form, others=True)
        found = _read_texts(parts, item, set(keys), max_bad_fraction, notes)
        check_found([path for path, _ in meta_files], keys, found, notes)
        return [found.get(key, {}) for key in keys]

    paths = [Path(table)] if isinstance(table, str | Path) else [Path(p) for p in table]
    return build(
        events,
        bad,
        source=", ".join(p.name for p in paths),
        name=name or paths[0].name.split(".")[0],
        core=k_core,
        duplicates=duplicates,
        max_bad_fraction=max_bad_fraction,
        describe=None if meta_files is None else describe,
        side_behaviours=[read_key(kind) for kind in side_behaviours],
        has_behaviours=behaviour is not None,
        has_values=value is not None,
        notes=notes,
    )


def _read_events(
    part: Part,
    named: dict[str, str],
    time_format: str | None,
    decimal: str | None,
    bad: BadLines,
) -> tuple[polars.DataFrame, polars.Series]:
    """The columns user, item, time, behaviour and value of a file, and which rows are good."""
    import polars as pl

    raw, path = part.frame, part.path
    bad.lines += len(raw)
    read: dict[str, polars.Series] = {}
    reasons: dict[str, dict[object, str]] = {}
    for role in ("user", "item", "behaviour"):
        if role in named:
            read[role], reasons[role] = keys_of(raw.get_column(named[role]), path)
    read["time"] = times_of(raw.get_column(named["time"]), time_format, path)
    if "value" in named:
        read["value"] = values_of(raw.get_column(named["value"]), decimal, path)

    good = np.ones(len(raw), dtype=bool)
    for column in read.values():
        good &= column.is_not_null().to_numpy()
    wrong = np.flatnonzero(~good)
    shown_rows = wrong[: bad.wants_examples].tolist()
    bad.more(len(wrong) - len(shown_rows))
    for row in shown_rows:
        role = next(role for role, column in read.items() if column[row] is None)
        what = "finite number" if role == "value" else role
        reason = f"no {what} in column {named[role]!r}"
        entry = raw.get_column(named[role])[row]
        if entry is not None and role in reasons:
            reason += f" ({reasons[role][entry]})" if entry in reasons[role] else ""
        elif role == "time" and time_format is not None:
            reason += f" (time_format {time_format!r})"
        elif role == "value" and decimal is None and isinstance(entry, str) and "," in entry:
            reason += " (decimal says what a comma means)"
        shown = ",".join("" if field is None else str(field) for field in raw.row(row))
        bad.add(f"{path.name}: row {row + 1}", reason, shown)
    frame = pl.DataFrame(
        {
            "user": read["user"],
            "item": read["item"],
            "time": read["time"],
            "behaviour": read.get("behaviour", pl.repeat("", len(raw), eager=True)),
            "value": read.get("value", pl.repeat(0.0, len(raw), eager=True)),
        }
    )
    return frame, pl.Series(good)


def _read_texts(
    parts: Iterable[Part],
    item: str,
    wanted: set[str],
    max_bad_fraction: float,
    notes: dict[str, int],
) -> dict[str, dict[str, str]]:
    """{key: texts} of the items ``wanted``; of several rows of one item the first counts."""
    found: dict[str, dict[str, str]] = {}
    bad = BadLines()
    sources, known = [], list(wanted)
    for part in parts:
        sources.append(part.path.name)
        keys, reasons = keys_of(part.frame.get_column(item), part.path)
        bad.lines += len(keys)
        bad.latin += part.latin
        wrong = np.flatnonzero(keys.is_null().to_numpy())
        shown_rows = wrong[: bad.wants_examples].tolist()
        bad.more(len(wrong) - len(shown_rows))
        for row in shown_rows:
            entry = part.frame.get_column(item)[row]
            why = f" ({reasons[entry]})" if entry in reasons else ""
            bad.add(f"{part.path.name}: row {row + 1}", f"no item in column {item!r}{why}")
        chosen = keys.is_in(known).fill_null(False)
        others = part.frame.drop(item).filter(chosen)
        rows = zip(keys.filter(chosen), others.iter_rows(named=True), strict=True)
        for key, row in rows if others.width else ((key, {}) for key in keys.filter(chosen)):
            if key not in found:
                found[key] = {field: text_of(entry) for field, entry in row.items()}
    bad.check(", ".join(sources), max_bad_fraction)
    if bad.bad:
        notes["bad metadata rows"] = bad.bad
    if bad.latin:
        notes["lines of metadata that are not UTF-8, read as Latin-1"] = bad.latin
    return found
