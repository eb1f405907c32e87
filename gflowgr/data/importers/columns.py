"""Columns of raw tables, of any type, as keys, times and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gflowgr.data.importers.text import read_key
from gflowgr.errors import DataError

if TYPE_CHECKING:
    import polars

_MAX_FLOAT32 = 3.4028234663852886e38
# 2019-01-31, 2019/1/31 10:00, 2019-01-31T10:00:05.25+02:00, 2019-01-31 10:00:05 UTC
_ISO = (
    r"^\s*(\d{4})[-/](\d{1,2})[-/](\d{1,2})"
    r"(?:[Tt ]\s*(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,]\d+)?)?"
    r"\s*(?:[Zz]|UTC|GMT|([+-])(\d{2}):?(\d{2})?)?)?\s*$"
)


def _refuse(path: Path, name: str, wanted: str, got: object) -> DataError:
    return DataError(f"{path}: column {name!r} must hold {wanted}; got {got}")


def _plain(column: polars.Series, path: Path, wanted: str) -> polars.Series:
    """Categories and bytes as text, whole decimals as integers; others as they are."""
    import polars as pl

    if column.dtype in (pl.Categorical, pl.Enum):
        return column.cast(pl.String)
    if column.dtype == pl.Binary:
        try:
            return column.cast(pl.String)
        except pl.exceptions.PolarsError as error:
            raise _refuse(path, column.name, wanted, "Binary that is not UTF-8 text") from error
    if column.dtype == pl.Null:
        return column.cast(pl.String)
    return column


def keys_of(column: polars.Series, path: Path) -> tuple[polars.Series, dict[object, str]]:
    """Text of each key by the one rule of :func:`read_key`, null where there is none.

    A column of text in which every number ends in ".0" was one of whole numbers before pandas met
    a gap in it, and is read as that.

    Returns:
        keys: String [rows].
        reasons: why an entry is no key, by the entry.

    Raises:
        DataError: the column's type cannot hold keys.
    """
    import polars as pl

    wanted = "keys (texts or whole numbers)"
    name = column.name
    column = _plain(column, path, wanted)
    if column.dtype.is_integer():
        return column.cast(pl.String), {}
    if not (column.dtype == pl.String or column.dtype.is_float() or column.dtype.is_decimal()):
        raise _refuse(path, name, wanted, column.dtype)
    if column.dtype.is_float():
        exact = column.dtype == pl.Float64
        column = column.cast(pl.Float64)
        if not exact:  # what float32 cannot tell apart is no key either
            inside = (column.abs() <= 1 << 24).fill_null(True)
            column = column.zip_with(inside, pl.Series([1e300]))
    entries = column.unique(maintain_order=True)
    if column.dtype == pl.String:
        stripped = entries.drop_nulls().str.strip_chars()
        whole = int(stripped.str.contains(r"^[+-]?\d+\.0$").sum())
        plain = int(stripped.str.contains(r"^[+-]?\d+(?:\.\d*)?$").sum())
        drop_fraction = 0 < whole == plain and whole * 2 > len(stripped)
    else:
        drop_fraction = False
    keys: list[str | None] = []
    reasons: dict[object, str] = {}
    for entry in entries:
        try:
            key = read_key(entry)
        except ValueError as error:
            keys.append(None)
            if str(error) != "empty":
                reasons[entry] = str(error)
            continue
        keys.append(key.removesuffix(".0") if drop_fraction else key)
    table = pl.DataFrame({"entry": entries, "key": pl.Series(keys, dtype=pl.String)})
    if column.dtype == pl.String and not reasons and table["entry"].equals(table["key"]):
        return column, {}
    rows = column.alias("entry").to_frame()
    joined = rows.join(table, on="entry", how="left", nulls_equal=True, maintain_order="left")
    return joined.get_column("key"), reasons


def times_of(column: polars.Series, time_format: str | None, path: Path) -> polars.Series:
    """Int64 [rows]: numbers as they are (fractions cut), dates and times as Unix seconds.

    Null where an entry is no time. Text without ``time_format`` is a number, or a date written from
    the year down to the day with or without a time and a zone (else UTC).

    Raises:
        DataError: the column's type cannot hold times.
        ValueError: ``time_format`` for a column that has no text, or one that cannot be used.
    """
    import polars as pl

    wanted = "times (numbers, dates, times with a date, or texts of them)"
    name = column.name
    column = _plain(column, path, wanted)
    if time_format is not None and column.dtype.is_integer():
        column = column.cast(pl.String)  # 20190131 with "%Y%m%d"
    if time_format is not None and column.dtype != pl.String:
        raise ValueError(
            f"time_format must be None for a column that has no text; got {time_format!r} and "
            f"{name!r} of type {column.dtype}"
        )
    if column.dtype == pl.String:
        column = column.str.strip_chars()
        if time_format is not None:
            try:
                column = column.str.to_datetime(time_format, strict=False)
            except pl.exceptions.PolarsError as error:
                raise ValueError(
                    f"time_format must be in chrono's notation, such as '%d.%m.%Y'; got "
                    f"{time_format!r}: {str(error).splitlines()[0]}"
                ) from error
        else:
            numbers = column.cast(pl.Float64, strict=False)
            # Whole columns are numbers or dates; a few bad entries must not change which.
            if numbers.null_count() * 2 >= max(len(column), 1):
                return _iso_seconds(column)
            # Nanoseconds have more digits than a float.
            exact = column.cast(pl.Int64, strict=False)
            return exact.zip_with(exact.is_not_null(), _whole(numbers))
    if column.dtype == pl.Date or isinstance(column.dtype, pl.Datetime):
        return column.cast(pl.Datetime("us")).dt.epoch("s")
    if column.dtype.is_decimal() or column.dtype.is_float():
        return _whole(column.cast(pl.Float64))
    if column.dtype.is_integer():
        return column.cast(pl.Int64, strict=False)
    raise _refuse(path, name, wanted, column.dtype)


def _whole(numbers: polars.Series) -> polars.Series:
    """Float64 cut to Int64; NaN, infinities and what 64 bits cannot hold become null."""
    import polars as pl

    floor = numbers.floor()
    inside = (floor >= -(2.0**63)) & (floor < 2.0**63)
    nothing = pl.Series([None], dtype=pl.Float64)
    return floor.zip_with(inside.fill_null(False), nothing).cast(pl.Int64)


def _iso_seconds(column: polars.Series) -> polars.Series:
    import polars as pl

    usual = column.str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False).dt.epoch("s")
    if usual.null_count() == column.null_count():
        return usual
    text = pl.col("text")
    group = {n: text.str.extract(_ISO, n) for n in range(1, 10)}
    number = {n: group[n].fill_null("0").cast(pl.Int64) for n in range(1, 10)}
    number[7] = pl.when(group[7] == "-").then(-1).otherwise(1)
    day = pl.format("{}-{}-{}", *(group[n].str.zfill(2) for n in (1, 2, 3)))
    right = (number[4] < 24) & (number[5] < 60) & (number[6] < 61)
    right &= (number[8] < 24) & (number[9] < 60)
    seconds = (
        day.str.to_date("%Y-%m-%d", strict=False).cast(pl.Int64) * 86_400
        + number[4] * 3600
        + number[5] * 60
        + number[6]
        - number[7] * (number[8] * 3600 + number[9] * 60)
    )
    frame = column.alias("text").to_frame().with_columns(usual=usual)
    parsed = pl.coalesce("usual", pl.when(right).then(seconds))
    return frame.select(time=parsed).get_column("time")


def values_of(column: polars.Series, decimal: str | None, path: Path) -> polars.Series:
    """Float64 [rows], null where an entry is no number that float32 can hold.

    Args:
        decimal: "." or ",", what begins the fraction in text; then the other of the two may group
            digits by thousands. None: numbers without commas only.

    Raises:
        DataError: the column's type cannot hold numbers.
    """
    import polars as pl

    wanted = "numbers"
    name = column.name
    column = _plain(column, path, wanted)
    if column.dtype == pl.String:
        column = column.str.strip_chars()
        if decimal is not None:
            point, group = (r"\.", ",") if decimal == "." else (",", r"\.")
            grouped = rf"^[+-]?\d{{1,3}}(?:{group}\d{{3}})+(?:{point}\d*)?$"
            simple = rf"^[+-]?\d*(?:{point}\d*)?(?:[eE][+-]?\d+)?$"
            bare = column.str.replace_all(group, "").str.replace(point, ".")
            fits = column.str.contains(grouped) | column.str.contains(simple)
            column = bare.zip_with(fits.fill_null(False), pl.Series([None], dtype=pl.String))
    elif not (column.dtype.is_numeric() or column.dtype.is_decimal()):
        raise _refuse(path, name, wanted, column.dtype)
    numbers = column.cast(pl.Float64, strict=False)
    inside = (numbers.abs() <= _MAX_FLOAT32).fill_null(False) & numbers.is_finite().fill_null(False)
    return numbers.zip_with(inside, pl.Series([None], dtype=pl.Float64))
