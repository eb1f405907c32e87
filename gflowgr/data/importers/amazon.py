"""Amazon review data: JSON lines of the 2014, 2018 and 2023 releases, plain or gzipped."""

from __future__ import annotations

import ast
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gflowgr.data.dataset import Dataset
from gflowgr.data.importers.build import Events, ImportReport, build, check_options
from gflowgr.data.importers.lines import BadLines, as_paths, read_lines

_MAX_TIME = 1 << 53


def import_amazon(
    reviews: str | Path | Sequence[str | Path],
    metadata: str | Path | Sequence[str | Path] | None = None,
    *,
    k_core: int = 5,
    duplicates: str = "first",
    max_bad_fraction: float = 0.01,
    name: str | None = None,
    progress: bool = True,
) -> tuple[Dataset, ImportReport]:
    """Read Amazon reviews, one JSON object (or Python dict, as early files have) per line.

    Layouts, told by the keys of each line: 2014 and 2018 have ``reviewerID, asin, overall,
    unixReviewTime`` (seconds); 2023 has ``user_id, parent_asin`` (or ``asin``), ``rating,
    timestamp`` (milliseconds). Stars become ``ratings``; stored times are Unix seconds.

    Args:
        reviews: review file or files.
        metadata: metadata file or files: ``asin`` or ``parent_asin`` with title and categories.
            Texts are {"title", "categories", "asin"}: a category path joined by " > ", several by "
            | ".
        k_core: keep users and items with at least this many reviews, iterated; 1 keeps all.
        duplicates: "all", "first" or "last" review of a user for an item.
        max_bad_fraction: more bad lines than this share is an error.
        name: of the data set; default: the name of the first file.
        progress: show a bar on a terminal.

    Raises:
        FileNotFoundError, ValueError: wrong arguments.
        DataError: truncated gzip, too many bad lines, nothing left after the k-core.
    """
    check_options(k_core, duplicates, max_bad_fraction)
    paths = as_paths(reviews)
    meta_paths = None if metadata is None else as_paths(metadata)
    events, bad = Events(), BadLines()
    for place, line in read_lines(paths, bad, progress=progress):
        try:
            user, item, stars, time = _parse_review(parse_object(line))
        except ValueError as error:
            bad.add(place, str(error), line)
            continue
        events.add(user, item, time, value=stars)

    notes: dict[str, int] = {}

    def describe(keys: list[str]) -> list[dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        if meta_paths is not None:
            found = _read_metadata(meta_paths, set(keys), max_bad_fraction, progress, notes)
            notes["items without metadata"] = sum(key not in found for key in keys)
        return [{**found.get(key, {}), "asin": key} for key in keys]

    return build(
        events,
        bad,
        source=", ".join(p.name for p in paths),
        name=name or paths[0].name.split(".")[0],
        core=k_core,
        duplicates=duplicates,
        max_bad_fraction=max_bad_fraction,
        describe=describe,
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
            record = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"neither JSON ({error.msg}) nor a Python dict") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {type(record).__name__}")
    return record


def text_field(record: Mapping[str, Any], *keys: str) -> str:
    """The first of ``keys`` that is there, which must be a non-empty text.

    Raises:
        ValueError: none is there, or it is not a text.
    """
    for key in keys:
        if key in record:
            value = record[key]
            if not isinstance(value, str) or not value:
                raise ValueError(f"{key} is {value!r:.40}, not a text")
            return value
    raise ValueError(f"no {' or '.join(keys)}")


def number_field(record: Mapping[str, Any], *keys: str) -> float:
    """The first of ``keys`` that is there, which must be a finite number.

    Raises:
        ValueError: none is there, or it is not a finite number.
    """
    for key in keys:
        if key in record:
            value = record[key]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise ValueError(f"{key} is {value!r:.40}, not a number")
            return value
    raise ValueError(f"no {' or '.join(keys)}")


def _parse_review(record: Mapping[str, Any]) -> tuple[str, str, float, int]:
    """(user, item, stars, milliseconds)."""
    user = text_field(record, "reviewerID", "user_id")
    item = text_field(record, "parent_asin", "asin")
    stars = float(number_field(record, "overall", "rating"))
    if "timestamp" in record:
        time = int(number_field(record, "timestamp"))
    else:
        time = 1000 * int(number_field(record, "unixReviewTime"))
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
            item = text_field(record, "parent_asin", "asin")
        except ValueError as error:
            bad.add(place, str(error), line)
            continue
        if item in wanted and item not in found:
            title = record.get("title")
            categories = record.get("categories") or record.get("category")
            found[item] = {
                "title": _clean(title) if isinstance(title, str) else "",
                "categories": _join_categories(categories),
            }
    bad.check(", ".join(p.name for p in paths), max_bad_fraction)
    notes["bad metadata lines"] = bad.bad
    return found


def _clean(text: str) -> str:
    return " ".join(html.unescape(text).split())


def _join_categories(value: object) -> str:
    """[["a", "b"], ["c"]] (2014), ["a", "b"] (2018, 2023) or a text, as "a > b | c"."""
    if isinstance(value, str):
        return _clean(value)
    if not isinstance(value, list):
        return ""
    if any(isinstance(entry, list) for entry in value):
        return " | ".join(_join_categories(entry) for entry in value if entry)
    return " > ".join(_clean(entry) for entry in value if isinstance(entry, str))
