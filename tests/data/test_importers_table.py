"""Tables of events: text in its many forms, Parquet, folders of parts."""

from __future__ import annotations

import datetime
import gzip
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from gflowgr.data import Dataset, import_table
from gflowgr.errors import DataError


def named(data: Dataset) -> dict[str, list[str | int]]:
    """{original user: [original items]}."""
    return {
        user: [data.item_id(i) for i in row]
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
    assert named(data) == {"A": ["q", "r", "s", "p"], "B": ["q", "p"]}
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
    side = [[data.item_id(i) for i in row] for row in data.side["view"]]
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
    assert data.texts[0] == {"title": "Quilt", "price": "2"}
    assert {"title": "", "price": "3"} in data.texts
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
        ({"duplicates": "some"}, "duplicates must be one of all, first, last; got 'some'"),
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
    with pytest.raises(ValueError, match=r"must be one of \.csv, .*; got '\.xlsx'"):
        import_table(tmp_path / "t.xlsx")
    path = write_table(tmp_path / "t.csv", ROWS)
    with pytest.raises(
        DataError, match=r"side behaviour 'like' does not occur; .* buy, cart, view"
    ):
        import_table(path, **COLUMNS, behaviour="how", side_behaviours=("like",))


# ---- what people have in their folders ----

EVENTS = "user,item,time\nu1,007,1\nu1,b,2\nu2,007,3\nu2,b,4\n"
HEADER, BODY = EVENTS.split("\n", 1)
HEADERLESS = {"columns": ["user", "item", "time"]}


@pytest.mark.parametrize(
    ("content", "options"),
    [
        (EVENTS.replace(",", ";"), {}),
        (EVENTS.replace(",", "|"), {}),
        (EVENTS.replace(",", "^"), {"separator": "^"}),
        (EVENTS.replace(",", ", ").replace("\n", "\r\n"), {}),
        (EVENTS.encode("utf-16"), {}),
        (b"\xff\xfe\x00\x00" + EVENTS.encode("utf-32-le"), {}),
        (EVENTS.encode("utf-8-sig"), {}),
        (EVENTS.encode("utf-16-le"), {"encoding": "utf-16-le"}),
        (BODY, HEADERLESS),
        (BODY.replace(",", ";"), HEADERLESS),
        ("\n".join(f"{n},{row}" for n, row in enumerate(EVENTS.splitlines(), -1)), {}),
        (EVENTS + "\n\n", {}),
    ],
)
def test_text_tables_of_many_forms(
    tmp_path: Path, content: str | bytes, options: dict[str, Any]
) -> None:
    path = tmp_path / "t[1]*.csv"  # a name is no pattern
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    data, report = import_table(path, k_core=1, **options)
    assert named(data) == {"u1": ["007", "b"], "u2": ["007", "b"]}
    assert report.bad_lines == 0


def test_lines_that_are_not_utf8_are_latin1_and_counted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(EVENTS)
    items = tmp_path / "items.csv"
    items.write_bytes('item,title\n007,"Café, €"\n'.encode("cp1252") + "b,Björk\n".encode())
    data, report = import_table(tmp_path / "t.csv", items, k_core=1)
    assert [data.title(0), data.title(1)] == ["Café, €", "Björk"]
    assert report.notes["lines of metadata that are not UTF-8, read as Latin-1"] == 1
    items.write_bytes("item,title\n007,Ночь\n".encode("cp1251"))
    data, _ = import_table(tmp_path / "t.csv", items, k_core=1, encoding="cp1251")
    assert data.title(0) == "Ночь"
    with pytest.raises(DataError, match=r"items\.csv: not ascii text"):
        import_table(tmp_path / "t.csv", items, k_core=1, encoding="ascii")


def test_metadata_may_have_another_separator(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(EVENTS.replace(",", "^"))
    (tmp_path / "items.csv").write_text("item;title\n007;Bond\n")
    data, _ = import_table(tmp_path / "t.csv", tmp_path / "items.csv", separator="^", k_core=1)
    assert data.title(0) == "Bond"


@pytest.mark.parametrize(
    ("events", "items"),
    [
        ([10.0, 11.0, None], [10, 11]),
        (["10.0", "11.0", None], [10, 11]),
        ([" 10", "11 ", "10"], ["10 ", " 11"]),
        ([10, 11, 10], ["10", "11"]),
        (["10", "11", "10"], pl.Series([10, 11]).cast(pl.Decimal(38, 0))),
        (pl.Series(["10", "11", "10"], dtype=pl.Categorical), pl.Series([b"10", b"11"])),
    ],
)
def test_keys_of_events_and_of_metadata_meet(tmp_path: Path, events: Any, items: Any) -> None:
    frame = pl.DataFrame({"user": ["A"] * 3, "item": events, "time": [1, 2, 3]})
    frame.write_parquet(tmp_path / "e.parquet")
    texts = pl.DataFrame({"item": items, "title": ["Ten", "Eleven"], "__index_level_0__": [0, 1]})
    texts.write_parquet(tmp_path / "m.parquet")
    data, _ = import_table(
        tmp_path / "e.parquet", tmp_path / "m.parquet", k_core=1, max_bad_fraction=0.5
    )
    assert data.texts == [
        {"title": "Ten"},
        {"title": "Eleven"},
    ]


def test_side_behaviours_are_spelled_as_keys_are(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("user,item,time,kind\nA,x,1,buy\nA,y,2, buy\nA,x,0,view \n")
    data, _ = import_table(path, behaviour="kind", side_behaviours=["view"], k_core=1)
    assert data.behaviour_names == ("buy",)
    assert data.side["view"].values.tolist() == [0]
    with pytest.raises(ValueError, match=r"side_behaviours must be a list of names; got .* 'view'"):
        import_table(path, behaviour="kind", side_behaviours="view")


FOREIGN = {
    "List": pl.Series([[1]] * 4),
    "Struct": pl.Series([{"a": 1}] * 4),
    "Boolean": pl.Series([True] * 4),
    "Duration": pl.Series([datetime.timedelta(1)] * 4),
    "Time": pl.Series([datetime.time(1)] * 4),
    "Binary that is not UTF-8": pl.Series([b"\xff1"] * 4),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("role", ["item", "time", "value"])
def test_columns_of_other_types_are_named(tmp_path: Path, role: str, kind: str) -> None:
    path = tmp_path / "t.parquet"
    columns = {"user": list("aabb"), "item": [1, 2, 1, 2], "time": [1, 2, 3, 4], "value": [1.0] * 4}
    pl.DataFrame({**columns, role: FOREIGN[kind]}).write_parquet(path)
    with pytest.raises(DataError, match=rf"t\.parquet: column '{role}' must hold .*; got {kind}"):
        import_table(path, value="value", k_core=1)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2019-01-02T00:00:00Z", 1546387200),
        ("2019-01-02T02:00:00.5+02:00", 1546387200),
        ("2019-01-01 19:30 -0430", 1546387200),
        ("2019-01-02 00:00:00 UTC", 1546387200),
        ("2019/1/2", 1546387200),
        ("1588687728923", 1588687728923),
        ("1.5e12", 1_500_000_000_000),
    ],
)
def test_forms_of_time(tmp_path: Path, text: str, seconds: int) -> None:
    (tmp_path / "t.csv").write_text(f"user,item,time\nA,x,{text}\n")
    data, _ = import_table(tmp_path / "t.csv", k_core=1)
    assert data.times is not None
    assert data.times.tolist() == [seconds]


@pytest.mark.parametrize(
    "text", ["01/02/2019", "2019-02-30", "2019-01-02 25:00", "1_0", "9" * 5000, "inf", "1e300"]
)
def test_what_is_no_time_or_could_be_two_is_bad(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(f"user,item,time\nA,x,{text}\n")
    with pytest.raises(DataError, match="row 1: no time in column 'time'"):
        import_table(tmp_path / "t.csv", k_core=1)


def test_a_time_format_is_for_text_and_whole_numbers(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    frame = pl.DataFrame({"user": ["A"], "item": ["x"], "time": [20190102]})
    frame.write_parquet(path)
    data, _ = import_table(path, time_format="%Y%m%d", k_core=1)
    assert data.times is not None
    assert data.times.tolist() == [1546387200]
    frame.with_columns(pl.lit(1.5).alias("time")).write_parquet(path)
    with pytest.raises(ValueError, match="time_format must be None for a column that has no text"):
        import_table(path, time_format="%Y%m%d", k_core=1)


def test_commas_in_numbers_are_read_only_when_told_how(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("user;item;time;score\nA;x;1;4,5\nA;y;2;1.234,5\n")
    data, _ = import_table(path, value="score", decimal=",", k_core=1)
    assert data.ratings is not None
    assert data.ratings.tolist() == [4.5, 1234.5]
    with pytest.raises(DataError, match=r"column 'score' .decimal says what a comma means."):
        import_table(path, value="score", k_core=1)
    path.write_text("user;item;time;score\nA;x;1;1,234.5\nA;y;2;1e39\n")
    data, report = import_table(path, value="score", decimal=".", k_core=1, max_bad_fraction=0.5)
    assert data.ratings is not None
    assert data.ratings.tolist() == [1234.5]
    assert report.bad_lines == 1


def test_a_folder_that_spark_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    for day, user, items in (("2019-01-02", "A", [1, 2]), ("2019-01-03", "A", [3.0, None])):
        part = folder / f"day={day}"
        part.mkdir(parents=True)
        frame = pl.DataFrame({"user": [user] * 2, "item": items})
        frame.write_parquet(part / "part-00000.snappy.parquet")
        (part / ".part-00000.snappy.parquet.crc").write_bytes(b"crc")
    (folder / "_SUCCESS").touch()
    data, report = import_table(folder, time="day", k_core=1, max_bad_fraction=0.25)
    assert named(data) == {"A": ["1", "2", "3"]}
    assert data.times is not None
    assert data.times.tolist() == [1546387200, 1546387200, 1546473600]
    assert (data.name, report.lines, report.bad_lines) == ("events", 4, 1)
    (folder / "notes.csv").write_text("x")
    with pytest.raises(DataError, match=r"must hold parts of one kind; got \.csv, \.parquet"):
        import_table(folder)
    (folder / "_temporary").mkdir()
    with pytest.raises(DataError, match="has not finished"):
        import_table(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"user,item,item,time\nA,x,y,1\n", "the column 'item' occurs twice"),
        (BODY.encode(), "columns are u1, 007, 1; if the first line is no header, name the columns"),
        (b'user,item,time\nA,"x,1\n', "is a quotation mark not closed"),
        (b"\xef\xbb\xbf\n", "it is empty"),
        (bytes(range(1, 100)), "there is no column 'user'"),
        (gzip.compress(EVENTS.encode(), mtime=0)[:-9], "the gzip file is truncated"),
        (EVENTS.encode("utf-16")[:-1], "not utf-16 text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_text_tables_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"t\.csv: .*{message}"):
        import_table(tmp_path / "t.csv", k_core=1)


def test_flipped_bits_of_a_parquet_file_are_named(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.parquet", {"user": ["a"], "item": [1], "time": [1]})
    whole = path.read_bytes()
    complaints = []
    for at in range(0, len(whole), 16):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 32]) + whole[at + 1 :])
        try:
            import_table(path, k_core=1)
        except DataError as error:
            complaints.append(str(error))
    assert len(complaints) > 10
    assert all("t.parquet" in complaint for complaint in complaints)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_core": 2.5}, "k_core must be an integer; got 2.5"),
        ({"max_bad_fraction": "few"}, "max_bad_fraction must be a number; got 'few'"),
        ({"separator": "::"}, "separator must be one ASCII character; got '::'"),
        ({"encoding": "klingon"}, "encoding must be one such as 'latin-1'; got 'klingon'"),
        ({"columns": ["a", "a"]}, "columns must differ; got 'a' twice"),
        ({"decimal": ";"}, "decimal must be '.' or ','; got ';'"),
        ({"user": "item"}, "user and item must be different columns; got 'item' twice"),
        ({"user": 3}, "user must be the name of a column; got 3"),
        ({"time_format": 3}, "time_format must be a text"),
    ],
)
def test_wrong_options_of_tables(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        import_table(tmp_path / "missing.csv", **options)
