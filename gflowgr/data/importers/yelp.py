"""Yelp Open Dataset: the JSON lines of reviews and businesses."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from gflowgr.data.dataset import Dataset
from gflowgr.data.importers.amazon import key_field, number_field, parse_object
from gflowgr.data.importers.build import Events, ImportReport, build, check_found, check_options
from gflowgr.data.importers.lines import BadLines, as_paths, read_lines
from gflowgr.data.importers.text import text_of


def import_yelp(
    reviews: str | Path | Sequence[str | Path],
    metadata: str | Path | Sequence[str | Path] | None = None,
    *,
    start: str | None = None,
    end: str | None = None,
    k_core: int = 5,
    duplicates: str = "all",
    max_bad_fraction: float = 0.01,
    name: str | None = None,
    progress: bool = True,
) -> tuple[Dataset, ImportReport]:
    """Read Yelp reviews (``user_id, business_id, stars, date``), one JSON object per line.

    Stars become ``ratings``; dates become Unix seconds (read as UTC).

    Args:
        reviews: review file or files, plain or gzipped.
        metadata: business file or files (``business_id, name, categories, city``). Texts are
            {"title", "description", "city"}, description being the categories.
        start, end: keep reviews of these days only, both included, as "2019-01-01". The
            literature's set takes 2019-01-01 to 2019-12-31.
        k_core: keep users and items with at least this many reviews, iterated; 1 keeps all.
        duplicates: "all" (a second visit is an event), "first" or "last" of a user at a business.
        max_bad_fraction: more bad lines than this share is an error.
        name: of the data set; default: the name of the first file.
        progress: show a bar on a terminal.

    Raises:
        FileNotFoundError, ValueError: wrong arguments.
        DataError: truncated gzip, too many bad lines, nothing left after the k-core, metadata of
            none of the items.
    """
    check_options(k_core, duplicates, max_bad_fraction)
    first = None if start is None else _day("start", start)
    last = None if end is None else _day("end", end)
    if first is not None and last is not None and first > last:
        raise ValueError(f"end must not be before start = {start!r}; got {end!r}")
    paths = as_paths(reviews)
    meta_paths = None if metadata is None else as_paths(metadata)
    events, bad = Events(), BadLines()
    notes: dict[str, int] = {}
    outside = 0
    for place, line in read_lines(paths, bad, progress=progress):
        try:
            record = parse_object(line)
            user = key_field(record, "user_id")
            item = key_field(record, "business_id")
            stars = number_field(record, "stars")
            when = _moment(key_field(record, "date"))
            seconds = int(when.timestamp())
        except (ValueError, OverflowError) as error:
            bad.add(place, str(error), line)
            continue
        if (first is not None and when.date() < first) or (last is not None and when.date() > last):
            outside += 1
            continue
        events.add(user, item, seconds, value=stars)
    if first is not None or last is not None:
        notes["reviews outside the time window"] = outside

    def describe(keys: list[str]) -> list[dict[str, str]]:
        assert meta_paths is not None
        found = _read_businesses(meta_paths, set(keys), max_bad_fraction, progress, notes)
        check_found(meta_paths, keys, found, notes)
        return [found.get(key, {}) for key in keys]

    return build(
        events,
        bad,
        source=", ".join(p.name for p in paths),
        name=name or "yelp",
        core=k_core,
        duplicates=duplicates,
        max_bad_fraction=max_bad_fraction,
        describe=None if meta_paths is None else describe,
        has_values=True,
        notes=notes,
    )


def _moment(text: str) -> datetime.datetime:
    # Python 3.10 does not know the Z of "2019-01-01T00:00:00Z".
    when = datetime.datetime.fromisoformat(text.removesuffix("Z") + "+00:00" * text.endswith("Z"))
    return when if when.tzinfo is not None else when.replace(tzinfo=datetime.timezone.utc)


def _day(argument: str, text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{argument} must be a day like 2019-01-31; got {text!r}") from error


def _read_businesses(
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
            item = key_field(record, "business_id")
        except ValueError as error:
            bad.add(place, str(error), line)
            continue
        if item in wanted and item not in found:
            fields = {"title": "name", "description": "categories", "city": "city"}
            # Businesses without categories have null there.
            found[item] = {ours: text_of(record.get(theirs)) for ours, theirs in fields.items()}
    bad.check(", ".join(p.name for p in paths), max_bad_fraction)
    notes["bad metadata lines"] = bad.bad
    return found
