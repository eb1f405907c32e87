"""Tables of events: CSV, TSV and Parquet."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from gflowgr.data import Dataset, import_table
from gflowgr.errors import DataError


def named(data: Dataset, field: str) -> dict[str, list[str]]:
    """{original user: [original items]}."""
    assert data.texts is not None
    texts = data.texts
    return {
        user: [texts[i][field] for i in row]
        for user, row in zip(data.user_ids, data.sequences, strict=True)
    }


ROWS = {
    "who": ["A", "A", "B", "A", "A", "B"],
    "what": ["p", "q", "p", "r", "s", "q"],
    "when": [4, 1, 9, 2, 3, 8],
    "how": ["buy", "view", "view", "cart", "buy", "buy"],
    "score": [1.0, 0.5, 0.0, 2.0, 3.0, 4.0],
}
COLUMNS = {"user": "who", "item": "what", "time": "when"}


def write_table(path: Path, rows: dict[str, list[Any]]) -> Path:
    frame = pl.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path, separator="," if path.suffix == ".csv" else "\t")
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "t.parquet"])
def test_tables(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path / name, ROWS)
    data, report = import_table(path, **COLUMNS, behaviour="how", value="score", k_core=1)
    assert named(data, "item_id") == {"A": ["q", "r", "s", "p"], "B": ["q", "p"]}
    assert data.behaviour_names == ("buy", "cart", "view")
    assert data.behaviours is not None
    assert data.behaviours.tolist() == [2, 1, 0, 0, 0, 2]
    assert data.ratings is not None
    assert data.ratings.tolist() == [0.5, 2, 3, 1, 4, 0]
    assert (report.lines, report.bad_lines, report.rounds) == (6, 0, 1)


def test_a_gzipped_table(tmp_path: Path) -> None:
    plain = write_table(tmp_path / "t.csv", ROWS)
    path = tmp_path / "zipped.csv.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    data, _ = import_table(path, **COLUMNS, k_core=1)
    assert data.num_interactions == 6
    assert data.behaviours is None
    assert data.ratings is None


def test_side_behaviours_come_from_before_the_validation_event(tmp_path: Path) -> None:
    # A buys a..d at times 10, 20, 30, 40: valid is c (30), test is d (40).
    rows = [("A", item, t, "buy") for item, t in zip("abcd", (10, 20, 30, 40), strict=True)]
    rows += [("A", "e", 5, "view"), ("A", "e", 6, "view"), ("A", "f", 31, "view")]
    rows += [("A", "c", 1, "view"), ("A", "zzz", 1, "view")]
    # B makes e and f known items; with two events nothing of B is held out.
    rows += [("B", "e", 1, "buy"), ("B", "f", 2, "buy"), ("B", "a", 99, "view")]
    path = tmp_path / "t.csv"
    path.write_text("user,item,time,kind\n" + "".join("{},{},{},{}\n".format(*r) for r in rows))
    data, _ = import_table(path, behaviour="kind", side_behaviours=("view",), k_core=1)
    assert data.texts is not None
    side = [[data.texts[i]["item_id"] for i in row] for row in data.side["view"]]
    # Of A's views: f is too late, c is the validation item, zzz was never bought by anyone.
    assert side == [["e"], ["a"]]
    assert data.side_dropped == {"view": 1}
    assert data.behaviour_names == ("buy",)


@pytest.mark.parametrize(
    ("times", "time_format", "expected"),
    [
        (["2019-01-02", "2019-01-01"], None, [1546300800, 1546387200]),
        (["2019-01-02 00:00:10", "2019-01-02 00:00:05"], None, [1546387205, 1546387210]),
        (["02.01.2019", "01.01.2019"], "%d.%m.%Y", [1546300800, 1546387200]),
        (["7.9", "7.1"], None, [7, 7]),
        (["1546387200123456789", "-5"], None, [-5, 1546387200123456789]),
    ],
)
def test_times_as_text(
    tmp_path: Path, times: list[str], time_format: str | None, expected: list[int]
) -> None:
    path = write_table(tmp_path / "t.csv", {"user": ["A", "A"], "item": ["x", "y"], "time": times})
    data, report = import_table(path, time_format=time_format, k_core=1)
    assert data.times is not None
    assert data.times.tolist() == expected
    assert report.bad_lines == 0


def test_times_with_types(tmp_path: Path) -> None:
    times = pl.Series(["2019-01-02", "2019-01-01"])
    for column in (
        times.str.to_date(),
        times.str.to_datetime(),
        times.str.to_datetime().dt.replace_time_zone("Asia/Tokyo").dt.convert_time_zone("UTC"),
    ):
        frame = pl.DataFrame({"user": ["A", "A"], "item": ["x", "y"], "time": column})
        frame.write_parquet(tmp_path / "t.parquet")
        data, _ = import_table(tmp_path / "t.parquet", k_core=1)
        assert data.times is not None
        shift = 9 * 3600 if column.dtype == pl.Datetime("us", "UTC") else 0
        assert data.times.tolist() == [1546300800 - shift, 1546387200 - shift]


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "user,item,time,score\n"
        "A,x,1,1\n"
        "A,y,2,2,surplus\n"  # fields beyond the header's are ignored
        "A,z,3\n"
        ",x,4,1\n"
        "A,,5,1\n"
        "A,x,soon,1\n"
        "A,x,6,inf\n"
    )
    data, report = import_table(path, value="score", k_core=1, max_bad_fraction=1)
    assert data.num_interactions == 2
    assert (report.lines, report.bad_lines) == (7, 5)
    assert report.bad_examples == [
        "t.csv: row 3: no finite number in column 'score': 'A,z,3,'",
        "t.csv: row 4: no user in column 'user': ',x,4,1'",
        "t.csv: row 5: no item in column 'item': 'A,,5,1'",
        "t.csv: row 6: no time in column 'time': 'A,x,soon,1'",
        "t.csv: row 7: no finite number in column 'score': 'A,x,6,inf'",
    ]


def test_a_table_of_items_gives_the_texts(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", ROWS)
    items = write_table(
        tmp_path / "items.csv",
        {"what": ["p", "q", "r"], "title": ["Pan", "Quilt", None], "price": [1, 2, 3]},
    )
    data, report = import_table(path, items, **COLUMNS, k_core=1)
    assert data.texts is not None
    assert data.texts[0] == {"title": "Quilt", "price": "2", "item_id": "q"}
    assert {"title": "", "price": "3", "item_id": "r"} in data.texts
    assert report.notes == {"items without metadata": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"user,item\nA,x\n", "there is no column 'time'; columns are user, item"),
        ("t.csv", b"", r"t\.csv: cannot be read as a csv table"),
        ("t.csv", b"user,item,time\n", "there are no lines"),
        ("t.parquet", b"PAR1 no", r"t\.parquet: cannot be read as a parquet table"),
        ("t.csv", b"user,item,time\nA,x,never\nA,y,soon\n", "2 of 2 lines are bad"),
    ],
)
def test_tables_that_cannot_be_used(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        import_table(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_core": 0}, "k_core must be at least 1"),
        ({"duplicates": "some"}, "duplicates must be one of all, first, last, got 'some'"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction must be between 0 and 1"),
        ({"side_behaviours": ["view"]}, "side_behaviours need the behaviour column"),
    ],
)
def test_options_are_checked_before_anything_is_read(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        import_table(tmp_path / "missing.csv", **options)


def test_unknown_kinds_of_tables_and_behaviours(tmp_path: Path) -> None:
    (tmp_path / "t.xlsx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"unknown kind of table '\.xlsx', expected \.csv"):
        import_table(tmp_path / "t.xlsx")
    path = write_table(tmp_path / "t.csv", ROWS)
    with pytest.raises(
        DataError, match=r"side behaviour 'like' does not occur; .* buy, cart, view"
    ):
        import_table(path, **COLUMNS, behaviour="how", side_behaviours=("like",))
