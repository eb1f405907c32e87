"""MovieLens: ``ratings.csv`` (ml-latest, 20M, 25M, 32M) and ``ratings.dat`` (1M, 10M)."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from gflowgr.data.dataset import Dataset
from gflowgr.data.importers.build import Events, ImportReport, build, check_options
from gflowgr.data.importers.lines import BadLines, as_paths, read_lines


def import_movielens(
    ratings: str | Path,
    metadata: str | Path | None = None,
    *,
    k_core: int = 5,
    duplicates: str = "all",
    max_bad_fraction: float = 0.01,
    name: str | None = None,
    progress: bool = True,
) -> tuple[Dataset, ImportReport]:
    """Read MovieLens ratings (user, movie, stars, Unix seconds).

    Files ending in ``.dat`` have fields separated by "::", no header and Latin-1 text (as the 1M
    release does); others are comma-separated with a header line and UTF-8. Stars become
    ``ratings``.

    Args:
        ratings: the ratings file, or the unpacked folder (then movies are found there as well).
        metadata: the movies file (movieId, title, genres). Texts are {"title", "categories" (genres
            separated by "|"), "movieId"}.
        k_core: keep users and items with at least this many ratings, iterated; 1 keeps all.
        duplicates: "all", "first" or "last" rating of a user for a movie.
        max_bad_fraction: more bad lines than this share is an error.
        name: of the data set; default: the name of the folder.
        progress: show a bar on a terminal.

    Raises:
        FileNotFoundError, ValueError: wrong arguments.
        DataError: truncated gzip, too many bad lines, nothing left after the k-core.
    """
    check_options(k_core, duplicates, max_bad_fraction)
    path = Path(ratings)
    if path.is_dir():
        folder = path
        path = _find(folder, "ratings")
        if metadata is None:
            metadata = _find(folder, "movies")
    (path,) = as_paths(path)
    movies = None if metadata is None else as_paths(metadata)[0]
    events, bad = Events(), BadLines()
    for place, fields, line in _read_rows(path, bad, progress):
        try:
            user, item, stars, time = fields
            value = float(stars)
            if not user or not item or not math.isfinite(value):
                raise ValueError("an empty field or a rating that is not finite")
            events.add(user, item, int(time), value=value)
        except (ValueError, OverflowError) as error:
            bad.add(place, f"not user, movie, rating, time: {error}", line)

    notes: dict[str, int] = {}

    def describe(keys: list[str]) -> list[dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        if movies is not None:
            found = _read_movies(movies, max_bad_fraction, progress, notes)
            notes["items without metadata"] = sum(key not in found for key in keys)
        return [{**found.get(key, {}), "movieId": key} for key in keys]

    return build(
        events,
        bad,
        source=path.name,
        name=name or path.resolve().parent.name,
        core=k_core,
        duplicates=duplicates,
        max_bad_fraction=max_bad_fraction,
        describe=describe,
        has_values=True,
        notes=notes,
    )


def _find(folder: Path, stem: str) -> Path:
    for name in (f"{stem}.csv", f"{stem}.dat", f"{stem}.csv.gz", f"{stem}.dat.gz"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: there is no {stem}.csv or {stem}.dat")


def _read_rows(path: Path, bad: BadLines, progress: bool) -> Iterator[tuple[str, list[str], str]]:
    """Yield (place, fields, line); the header of a comma-separated file is skipped."""
    dat = ".dat" in path.suffixes
    encoding = "latin-1" if dat else "utf-8"
    header = not dat
    for place, line in read_lines([path], bad, progress=progress, encoding=encoding):
        line = line.rstrip("\r\n")
        if header:
            header = False
            if "movieid" in line.lower():
                bad.lines -= 1
                continue
        yield place, line.split("::") if dat else next(csv.reader([line])), line


def _read_movies(
    path: Path, max_bad_fraction: float, progress: bool, notes: dict[str, int]
) -> dict[str, dict[str, str]]:
    bad = BadLines()
    found = {}
    for place, fields, line in _read_rows(path, bad, progress):
        if len(fields) != 3 or not fields[0]:
            bad.add(place, f"{len(fields)} fields instead of movieId, title, genres", line)
            continue
        found[fields[0]] = {"title": fields[1], "categories": fields[2]}
    bad.check(path.name, max_bad_fraction)
    notes["bad metadata lines"] = bad.bad
    return found
