"""Files of tables as polars frames: text of any separator and encoding, Parquet, folders."""

from __future__ import annotations

import csv
import io
import re
import urllib.parse
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gflowgr.data.importers.lines import check_encoding, decode_latin, encoding_of, open_bytes
from gflowgr.errors import DataError

if TYPE_CHECKING:
    import polars

_SEPARATORS = {
    ".csv": ",",
    ".tsv": "\t",
    ".txt": "\t",
    ".dat": "\t",
    ".data": "\t",
    ".inter": "\t",
    ".item": "\t",
}
_PARQUET = (".parquet", ".pq")
_PACKED = (".gz", ".bz2", ".xz", ".zip")
_SNIFFED = (",", ";", "\t", "|")
_HEAD = 1 << 20
_RECBOLE = re.compile(r"(.+):(?:token|float)(?:_seq)?\Z")
# The number of the row, which pandas and dask write beside the columns that were meant.
_INDEX = re.compile(r"(?:Unnamed: \d+|__index_level_\d+__|__null_dask_index__)?\Z")


@dataclass(frozen=True)
class TextForm:
    """How text files are written, where a file's name and first line do not tell.

    Attributes:
        separator: one character; default: the first of the name's usual one, comma, semicolon, tab
            and "|" that finds the wanted columns in the header.
        encoding: default: by the byte order mark, else UTF-8 with Latin-1 for lines that are not.
        columns: names of the columns of a file that has no header line.
    """

    separator: str | None = None
    encoding: str | None = None
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_encoding(self.encoding)
        if self.separator is not None and (
            not isinstance(self.separator, str)
            or len(self.separator) != 1
            or not self.separator.isascii()
            or self.separator in '"\r\n'
        ):
            raise ValueError(f"separator must be one ASCII character; got {self.separator!r}")
        repeated = [c for c in self.columns if self.columns.count(c) > 1]
        if repeated:
            raise ValueError(f"columns must differ; got {repeated[0]!r} twice")


@dataclass(frozen=True)
class Part:
    """One file of a table: its columns, and how many of its lines were read as Latin-1."""

    path: Path
    frame: polars.DataFrame
    latin: int = 0


def table_files(sources: str | Path | Sequence[str | Path]) -> list[tuple[Path, dict[str, str]]]:
    """The files of one or several files and folders of parts, with their partition columns.

    A folder is what Spark, Hive and dask write: ``part-*`` files, also within folders named
    ``column=value``; names that begin with "_" or "." are no parts.

    Raises:
        FileNotFoundError, ValueError: there is no such file, no file at all, or a kind of file that
            is no table.
        DataError: a folder without parts, with parts of several kinds, or not finished.
    """
    single = isinstance(sources, str | Path)
    paths = [Path(sources)] if isinstance(sources, str | Path) else [Path(p) for p in sources]
    if not paths:
        raise ValueError("no files given" if not single else f"no such file: {sources}")
    files: list[tuple[Path, dict[str, str]]] = []
    for path in paths:
        if path.is_dir():
            files.extend(_folder_files(path))
        elif path.is_file():
            files.append((path, {}))
        else:
            raise FileNotFoundError(f"no such file: {path}")
    for path, _ in files:
        _kind(path)
    return files


def _folder_files(folder: Path) -> list[tuple[Path, dict[str, str]]]:
    if (folder / "_temporary").exists():
        raise DataError(f"{folder}: holds _temporary: the job that writes it has not finished")
    files = []
    for path in sorted(folder.rglob("*")):
        names = path.relative_to(folder).parts
        if not path.is_file() or any(name.startswith(("_", ".")) for name in names):
            continue
        partition = {}
        for name in names[:-1]:
            column, equals, value = name.partition("=")
            if equals:
                empty = value == "__HIVE_DEFAULT_PARTITION__"
                partition[column] = "" if empty else urllib.parse.unquote(value)
        files.append((path, partition))
    if not files:
        raise DataError(f"{folder}: the folder holds no parts of a table")
    try:
        kinds = {_kind(path) for path, _ in files}
    except ValueError as error:
        raise DataError(f"{folder}: must hold the parts of one table; got {error}") from error
    if len(kinds) > 1:
        raise DataError(
            f"{folder}: must hold parts of one kind; got {', '.join(sorted(kinds))} files"
        )
    # An empty part of a text table has not even a header; of all others emptiness is a fault.
    return [file for file in files if file[0].stat().st_size or len(files) == 1]


def _kind(path: Path) -> str:
    """The suffix that tells what a table is, below that of a packing."""
    suffix = path.suffix.lower()
    if suffix in _PACKED:
        name = path.stem
        if suffix == ".zip" and not Path(name).suffix and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next((n for n in archive.namelist() if not n.endswith("/")), name)
        suffix = Path(name).suffix.lower()
    if suffix not in _SEPARATORS and suffix not in _PARQUET:
        known = ", ".join([*_SEPARATORS, ".parquet"])
        raise ValueError(f"{path}: the kind of table must be one of {known}; got {suffix!r}")
    return suffix


def read_parts(
    files: list[tuple[Path, dict[str, str]]],
    wanted: list[str],
    form: TextForm,
    *,
    others: bool = False,
) -> Iterator[Part]:
    """Yield the columns ``wanted`` of each file, in its order; with ``others`` all of them.

    Columns of text files are text. Rows without any entry are left out, and so are columns that
    hold pandas' index.

    Raises:
        DataError: a file that cannot be read, or without one of the columns, or with one twice.
    """
    import polars as pl

    for path, partition in files:
        inside = [column for column in wanted if column not in partition]
        try:
            if _kind(path) in _PARQUET:
                part = Part(path, _read_parquet(path, inside, others))
            else:
                part = _read_text(path, inside, others, form)
        # Of a damaged Parquet file polars may find one part out of another's bounds, and panic.
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            message = str(error).strip().splitlines()[0][:200]
            if "could not parse" in message:
                message += " (is a quotation mark not closed?)"
            raise DataError(
                f"{path}: cannot be read as a {_kind(path)[1:]} table: {message}"
            ) from error
        kept = [pl.lit(v).alias(c) for c, v in partition.items() if others or c in wanted]
        yield Part(path, part.frame.with_columns(kept) if kept else part.frame, part.latin)


def column_names(path: Path, form: TextForm) -> list[str]:
    """Names of the columns of a text table, without their types.

    Raises:
        DataError: the file is empty or damaged.
    """
    with open_bytes(path) as stream:
        head = stream.read(_HEAD)
    encoding = form.encoding or encoding_of(head) or "utf-8"
    return _header(path, head.decode(encoding, "replace").removeprefix("\ufeff"), [], form)[1]


def _choose(path: Path, names: list[str], wanted: list[str], others: bool) -> list[int]:
    """Positions of the columns to read."""
    for column in wanted:
        if column not in names:
            shown = ", ".join(
                name[:40] if name.isprintable() and name else repr(name[:40]) for name in names[:40]
            )
            hint = ""
            if all(re.search(r"\d", name) for name in names):
                hint = "; if the first line is no header, name the columns with columns"
            raise DataError(f"{path}: there is no column {column!r}; columns are {shown}{hint}")
    chosen = [
        at for at, name in enumerate(names) if name in wanted or (others and not _INDEX.match(name))
    ]
    seen: set[str] = set()
    for at in chosen:
        if names[at] in seen:
            raise DataError(f"{path}: the column {names[at]!r} occurs twice")
        seen.add(names[at])
    return chosen


def _read_parquet(path: Path, wanted: list[str], others: bool) -> polars.DataFrame:
    import polars as pl

    with open(path, "rb") as file:
        if file.read(4) != b"PAR1":
            raise DataError(f"{path}: cannot be read as a parquet table: it does not begin as one")
    # Files' names with "*" or "[" are meant as they are.
    scan = pl.scan_parquet(path, glob=False, hive_partitioning=False)
    names = scan.collect_schema().names()
    return scan.select(names[at] for at in _choose(path, names, wanted, others)).collect()


def _read_text(path: Path, wanted: list[str], others: bool, form: TextForm) -> Part:
    import polars as pl

    with open_bytes(path) as stream:
        head = stream.peek(_HEAD)[:_HEAD]
        encoding = form.encoding or encoding_of(head) or "utf-8"
        plain = isinstance(stream.raw, io.FileIO)
        recode = encoding.lower().replace("_", "-") not in ("utf-8", "utf8", "utf-8-sig")
        data: Path | bytes = path
        if recode or not plain:
            data = stream.read()
    if recode:
        assert isinstance(data, bytes)
        try:
            data = data.decode(encoding).encode()
        except UnicodeError as error:
            raise DataError(f"{path}: not {encoding} text: {error}") from error
    if isinstance(data, bytes):
        head = data[:_HEAD]
    separator, names = _header(path, head.decode("utf-8-sig", "replace"), wanted, form)
    columns = _choose(path, names, wanted, others)

    def parse(source: Path | bytes) -> polars.DataFrame:
        return pl.read_csv(
            source,
            separator=separator,
            has_header=not form.columns,
            columns=columns,
            infer_schema=False,
            truncate_ragged_lines=True,
            # RecBole's files are joined by tabs as they are: a quote is a quote.
            quote_char=None if _kind(path) in (".inter", ".item") else '"',
            glob=False,
        )

    latin = 0
    try:
        frame = parse(data)
    except pl.exceptions.ComputeError as error:
        if "utf-8" not in str(error) or form.encoding is not None:
            raise
        data = data if isinstance(data, bytes) else path.read_bytes()
        lines = data.split(b"\n")
        for at, line in enumerate(lines):
            try:
                line.decode()
            except UnicodeDecodeError:
                lines[at] = decode_latin(line).encode()
                latin += 1
        frame = parse(b"\n".join(lines))
    frame.columns = [names[at] for at in columns]
    if frame.width:
        frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))
    return Part(path, frame, latin)


def _header(path: Path, head: str, wanted: list[str], form: TextForm) -> tuple[str, list[str]]:
    """The separator and the names of the columns."""
    first = next((line for line in io.StringIO(head) if line.strip()), "")
    if not first:
        raise DataError(f"{path}: cannot be read as a {_kind(path)[1:]} table: it is empty")
    usual = _SEPARATORS[_kind(path)]
    # Metadata may be written otherwise than the events, whose separator was given.
    candidates = list(dict.fromkeys((form.separator or usual, *_SNIFFED)))
    found: list[tuple[str, list[str]]] = []
    for separator in candidates:
        try:
            fields = next(csv.reader([first], delimiter=separator, skipinitialspace=True), [])
        except csv.Error:
            continue
        names = [field.strip() for field in fields]
        if form.columns:
            if len(names) == len(form.columns):
                return separator, list(form.columns)
        else:
            typed = [_RECBOLE.match(name) for name in names]
            if all(typed):
                names = [match[1] for match in typed if match]
            if all(column in names for column in wanted):
                return separator, names
        found.append((separator, names))
    if not found:
        raise DataError(f"{path}: the first line cannot be read: {first[:80]!r}")
    if form.columns:
        raise DataError(
            f"{path}: columns must name each of the {len(found[0][1])} fields of the first line "
            f"{first.strip()[:80]!r}; got {len(form.columns)} names"
        )
    # Nothing fits: the error that follows shows the names of the likeliest separator.
    return max(found, key=lambda pair: len(pair[1]))
