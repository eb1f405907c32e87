"""Amazon review data: JSON lines of the 2014, 2018 and 2023 releases, plain or gzipped."""

from __future__ import annotations

import ast
import csv
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gflowgr.data.dataset import Dataset
from gflowgr.data.importers.build import Events, ImportReport, build, check_found, check_options
from gflowgr.data.importers.lines import BadLines, as_paths, read_lines
from gflowgr.data.importers.text import clean_text, named_key, read_rating, read_time
from gflowgr.errors import DataError

_MAX_TIME = 1 << 53


class _Layout(NamedTuple):
    """The keys of a review."""

    user: str
    stars: str
    time: str


_OLD = _Layout("reviewerID", "overall", "unixReviewTime")
_NEW = _Layout("user_id", "rating", "timestamp")
_RELEASES = {2014: _OLD, 2018: _OLD, 2023: _NEW}


def import_amazon(
    reviews: str | Path | Sequence[str | Path],
    metadata: str | Path | Sequence[str | Path] | None = None,
    *,
    release: int | None = None,
    k_core: int = 5,
    duplicates: str = "first",
    max_bad_fraction: float = 0.01,
    name: str | None = None,
    progress: bool = True,
) -> tuple[Dataset, ImportReport]:
    """Read Amazon reviews, one JSON object (or Python dict, as early files have) per line.

    Layouts, told by the keys of each line: 2014 and 2018 have ``reviewerID, asin, overall,
    unixReviewTime`` (seconds); 2023 has ``user_id, parent_asin`` (or ``asin``), ``rating,
    timestamp`` (milliseconds). Stars become ``ratings``; stored times are Unix seconds. The 2023
    release's ``.csv`` files of ratings, whose header has the same names, are read as well.

    Args:
        reviews: review file or files, plain or packed.
        metadata: metadata file or files: ``asin`` or ``parent_asin`` with title and categories.
            Texts are {"title", "categories"}: a category path joined by " > ", several by "
            | ". Entities, tags and scripts are removed from texts.
        release: 2014, 2018 or 2023: lines of another layout are bad; None: all are read.
        k_core: keep users and items with at least this many reviews, iterated; 1 keeps all.
        duplicates: "all", "first" or "last" review of a user for an item.
        max_bad_fraction: more bad lines than this share is an error.
        name: of the data set; default: the name of the first file.
        progress: show a bar on a terminal.

    Raises:
        FileNotFoundError, ValueError: wrong arguments.
        DataError: truncated gzip, too many bad lines, nothing left after the k-core, metadata of
            none of the items.
    """
    check_options(k_core, duplicates, max_bad_fraction)
    if release not in (None, *_RELEASES):
        raise ValueError(
            f"release must be one of {', '.join(map(str, _RELEASES))}; got {release!r}"
        )
    paths = as_paths(reviews)
    meta_paths = None if metadata is None else as_paths(metadata)
    layouts = tuple(_RELEASES.values()) if release is None else (_RELEASES[release],)
    events, bad = Events(), BadLines()
    for path in paths:
        for place, line, record in _read_reviews(path, bad, progress):
            try:
                review = parse_object(line) if record is None else record
                user, item, stars, time = _parse_review(review, layouts)
            except ValueError as error:
                bad.add(place, str(error), line)
                continue
            events.add(user, item, time, value=stars)

    notes: dict[str, int] = {}

    def describe(keys: list[str]) -> list[dict[str, str]]:
        assert meta_paths is not None
        found = _read_metadata(meta_paths, set(keys), max_bad_fraction, progress, notes)
        check_found(meta_paths, keys, found, notes)
        return [found.get(key, {}) for key in keys]

    return build(
        events,
        bad,
        source=", ".join(p.name for p in paths),
        name=name or paths[0].name.split(".")[0],
        core=k_core,
        duplicates=duplicates,
        max_bad_fraction=max_bad_fraction,
        describe=None if meta_paths is None else describe,
        has_values=True,
        time_divisor=1000,
        notes=notes,
    )


def parse_object(line: str) -> dict[str, Any]:
    """One line as a JSON object, or as a Python dict literal (never evaluated as code).

    Raises:
        ValueError: it is neither.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        try:
            with warnings.catch_warnings():  # of "\d" within its texts
                warnings.simplefilter("ignore")
                record = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(f"neither JSON ({error.msg}) nor a Python dict") from error
    except ValueError as error:
        raise ValueError("a number of thousands of digits") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {type(record).__name__}")
    return record


def _first_field(record: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    for key in keys:
        if key in record:
            return key, record[key]
    raise ValueError(f"no {' or '.join(keys)}")


def key_field(record: Mapping[str, Any], *keys: str) -> str:
    """The first of ``keys`` that is there, which must be a text that can be a key.

    Raises:
        ValueError: none is there, or it is not a text.
    """
    name, value = _first_field(record, keys)
    # A number here has lost its leading zeros ("0439886341"): it would be another item's key.
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_short(value)}, not a text")
    return named_key(value, name)


def number_field(record: Mapping[str, Any], *keys: str) -> float:
    """The first of ``keys`` that is there, which must be a number that float32 can hold.

    Raises:
        ValueError: none is there, or it is no such number.
    """
    name, value = _first_field(record, keys)
    if type(value) is not int and type(value) is not float:
        raise ValueError(f"{name} is {_short(value)}, not a number")
    try:
        return read_rating(value)
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from None


def _short(value: object) -> str:
    return f"{value!r:.40}" if isinstance(value, str | float | bool) else f"{str(value)[:40]}"


def _read_reviews(
    path: Path, bad: BadLines, progress: bool
) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """Yield (place, line, record); the record of a line of JSON is left to the caller (None)."""
    header: list[str] | None = None
    table = ".csv" in path.suffixes
    for place, line in read_lines([path], bad, progress=progress):
        if not table:
            yield place, line, None
            continue
        try:
            fields = next(csv.reader([line.rstrip("\r\n")]), [])
        except csv.Error as error:
            bad.add(place, str(error), line)
            continue
        if header is None:
            header = [field.strip() for field in fields]
            if not {"rating", "overall"} & set(header):
                raise DataError(
                    f"{path}: the first line must name the columns user_id, parent_asin, rating, "
                    f"timestamp; got {line.strip()[:80]!r}. Releases differ in the order of "
                    "columns without names: read such a file with import_table and its columns=..."
                )
            bad.lines -= 1
            continue
        record: dict[str, Any] = dict(zip(header, fields, strict=False))
        try:
            for name in ("rating", "overall"):
                if name in record:
                    record[name] = read_rating(record[name])
            for name in ("timestamp", "unixReviewTime"):
                if name in record:
                    record[name] = read_time(record[name])
        except ValueError as error:
            bad.add(place, f"{name} is {error}", line)
            continue
        yield place, line, record


def _parse_review(
    record: Mapping[str, Any], layouts: Sequence[_Layout]
) -> tuple[str, str, float, int]:
    """(user, item, stars, milliseconds)."""
    user = key_field(record, *dict.fromkeys(layout.user for layout in layouts))
    item = key_field(record, *(("parent_asin", "asin") if _NEW in layouts else ("asin",)))
    stars = number_field(record, *dict.fromkeys(layout.stars for layout in layouts))
    name, value = _first_field(record, tuple(dict.fromkeys(each.time for each in layouts)))
    if type(value) is not int and type(value) is not float:
        raise ValueError(f"{name} is {_short(value)}, not a number")
    try:
        time = read_time(value) * (1 if name == "timestamp" else 1000)
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from None
    if abs(time) > _MAX_TIME:
        raise ValueError(f"the time {time} is out of range")
    return user, item, stars, time


def _read_metadata(
    paths: list[Path],
    wanted: set[str],
    max_bad_fraction: float,
    progress: bool,
    notes: dict[str, int],
) -> dict[str, dict[str, str]]:
    bad = BadLines()
    found: dict[str, dict[str, str]] = {}
    for place, line in read_lines(paths, bad, progress=progress):
        try:
            record = parse_object(line)
            item = key_field(record, "parent_asin", "asin")
        except ValueError as error:
            bad.add(place, str(error), line)
            continue
        if item in wanted and item not in found:
            title = record.get("title")
            categories = record.get("categories") or record.get("category")
            found[item] = {
                "title": clean_text(title) if isinstance(title, str) else "",
                "categories": _join_categories(categories),
            }
    bad.check(", ".join(p.name for p in paths), max_bad_fraction)
    notes["bad metadata lines"] = bad.bad
    return found


def _join_categories(value: object) -> str:
    """[["a", "b"], ["c"]] (2014), ["a", "b"] (2018, 2023) or a text, as "a > b | c"."""
    if isinstance(value, str):
        return clean_text(value)
    if not isinstance(value, list):
        return ""
    if any(isinstance(entry, list) for entry in value):
        return " | ".join(_join_categories(entry) for entry in value if entry)
    names = (clean_text(entry) for entry in value if isinstance(entry, str))
    return " > ".join(name for name in names if name)
