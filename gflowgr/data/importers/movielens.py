"""MovieLens: ``u.data`` (100K), ``ratings.dat`` (1M, 10M), ``ratings.csv`` (20M and later)."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from gflowgr.data.dataset import Dataset
from gflowgr.data.importers.build import Events, ImportReport, build, check_found, check_options
from gflowgr.data.importers.lines import BadLines, as_paths, read_lines
from gflowgr.data.importers.text import clean_text, named_key, read_rating, read_time
from gflowgr.errors import DataError

_SEPARATORS = {".dat": "::", ".data": "\t", ".base": "\t", ".test": "\t", ".item": "|"}
_RATINGS = ("ratings.csv", "ratings.dat", "ratings.csv.gz", "ratings.dat.gz", "u.data")
_MOVIES = ("movies.csv", "movies.dat", "movies.csv.gz", "movies.dat.gz", "u.item")
_RATING_COLUMNS = ("userid", "movieid", "rating", "timestamp")
_MOVIE_COLUMNS = ("movieid", "title", "genres")
# The flags at the end of a line of u.item, in the order of the release's u.genre.
_GENRES = re.split(
    r"\|",
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|"
    "Horror|Musical|Mystery|Romance|Sci-Fi|Thriller|War|Western",
)


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

    The layout follows the name: ``.dat`` has fields separated by "::" (1M, 10M), ``u.data`` by tabs
    and ``u.item`` by "|" (100K), all without a header; others are comma-separated with the header
    userId,movieId,rating,timestamp. A line that is not UTF-8 is read as Latin-1, the text of 100K
    and 1M. Stars become ``ratings``.

    Args:
        ratings: the ratings file, or the unpacked folder (then movies are found there as well).
        metadata: the movies file (movieId, title, genres). Texts are {"title", "categories" (genres
            separated by "|")}. Entities, tags and scripts are removed from texts.
        k_core: keep users and items with at least this many ratings, iterated; 1 keeps all.
        duplicates: "all", "first" or "last" rating of a user for a movie.
        max_bad_fraction: more bad lines than this share is an error.
        name: of the data set; default: the name of the folder.
        progress: show a bar on a terminal.

    Raises:
        FileNotFoundError, ValueError: wrong arguments.
        DataError: truncated gzip, too many bad lines, nothing left after the k-core, metadata of
            none of the items.
    """
    check_options(k_core, duplicates, max_bad_fraction)
    path = Path(ratings)
    if path.is_dir():
        folder = path
        path = _find(folder, _RATINGS)
        if metadata is None:
            metadata = _find(folder, _MOVIES)
    (path,) = as_paths(path)
    movies = None if metadata is None else as_paths(metadata)[0]
    events, bad = Events(), BadLines()
    for place, fields, line in _read_rows(path, _RATING_COLUMNS, bad, progress):
        try:
            if len(fields) != 4:
                raise ValueError(f"{len(fields)} fields")
            user, item = named_key(fields[0], "user"), named_key(fields[1], "movie")
            events.add(user, item, read_time(fields[3]), value=read_rating(fields[2]))
        except ValueError as error:
            bad.add(place, f"not user, movie, rating, time: {error}", line)

    notes: dict[str, int] = {}

    def describe(keys: list[str]) -> list[dict[str, str]]:
        assert movies is not None
        found = _read_movies(movies, max_bad_fraction, progress, notes)
        check_found([movies], keys, found, notes)
        return [found.get(key, {}) for key in keys]

    return build(
        events,
        bad,
        source=path.name,
        name=name or path.resolve().parent.name,
        core=k_core,
        duplicates=duplicates,
        max_bad_fraction=max_bad_fraction,
        describe=None if movies is None else describe,
        has_values=True,
        notes=notes,
    )


def _find(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    plain = [name for name in names if not name.endswith(".gz")]
    raise FileNotFoundError(f"{folder}: there is no {' or '.join(plain)}")


def _read_rows(
    path: Path, columns: tuple[str, ...], bad: BadLines, progress: bool
) -> Iterator[tuple[str, list[str], str]]:
    """Yield (place, fields, line); a header may name ``columns`` in another order, or more."""
    separator = next((_SEPARATORS[s] for s in path.suffixes if s in _SEPARATORS), None)
    first = separator is None
    separator = separator or ","
    order: list[int] | None = None
    for place, line in read_lines([path], bad, progress=progress, latin=True):
        line = line.rstrip("\r\n")
        if first:
            first = False
            if "movieid" in line.lower():
                bad.lines -= 1
                separator = max(",;\t", key=line.count)
                names = [f.strip().lower() for f in next(csv.reader([line], delimiter=separator))]
                missing = [column for column in columns if column not in names]
                if missing:
                    raise DataError(f"{path}: there is no column {missing[0]!r} in {line[:80]!r}")
                if len(set(names)) < len(names):
                    raise DataError(f"{path}: a column occurs twice in {line[:80]!r}")
                order = [names.index(column) for column in columns]
                order = None if order == list(range(len(names))) else order
                continue
        if separator in ("::", "|") or '"' not in line:
            fields = line.split(separator)
        else:
            try:
                fields = next(csv.reader([line], delimiter=separator))
            except csv.Error as error:
                bad.add(place, str(error), line)
                continue
        if order is not None and len(fields) > max(order):
            fields = [fields[position] for position in order]
        yield place, fields, line


def _read_movies(
    path: Path, max_bad_fraction: float, progress: bool, notes: dict[str, int]
) -> dict[str, dict[str, str]]:
    bad = BadLines()
    found: dict[str, dict[str, str]] = {}
    flags = ".item" in path.suffixes
    for place, fields, line in _read_rows(path, _MOVIE_COLUMNS, bad, progress):
        if flags and len(fields) == 5 + len(_GENRES):
            genres = [g for g, flag in zip(_GENRES, fields[5:], strict=True) if flag == "1"]
            fields = [fields[0], fields[1], "|".join(genres)]
        try:
            if len(fields) != 3:
                raise ValueError(f"{len(fields)} fields instead of movieId, title, genres")
            key = named_key(fields[0], "movieId")
        except ValueError as error:
            bad.add(place, str(error), line)
            continue
        texts = {"title": clean_text(fields[1]), "categories": clean_text(fields[2])}
        found.setdefault(key, texts)
    bad.check(path.name, max_bad_fraction)
    notes["bad metadata lines"] = bad.bad
    if bad.latin:
        notes["lines of metadata that are not UTF-8, read as Latin-1"] = bad.latin
    return found
