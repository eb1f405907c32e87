"""Each raw format, from small files as their publishers write them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gflowgr.data import (
    Dataset,
    LeaveOneOut,
    import_amazon,
    import_movielens,
    import_recbole,
    import_yelp,
    load_dataset,
    save_dataset,
)
from gflowgr.errors import DataError


def write_lines(path: Path, rows: Sequence[Any], dump: Callable[[Any], str] = json.dumps) -> Path:
    text = "".join((row if isinstance(row, str) else dump(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def named(data: Dataset) -> dict[str, list[str | int]]:
    """{original user: [original items]}."""
    return {
        user: [data.item_id(i) for i in row]
        for user, row in zip(data.user_ids, data.sequences, strict=True)
    }


# ---- Amazon ----


def review_2014(user: str, item: str, stars: float, seconds: int) -> dict[str, Any]:
    return {
        "reviewerID": user,
        "asin": item,
        "helpful": [0, 1],
        "reviewText": "It's fine.",
        "overall": stars,
        "unixReviewTime": seconds,
        "reviewTime": "01 30, 2014",
    }


def review_2023(user: str, item: str, stars: float, seconds: int) -> dict[str, Any]:
    return {
        "rating": stars,
        "title": "Good",
        "asin": "child of " + item,
        "parent_asin": item,
        "user_id": user,
        "timestamp": seconds * 1000 + 588,
    }


EVENTS = [("A", "x", 5, 30), ("B", "y", 3, 5), ("A", "y", 4, 10), ("B", "x", 1, 6)]


@pytest.mark.parametrize(
    ("review", "dump", "suffix"),
    [
        (review_2014, json.dumps, ".json.gz"),
        (review_2014, repr, ".json"),  # early files are Python dicts in single quotes
        (review_2023, json.dumps, ".jsonl.gz"),
    ],
)
def test_amazon_layouts(
    tmp_path: Path, review: Callable[..., Any], dump: Callable[[Any], str], suffix: str
) -> None:
    path = write_lines(tmp_path / f"reviews_Toys{suffix}", [review(*e) for e in EVENTS], dump)
    data, report = import_amazon(path, k_core=2, progress=False)
    assert named(data) == {"A": ["y", "x"], "B": ["y", "x"]}
    assert data.ratings is not None
    assert data.ratings.tolist() == [4, 5, 3, 1]
    assert data.times is not None
    assert data.times.tolist() == [10, 30, 5, 6]
    assert data.name == "reviews_Toys"
    assert (report.lines, report.bad_lines, report.kept_events) == (4, 0, 4)


@pytest.mark.parametrize(
    ("meta", "dump", "categories"),
    [
        ({"asin": "x", "categories": [["Toys", "Kites"], ["Gifts"]]}, repr, "Toys > Kites | Gifts"),
        (
            {"asin": "x", "category": ["Toys", "Kites &amp; more"]},
            json.dumps,
            "Toys > Kites & more",
        ),
        ({"parent_asin": "x", "categories": ["Toys", "Kites"]}, json.dumps, "Toys > Kites"),
        ({"parent_asin": "x", "categories": []}, json.dumps, ""),
    ],
)
def test_amazon_metadata(
    tmp_path: Path, meta: dict[str, Any], dump: Callable[[Any], str], categories: str
) -> None:
    reviews = write_lines(tmp_path / "r.json", [review_2014(*e) for e in EVENTS])
    rows = [{**meta, "title": "Red  &amp; blue\nkite"}, {"asin": "unused", "title": "Other"}]
    metadata = write_lines(tmp_path / "meta.json.gz", rows, dump)
    data, report = import_amazon(reviews, metadata, k_core=1, progress=False)
    assert data.texts is not None
    assert data.texts == [
        {},
        {"title": "Red & blue kite", "categories": categories},
    ]
    assert data.title(1) == "Red & blue kite"
    assert report.notes == {"bad metadata lines": 0, "items without metadata": 1}


def test_amazon_several_files_are_one_data_set(tmp_path: Path) -> None:
    parts = [write_lines(tmp_path / f"{i}.json", [review_2014(*e)]) for i, e in enumerate(EVENTS)]
    data, report = import_amazon(parts, k_core=1, name="both", progress=False)
    assert data.num_interactions == 4
    assert report.source == "0.json, 1.json, 2.json, 3.json"
    assert data.name == "both"


def test_amazon_bad_lines_are_counted_with_reasons(tmp_path: Path) -> None:
    good = review_2014("A", "x", 5, 1)
    without_user = {k: v for k, v in good.items() if k != "reviewerID"}
    rows = [
        *(review_2014("A", f"i{n}", 5, n) for n in range(10)),
        '{"reviewerID": "A", "asin": ',
        without_user,
        {**good, "asin": 17},
        {**good, "overall": "five"},
        {**good, "unixReviewTime": None},
        {**good, "overall": float("nan")},
        {**good, "unixReviewTime": 10**20},
        "[1, 2]",
        "__import__('os').getcwd()",
    ]
    path = write_lines(tmp_path / "r.json", rows)
    data, report = import_amazon(path, k_core=1, max_bad_fraction=0.5, progress=False)
    assert data.num_interactions == 10
    assert (report.lines, report.bad_lines) == (19, 9)
    assert len(report.bad_examples) == 5
    first, second, third, fourth, _ = report.bad_examples
    assert first.startswith("r.json:11: neither JSON")
    assert second.startswith("r.json:12: no reviewerID or user_id: ")
    assert "r.json:13: asin is 17, not a text" in third
    assert "r.json:14: overall is 'five', not a number" in fourth
    with pytest.raises(DataError, match="9 of 19 lines are bad"):
        import_amazon(path, k_core=1, progress=False)


def test_amazon_metadata_without_any_of_the_items_is_an_error(tmp_path: Path) -> None:
    reviews = write_lines(tmp_path / "r.json", [review_2014(*e) for e in EVENTS])
    metadata = write_lines(tmp_path / "m.json", [{"asin": "other", "title": "A"}])
    with pytest.raises(DataError, match=r"m\.json: metadata must have .* none of 2, .* 'y', 'x'"):
        import_amazon(reviews, metadata, k_core=1, progress=False)


def test_amazon_keys_of_reviews_and_metadata_are_spelled_alike(tmp_path: Path) -> None:
    reviews = write_lines(tmp_path / "r.json", [review_2014("A", " x", 5, 1)])
    metadata = write_lines(tmp_path / "m.json", [{"asin": "x ", "title": "Kite"}])
    data, _ = import_amazon(reviews, metadata, k_core=1, progress=False)
    assert data.texts == [{"title": "Kite", "categories": ""}]


def test_amazon_half_characters_can_be_saved(tmp_path: Path) -> None:
    rows = [review_2023("A", "x", 5, 1), review_2023("\ud83d", "x", 5, 2)]
    reviews = write_lines(tmp_path / "r.jsonl", rows)
    metadata = write_lines(tmp_path / "m.jsonl", [{"parent_asin": "x", "title": "cut \ud83d"}])
    data, report = import_amazon(reviews, metadata, k_core=1, max_bad_fraction=0.5, progress=False)
    assert "user_id is half a character" in report.bad_examples[0]
    save_dataset(data, tmp_path / "out")
    assert load_dataset(tmp_path / "out").title(0) == "cut \ufffd"


def test_amazon_numbers_beyond_all_measure_are_bad_lines(tmp_path: Path) -> None:
    good = review_2023("A", "x", 5, 1)
    rows = [
        good,
        {**good, "rating": 10**400},
        {**good, "rating": 1e39},
        {**good, "timestamp": 10**400},
        {**good, "timestamp": True},
        json.dumps(good).replace("5", "5" * 5000),
        "[" * 100_000,
    ]
    path = write_lines(tmp_path / "r.jsonl", rows)
    data, report = import_amazon(path, k_core=1, max_bad_fraction=1, progress=False)
    assert (data.num_interactions, report.bad_lines) == (1, 6)


def test_amazon_2023_csv_of_ratings(tmp_path: Path) -> None:
    rows = ["user_id,parent_asin,rating,timestamp", "A,007,4.0,30588", "A,x,,1"]
    path = write_lines(tmp_path / "Toys.csv.gz", rows)
    data, report = import_amazon(path, k_core=1, max_bad_fraction=0.5, progress=False)
    assert named(data) == {"A": ["007"]}
    assert data.times is not None
    assert data.times.tolist() == [30]
    assert (report.lines, report.bad_lines) == (2, 1)
    write_lines(path, rows[1:])
    with pytest.raises(DataError, match="the first line must name the columns"):
        import_amazon(path, k_core=1, progress=False)


def test_an_imported_data_set_can_be_saved_split_and_read_again(tmp_path: Path) -> None:
    events = [(f"u{u}", f"i{(u + t) % 6}", 1 + t % 5, t) for u in range(6) for t in range(5)]
    path = write_lines(tmp_path / "r.json", [review_2014(*e) for e in events])
    data, _ = import_amazon(path, progress=False)
    save_dataset(data, tmp_path / "out")
    again = load_dataset(tmp_path / "out")
    assert named(again) == named(data)
    assert LeaveOneOut(again).report()["users evaluated"] == 6


# ---- Yelp ----


def yelp_review(user: str, item: str, stars: float, date: str) -> dict[str, Any]:
    return {"review_id": "r", "user_id": user, "business_id": item, "stars": stars, "date": date}


def test_yelp(tmp_path: Path) -> None:
    reviews = write_lines(
        tmp_path / "review.json",
        [
            yelp_review("A", "cafe", 5, "2019-05-01 10:00:00"),
            yelp_review("A", "bar", 2, "2019-04-01 10:00:00"),
            yelp_review("A", "cafe", 4, "2019-12-31 23:59:59"),
            yelp_review("A", "bar", 3, "2018-12-31 23:59:59"),
            yelp_review("A", "bar", 3, "2020-01-01 00:00:00"),
        ],
    )
    business = write_lines(
        tmp_path / "business.json",
        [
            {
                "business_id": "cafe",
                "name": "Blue Cup",
                "categories": "Coffee, Tea",
                "city": "Reno",
            },
            {"business_id": "bar", "name": "Owl", "categories": None, "city": "Reno"},
        ],
    )
    data, report = import_yelp(
        reviews, business, start="2019-01-01", end="2019-12-31", k_core=1, progress=False
    )
    # A second visit is an event; the two reviews outside the year are not.
    assert named(data) == {"A": ["bar", "cafe", "cafe"]}
    assert data.texts is not None
    described = [data.texts[item]["description"] for item in data.sequences.row(0)]
    assert described == ["", "Coffee, Tea", "Coffee, Tea"]
    assert data.times is not None
    assert data.times[0] == 1_554_112_800  # 2019-04-01 10:00 UTC
    assert report.notes["reviews outside the time window"] == 2
    assert report.bad_lines == 0


def test_yelp_bad_dates_are_bad_lines_or_bad_arguments(tmp_path: Path) -> None:
    good = [yelp_review("A", f"b{n}", 5, "2019-05-01 10:00:00") for n in range(5)]
    path = write_lines(tmp_path / "r.json", [*good, yelp_review("A", "b", 5, "yesterday")])
    _, report = import_yelp(path, k_core=1, max_bad_fraction=0.2, progress=False)
    assert report.bad_lines == 1
    assert "yesterday" in report.bad_examples[0]
    with pytest.raises(ValueError, match="start must be a day like 2019-01-31; got 'May'"):
        import_yelp(path, start="May")
    with pytest.raises(ValueError, match="end must not be before start = '2020-01-01'"):
        import_yelp(path, start="2020-01-01", end="2019-01-01")


# ---- MovieLens ----


def movielens_csv(folder: Path) -> Path:
    folder.mkdir()
    write_lines(
        folder / "ratings.csv",
        ["userId,movieId,rating,timestamp", "1,10,4.0,100", "1,20,3.5,50", "2,10,0.5,7"],
    )
    write_lines(
        folder / "movies.csv",
        ["movieId,title,genres", '10,"Heat, The (1995)",Action|Crime', "20,Babe (1995),Children"],
    )
    return folder


def movielens_dat(folder: Path) -> Path:
    folder.mkdir()
    write_lines(folder / "ratings.dat", ["1::10::4::100", "1::20::3.5::50", "2::10::0.5::7"])
    movies = "10::Heat, The (1995)::Action|Crime\n20::Les Misérables (1995)::Drama\n"
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))
    return folder


@pytest.mark.parametrize("make", [movielens_csv, movielens_dat])
def test_movielens_folders(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    data, report = import_movielens(make(tmp_path / "ml"), k_core=1, progress=False)
    assert named(data) == {"1": ["20", "10"], "2": ["10"]}
    assert data.ratings is not None
    assert data.ratings.tolist() == [3.5, 4.0, 0.5]
    assert data.title(1) == "Heat, The (1995)"
    assert data.title(0) in ("Babe (1995)", "Les Misérables (1995)")
    assert data.texts is not None
    assert data.texts[1]["categories"] == "Action|Crime"
    assert data.name == "ml"
    assert (report.lines, report.bad_lines) == (3, 0)


def test_movielens_a_ratings_file_alone(tmp_path: Path) -> None:
    folder = movielens_csv(tmp_path / "ml")
    data, _ = import_movielens(folder / "ratings.csv", k_core=1, progress=False)
    assert data.texts is None
    assert [data.title(item) for item in range(2)] == ["20", "10"]


def test_movielens_bad_lines(tmp_path: Path) -> None:
    rows = ["userId,movieId,rating,timestamp", "1,10,4.0", "1,10,x,5", "1,,4,5", "1,10,nan,5"]
    path = write_lines(tmp_path / "ratings.csv", [*rows, "1,10,4,5"])
    data, report = import_movielens(path, k_core=1, max_bad_fraction=1.0, progress=False)
    assert data.num_interactions == 1
    assert (report.lines, report.bad_lines) == (5, 4)
    assert report.bad_examples[0].startswith("ratings.csv:2: not user, movie, rating, time")


def test_movielens_folder_without_ratings(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no ratings\.csv or ratings\.dat"):
        import_movielens(tmp_path)


def test_movielens_10m_is_utf8_and_1m_is_latin1(tmp_path: Path) -> None:
    folder = movielens_dat(tmp_path / "ml-1m")
    data, report = import_movielens(folder, k_core=1, progress=False)
    assert data.title(0) == "Les Misérables (1995)"
    assert report.notes["lines of metadata that are not UTF-8, read as Latin-1"] == 1
    movies = folder / "movies.dat"
    movies.write_bytes(movies.read_bytes().decode("latin-1").encode("utf-8"))
    data, report = import_movielens(folder, k_core=1, progress=False)
    assert data.title(0) == "Les Misérables (1995)"
    assert "lines of metadata that are not UTF-8, read as Latin-1" not in report.notes


def test_movielens_100k(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n186\t302\t4\t891717742\n")
    flags = ["|".join("1" if at in on else "0" for at in range(19)) for on in ({5, 8}, {18})]
    (tmp_path / "u.item").write_bytes(
        f"242|Café <i>x</i> (1996)|24-Jan-1997||http://a|{flags[0]}\n"
        f"302|L.A. (1997)|01-Jan-1997||http://b|{flags[1]}\n".encode("latin-1")
    )
    data, _ = import_movielens(tmp_path, k_core=1, progress=False)
    assert data.texts == [
        {"title": "Café x (1996)", "categories": "Comedy|Drama"},
        {"title": "L.A. (1997)", "categories": "Western"},
    ]
    assert data.ratings is not None
    assert data.ratings.tolist() == [3, 4]


def test_movielens_csv_with_an_index_and_in_another_order(tmp_path: Path) -> None:
    rows = [",movieId,userId,rating,timestamp", "0,10,1,4.0,100.0", "1,20,1,1_0,7", "2,30,1,3,1_0"]
    path = write_lines(tmp_path / "ratings.csv", rows)
    data, report = import_movielens(path, k_core=1, max_bad_fraction=1, progress=False)
    assert named(data) == {"1": ["10"]}
    assert report.bad_lines == 2  # 1_0 is a number for Python only
    write_lines(path, ["userId,movieId,stars,timestamp", "1,10,4.0,100"])
    with pytest.raises(DataError, match=r"ratings\.csv: there is no column 'rating'"):
        import_movielens(path, progress=False)


# ---- RecBole ----


def test_recbole_atomic_files(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "ml.inter",
        [
            "user_id:token\titem_id:token\trating:float\ttimestamp:float",
            "1\t10\t4\t8.8e8",
            "1\t007\t3.5\t881250949.0",
        ],
    )
    write_lines(
        tmp_path / "ml.item",
        ["item_id:token\ttitle:token_seq", '10\t"Toy Story', '007\tBond "x'],
    )
    data, _ = import_recbole(tmp_path, k_core=1)
    assert data.texts == [
        {"title": '"Toy Story'},
        {"title": 'Bond "x'},
    ]
    assert data.ratings is not None
    assert data.ratings.tolist() == [4, 3.5]
    (tmp_path / "other.inter").write_text("")
    with pytest.raises(DataError, match=r"one \.inter file; got ml\.inter, other\.inter"):
        import_recbole(tmp_path)
