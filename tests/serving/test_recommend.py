"""``gflowgr recommend``: requests in, answers out, and what happens to bad ones."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from support.command_line import Capture, call, without_bars

from gflowgr.collaborative import SASRec
from gflowgr.data import load_dataset, save_dataset
from gflowgr.evaluation.generative import GenerativeRecommender
from gflowgr.item_ids import ItemIds
from gflowgr.models.gflow_model import GFlowModel


@pytest.fixture(scope="module")
def model(finished_run: Path) -> Path:
    return finished_run / "gflowgr" / "model"


@pytest.fixture(scope="module")
def data(finished_run: Path) -> Path:
    return finished_run / "data"


class Shop:
    """The command on one model and dataset."""

    def __init__(self, model: Path, data: Path, capsys: Capture) -> None:
        self.model, self.data, self.capsys = model, data, capsys

    def __call__(self, *options: Any) -> tuple[int, str, str]:
        code, out, error = call(self.capsys, "recommend", self.model, "--data", self.data, *options)
        return code, out, without_bars(error)

    def records(self, *options: Any) -> list[dict[str, Any]]:
        code, out, error = self(*options)
        assert code == 0, error
        return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def shop(model: Path, data: Path, capsys: Capture) -> Shop:
    return Shop(model, data, capsys)


def write_lines(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ---- people ----


def test_a_table_for_users_and_histories(shop: Shop, data: Path) -> None:
    code, out, error = shop("--user", 17, "--user", 3, "--history", "3,14,15", "-k", 4)
    assert (code, error) == (0, "")
    for label in ("user 17", "user 3", "history 3,14,15"):
        assert f"\n{label}\n" in out
    assert out.count("log P") == 3 * 4
    dataset = load_dataset(data)
    assert dataset.title(int(dataset.sequences.row(17)[-1])) in out
    assert dataset.title(15) in out


def test_the_history_is_left_out_unless_asked_for(shop: Shop) -> None:
    asked = ("--history", "3,14,15", "--json", "--top", 200)
    assert sorted(shop.records(*asked, "--no-mask-seen")[0]["items"]) == list(range(200))
    (masked,) = shop.records(*asked)
    assert sorted(masked["items"]) == sorted(set(range(200)) - {3, 14, 15})
    assert masked == shop.records(*asked, "--mask-seen")[0]


# ---- files ----


def test_json_lines_of_users_and_histories(shop: Shop, tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "users.jsonl",
        {"user": "17"},
        {"user": 3},
        "",
        {"history": [3, 14, 15]},
        {"user": "new", "history": [3, 14, 15]},
        {"history": []},
    )
    code, out, error = shop("--input", source, "--top", 3, "--with-scores", "--with-titles")
    assert code == 0
    assert error.startswith("gflowgr: 5 users in ")
    records = [json.loads(line) for line in out.splitlines()]
    named = [(record["row"], record["user"]) for record in records]
    assert named == [(1, "17"), (2, "3"), (4, None), (5, "new"), (6, None)]
    assert records[2]["items"] == records[3]["items"]
    dataset = load_dataset(shop.data)
    for record in records:
        assert set(record) == {"row", "user", "items", "scores", "titles"}
        assert record["scores"] == sorted(record["scores"], reverse=True)
        assert record["titles"] == [dataset.title(item) for item in record["items"]]


def test_parquet_in_and_out_is_json_lines_in_and_out(shop: Shop, tmp_path: Path) -> None:
    users: list[str | None] = ["17", "3", None, "new"]
    histories = [None, None, [3, 14, 15], [7]]
    source, target = tmp_path / "users.parquet", tmp_path / "top.parquet"
    table = pyarrow.table({"user": users, "history": histories, "other": [1, 2, 3, 4]})
    parquet.write_table(table, source)
    expected = shop.records("--input", source, "--with-scores")
    code, out, _ = shop("--input", source, "--with-scores", "--output", target)
    assert (code, out) == (0, "")
    found = parquet.read_table(target)
    types = {field.name: str(field.type) for field in found.schema}
    assert types["items"] == "list<element: int64>"
    assert types["scores"] == "list<element: float>"
    for one, other in zip(found.to_pylist(), expected, strict=True):
        np.testing.assert_allclose(one.pop("scores"), other.pop("scores"), rtol=1e-6)
        assert one == other
    lines = tmp_path / "top.jsonl"
    assert shop("--input", source, "--output", lines)[0] == 0
    assert [json.loads(line)["items"] for line in lines.read_text().splitlines()] == [
        record["items"] for record in expected
    ]


def test_standard_input_is_the_default_and_answers_do_not_depend_on_the_batch(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(json.dumps({"user": user}) + "\n" for user in range(10))
    answers = []
    for options in ((), ("--input", "-"), ("--batch-size", 1), ("--batch-size", 4)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        answers.append(shop.records(*options))
    assert [record["user"] for record in answers[0]] == [str(user) for user in range(10)]
    assert answers[1:] == answers[:1] * 3


def test_a_batch_is_answered_before_the_next_one_is_read(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    class Requests(io.BytesIO):
        """Ten requests; notes how many answers there are when each is read."""

        def readline(self, size: int | None = -1, /) -> bytes:
            written.append(shop.capsys.readouterr().out.count("\n"))
            return super().readline(size)

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(Requests(b'{"user": 5}\n' * 10)))
    assert shop("--batch-size", 4)[0] == 0
    assert written == [0, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0]  # answers since the read before


def test_progress_shows_on_a_terminal_and_users_per_second_at_the_end(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "users.jsonl", *({"user": user} for user in range(6)))
    asked = ("--input", source, "--output", tmp_path / "top.jsonl")
    summary = r"gflowgr: 6 users in \d+\.\d s \([\d,.]+ users/s\)"
    assert re.fullmatch(summary, shop(*asked)[2])
    assert shop(*asked, "--no-progress")[2] == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert re.search(r"\duser .*user/s", shop(*asked)[2])


# ---- options ----


def test_only_available_items_are_recommended(shop: Shop, tmp_path: Path) -> None:
    listed = tmp_path / "stock.txt"
    listed.write_text("5\n\n 17 \n30\n15\n")
    (record,) = shop.records("--history", "3,14,15", "--json", "--available", listed)
    assert sorted(record["items"]) == [5, 17, 30]


def test_search_options_are_those_of_the_engine(shop: Shop) -> None:
    options = ("--temperature", 2.5, "--normalize", "children", "--beams", 7, "--top", 7)
    (record,) = shop.records("--history", "3,14", "--json", "--with-scores", *options)
    recommender = GenerativeRecommender(
        GFlowModel.from_pretrained(shop.model), num_beams=7, temperature=2.5, normalize="children"
    )
    history = [np.array([3, 14])]
    items, scores = recommender.recommend(history, 7, history)
    assert record["items"] == items[0].tolist()
    np.testing.assert_allclose(record["scores"], scores[0], atol=1e-4)
    (plain,) = shop.records("--history", "3,14", "--json", "--with-scores", "--top", 7)
    assert plain["scores"] != record["scores"]


# ---- bad requests ----


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "not valid JSON, line 1 column 1"),
        ('{"history": [3, 900]}', "item 900 is not in 0..199"),
        ('{"history": [1.5]}', "1.5 is not an item number"),
        ('{"history": [1e999]}', "inf is not an item number"),
        ('{"history": ["x"]}', "'x' is not an item number"),
        ('{"history": [true]}', "True is not an item number"),
        ('{"history": 3}', "history must be a list of items; got 3"),
        ('{"user": [1]}', "user must be text or a whole number; got [1]"),
        ('{"user": "nobody"}', "user 'nobody' is not in"),
        ('{"items": [1]}', 'the query must be {"user": "17"} or {"history": [3, 14, 15]}'),
        ("[1, 2]", "the query must be"),
        ('{"history": ["1_0"]}', "'1_0' is not an item number"),
        ('{"history": ["\u0663"]}', "is not an item number"),
        ('{"history": [%s]}' % ("9" * 5000), "a number has too many digits"),
        ('{"history": [%s]}' % ("9" * 4000), "item an integer of 13,288 bits is not in 0..199"),
        ('{"user": "new \\ud800", "history": [3]}', "must be valid Unicode; got a lone surrogate"),
        ('{"user": "a", "user": "b"}', "the key 'user' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"user": "%s"}' % ("x" * (1 << 24)), "a line must have at most 16,777,216 bytes"),
    ],
)
def test_a_bad_line_is_named_and_those_before_it_are_answered(
    line: str, reason: str, shop: Shop, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "users.jsonl", {"user": 1}, {"user": 2}, line, {"user": 3})
    code, out, error = shop("--input", source)
    assert code == 2
    assert [json.loads(answer)["row"] for answer in out.splitlines()] == [1, 2]
    assert error.startswith(f"gflowgr: error: {source}: line 3: ")
    assert reason in error
    assert len(error.splitlines()) == 1


def test_bad_bytes_and_bad_rows_are_named(shop: Shop, tmp_path: Path) -> None:
    raw = tmp_path / "users.jsonl"
    raw.write_bytes(b'{"user": "\xff"}\n')
    assert f"{raw}: line 1: not UTF-8 text, byte 10" in shop("--input", raw)[2]
    rows = tmp_path / "users.parquet"
    parquet.write_table(pyarrow.table({"history": [[1], None, [2]]}), rows)
    code, out, error = shop("--input", rows)
    assert (code, len(out.splitlines())) == (2, 1)
    assert f"{rows}: row 2: the query must be" in error
    parquet.write_table(pyarrow.table({"id": [1]}), rows)
    assert "no column user or history; its columns: id" in shop("--input", rows)[2]
    invalid = pyarrow.array([b"\xed\xa0\x80"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"user": invalid}), rows)
    assert f"{rows}: not a readable Parquet file" in shop("--input", rows)[2]
    decimals = pyarrow.array([[Decimal("3.7")]], pyarrow.list_(pyarrow.decimal128(5, 1)))
    parquet.write_table(pyarrow.table({"history": decimals}), rows)
    assert "row 1: Decimal('3.7') is not an item number" in shop("--input", rows)[2]
    rows.write_bytes(b"PAR0")
    assert f"{rows}: not a readable Parquet file" in shop("--input", rows)[2]


@pytest.mark.parametrize("name", ["top.jsonl", "top.parquet"])
def test_an_output_file_is_whole_or_not_there(name: str, shop: Shop, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "users.jsonl", {"user": 1}, {"user": "nobody"})
    target = tmp_path / "out" / name
    assert shop("--input", source, "--output", target)[0] == 2
    assert list(target.parent.iterdir()) == []
    empty = write_lines(tmp_path / "none.jsonl", "")
    assert shop("--input", empty, "--output", target)[0] == 0
    assert target.is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--user", "nobody"), "user 'nobody' is not in"),
        (("--history", "3,200"), "--history 3,200: item 200 is not in 0..199"),
        (("--history", "3,-1"), "item -1 is not in 0..199"),
        (("--history", "a,b"), "'a' is not an item number"),
        (("--history", "1_0"), "'1_0' is not an item number"),
        (("--user", "3", "-k", "0"), "--top must be at least 1; got 0"),
        (("--user", "3", "--beams", "-2"), "--beams must be at least 1; got -2"),
        (("--user", "3", "--batch-size", "0"), "--batch-size must be at least 1; got 0"),
        (("--user", "3", "--temperature", "0"), "--temperature must be above 0 and finite; got 0"),
        (("--user", "3", "--input", "x.jsonl"), "either --input, or users by --user and --history"),
        (("--user", "3", "--output", "top.csv"), "--output top.csv: the name must end in .jsonl"),
        (("--input", "missing.jsonl"), "missing.jsonl"),
        (("--input", "missing.parquet"), "missing.parquet"),
        (("--user", "3", "--available", "missing.txt"), "missing.txt"),
    ],
)
def test_bad_options_are_refused(options: tuple[str, ...], message: str, shop: Shop) -> None:
    code, out, error = shop(*options)
    assert (code, out) == (2, "")
    assert error.startswith("gflowgr: error: ")
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5\nx\n", "line 2: 'x' is not an item number"),
        ("5\n200\n", "line 2: item 200 is not in 0..199"),
        ("5\n1_0\n", "line 2: '1_0' is not an item number"),
        ("\n", "no item in it"),
    ],
)
def test_a_bad_list_of_available_items_is_named(
    text: str, message: str, shop: Shop, tmp_path: Path
) -> None:
    listed = tmp_path / "stock.txt"
    listed.write_text(text)
    code, _, error = shop("--user", 3, "--available", listed)
    assert code == 2
    assert f"{listed}: {message}" in error


@pytest.mark.parametrize("option", ["--input", "--available"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_pipe_or_a_folder_is_refused_and_not_waited_for(
    option: str, ending: str, shop: Shop, tmp_path: Path
) -> None:
    pipe = tmp_path / f"pipe.{ending}"
    os.mkfifo(pipe)
    folder = tmp_path / f"folder.{ending}"
    folder.mkdir()
    for path, kind in ((pipe, "pipe"), (folder, "folder")):
        asked = () if option == "--input" else ("--user", 3)
        code, out, error = shop(*asked, option, path)
        assert (code, out) == (2, "")
        assert error == f"gflowgr: error: {path} must be a regular file; got a {kind}"


def test_a_full_disk_leaves_no_answers(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for name in ("top.jsonl", "top.parquet"):
        code, _, error = shop("--user", 3, "--output", tmp_path / name)
        assert code == 2
        assert error.startswith("gflowgr: error: ")
        assert "no space left on the device" in error
        assert name in error
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_are_no_text_are_refused(shop: Shop) -> None:
    code, out, error = shop("--user", "caf\udce9")
    assert (code, out) == (2, "")
    assert "arguments must be UTF-8 text; got 'caf\\udce9'" in error


# ---- ids of the data's source ----


@pytest.fixture(scope="module")
def named(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model and data, whose items have ids such as ``"B017, x"``."""
    folder = tmp_path_factory.mktemp("named")
    data = load_dataset(finished_run / "data")
    ids = ItemIds(f"B{item:03}{', x' * (item % 2)}" for item in range(data.num_items))
    save_dataset(replace(data, item_ids=ids), folder / "data")
    model = GFlowModel.from_pretrained(finished_run / "gflowgr" / "model")
    model.item_ids = ids
    model.with_settings().save_pretrained(folder / "model")
    return folder / "model", folder / "data"


def test_ids_go_in_and_come_out(
    shop: Shop, named: tuple[Path, Path], capsys: Capture, tmp_path: Path
) -> None:
    """As arguments, JSON lines, a table for people, Parquet, and what is in stock."""
    ours = Shop(*named, capsys)
    ids = load_dataset(named[1]).item_ids
    assert ids is not None
    numbers = shop.records("--history", "4,16,2", "--json")[0]["items"]
    (found,) = ours.records("--history", "B004, B016,B002", "--json")
    assert found["items"] == [ids[item] for item in numbers]
    code, table, _ = ours("--history", 'B004,"B003, x"', "-k", 1)
    assert code == 0
    assert "history B004,B003, x" in table
    assert re.search(r"1\.  +B\d{3}(, x)?  ", table)
    stock, source, target = tmp_path / "stock", tmp_path / "in.jsonl", tmp_path / "out.parquet"
    stock.write_text("B017, x\nB005, x\n")
    write_lines(source, {"history": ["B004", "B003, x"]}, {"user": "17"})
    assert ours("--input", source, "--output", target, "--available", stock)[0] == 0
    rows = parquet.read_table(target)
    assert str(rows.schema.field("items").type) == "list<element: string>"
    assert sorted(rows.to_pylist()[0]["items"]) == ["B005, x", "B017, x"]


def test_an_id_that_no_item_has_is_named(named: tuple[Path, Path], capsys: Capture) -> None:
    for asked in ("4", "b004", '"B004'):
        code, _, error = Shop(*named, capsys)("--history", asked)
        assert code == 2
        assert f"--history {asked}: " in error
    assert "must be ids with commas between them" in error
    assert (
        "is no item of the data; ids are such as 'B000'" in Shop(*named, capsys)("--history", 4)[2]
    )


def test_a_model_answers_in_its_ids_and_refuses_data_of_others(
    shop: Shop, named: tuple[Path, Path], capsys: Capture, tmp_path: Path
) -> None:
    model, folder = named
    assert Shop(model, shop.data, capsys).records("--history", "B004", "--json")
    assert Shop(shop.model, folder, capsys).records("--history", "B004", "--json")
    data = load_dataset(folder)
    assert data.item_ids is not None
    other = ItemIds([*list(data.item_ids)[:-1], "another"])
    save_dataset(replace(data, item_ids=other), tmp_path / "other")
    code, _, error = Shop(model, tmp_path / "other", capsys)("--user", 1)
    assert code == 2
    assert "item 199 is 'B199, x' there and 'another' here" in error


def test_the_collaborative_model_answers_in_the_same_files(
    finished_run: Path, named: tuple[Path, Path], capsys: Capture, tmp_path: Path
) -> None:
    stock = tmp_path / "stock"
    stock.write_text("B017, x\nB006\nB004\n")
    sasrec = Shop(finished_run / "sasrec", named[1], capsys)
    asked = ("--history", "B004,B002", "--available", stock)
    (found,) = sasrec.records(*asked, "--json", "--with-scores")
    assert sorted(found["items"]) == ["B006", "B017, x"]
    scores = SASRec.load(finished_run / "sasrec").score(torch.tensor([[4, 2]]))[0]
    numbers = {"B006": 6, "B017, x": 17}
    expected = [scores[numbers[each]].item() for each in found["items"]]
    assert expected == sorted(expected, reverse=True)
    np.testing.assert_allclose(found["scores"], expected, atol=1e-5)
    code, table, _ = sasrec(*asked)
    assert code == 0
    assert f"(score {expected[0]:.2f})" in table
    code, _, error = sasrec(*asked, "--temperature", 2)
    assert code == 2
    assert "must be left out for a collaborative model" in error
