"""Answers into a folder: every request once, whole files, and a restart that repeats nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from support.command_line import Capture, call, without_bars
from support.served_shop import write_folders

from gflowgr.files import read_json
from gflowgr.serving import shards
from gflowgr.serving.queries import QueryReader
from gflowgr.serving.shards import Shard, plan_shards


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_folders(tmp_path_factory.mktemp("shop"))


def write_requests(path: Path, users: Sequence[int], row_group_size: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"user": [str(user) for user in users]})
    parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All answers, read as any reader of Parquet folders does."""
    rows: list[dict[str, Any]] = parquet.read_table(folder).to_pylist()
    return rows


class Command:
    """``gflowgr recommend --input ... --output FOLDER/`` on the tiny shop."""

    def __init__(self, folders: dict[str, str], capsys: Capture) -> None:
        self.folders, self.capsys = folders, capsys

    def __call__(self, *options: Any, model: str = "model0") -> tuple[int, str]:
        place = (self.folders[model], "--data", self.folders["data"])
        code, out, error = call(self.capsys, "recommend", *place, *options)
        assert out == ""
        return code, without_bars(error)


@pytest.fixture
def recommend(folders: dict[str, str], capsys: Capture) -> Command:
    return Command(folders, capsys)


def test_a_folder_has_the_answers_of_a_file(recommend: Command, tmp_path: Path) -> None:
    source = write_requests(tmp_path / "users.parquet", [*range(11)])
    asked = ("--input", source, "--with-scores", "--top", 5)
    assert recommend(*asked, "--output", tmp_path / "all.parquet")[0] == 0
    folder = tmp_path / "answers"
    code, said = recommend(*asked, "--output", f"{folder}/", "--shard-rows", 4)
    assert code == 0
    assert said.startswith("gflowgr: 11 users in ")
    assert sorted(path.name for path in folder.glob("[!.]*")) == [
        "_SUCCESS",
        "_request.json",
        *(f"users-{number:05}.parquet" for number in range(3)),
    ]
    expected = parquet.read_table(tmp_path / "all.parquet").to_pylist()
    for found, wanted in zip(rows_of(folder), expected, strict=True):
        # Batches differ in their sizes, and sums in their order.
        assert found.pop("scores") == pytest.approx(wanted.pop("scores"), rel=1e-5)
        assert found == wanted
    assert read_json(folder / "_SUCCESS") == {"users": 11, "shards": 3}


def test_a_restart_does_only_what_is_missing(
    recommend: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_requests(tmp_path / "users.parquet", [*range(10)])
    folder = tmp_path / "answers"
    asked = ("--input", source, "--output", f"{folder}/", "--shard-rows", 4)
    assert recommend(*asked)[0] == 0
    expected = rows_of(folder)
    (folder / "users-00001.parquet").unlink()
    (folder / "_SUCCESS").unlink()
    (folder / ".users-00001.0123456789ab.tmp.parquet").write_bytes(b"half")  # of a killed process
    kept = folder / "users-00000.parquet"
    before = kept.stat().st_mtime_ns
    code, said = recommend(*asked)
    assert code == 0
    assert said.startswith("gflowgr: 4 users in ")
    assert said.endswith("; 2 of 3 files were there")
    assert kept.stat().st_mtime_ns == before
    assert not list(folder.glob(".*.parquet"))
    assert rows_of(folder) == expected
    monkeypatch.setattr(shards, "ShardAnswerer", None)  # with nothing to do no model is loaded
    assert recommend(*asked)[0] == 0


def test_another_request_in_the_same_folder_is_refused(recommend: Command, tmp_path: Path) -> None:
    users = write_requests(tmp_path / "users.parquet", [*range(5)])
    asked = ("--input", users, "--output", f"{tmp_path / 'answers'}/")
    assert recommend(*asked)[0] == 0
    assert recommend(*asked, "--batch-size", 2)[0] == 0, "which changes no answer"
    for options, model, changed in (
        (("--top", 3), "model0", "options"),
        ((), "model1", "model"),
        (("--shard-rows", 2), "model0", "shard_rows"),
    ):
        code, said = recommend(*asked, *options, model=model)
        assert code == 2
        assert f"got some with another {changed}" in said
    write_requests(users, [4, 3, 2, 1, 0])
    code, said = recommend(*asked)
    assert code == 2
    assert "must be empty, or have answers to the same request; got some with another input" in said


def test_a_folder_of_requests_has_files_of_answers_for_each(
    recommend: Command, tmp_path: Path
) -> None:
    for name, users in (("b", range(3)), ("a", range(3, 8))):
        write_requests(tmp_path / "users" / f"{name}.parquet", list(users))
    folder = tmp_path / "answers"
    asked = ("--input", tmp_path / "users", "--output", f"{folder}/", "--shard-rows", 3)
    assert recommend(*asked)[0] == 0
    found = {path.name: parquet.read_table(path).to_pylist() for path in folder.glob("*.parquet")}
    named = {
        name: [(row["row"], row["user"]) for row in rows] for name, rows in sorted(found.items())
    }
    assert named == {
        "a-00000.parquet": [(1, "3"), (2, "4"), (3, "5")],
        "a-00001.parquet": [(4, "6"), (5, "7")],
        "b-00000.parquet": [(1, "0"), (2, "1"), (3, "2")],
    }


@pytest.mark.parametrize("row_group_size", [1, 3, 100])
def test_rows_of_a_file_are_those_asked_for(
    row_group_size: int, folders: dict[str, str], tmp_path: Path
) -> None:
    from gflowgr.data import load_dataset

    source = write_requests(tmp_path / "users.parquet", [*range(10)], row_group_size)
    reader = QueryReader(load_dataset(folders["data"]))
    for first in range(10):
        for rows in range(1, 11 - first):
            found = [(each.row, each.user) for each in reader.from_rows(str(source), first, rows)]
            assert found == [(row + 1, str(row)) for row in range(first, first + rows)]


def test_a_bad_row_is_named_and_finished_files_stay(recommend: Command, tmp_path: Path) -> None:
    source = tmp_path / "users.parquet"
    parquet.write_table(pyarrow.table({"user": ["1", "2", "3", "nobody"]}), source)
    folder = tmp_path / "answers"
    asked = ("--input", source, "--output", f"{folder}/", "--shard-rows", 2)
    code, said = recommend(*asked)
    assert code == 2
    assert f"{source}: row 4: user 'nobody' is not in" in said
    assert [path.name for path in folder.glob("[!_.]*")] == ["users-00000.parquet"]
    assert not (folder / "_SUCCESS").exists()


def test_shards_cover_every_row_once(tmp_path: Path) -> None:
    source = str(write_requests(tmp_path / "u.parquet", [*range(10)]))
    assert plan_shards(source, 4) == [
        Shard(source, 0, 4, "u-00000.parquet"),
        Shard(source, 4, 4, "u-00001.parquet"),
        Shard(source, 8, 2, "u-00002.parquet"),
    ]
    empty = str(write_requests(tmp_path / "none.parquet", []))
    assert plan_shards(empty, 4) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--user", "3", "--output", "x/"), "an --output folder takes its requests from --input"),
        (("--input", "u.jsonl", "--output", "x/"), "--input must be a .parquet file or a folder"),
        (("--input", "u.parquet", "--output", "x/"), "u.parquet"),
        (
            ("--input", "u.parquet", "--output", "x/", "--shard-rows", "0"),
            "--shard-rows must be at least 1; got 0",
        ),
        (
            ("--input", "u.parquet", "--output", "x.parquet", "--ray", "auto"),
            "--output must be a folder, with a / at its end, for --ray; got 'x.parquet'",
        ),
        (
            ("--input", "u.parquet", "--output", "x/", "--ray", "auto", "--threads", "0"),
            "--threads must be at least 1; got 0",
        ),
        (
            ("--input", "u.parquet", "--output", "x/", "--ray", "auto", "--gpus", "-1"),
            "--gpus must be >= 0 and finite; got -1",
        ),
    ],
)
def test_wrong_usage(
    options: tuple[str, ...],
    message: str,
    recommend: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = recommend(*options)
    assert code == 2
    assert message in said
    assert list(tmp_path.iterdir()) == []
